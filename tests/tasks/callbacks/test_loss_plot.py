import matplotlib.image
import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.callbacks import loss_plot
from paca_lightning.tasks.callbacks.held_out_loss import HeldOutLoss
from paca_lightning.tasks.callbacks.loss_plot import LossPlot
from paca_lightning.tasks.causal_lm import CausalLMModule
from tests.tasks.runs import batches, trainer


def test_the_losses_of_a_run_are_drawn(directory, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(loss_plot, "rank_zero_info", said.append)
    run = trainer(tmp_path, callbacks=[LossPlot(), HeldOutLoss()], max_epochs=2)
    run.fit(CausalLMModule(directory), batches(3), batches(2))

    curves = loss_plot.read_curves(tmp_path / "metrics.csv", ["train/loss", "val/loss"])
    assert curves["train/loss"][0] == [0, 1, 2, 3, 4, 5]
    assert curves["val/loss"][0] == [0, 2, 5]  # before the first step, and at the end of each epoch

    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (600, 1050, 4)
    assert said == [f"Metrics: {tmp_path / 'metrics.csv'}\nLoss plot: {tmp_path / 'loss.png'}"]
    assert not list(tmp_path.glob(".loss.png*"))


def test_a_run_too_short_to_log_says_so(directory, tmp_path):
    run = trainer(tmp_path, callbacks=[LossPlot()], log_every_n_steps=100)
    with pytest.warns(UserWarning, match="nothing to draw"):
        run.fit(CausalLMModule(directory), batches(1))
    assert not (tmp_path / "loss.png").exists()


def test_a_trainer_without_a_csv_logger_is_refused_before_training(directory, tmp_path):
    with pytest.raises(PaCAError, match="CSVLogger"):
        trainer(tmp_path, callbacks=[LossPlot()], logger=False).fit(CausalLMModule(directory), batches(1))
