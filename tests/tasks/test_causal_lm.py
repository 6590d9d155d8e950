"""Training, evaluation and settings of CausalLMModule."""

import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.batch import model_inputs
from paca_lightning.tasks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule
from tests.tasks.runs import VOCABULARY, Metrics, adamw, batches, trainer


class FreezeAllButHead(Callback):
    def on_fit_start(self, trainer, pl_module):
        assert pl_module.model is not None

    def setup(self, trainer, pl_module, stage):
        configure = pl_module.configure_model

        def configure_and_freeze():
            configure()
            pl_module.model.requires_grad_(False)
            pl_module.model.lm_head.requires_grad_(True)

        pl_module.configure_model = configure_and_freeze


def learned(tmp_path, module, **settings):
    """Train on one batch again and again, and return the first and last loss."""
    metrics = Metrics()
    loader = DataLoader(list(batches(1)) * 15, batch_size=None)
    trainer(tmp_path, callbacks=[metrics, *settings.pop("callbacks", [])], **settings).fit(module, loader)
    losses = [row["train/loss"] for row in metrics.rows[1:]]
    return losses[0], losses[-1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_training_learns_in_every_precision(directory, tmp_path, precision):
    seed_everything(0)
    first, last = learned(tmp_path, CausalLMModule(directory, optimizer=adamw(3e-3)), precision=precision)
    assert last < 0.7 * first


def test_gradients_are_those_of_the_model_alone(directory):
    module = CausalLMModule(directory, loss_chunk_size=5)
    module.configure_model()
    reference = AutoModelForCausalLM.from_pretrained(directory)
    batch = next(iter(batches()))

    loss = module.training_step(batch, 0)
    loss.backward()
    expected = reference(**batch).loss
    expected.backward()

    torch.testing.assert_close(loss, expected)
    for (name, ours), theirs in zip(module.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("frozen_below", [True, False])
def test_activation_checkpointing_changes_no_gradient_and_saves_memory(directory, frozen_below):
    def run(**settings):
        saved = []
        module = CausalLMModule(directory, **settings)
        module.configure_model()
        module.model.requires_grad_(not frozen_below)
        for layer in module.model.model.layers:
            layer.mlp.down_proj.requires_grad_(True)

        def pack(tensor):
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.training_step(next(iter(batches())), 0)
        loss.backward()
        return sum(saved), [parameter.grad for parameter in module.parameters() if parameter.requires_grad]

    plain_saved, plain_grads = run()
    saved, grads = run(activation_checkpointing=True)
    assert saved < 0.5 * plain_saved
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)


def test_logs_loss_perplexity_and_gradient_norm_at_logging_steps_only(directory, tmp_path):
    metrics = Metrics()
    run = trainer(tmp_path, callbacks=[metrics, LearningRateMonitor()], log_every_n_steps=2)
    module = CausalLMModule(directory, optimizer=adamw(0.0))
    run.fit(module, batches(6), batches(2))

    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/perplexity", "train/grad_norm", "val/loss", "val/perplexity", "lr-AdamW"} <= set(
        rows[0].split(",")
    )
    assert "train/loss" not in metrics.rows[0]

    # Nothing was learned, so the last logged loss is that of the last two batches, token by token.
    with torch.no_grad():
        sums = [module.loss(module.model, model_inputs(batch), batch["labels"]) for batch in list(batches(6))[4:]]
    mean = sum(total for total, _ in sums) / sum(tokens for _, tokens in sums)
    assert run.callback_metrics["train/loss"] == pytest.approx(float(mean), rel=1e-6)
    assert run.callback_metrics["train/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_gradient_norm_is_that_of_the_whole_gradient(directory, tmp_path):
    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.expected = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).norm()

    norm = Norm()
    run = trainer(tmp_path, callbacks=[norm, FreezeAllButHead()], accumulate_grad_batches=2, gradient_clip_val=1e-3)
    run.fit(CausalLMModule(directory), batches(4))
    torch.testing.assert_close(run.callback_metrics["train/grad_norm"], norm.expected)


