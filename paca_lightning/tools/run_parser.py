"""The parser of a run's config, also of one that another command saved."""

import inspect
import os
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.tools.short_errors import ShortErrors, settings_in


class RunParser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser with short errors, which saves a config whole or not at all.

    Attributes:
        left_out: Settings of a config that another command of LightningCLI takes, and this one does not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `--ckpt last` would mean ckpt_path, and is undone by a saved config after it.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.left_out: dict[str, Any] = {}

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse a config, also one that another command saved, with ``ckpt_path``, ``verbose`` and the like."""
        settings = settings_in(content)
        if "trainer" in settings:
            for name in options_of_runs() & set(settings):
                if name not in self.get_defaults():
                    self.left_out[name] = settings.pop(name)
                    content = yaml.safe_dump(settings, sort_keys=False)
        return super().parse_string(content, *args, **kwargs)

    @override
    def parse_path(self, cfg_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Parse the config of a path.

        Raises:
            PaCAError: If it is no text.
        """
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise PaCAError(f"{str(cfg_path)!r} is no config: it is not text in UTF-8 ({error.reason}).") from error

    @override
    def save(self, namespace: Any, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a config.

        Raises:
            PaCAError: If the disk fails or is full.
        """
        refused = Path(path).exists() and not kwargs.get("overwrite")
        if refused or "://" in str(path):
            super().save(namespace, path, *args, **kwargs)
            return
        with replacing(Path(path)) as temporary:
            super().save(namespace, temporary, *args, **kwargs)


def options_of_runs() -> set[str]:
    """Names of what the commands of LightningCLI take beside a trainer, a module and a data module."""
    return {
        name
        for command, skipped in LightningCLI.subcommands().items()
        for name in inspect.signature(getattr(Trainer, command)).parameters
        if name not in skipped | {"self"}
    }


def checkpoint_last(arguments: list[str]) -> list[str]:
    """The arguments with ``--ckpt_path`` at the end: a saved config has ``ckpt_path: null``, which would undo it."""
    others, moved = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--ckpt_path":
            moved += [argument, *([value] if (value := next(rest, None)) is not None else [])]
        elif argument.startswith("--ckpt_path="):
            moved.append(argument)
        else:
            others.append(argument)
    return others + moved
