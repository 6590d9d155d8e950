"""Runs of a small Llama, to be traced."""

from typing import Any

from paca_lightning import PaCAConfig
from paca_lightning.tasks import CausalLMModule
from paca_lightning.tools.memory.baselines import PACA, Baseline
from paca_lightning.tools.memory.traced_run import TracedRun

CONFIG = PaCAConfig(r=8)
SHAPE = (2, 256)
"""Sequences and tokens of a batch."""

DEBUG = ["--config", "configs/debug.yaml"]


def llama_run(directory: str, baseline: Baseline = PACA, config: PaCAConfig = CONFIG, **settings: Any) -> TracedRun:
    """A run of a model in ``model_directory``."""
    module = CausalLMModule(directory, pretrained=False, dtype="float32")
    defaults = {"batch_size": SHAPE[0], "tokens": SHAPE[1]}
    return TracedRun(module=module, convert=baseline.converter(config), **(defaults | settings))
