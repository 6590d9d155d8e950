"""FSDP2 for any LightningModule: ``strategy="paca_fsdp2"``.

``strategy`` is the Lightning strategy and ``sharding`` chooses what is gathered together; ``materializing``,
``streaming`` and ``rows`` fill a model on meta from safetensors files; ``checkpoints``, ``saving``, ``restoring`` and
``location`` write and read checkpoints. May import ``core``, ``layers`` and ``activation_checkpointing``.
Limits: no tensor parallelism, no Conv1D layers, no FSDP1, and no files that other programs write per rank.
"""

from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
