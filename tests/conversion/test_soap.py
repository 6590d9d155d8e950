"""SOAP of pytorch-optimizer on the side of the columns: an optimizer of the study in docs/learning.md."""

from pathlib import Path

import lightning as L
import torch

from paca_lightning import PaCAStrategy, paca_layers
from tests.callbacks.test_paca import Module, loader
from tests.conversion.test_optimizers import BATCHES, CONFIG, Converted, loss_of, soap


def test_it_is_adam_in_the_eigenbasis_of_the_columns_gradients() -> None:
    """The second step in plain algebra: the first one only begins the basis."""
    model = Converted()
    deltas = model.deltas
    optimizer = soap(list(deltas.values()))
    gradients: list[dict[str, torch.Tensor]] = []
    for batch in BATCHES[:2]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        gradients.append({path: delta.grad.clone() for path, delta in deltas.items()})
        optimizer.step()
    for path, delta in deltas.items():
        first, second = (gradient[path] for gradient in gradients)
        basis = torch.linalg.eigh(first.T @ first).eigenvectors  # (r, r); rows have none
        turned = second @ basis
        step = 0.05 * turned / (turned.abs() + 1e-8 / 0.001**0.5) @ basis.T  # both moments hold one gradient
        torch.testing.assert_close(delta.detach(), -step, rtol=1e-6, atol=1e-9)


class WithSOAP(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return soap([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: Path | None = None) -> WithSOAP:
        module = WithSOAP()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[PaCAStrategy(CONFIG)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(3)
    fit(1)
    resumed = fit(3, tmp_path / "1.ckpt")
    for (_, expected), (_, layer) in zip(paca_layers(whole), paca_layers(resumed), strict=True):
        assert expected.paca_delta.abs().max() > 1e-3
        assert torch.equal(layer.paca_delta, expected.paca_delta)
