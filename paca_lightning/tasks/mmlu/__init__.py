"""MMLU (Hendrycks et al., 2021, arXiv 2009.03300): its data for training, and its evaluation as a callback.

`sources` and `files` read questions, `prompts` words them, `likelihood` scores the choices, `accuracy` and `report`
sum up. `datamodule` trains on `training_samples`; `callback` runs the `evaluator` in a Trainer.
May import `core` and the rest of `tasks`. Limits: four choices a question, the 57 subjects of the benchmark.
"""

from paca_lightning.tasks.mmlu.callback import MMLUEvaluation
from paca_lightning.tasks.mmlu.datamodule import MMLUDataModule

__all__ = ["MMLUDataModule", "MMLUEvaluation"]
