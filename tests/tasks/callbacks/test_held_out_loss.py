import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.callbacks import held_out_loss
from paca_lightning.tasks.callbacks.held_out_loss import HeldOutLoss
from paca_lightning.tasks.causal_lm import CausalLMModule
from tests.tasks.runs import adamw, batches, trainer


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(held_out_loss, "rank_zero_info", lines.append)
    return lines


def test_the_fall_is_measured_on_the_whole_set_and_printed(directory, tmp_path, said):
    (untrained,) = trainer(tmp_path / "before").validate(CausalLMModule(directory), batches(5), verbose=False)
    module, callback = CausalLMModule(directory, optimizer=adamw(3e-3)), HeldOutLoss()
    run = trainer(tmp_path / "run", callbacks=[callback], max_epochs=3)
    run.fit(module, batches(5), batches(5))
    (trained,) = trainer(tmp_path / "after").validate(module, batches(5), verbose=False)

    assert callback.before == untrained["val/loss"]
    assert callback.after == trained["val/loss"] < callback.before
    fall = 100 * (1 - callback.after / callback.before)
    assert said == [
        f"Held-out loss before training: {callback.before:.4f}",
        f"Held-out loss: {callback.before:.4f} before training, {callback.after:.4f} after 15 steps, down {fall:.1f}%",
    ]
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert str(callback.before) in rows.splitlines()[1]


def test_a_rise_is_called_a_rise(directory, tmp_path, said):
    module = CausalLMModule(directory, optimizer=adamw(1.0))
    trainer(tmp_path, callbacks=[HeldOutLoss()]).fit(module, batches(5), batches(5))
    assert ", up " in said[-1]


def test_a_resumed_run_says_that_there_is_nothing_before_it(directory, tmp_path, said):
    first = trainer(tmp_path)
    first.fit(CausalLMModule(directory), batches(2), batches(2))
    first.save_checkpoint(tmp_path / "first.ckpt")
    run = trainer(tmp_path / "second", callbacks=[HeldOutLoss()], max_epochs=2)
    run.fit(CausalLMModule(directory), batches(2), batches(2), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert len(said) == 1
    assert said[0].startswith("Held-out loss after 4 steps: ")


def test_a_run_without_validation_is_refused(directory, tmp_path):
    with pytest.raises(PaCAError, match="HeldOutLoss needs validation"):
        trainer(tmp_path, callbacks=[HeldOutLoss()], limit_val_batches=0).fit(
            CausalLMModule(directory), batches(1), batches(1)
        )


def test_a_model_that_is_broken_from_the_start_is_refused(directory, tmp_path):
    class Broken(CausalLMModule):
        def configure_model(self):
            super().configure_model()
            self.model.model.norm.weight.data[3] = float("nan")

    with pytest.raises(PaCAError, match="val/loss is nan before training"):
        trainer(tmp_path, callbacks=[HeldOutLoss()]).fit(Broken(directory), batches(1), batches(1))


def test_a_metric_that_is_not_logged_is_named(directory, tmp_path):
    with pytest.raises(PaCAError, match=r"'loss'.*'val/loss'"):
        trainer(tmp_path, callbacks=[HeldOutLoss("loss")]).fit(CausalLMModule(directory), batches(1), batches(1))
