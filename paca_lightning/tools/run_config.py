"""A run's config as every command reads it: LightningCLI in which configs name any classes."""

import sys

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

import paca_lightning.tasks  # noqa: F401  (so that configs can name its classes without their module)


def lightning_cli(
    arguments: list[str], *, run: bool, cli_class: type[LightningCLI] = LightningCLI, prog: str = "paca-lightning"
) -> LightningCLI:
    """Parse arguments and build what they name; with ``run``, their subcommand has run when this returns.

    Args:
        arguments: Command line without the program's name.
        run: Whether it begins with a subcommand (``fit``, ...), to be run.
        cli_class: What builds the trainer, the module and the data module.
        prog: Program's name in messages.
    """
    sys.argv[1:] = arguments
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
