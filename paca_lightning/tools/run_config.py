"""How every command reads a run's config: LightningCLI, for modules and data of any class."""

import errno
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from paca_lightning.callbacks.run_checks import guard_checkpoints
from paca_lightning.callbacks.stop_signals import StopSignals
from paca_lightning.core.checkpoints import is_checkpoint_directory
from paca_lightning.core.errors import PaCAError, first_message, raised_by, users_mistake
from paca_lightning.core.files import check_writable_if_local, disk_error
from paca_lightning.core.private.lightning import wait_before_ending_ranks
from paca_lightning.strategies.fsdp2.checkpoints import ShardedCheckpointStrategy
from paca_lightning.tasks import EpochProgressBar  # also defines the classes that configs name without a module
from paca_lightning.tools.checkpoint_search import WORDS, check_checkpoint, find_checkpoint
from paca_lightning.tools.lost_ranks import GRACE, watch_first_rank
from paca_lightning.tools.machine_faults import fault_of_the_machine
from paca_lightning.tools.run_parser import RunParser, checkpoint_last
from paca_lightning.tools.run_version import claim_versions, remove_empty

FOUND_BY_LIGHTNING = ("hpc", "registry")
REFUSALS = (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError, OSError)
"""What constructors raise for settings that they refuse, or for packages and devices that are not there."""
LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0, "log_every_n_steps": 0}
"""Settings of the trainer that Lightning does not check: the least value of each."""
EVALUATIONS = ("validate", "test", "predict")
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunCLI(LightningCLI):
    """LightningCLI that reports a mistake in a config as one PaCAError, before the run."""

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint's path, and read no hyperparameters from it.

        Lightning would let them override the command line.

        Raises:
            PaCAError: If the path is not that of a checkpoint.
        """
        path = self._ckpt_path()
        if path == "":
            raise PaCAError("--ckpt_path is empty. Give the path of a checkpoint, last or best, or leave it out.")
        if path and path not in (*WORDS, *FOUND_BY_LIGHTNING) and "://" not in path:
            check_checkpoint(path)

    def _ckpt_path(self) -> str | None:
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        path: str | None = settings.get("ckpt_path")
        return path

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and check what Lightning does not.

        Raises:
            PaCAError: If the seed, or a setting of the trainer, is out of range.
        """
        super().parse_arguments(parser, args)
        config = self.config.get(self.config.get("subcommand") or "") or self.config
        seed = config.get("seed_everything")
        if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise PaCAError(f"seed_everything is {seed}, but must lie between 0 and 4294967295.")
        for name, least in LEAST.items():
            value = config.get(f"trainer.{name}")
            if value is not None and value < least:
                raise PaCAError(f"trainer.{name} is {value}, but must be at least {least}.")
        interval = config.get("trainer.val_check_interval")
        if isinstance(interval, int | float) and interval <= 0:
            raise PaCAError(f"trainer.val_check_interval is {interval}, but must be above 0.")

    @override
    def instantiate_classes(self) -> None:
        """Build what the config names.

        Raises:
            PaCAError: If a class refuses its settings, or needs a package that is not installed.
        """
        try:
            super().instantiate_classes()
        except REFUSALS as error:
            if (mistake := users_mistake(error)) is not None:
                raise mistake from error
            raise PaCAError(f"The run cannot be built: {first_message(error)}") from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with our progress bar unless it has one.

        Raises:
            PaCAError: If Lightning refuses its settings, or a logger cannot write its files.
        """
        settings = {**self.config_init.get(str(self.subcommand), self.config_init).get("trainer", {}), **kwargs}
        callbacks = as_list(settings.get("callbacks"))
        if settings.get("enable_progress_bar") is not False and not settings.get("barebones"):
            callbacks = with_progress_bar(callbacks)
        kwargs["callbacks"] = [*callbacks, StopSignals()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except PaCAError:
            raise
        except REFUSALS as error:
            raise PaCAError(f"The trainer cannot be built: {error}") from error
        guard_checkpoints(trainer)
        for logger in trainer.loggers:
            if logger.save_dir:
                check_writable_if_local(logger.save_dir, f"{type(logger).__name__}(save_dir=...)")
        return trainer

    @override
    def after_instantiate_classes(self) -> None:
        """Find the checkpoint that ``last`` or ``best`` means.

        Raises:
            PaCAError: If there is none, or it is sharded and the strategy reads files only.
        """
        path = self._ckpt_path()
        if path in WORDS:
            path = str(find_checkpoint(path, self.trainer))
            self.config_init[str(self.subcommand)]["ckpt_path"] = path
        if path is None and self.subcommand in EVALUATIONS and not has_adapter(self.trainer):
            rank_zero_warn(
                f"{self.subcommand} takes the base model, as no checkpoint is given: --ckpt_path last is the newest of "
                "this run, --ckpt_path best the best; an adapter is given to the callback: PaCAStrategy(adapter=...)."
            )
        sharded = path is not None and "://" not in path and is_checkpoint_directory(Path(path))
        if sharded and not isinstance(self.trainer.strategy, ShardedCheckpointStrategy):
            raise PaCAError(
                f"{path!r} (--ckpt_path) is a sharded checkpoint, which {type(self.trainer.strategy).__name__} does "
                "not read. Use --trainer.strategy=paca_fsdp2, on any number of devices."
            )

    def _run_subcommand(self, subcommand: str) -> None:
        watch_first_rank()
        wait_before_ending_ranks(GRACE)  # this one may be about to say which other one has died
        versions = claim_versions(self.trainer)
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if (mistake := self._mistake(error)) is None:
                raise
            self._end_other_ranks()
            if mistake is error:
                raise
            raise mistake from error
        finally:
            remove_empty(versions)

    def _mistake(self, error: BaseException) -> PaCAError | None:
        """What the user has to know of an error in a run, if it is not a bug of the user's or of ours."""
        if isinstance(error, PaCAError):
            return error
        if isinstance(error, RuntimeError) and ".paca_delta" in str(error):  # PyTorch's list of keys that do not fit
            return PaCAError(
                "The checkpoint trains other layers than this run. Use its target_modules and modules_to_save."
            )
        if isinstance(error, REFUSALS) and raised_by(error).startswith("lightning."):
            return PaCAError(str(error).strip())
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            return PaCAError(f"A file of the run could not be written: {disk_error(error)}. Free space and resume it.")
        return fault_of_the_machine(error, sys.argv[2:], getattr(self.trainer.strategy.launcher, "procs", ()))

    def _end_other_ranks(self) -> None:
        """End the ranks that this one started. Otherwise each would add that it has lost its peer."""
        if self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signal.SIGKILL)


