"""SOAP of pytorch-optimizer on the side of the columns: an optimizer of the study in docs/learning.md."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from pytorch_optimizer import SOAP
from torch import nn

from paca_lightning import PaCAConfig, PaCAStrategy, attach, paca_layers
from tests.callbacks.test_paca import Module, in_step, loader
from tests.conversion.test_optimizers import BATCHES, Converted, Reference, loss_of, one_gradient

SETTINGS: dict[str, Any] = {
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "shampoo_beta": 0.95,
    "precondition_frequency": 2,
    "max_precondition_dim": 4,  # r; the layers have 8 and 32 outputs
}


def soap(parameters: list[nn.Parameter], lr: float = 0.05) -> SOAP:
    return SOAP(parameters, lr=lr, **SETTINGS)


def test_soap_trains_what_it_trains_in_the_reference() -> None:
    reference, converted = Reference(), Converted()
    for model in (reference, converted):
        optimizer = soap(list(model.deltas.values()))
        if model is converted:
            attach(optimizer, converted.net)
        one_gradient(model, optimizer)
    assert in_step(converted.net)
    for path, delta in converted.deltas.items():
        assert delta.abs().max() > 1e-3
        # Double precision: the gradients come from GEMMs of other shapes.
        torch.testing.assert_close(delta, reference.deltas[path], rtol=1e-6, atol=1e-9)


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
            callbacks=[PaCAStrategy(PaCAConfig(r=4, alpha=8))],
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
