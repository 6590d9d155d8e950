"""ConversionReport: what was converted and what is left frozen, with parameters and bytes, to be printed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from paca_lightning.conversion.frozen import FrozenGroup, frozen_groups
from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.learning_rates import remark_on
from paca_lightning.conversion.select import waits_for_data
from paca_lightning.conversion.targets import Resolution
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.new_tokens import ROWS
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.along import along_names
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.layers.rows import row_modules

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class LayerRecord:
    """One converted layer."""

    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    scaling: float
    delta_bytes: int
    experts: int = 1

    @property
    def trainable(self) -> int:
        """Parameters trained in this layer."""
        return self.experts * self.out_features * self.r


@dataclass
class ConversionReport:
    """What ``apply_paca`` converted, and what it left alone and why.

    Attributes:
        config: The settings.
        layers: The converted layers.
        skipped: Reason by path of each linear layer that was left alone.
        frozen: All other parameters that are left frozen, by kind.
        thawed: Class of the model that was frozen as a whole before, and was converted all the same.
        along: Number of tensors and of parameters that are trained along, by their kind.
        saved: Paths of the modules that are trained whole.
        trainable_parameters: Of the deltas, and of all that is trained beside them.
        total_parameters: Of the base model and the deltas.
        rows: Shape (n, D) of the rows of new tokens that are trained, by the path of the embedding or head.
        by_data: How many of the layers wait for batches to choose their columns.
        along_rate: Once known, the learning rate of what is trained along.
        learning_rate: Once known, the optimizer's; ``scaling * learning_rate`` is Adam's step on a column.
        adam: Whether the optimizer is an Adam, for which there is a suitable ``scaling * learning_rate``.
        optimizer_bytes: Of Adam's state, two fp32 values a trained parameter.
    """

    config: PaCAConfig
    layers: list[LayerRecord]
    skipped: dict[str, str] = field(default_factory=dict)
    frozen: list[FrozenGroup] = field(default_factory=list)
    thawed: str | None = None
    along: dict[str, tuple[int, int]] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    trainable_parameters: int = 0
    total_parameters: int = 0
    by_data: int = 0
    along_rate: float | None = None
    learning_rate: float | None = None
    adam: bool = False

    @property
    def delta_bytes(self) -> int:
        """Bytes of all deltas."""
        return sum(layer.delta_bytes for layer in self.layers)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of Adam's two moments for everything that is trained."""
        return 2 * 4 * self.trainable_parameters

    def __rich__(self) -> "Group":
        """Table of the layers by kind, with totals and notes below."""
        from rich.console import Group  # not at import time: apply_paca alone needs no rich
        from rich.table import Table

        table = Table(title="PaCA", title_justify="left", title_style="bold")
        table.add_column("layers")
        for name in ("count", "shape", "r", "scaling", "trained"):
            table.add_column(name, justify="right")
        kinds = Counter((lr.kind, lr.experts, lr.in_features, lr.out_features, lr.r, lr.scaling) for lr in self.layers)
        for (kind, experts, inputs, outputs, r, scaling), count in kinds.items():
            trained = count * experts * outputs * r
            shape = f"{experts} x " * (experts > 1) + f"{inputs} -> {outputs}"
            table.add_row(kind, str(count), shape, str(r), f"{scaling:g}", f"{trained:,}")
        return Group(table, *self._notes())

    def _notes(self) -> list[str]:
        share = self.trainable_parameters / max(self.total_parameters, 1)
        notes = [
            f"Trainable: {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2%}); "
            f"deltas {readable_size(self.delta_bytes)}, Adam's state {readable_size(self.optimizer_bytes)}."
        ]
        if self.learning_rate is not None:
            scalings = sorted({layer.scaling for layer in self.layers})
            steps = ", ".join(f"{scaling * self.learning_rate:.3g}" for scaling in scalings)
            notes.append(f"Adam's step on a column, scaling * lr: {steps}.")
            if self.adam and (remark := remark_on(scalings[-1] * self.learning_rate, self.total_parameters)):
                notes.append(remark)
        if self.by_data:
            then = ", before they are quantized" if self.config.quantize is not None else ""
            notes.append(f"Columns: {self.config.selection} chooses those of {self.by_data} layers by data{then}.")
        if self.config.steps_by_input:
            notes.append("Steps: each column's fits its input, by data; scaling * lr is that of a middling one.")
        for kind, (tensors, parameters) in self.along.items():
            rate = "" if self.along_rate is None else f" at lr {self.along_rate:.3g}"
            notes.append(
                f"Trained along: {kind}, {tensors} tensors, {parameters:,} parameters, in fp32,{rate} without weight "
                "decay."
            )
        for path, (count, width) in self.rows.items():
            notes.append(
                f"Trained rows of new tokens: {count} of {path}, {count * width:,} parameters, in fp32, without weight "
                "decay."
            )
        if self.saved:
            notes.append(f"Trained whole: {', '.join(self.saved)}.")
        if self.thawed:
            notes.append(f"All linear layers of {self.thawed} were frozen before; they are converted all the same.")
        for reason, count in Counter(self.skipped.values()).items():
            example = next(path for path, why in self.skipped.items() if why == reason)
            more = f" and {count - 1} more" if count > 1 else ""
            notes.append(f"Left alone: {example}{more}: {reason}.")
        for group in self.frozen:
            more = f" and {group.tensors - 1} more" if group.tensors > 1 else ""
            notes.append(
                f"Frozen: {group.kind}: {group.example}{more}, {group.parameters:,} parameters "
                f"({group.parameters / max(self.total_parameters, 1):.1%})."
            )
        return notes

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def layer_records(inventory: Inventory) -> list[LayerRecord]:
    """A record of each PaCA layer as it is now."""
    return [
        LayerRecord(
            path=path,
            kind=path.rpartition(".")[2] if not path.rpartition(".")[2].isdigit() else type(layer).__name__,
            in_features=layer.in_features,
            out_features=layer.out_features,
            r=layer.r,
            scaling=layer.scaling,
            delta_bytes=layer.paca_delta.numel() * layer.paca_delta.element_size(),
            experts=layer.experts if isinstance(layer, PaCAExperts) else 1,
        )
        for path, layer in inventory.layers.items()
    ]


