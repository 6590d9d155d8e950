"""What determines the memory of a run's training step."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import LightningModule

from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """A run, as far as it determines the memory of a training step on one device.

    Args:
        module: As LightningCLI builds it: its model is made in ``configure_model``. It is left as it is.
        convert: Freezes the module's model and changes its layers as the method of fine-tuning does; on ``meta``.
        strategy: Shards the model. None: every device holds all of it.
        ranks: Devices that train together.
        shard_size: How many of them share one copy of a sharded model. None: all.
        gradient_buckets: Whether gradients are exchanged through a copy of them, as DDP does.
        precision: Lightning's name for it.
        batch_size: Sequences of a micro-batch, on each rank.
        tokens: Length of a sequence.
        texts: Of a row, each of ``tokens``; of embeddings two or three.
        packed: Whether a sequence holds several documents, with positions of their own.
        accumulate: Micro-batches of an optimizer step.
        accelerator: Whether to trace what runs on an accelerator, or on a CPU.
    """

    module: LightningModule
    convert: Callable[[LightningModule], None]
    strategy: FSDP2Strategy | None = None
    ranks: int = 1
    shard_size: int | None = None
    gradient_buckets: bool = False
    precision: str = "32-true"
    batch_size: int = 1
    tokens: int = 512
    texts: int = 1
    packed: bool = False
    accumulate: int = 1
    accelerator: bool = True

    @property
    def block_names(self) -> list[str] | None:
        """Class names of the model's blocks; None: those that Hugging Face models declare."""
        return None if self.strategy is None else self.strategy.blocks

    @property
    def offloads(self) -> bool:
        """Whether parameters, gradients and optimizer states lie in the host's memory."""
        return self.strategy is not None and bool(self.strategy.options.cpu_offload)
