"""What to fine-tune and on what: causal language models, instruction data, MMLU, and the callbacks around them."""

from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.heldout import HeldOutLoss
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.mmlu import MMLUDataModule, MMLUEvaluation
from paca_lightning.tasks.plots import LossPlot
from paca_lightning.tasks.row_losses import RowLosses
from paca_lightning.tasks.samples import SampleAnswers
from paca_lightning.tasks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule
from paca_lightning.tasks.throughput import TokenThroughput

__all__ = [
    "CausalLMModule",
    "ConstantSchedule",
    "CosineSchedule",
    "HeldOutLoss",
    "InstructionDataModule",
    "LinearSchedule",
    "LossPlot",
    "MMLUDataModule",
    "MMLUEvaluation",
    "RowLosses",
    "SampleAnswers",
    "TokenThroughput",
]
