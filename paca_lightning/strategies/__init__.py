"""Lightning strategies and plugins, registered by name when this package is imported.

``diloco/`` trains over slow connections (``strategy="paca_diloco"``); ``compressed_ddp.py`` compresses the gradients of
DDP (``strategy="paca_compressed_ddp"``); ``fsdp2/`` shards any LightningModule (``strategy="paca_fsdp2"``); ``hpu/``
brings Intel Gaudi to Lightning 2.6 (``accelerator="hpu"``). May import ``core``, ``layers`` and
``activation_checkpointing``; knows nothing of callbacks, tasks and the command line. Limits: no
tensor parallelism and no pipeline parallelism.
"""

import lightning.pytorch  # noqa: F401  (first: its import registers these strategies, which must not be half imported)

from paca_lightning.strategies.compressed_ddp import CompressedDDPStrategy
from paca_lightning.strategies.diloco.strategy import DiLoCoStrategy
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.strategies.hpu import HPUAccelerator, HPUDDPStrategy, HPUFSDP2Strategy, SingleHPUStrategy

__all__ = [
    "CompressedDDPStrategy",
    "DiLoCoStrategy",
    "FSDP2Strategy",
    "HPUAccelerator",
    "HPUDDPStrategy",
    "HPUFSDP2Strategy",
    "SingleHPUStrategy",
]
