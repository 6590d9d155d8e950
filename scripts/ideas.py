"""Ideas that could help PaCA, as callbacks that stand behind PaCAStrategy in a run of the study.

They are for research: nothing of the package knows them, and adapters do not hold what they change.
"""

from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning import paca_layers, write_columns
from paca_lightning.layers.columns import random_indices


class _OncePerBatch(Callback):
    """A callback that takes every batch as an optimizer step."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse accumulation.

        Raises:
            ValueError: If gradients are accumulated.
        """
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(f"{type(self).__name__} needs accumulate_grad_batches=1.")


class RedrawColumns(_OncePerBatch):
    """Trains other random columns every so many steps. The former ones keep what they learned, in the weight.

    Args:
        every: Optimizer steps between two draws.
        seed: Of the draws.
    """

    def __init__(self, every: int, seed: int = 0) -> None:
        self.every, self.seed = every, seed

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Draw, unless training ends here."""
        step = trainer.global_step
        if step % self.every == 0 and step < trainer.estimated_stepping_batches:
            for optimizer in trainer.optimizers:
                redraw(pl_module, optimizer, seed=self.seed, draw=step // self.every)


@torch.no_grad()
def redraw(model: nn.Module, optimizer: Optimizer, *, seed: int, draw: int) -> None:
    """Move each layer to other random columns: the weight stays as it is, and the optimizer begins anew.

    Args:
        model: A converted model.
        optimizer: Its states of the deltas are forgotten.
        seed: Of all draws.
        draw: Number of this one.
    """
    for path, layer in paca_layers(model):
        indices = random_indices(layer.in_features, layer.r, seed=seed, path=f"{path}, draw {draw}")
        layer.paca_indices.copy_(indices)
        layer.paca_delta.zero_()
        layer.begin_from_weight()
        optimizer.state.pop(layer.paca_delta, None)


class ColumnBasis(_OncePerBatch):
    """Trains each delta in another basis of its columns: ``W[:, indices] = C + D P`` with P of shape (r, r).

    The parameter stays the delta ``D P``. Its gradient G becomes ``G P^T`` before the optimizer's step, which is the
    gradient of D, and the step behind it is multiplied by P. Without weight decay this is training D itself.
    """

    def __init__(self) -> None:
        self.bases: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def refresh(self, path: str, gradient: Tensor, state: dict[str, Any]) -> None:
        """Change the basis of a layer, if this step does.

        Args:
            path: Of the layer.
            gradient: Of the delta, shape (out_features, r).
            state: The optimizer's, of the delta.
        """

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Express the gradients in the basis; they are clipped after that."""
        for path, layer in paca_layers(pl_module):
            delta = layer.paca_delta
            if delta.grad is not None:
                self.refresh(path, delta.grad, optimizer.state[delta])
                self._before[path] = delta.detach().clone()
                delta.grad = delta.grad @ self.bases[path].T

    @override
    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Express the steps in the columns again, and write them."""
        for path, layer in paca_layers(pl_module):
            if path in self._before:
                before = self._before.pop(path)
                layer.paca_delta.copy_(before + (layer.paca_delta - before) @ self.bases[path])
        write_columns(pl_module)


class WhitenedColumns(ColumnBasis):
    """Whitens the inputs of the trained columns by their second moments, which calibration batches tell.

    Args:
        batches: Of training data, from a loader of its own.
        limit: Largest factor of a direction, and of its inverse.
    """

    def __init__(self, batches: int = 8, limit: float = 8.0) -> None:
        super().__init__()
        self.batches, self.limit = batches, limit

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate."""
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        with isolate_rng(), torch.no_grad():
            moments = input_moments(pl_module, islice(iter(loader), self.batches))
        self.bases = {path: whitening(moment, self.limit) for path, moment in moments.items()}


def input_moments(module: LightningModule, batches: Any) -> dict[str, Tensor]:
    """Sums of ``X^T X`` over the inputs X of each layer's trained columns, shape (r, r), fp32, by layer path."""
    moments: dict[str, Tensor] = {}

    def watch(path: str, layer: Any) -> Any:
        def on_forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            selected = inputs[0].detach().flatten(0, -2).index_select(-1, layer.paca_indices).float()
            moments[path] = moments.get(path, torch.zeros(())) + selected.T @ selected

        return layer.register_forward_pre_hook(on_forward)

    handles = [watch(path, layer) for path, layer in paca_layers(module)]
    try:
        for batch in batches:
            module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def whitening(moment: Tensor, limit: float) -> Tensor:
    """The symmetric P for which ``X P`` has equal second moments in all directions, at the mean size of X's columns.

    Args:
        moment: ``X^T X``, shape (r, r).
        limit: P's eigenvalues lie between ``1 / limit`` and ``limit``.
    """
    values, vectors = torch.linalg.eigh(moment)
    tiny = torch.finfo(moment.dtype).tiny
    factors = (values.mean().clamp_min(tiny) / values.clamp_min(tiny)).sqrt().clamp(1 / limit, limit)
    return vectors * factors @ vectors.T


class EigenbasisAdam(ColumnBasis):
    """Adam in the eigenbasis of the running ``G^T G``: SOAP (arXiv 2409.11321) on the side of the columns alone.

    Args:
        every: Steps after which the basis follows the running moment.
        decay: Of the running moment.
    """

    def __init__(self, every: int = 5, decay: float = 0.95) -> None:
        super().__init__()
        self.every, self.decay = every, decay
        self._moments: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    @override
    def refresh(self, path: str, gradient: Tensor, state: dict[str, Any]) -> None:
        """Follow the running moment. Adam's first moment is turned along; its second one stays, as in SOAP."""
        moment, step = gradient.T @ gradient, self._steps.get(path, 0)
        known = self._moments.get(path)
        self._moments[path] = moment if known is None else torch.lerp(moment, known, self.decay)
        self._steps[path] = step + 1
        if step % self.every == 0:
            former = self.bases.get(path)
            self.bases[path] = torch.linalg.eigh(self._moments[path]).eigenvectors.T
            if former is not None and "exp_avg" in state:
                state["exp_avg"].copy_(state["exp_avg"] @ former @ self.bases[path].T)
