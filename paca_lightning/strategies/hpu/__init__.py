"""Intel Gaudi (HPU) for Lightning 2.6: an accelerator and strategies, registered by name on import.

On a host with the Gaudi software, ``Trainer(accelerator="hpu")`` and ``Trainer(accelerator="auto")`` then use HPUs. On
other hosts nothing else changes. Only this folder may import ``habana_frameworks``; it also imports ``core``,
``layers`` and ``fsdp2``. Limits: eager mode and ``torch.compile`` (no lazy mode); fp32, bf16 and bf16 mixed precision;
run on a simulated device only.
"""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from paca_lightning.core.private.lightning import accelerator_connector
from paca_lightning.strategies.hpu.accelerator import HPUAccelerator
from paca_lightning.strategies.hpu.bridge import bridge_installed
from paca_lightning.strategies.hpu.connector import patch_connector
from paca_lightning.strategies.hpu.ddp import HPUDDPStrategy
from paca_lightning.strategies.hpu.fsdp2 import HPUFSDP2Strategy
from paca_lightning.strategies.hpu.mixins import HPUStrategyMixin
from paca_lightning.strategies.hpu.single import SingleHPUStrategy

__all__ = [
    "HPUAccelerator",
    "HPUDDPStrategy",
    "HPUFSDP2Strategy",
    "HPUStrategyMixin",
    "SingleHPUStrategy",
]

AcceleratorRegistry.register("hpu", HPUAccelerator, description="Intel Gaudi", override=True)
for _strategy in (SingleHPUStrategy, HPUDDPStrategy, HPUFSDP2Strategy):
    StrategyRegistry.register(_strategy.strategy_name, _strategy, description=_strategy.__name__, override=True)
if bridge_installed():
    patch_connector(accelerator_connector())