def has_adapter(trainer: Trainer) -> bool:
    """Whether a callback of the run begins with an adapter."""
    return any(getattr(callback, "adapter", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def as_list(callbacks: Callback | list[Callback] | None) -> list[Callback]:
    """A trainer's callbacks as a list."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks is not None else []


def with_progress_bar(callbacks: list[Callback]) -> list[Callback]:
    """A trainer's callbacks, with our progress bar if none of them is one."""
    if any(isinstance(callback, ProgressBar) for callback in callbacks):
        return callbacks
    return [*callbacks, EpochProgressBar()]


def lightning_cli(
    arguments: list[str],
    *,
    run: bool,
    cli_class: type[LightningCLI] = RunCLI,
    prog: str = "paca-lightning",
    fit_help: str | None = None,
) -> LightningCLI:
    """Parse arguments and build what they name.

    Args:
        arguments: Command line without the program's name.
        run: Whether it begins with a subcommand (``fit``, ...), which has run when this returns.
        cli_class: Builds the trainer, the module and the data module.
        prog: The command, for messages.
        fit_help: What the help of ``fit`` says at its end.

    Raises:
        PaCAError: If an option is unknown or has a value that it does not take, or the run cannot be built.
    """
    sys.argv[1:] = checkpoint_last(arguments)  # LightningCLI and the ranks that DDP launches read them there
    return cli_class(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_class=RunParser,
        parser_kwargs={"prog": prog, "fit": {"epilog": fit_help}},
        run=run,
    )
