"""MethodReport: what a method beside PaCA trains and what stays frozen, to be printed."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from paca_lightning.conversion.report import readable_size

if TYPE_CHECKING:
    from rich.console import Group


@dataclass
class MethodReport:
    """What a method trains.

    Attributes:
        method: Its name.
        trained: Shape by name of each trained parameter.
        total_parameters: Trained and frozen ones; those of a 4-bit base count by their stored bytes.
        learning_rate: Once known, the optimizer's.
        notes: What else a user must know.
    """

    method: str
    trained: dict[str, tuple[int, ...]]
    total_parameters: int
    learning_rate: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(math.prod(shape) for shape in self.trained.values())

    def __rich__(self) -> "Group":
        """Table of the trained parameters by kind, with totals and notes below."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=self.method, title_justify="left", title_style="bold")
        table.add_column("trained")
        for name in ("count", "shape", "parameters"):
            table.add_column(name, justify="right")
        for (kind, shape), count in Counter((_kind(name), shape) for name, shape in self.trained.items()).items():
            table.add_row(kind, str(count), " x ".join(map(str, shape)), f"{count * math.prod(shape):,}")
        trained, total = self.trainable_parameters, max(self.total_parameters, 1)
        lines = [
            f"Trainable: {trained:,} of {self.total_parameters:,} parameters ({trained / total:.2%}); "
            f"Adam's state {readable_size(2 * 4 * trained)}.",
            f"Frozen: {self.total_parameters - trained:,} parameters.",
        ]
        if self.learning_rate is not None:
            lines.append(f"Learning rate: {self.learning_rate:.3g}.")
        return Group(table, *lines, *self.notes)


def report_on(method: str, module: nn.Module, notes: list[str]) -> MethodReport:
    """The report of a module that has just been adapted."""
    parameters = dict(module.named_parameters())
    return MethodReport(
        method=method,
        trained={name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad},
        total_parameters=sum(p.numel() for p in parameters.values()),
        notes=notes,
    )


def _kind(name: str) -> str:
    """The last two telling segments of a parameter's name, such as ``q_proj.lora_A``."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("default", "weight")]
    return ".".join(parts[-2:])
