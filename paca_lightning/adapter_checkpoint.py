"""AdapterCheckpoint: the callback that leaves an adapter directory behind."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from paca_lightning.adapter import save_adapter
from paca_lightning.errors import PaCAError
from paca_lightning.files import check_writable, written_aside
from paca_lightning.gathering import is_first_rank
from paca_lightning.targets import paca_layers


class AdapterCheckpoint(Callback):
    """Write the adapter when fitting ends, and when it is interrupted with Ctrl-C.

    The directory holds what ``load_adapter``, ``PaCAStrategy(adapter=...)`` and ``paca-lightning export`` take; and the
    data module's ``tokenizer``, if it has one, whose chat template may be another than the base model's. For snapshots
    during training use Lightning's ModelCheckpoint: its files hold the adapter and the state of the run.

    Args:
        dirpath: Where to. Default: ``adapter`` in the logger's directory.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find an unusable directory before training, not after."""
        if stage == "fit":
            check_writable(self._directory(trainer), "AdapterCheckpoint(dirpath=...)")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find that there is no adapter to write before training, not after."""
        if not any(paca_layers(pl_module)):
            raise PaCAError("AdapterCheckpoint has nothing to write: no layer is trained by PaCA. Add PaCAStrategy.")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter."""
        self._save(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the adapter as it stands when the user stops the run."""
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = self._directory(trainer)
        save_adapter(pl_module, directory)
        tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if is_first_rank() and hasattr(tokenizer, "save_pretrained"):
            with written_aside(directory) as scratch:  # after the adapter, which shall not be lost to a tokenizer
                tokenizer.save_pretrained(scratch)
        rank_zero_info(f"Adapter: {directory}")

    def _directory(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "adapter")
