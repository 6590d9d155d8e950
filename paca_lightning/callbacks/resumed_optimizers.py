"""What a run that goes on from a checkpoint takes over from its optimizers, and what of its own settings is ignored."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from paca_lightning.core.errors import PaCAError


def optimizer_names(trainer: Trainer) -> list[str]:
    """The class of each optimizer, for a checkpoint."""
    return [type(optimizer).__qualname__ for optimizer in trainer.optimizers]


def optimizer_settings(trainer: Trainer) -> list[dict[str, Any]]:
    """The settings of each parameter group: the learning rate is that before a schedule scales it."""
    plateau = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = []
    for group in groups:
        known = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        if not plateau:  # which lowers the rate itself, and does not keep the first one
            rate = group.get("initial_lr", group["lr"])
            known["lr"] = None if rate is None else float(rate)  # Adafactor may choose its own
        settings.append(known)
    return settings


class ResumedOptimizers:
    """Compares the optimizers of a run with those of the checkpoint that it goes on from."""

    def __init__(self) -> None:
        self._saved_names: list[str] | None = None
        self._configured: list[dict[str, Any]] | None = None

    def note_saved(self, names: list[str] | None) -> None:
        """Note the classes of a checkpoint's optimizers, if they are known."""
        self._saved_names = names

    def note_configured(self, trainer: Trainer) -> None:
        """Note the settings of this run's optimizers, before those of a checkpoint replace them."""
        self._configured = optimizer_settings(trainer)

    def check_classes(self, trainer: Trainer) -> None:
        """Refuse a checkpoint whose optimizer states belong to other optimizers.

        Raises:
            PaCAError: If a class differs: PyTorch would load the settings of one into the other.
        """
        here = optimizer_names(trainer)
        if self._saved_names is not None and self._saved_names != here:
            raise PaCAError(
                f"The checkpoint was saved by a run with {', '.join(self._saved_names)}, and this one has "
                f"{', '.join(here)}, which cannot go on with its state. Use the optimizer of the checkpoint, or begin "
                "from its adapter: PaCAStrategy(adapter=...)."
            )

    def warn_of_ignored(self, trainer: Trainer) -> bool:
        """Name the settings of this run that a checkpoint has replaced, once a run; False if that was done before."""
        if self._configured is None:
            return False
        ignored: dict[str, tuple[Any, Any]] = {}
        for own, restored in zip(self._configured, optimizer_settings(trainer), strict=False):
            for name in own.keys() & restored.keys():
                if own[name] != restored[name]:
                    ignored.setdefault(name, (own[name], restored[name]))
        if ignored:
            said = ", ".join(f"{name}={own!r} (goes on with {used!r})" for name, (own, used) in sorted(ignored.items()))
            rank_zero_warn(
                f"Ignored, as the run goes on with the optimizer of its checkpoint: {said}. To train with other "
                "settings, begin a new run from the adapter: PaCAStrategy(adapter=...)."
            )
        self._configured = None
        return True
