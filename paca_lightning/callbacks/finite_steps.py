"""FiniteSteps: no NaN and no Inf reaches the trained weights or a checkpoint."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import should_log
from paca_lightning.core.private.torch import is_fake, largest_values
from paca_lightning.strategies.agreement import highest

MOST_SKIPPED = 20
"""Steps in a row that may be skipped: by then, it is no single bad batch."""


class Finding(NamedTuple):
    """What was not finite in a step.

    Attributes:
        step: Number of the optimizer step, from 1.
        loss: Whether the loss was not finite.
        gradients: How many gradients were not finite.
        last: Number of the last such parameter in the order of the optimizers, where the backward met it first.
    """

    step: int
    loss: int
    gradients: int
    last: int


class FiniteSteps(Callback):
    """Stops a run, or skips the step, where the loss or a gradient is NaN or Inf.

    On the CPU, and with ``skip``, each optimizer step is checked before it is taken, on all ranks together. On other
    devices, ``stop`` does not wait for the device at each step: it notes the first bad step there, and reads the note
    where the run waits anyway, at logging steps, and before a checkpoint and the end. The weights in memory are then
    lost; those on the disk are from before. So ``stop`` adds no wait to a step that is not logged, and ``skip`` adds
    one read of the device to each step. On several ranks, either read follows one reduction of a number.

    A checkpoint of trained weights that are not finite is refused, so that the last good one stays. Under fp16 mixed
    precision, PyTorch's GradScaler skips such steps, and nothing is checked beside it but checkpoints.

    Args:
        nonfinite: ``stop`` or ``skip``.

    Raises:
        PaCAError: If it is neither.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"] = "stop") -> None:
        if nonfinite not in ("stop", "skip"):
            raise PaCAError(f"nonfinite={nonfinite!r} is unknown. Choose stop or skip.")
        self.nonfinite = nonfinite
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._bad_loss: Tensor | None = None  # of the micro-batches of this step, a boolean on the device
        self._note: Tensor | None = None  # a Finding on the device, zeros as long as all is well
        self._skipped = self._in_a_row = 0

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note on the device whether the loss is finite."""
        bad = ~loss.detach().isfinite().all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients, before they are clipped.

        Raises:
            PaCAError: If one is not finite, or the loss was not.
        """
        bad_loss, self._bad_loss = self._bad_loss, None
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        parameters = stepped_by(optimizer)
        if any(is_fake(p) for p in parameters[:1]):  # a traced run: no values
            return
        before = takewhile(lambda other: other is not optimizer, trainer.optimizers)
        first = sum(len(stepped_by(other)) for other in before)
        now = _finding(trainer.global_step + 1, bad_loss, parameters, first, pl_module.device)
        earlier = self._note
        self._note = now if earlier is None else torch.where(earlier[0] > 0, earlier, now)
        if self.nonfinite == "stop":
            if is_on_host(pl_module) or should_log(trainer):
                self._stop_if_noted(trainer, pl_module)
        elif (found := self.first_finding(trainer)) is not None:
            self._skip(found, trainer, pl_module, optimizer)
        else:
            self._in_a_row = 0

    def check_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check all steps so far, and the trained weights, before they are saved. Collective.

        Raises:
            PaCAError: On all ranks, if a step or a weight was not finite.
        """
        self._stop_if_noted(trainer, pl_module)
        trained = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        broken = first_not_finite(trained)
        if trainer.strategy.reduce_boolean_decision(broken is not None, all=False):
            raise PaCAError(
                f"{broken or 'A trained weight of another rank'} has NaN or Inf after step {trainer.global_step}, so "
                "no checkpoint is written, and the last one stays. Lower the learning rate."
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last steps, and tell how many were skipped."""
        self._stop_if_noted(trainer, pl_module)
        if self._skipped:
            rank_zero_info(f"nonfinite='skip': {self._skipped} optimizer steps were skipped.")

    def _stop_if_noted(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (found := self.first_finding(trainer)) is not None:
            applied = "was not taken" if is_on_host(pl_module) else "and those after it are lost"
            raise PaCAError(
                f"{described(found, trainer, pl_module)} The step {applied}; checkpoints and adapters on the disk are "
                "from before it. Lower the learning rate or look at the data of this step; "
                f"{type(self).__name__}(nonfinite='skip') passes over single steps."
            )

    def first_finding(self, trainer: Trainer) -> Finding | None:
        """The first finding of any rank, taken off the device; None if there is none."""
        if trainer.world_size == 1:
            found = None if self._note is None else Finding(*self._note.tolist())
            note = found if found is not None and found.step else None
        else:
            own = self._note if self._note is not None else _no_finding(trainer.strategy.root_device)
            note = None
            if bool(highest((own[0] > 0).long())):
                findings = [Finding(*one) for one in trainer.strategy.all_gather(own).view(-1, len(own)).tolist()]
                note = min((one for one in findings if one.step), key=lambda one: (one.step, -one.last))
        self._note = None
        return note

    def _skip(self, found: Finding, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._skipped += 1
        self._in_a_row += 1
        message = described(found, trainer, pl_module)
        if self._in_a_row > MOST_SKIPPED:
            raise PaCAError(f"{message} {MOST_SKIPPED} steps before it were skipped in a row. Lower the learning rate.")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # not 0: the optimizer passes over it, and its moments stay
        rank_zero_warn(f"{message} The step is skipped (nonfinite='skip').")


def described(found: Finding, trainer: Trainer, pl_module: LightningModule) -> str:
    """A finding in words, with what of the model has NaN or Inf itself."""
    what = ["the loss is NaN or Inf"] if found.loss else []
    if found.gradients:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        parameters = [parameter for optimizer in trainer.optimizers for parameter in stepped_by(optimizer)]
        first = names.get(id(parameters[found.last]), "another model")
        what.append(
            f"{found.gradients} of {len(parameters)} gradients have NaN or Inf, in the backward {first!r} first"
        )
    message = f"Optimizer step {found.step}: {' and '.join(what)}."
    present = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
    if (weight := first_not_finite(present)) is not None:
        message += f" {weight} itself has NaN or Inf."
    return message


def stepped_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """The trainable parameters of an optimizer, those without a gradient too: the same on all ranks in all steps."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def first_not_finite(tensors: dict[str, Any]) -> str | None:
    """Name of the first tensor that has NaN or Inf, of this rank's rows, in quotes."""
    for name, tensor in tensors.items():
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta
        if floating and not bool(local(tensor.detach()).isfinite().all()):
            return repr(name)
    return None


def _finding(
    step: int, bad_loss: Tensor | None, parameters: Sequence[nn.Parameter], first: int, device: torch.device
) -> Tensor:
    """A Finding as an int64 tensor of four numbers on the device; zeros if all is finite.

    Args:
        step: Number of the optimizer step.
        bad_loss: Whether the loss was not finite.
        parameters: Of the optimizer.
        first: Number of its first parameter among those of all optimizers.
        device: Of the model.
    """
    of_loss = torch.zeros((), dtype=torch.bool, device=device) if bad_loss is None else bad_loss.to(device)
    gradients = [_gradient_or_zero(parameter) for parameter in parameters]
    if not gradients:
        return torch.stack([of_loss * step, of_loss.long(), *_no_finding(device)[2:]])
    bad = ~largest_values(gradients).to(device).isfinite()
    last = torch.where(bad, torch.arange(first, first + len(bad), device=device), 0).amax()
    return torch.stack([(of_loss | bad.any()) * step, of_loss.long(), bad.sum(), last])


def _no_finding(device: torch.device) -> Tensor:
    return torch.zeros(4, dtype=torch.long, device=device)


def is_on_host(pl_module: LightningModule) -> bool:
    """Whether reading a value of a model's device waits for nothing."""
    return pl_module.device.type == "cpu"


def _gradient_or_zero(parameter: nn.Parameter) -> Tensor:
    """This rank's rows of a gradient, or a zero where there is none or it is sparse."""
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse or local(gradient).numel() == 0:
        return local(parameter.detach()).new_zeros(())
    return local(gradient)
