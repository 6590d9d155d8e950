"""Small training runs: batches, trainers, and what they log."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

VOCABULARY = 384


def batches(count=6, rows=2, seed=0):
    """Batches of varied length and share of trained tokens, padded on the right, in a loader."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = 8 + 3 * (index % 3)
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, : 1 + index % 4] = -100
        labels[0, -2:], mask[0, -2:] = -100, 0
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return DataLoader(made, batch_size=None)


def trainer(tmp_path, **settings):
    defaults = {
        "accelerator": "cpu",
        "logger": CSVLogger(tmp_path, name=None, version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(defaults | settings))


class Metrics(Callback):
    """Collects what was logged, step by step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *args):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def adamw(lr):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)
