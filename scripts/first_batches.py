"""The first training batches of a run, by which the scripts of the study calibrate."""

from itertools import islice
from typing import Any

from paca_lightning.tools.compare.task import Task

BATCHES = 8


def first_training_batches(task: Task) -> list[Any]:
    """Batches of a run, whose data module is then ready for its validation batches, too."""
    task.data.prepare_data()
    task.data.setup("fit")
    return list(islice(iter(task.data.train_dataloader()), BATCHES))
