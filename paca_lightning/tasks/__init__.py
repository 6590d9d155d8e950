"""Fine-tuning tasks: causal language models, heads over labels, their data, MMLU, schedules, callbacks around them.

Configs name the classes exported here (``paca_lightning.tasks.CausalLMModule``). `causal_lm`, `classifier` and
`preference` train, `instruction`, `classification_data`, `preference_data` and `data` make batches, `mmlu` trains
on and evaluates MMLU, `callbacks` measures and shows.
May import `core`, `activation_checkpointing` and `strategies`; knows nothing of PaCA, which a callback adds.
Limits: text only, one optimizer, models from Hugging Face transformers.
"""

from paca_lightning.tasks.callbacks.exact_answers import ExactAnswers
from paca_lightning.tasks.callbacks.held_out_loss import HeldOutLoss
from paca_lightning.tasks.callbacks.loss_plot import LossPlot
from paca_lightning.tasks.callbacks.progress_bar import EpochProgressBar
from paca_lightning.tasks.callbacks.row_losses import RowLosses
from paca_lightning.tasks.callbacks.sample_answers import SampleAnswers
from paca_lightning.tasks.callbacks.throughput import TokenThroughput
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.classification_data import ClassificationDataModule
from paca_lightning.tasks.classifier import ClassifierModule
from paca_lightning.tasks.embedding import EmbeddingModule
from paca_lightning.tasks.embedding_data import EmbeddingDataModule
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.mmlu import MMLUDataModule, MMLUEvaluation
from paca_lightning.tasks.preference import PreferenceModule
from paca_lightning.tasks.preference_data import PreferenceDataModule
from paca_lightning.tasks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule

__all__ = [
    "CausalLMModule",
    "ClassificationDataModule",
    "ClassifierModule",
    "ConstantSchedule",
    "CosineSchedule",
    "EmbeddingDataModule",
    "EmbeddingModule",
    "EpochProgressBar",
    "ExactAnswers",
    "HeldOutLoss",
    "InstructionDataModule",
    "LinearSchedule",
    "LossPlot",
    "MMLUDataModule",
    "MMLUEvaluation",
    "PreferenceDataModule",
    "PreferenceModule",
    "RowLosses",
    "SampleAnswers",
    "TokenThroughput",
]
