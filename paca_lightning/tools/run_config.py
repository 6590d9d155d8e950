"""How every command reads a run's config: LightningCLI, for modules and data of any class."""

import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningCLI

from paca_lightning.callbacks.paca import PaCAStrategy
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable_if_local
from paca_lightning.tasks import EpochProgressBar  # also defines the classes that configs name without a module

KNOWN_CHECKPOINTS = ("best", "last", "hpc", "registry")
"""Values of ``--ckpt_path`` that Lightning looks up itself."""


class RunCLI(LightningCLI):
    """LightningCLI that reports a mistake in a config as one PaCAError, before the run."""

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint's path, and read no hyperparameters from it.

        Lightning would let them override the command line.

        Raises:
            PaCAError: If the path is not that of a checkpoint.
        """
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        path = settings.get("ckpt_path")
        if not path or path in KNOWN_CHECKPOINTS or "://" in path:
            return
        if not Path(path).exists():
            raise PaCAError(f"There is no checkpoint {path!r} (--ckpt_path).")
        if Path(path, "adapter_config.json").exists():
            raise PaCAError(
                f"{path!r} (--ckpt_path) is an adapter, no checkpoint of a run. PaCAStrategy takes it: "
                f"--trainer.callbacks=PaCAStrategy --trainer.callbacks.adapter={path}"
            )
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            raise PaCAError(f"{path!r} (--ckpt_path) is no checkpoint, or was cut off.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with our progress bar unless it has one.

        Raises:
            PaCAError: If Lightning refuses its settings, or a logger cannot write its files.
        """
        settings = {**self.config_init.get(str(self.subcommand), self.config_init).get("trainer", {}), **kwargs}
        if settings.get("enable_progress_bar") is not False and not settings.get("barebones"):
            kwargs["callbacks"] = with_progress_bar(settings.get("callbacks"))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except PaCAError:
            raise
        except (MisconfigurationException, ValueError, ImportError, RuntimeError) as error:
            raise PaCAError(f"The trainer cannot be built: {error}") from error
        for logger in trainer.loggers:
            if logger.save_dir:
                check_writable_if_local(logger.save_dir, f"{type(logger).__name__}(save_dir=...)")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except PaCAError:
            self._end_other_ranks()
            raise
        except RuntimeError as error:
            if ".paca_delta" not in str(error):  # not PyTorch's list of missing and unexpected keys
                raise
            self._end_other_ranks()
            message = "The checkpoint trains other layers than this run. Use its target_modules and modules_to_save."
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, PaCAStrategy) for callback in callbacks):
                message = "The checkpoint was saved by a run with PaCAStrategy, which this one lacks. Add it."
            raise PaCAError(message) from error

    def _end_other_ranks(self) -> None:
        """End the ranks that this one started. Otherwise each would add that it has lost its peer."""
        if self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signal.SIGKILL)


def with_progress_bar(callbacks: Callback | list[Callback] | None) -> list[Callback]:
    """A trainer's callbacks, with our progress bar if none of them is one."""
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks is not None else []
    return given if any(isinstance(callback, ProgressBar) for callback in given) else [*given, EpochProgressBar()]


def lightning_cli(
    arguments: list[str], *, run: bool, cli_class: type[LightningCLI] = RunCLI, prog: str = "paca-lightning"
) -> LightningCLI:
    """Parse arguments and build what they name.

    Args:
        arguments: Command line without the program's name.
        run: Whether it begins with a subcommand (``fit``, ...), which has run when this returns.
        cli_class: Builds the trainer, the module and the data module.
        prog: The command, for messages.
    """
    sys.argv[1:] = arguments  # LightningCLI and the ranks that DDP launches read them there
    return cli_class(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_kwargs={"prog": prog},
        run=run,
    )