def test_validation_loss_weighs_every_token_alike(directory, tmp_path):
    module = CausalLMModule(directory)
    run = trainer(tmp_path)
    (result,) = run.validate(module, batches(5), verbose=False)

    reference, total, tokens = AutoModelForCausalLM.from_pretrained(directory), 0.0, 0
    for batch in batches(5):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + reference(**batch).loss.item() * count, tokens + count
    assert result["val/loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["val/perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    (tested,) = run.test(module, batches(5), verbose=False)
    assert tested["test/loss"] == result["val/loss"]


@pytest.mark.slow
def test_bf16_true_logs_the_mean_over_hundreds_of_batches(directory, tmp_path):
    """A sum of 500 losses does not fit into bf16: it would stop growing, and the mean would keep falling."""
    run = trainer(tmp_path, precision="bf16-true", log_every_n_steps=500)
    module = CausalLMModule(directory, optimizer=adamw(0.0))
    loader = DataLoader(list(batches(5)) * 100, batch_size=None)
    run.fit(module, loader, loader)

    with torch.no_grad():
        sums = [module.loss(module.model, model_inputs(batch), batch["labels"]) for batch in batches(5)]
    mean = sum(float(total) for total, _ in sums) / sum(int(tokens) for _, tokens in sums)
    assert run.callback_metrics["train/loss"] == pytest.approx(mean, rel=1e-3)
    assert run.callback_metrics["val/loss"] == pytest.approx(mean, rel=1e-3)


def test_the_schedule_is_planned_over_the_whole_run(directory, tmp_path):
    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, *args):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    module = CausalLMModule(
        directory, optimizer=adamw(1.0), lr_scheduler=lambda optimizer: LinearSchedule(optimizer, warmup_ratio=0.5)
    )
    trainer(tmp_path, callbacks=[rates], max_epochs=2, accumulate_grad_batches=3).fit(module, batches(6))
    # 4 optimizer steps of 3 batches each, the first 2 of them warm-up
    assert rates.seen[::3] == [1 / 3, 2 / 3, 1, 0.5]


def test_a_run_that_diverges_says_so(directory, tmp_path):
    module = CausalLMModule(directory, optimizer=adamw(float("inf")))
    with pytest.warns(UserWarning, match=r"train/loss is nan at step \d: it diverges"):
        trainer(tmp_path).fit(module, batches(3))


def test_a_schedule_needs_a_run_with_an_end(directory, tmp_path):
    module = CausalLMModule(directory, lr_scheduler=CosineSchedule)
    with pytest.raises(PaCAError, match="max_steps or max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(module, batches(2))


def test_a_constant_rate_needs_no_run_with_an_end(directory, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module = CausalLMModule(
        directory, optimizer=adamw(1.0), lr_scheduler=lambda optimizer: ConstantSchedule(optimizer, warmup_steps=4)
    )
    run = trainer(tmp_path, max_epochs=-1, callbacks=[Stop()])
    run.fit(module, batches(2))
    assert run.optimizers[0].param_groups[0]["lr"] == 3 / 5


def test_reduce_on_plateau_steps_after_each_epoch(directory, tmp_path):
    seen = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(float(metrics))
            super().step(metrics)

    run = trainer(tmp_path, max_epochs=2, val_check_interval=2)
    run.fit(CausalLMModule(directory, lr_scheduler=Plateau), batches(4), batches(2))
    assert len(seen) == 2
    assert seen[-1] == run.callback_metrics["val/loss"]


def test_nothing_to_train_is_an_error(directory, tmp_path):
    class Freeze(FreezeAllButHead):
        def setup(self, trainer, pl_module, stage):
            pl_module.configure_model()
            pl_module.model.requires_grad_(False)

    with pytest.raises(PaCAError, match="nothing to train"):
        trainer(tmp_path, callbacks=[Freeze()]).fit(CausalLMModule(directory), batches(2))


def test_training_mode_and_cache_are_set_for_training(directory):
    module = CausalLMModule(directory)
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model
    assert all(part.training for part in model.modules())
    assert model.config.use_cache


def test_bf16_true_leaves_rotary_frequencies_alone(directory, tmp_path):
    module = CausalLMModule(directory)
    trainer(tmp_path, precision="bf16-true", limit_val_batches=1).validate(module, batches(1), verbose=False)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    ours, theirs = module.model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(module(next(iter(batches()))), expected(**next(iter(batches()))).logits)


def test_logits_of_packed_documents_are_those_of_each_alone(directory):
    module = CausalLMModule(directory)
    module.configure_model()
    first, second = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0)).split([10, 14], 1)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        packed = module({"input_ids": torch.cat([first, second], 1), "position_ids": positions})
        alone = [module({"input_ids": document}) for document in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_checkpoints_hold_primitive_settings_and_load_without_pickle(directory, tmp_path):
    run = trainer(tmp_path)
    module = CausalLMModule(directory, loss_chunk_size=7, lr_scheduler=LinearSchedule)
    run.fit(module, batches(1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["loss_chunk_size"] == 7
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere/at/all"}, "directory '/nowhere/at/all' does not exist"),
        ({"model": "./nowhere"}, "does not exist"),
        ({"dtype": "bf8"}, "dtype='bf8' is unknown"),
        ({"attn_implementation": "magic"}, "could not be loaded"),
        ({"loss_chunk_size": 0}, "loss_chunk_size"),
        ({"activation_checkpointing": "Selective"}, "activation_checkpointing='Selective' is unknown"),
    ],
)
def test_wrong_settings_are_named(directory, settings, message):
    with pytest.raises(PaCAError, match=message):
        CausalLMModule(**({"model": directory} | settings)).configure_model()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss(directory):
    batch = next(iter(batches()))
    plain, compiled = CausalLMModule(directory), CausalLMModule(directory, compile=True)
    for module in (plain, compiled):
        module.configure_model()
    torch.testing.assert_close(compiled.training_step(batch, 0), plain.training_step(batch, 0))
