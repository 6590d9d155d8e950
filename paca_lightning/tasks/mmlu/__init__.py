"""MMLU (Hendrycks et al., 2021, arXiv 2009.03300): its data for training, and its evaluation as a callback."""

from paca_lightning.tasks.mmlu.callback import MMLUEvaluation
from paca_lightning.tasks.mmlu.datamodule import MMLUDataModule

__all__ = ["MMLUDataModule", "MMLUEvaluation"]
