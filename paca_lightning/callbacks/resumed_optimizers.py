"""What a run that goes on from a checkpoint takes over from its optimizers, and what of its own settings is ignored."""

from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from paca_lightning.callbacks.resumed_rates import apply_rates, first_rate
from paca_lightning.core.errors import PaCAError


def saved_optimizers(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint tells of the optimizers: the class of each, and how many parameter groups it has."""
    return {
        "optimizers": [type(optimizer).__qualname__ for optimizer in trainer.optimizers],
        "groups": [len(optimizer.param_groups) for optimizer in trainer.optimizers],
    }


def optimizer_settings(trainer: Trainer) -> list[dict[str, Any]]:
    """The settings of each parameter group: the learning rate is that before a schedule scales it."""
    plateau = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = []
    for group in groups:
        known = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        if not plateau:  # which lowers the rate itself, and does not keep the first one
            known["lr"] = first_rate(group)
        settings.append(known)
    return settings


class ResumedOptimizers:
    """Compares the optimizers of a run with those of the checkpoint that it goes on from.

    Args:
        resume_lr: Whose learning rate a resumed run takes, ``checkpoint`` or ``config``.

    Raises:
        PaCAError: If it is neither.
    """

    def __init__(self, resume_lr: Literal["checkpoint", "config"]) -> None:
        if resume_lr not in ("checkpoint", "config"):
            raise PaCAError(f"resume_lr={resume_lr!r} is unknown. Choose checkpoint or config.")
        self.resume_lr = resume_lr
        self.forget()

    def forget(self) -> None:
        """Forget the checkpoint and the optimizers of a run."""
        self._resumes = False
        self._saved: dict[str, Any] = {}
        self._configured: list[dict[str, Any]] | None = None
        self._rates: list[float | None] = []

    def note_saved(self, saved: dict[str, Any]) -> None:
        """Note that the run goes on from a checkpoint, and what that tells as :func:`saved_optimizers`, if anything."""
        self._resumes, self._saved = True, saved

    def note_configured(self, trainer: Trainer) -> None:
        """Note the settings of this run's optimizers, before those of a checkpoint replace them."""
        self._configured = optimizer_settings(trainer)
        self._rates = [first_rate(group) for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse a checkpoint whose optimizer states belong to other optimizers.

        Raises:
            PaCAError: If a class differs, as PyTorch would load the settings of one into the other, or the number of
                parameter groups.
        """
        here = saved_optimizers(trainer)
        names, groups = (self._saved.get(name, here[name]) for name in ("optimizers", "groups"))
        if names != here["optimizers"]:
            raise PaCAError(
                f"The checkpoint was saved by a run with {', '.join(names)}, and this one has "
                f"{', '.join(here['optimizers'])}, which cannot go on with its state. Use the optimizer of the "
                "checkpoint, or begin from its adapter: PaCAStrategy(adapter=...)."
            )
        if groups != here["groups"]:
            raise PaCAError(
                f"The checkpoint's optimizers have {groups} parameter groups, and this run's {here['groups']}. Norms "
                "that are trained along have a group of their own if norms_lr is not 1 or there is weight decay. Use "
                "the settings of the checkpoint, or begin from its adapter: PaCAStrategy(adapter=...)."
            )

    def settle(self, trainer: Trainer) -> bool:
        """Apply the config's learning rate if it is asked for, and name what is ignored, once a run, on every rank.

        Returns:
            False if that was done before.

        Raises:
            PaCAError: If the learning rates that follow from the config's are not defined.
        """
        if self._configured is None:
            return False
        if self._resumes and self.resume_lr == "config":
            for old, new in dict.fromkeys(apply_rates(trainer, self._rates)):
                rank_zero_info(f"resume_lr='config': the run goes on with lr={new}; its checkpoint has {old}.")
        self._warn_of_ignored(self._configured, optimizer_settings(trainer))
        self._configured = None
        return True

    def _warn_of_ignored(self, configured: list[dict[str, Any]], used: list[dict[str, Any]]) -> None:
        ignored: dict[str, tuple[Any, Any]] = {}
        for own, restored in zip(configured, used, strict=False):
            for name in own.keys() & restored.keys():
                if own[name] != restored[name]:
                    ignored.setdefault(name, (own[name], restored[name]))
        if ignored:
            said = ", ".join(f"{name}={own!r} (goes on with {kept!r})" for name, (own, kept) in sorted(ignored.items()))
            rate = "resume_lr='config' applies the learning rate. " if "lr" in ignored else ""
            rank_zero_warn(
                f"Ignored, as the run goes on with the optimizer of its checkpoint: {said}. {rate}To train with other "
                "settings, begin a new run from the adapter: PaCAStrategy(adapter=...)."
            )