def report_on(inventory: Inventory, config: PaCAConfig, resolution: Resolution) -> ConversionReport:
    """The report of a model that has just been converted."""
    layers = inventory.layers
    base = dict(_base_parameters(inventory))
    deltas = sum(layer.paca_delta.numel() for layer in layers.values() if layer.paca_delta.requires_grad)
    rows = {path: module.paca_rows for path, module in row_modules(inventory.root)}
    beside = sum(parameter.numel() for parameter in (*base.values(), *rows.values()) if parameter.requires_grad)
    return ConversionReport(
        config=config,
        layers=layer_records(inventory),
        skipped=resolution.skipped,
        thawed=resolution.thawed,
        frozen=frozen_groups(inventory, {name: p for name, p in base.items() if not p.requires_grad}),
        along=dict(_along(inventory)),
        saved=list(resolution.saved),
        rows={clean_path(path): (len(values), values.shape[1]) for path, values in rows.items()},
        by_data=sum(map(waits_for_data, layers.values())),
        trainable_parameters=deltas + beside,
        total_parameters=deltas
        + sum(parameter.numel() for parameter in base.values())
        + sum(layer.paca_delta.numel() // layer.r * layer.in_features for layer in layers.values()),
    )


def _along(inventory: Inventory) -> Iterator[tuple[str, tuple[int, int]]]:
    """Number of tensors and of parameters that are trained along, by their kind."""
    for name, kind in (("weight", "norm weights"), ("bias", "biases")):
        sizes = [module.get_parameter(name).numel() for module in inventory.paths if name in along_names(module)]
        if sizes:
            yield kind, (len(sizes), sum(sizes))


def _base_parameters(inventory: Inventory) -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's parameters by name, without the weights of PaCA layers, dense or quantized."""
    layers = inventory.layers
    for name, parameter in inventory.parameters.items():
        path, _, own_name = name.rpartition(".")
        if name not in layers and own_name != ROWS and (path not in layers or own_name == "bias"):
            yield name, parameter


def readable_size(number: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
