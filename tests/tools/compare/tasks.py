"""Small runs to compare methods on."""

from pathlib import Path

from paca_lightning.tools.compare.task import Task, read_task

ROOT = Path(__file__).parents[3]
DEBUG = str(ROOT / "configs" / "debug.yaml")


def debug_task(*overrides: str) -> Task:
    """The run of configs/debug.yaml."""
    return read_task([f"--config={DEBUG}", *overrides], "debug", None, "paca-lightning compare")
