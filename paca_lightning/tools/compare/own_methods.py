"""Methods of this package beside PaCA: bottleneck adapters, LoReFT, and projected optimizers."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError, did_you_mean
from paca_lightning.other_methods.bottleneck import insert_bottlenecks
from paca_lightning.other_methods.loreft import insert_loreft
from paca_lightning.other_methods.projected import KINDS, projected_optimizer
from paca_lightning.tools.compare.methods import Method
from paca_lightning.tools.compare.task import Settings, Task, replaced

INSERTED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "bottleneck": ("paca_lightning.BottleneckStrategy", "size", insert_bottlenecks),
    "loreft": ("paca_lightning.LoReFTStrategy", "rank", insert_loreft),
}
"""By name: the callback, the setting that says how much is trained, and what inserts the method's modules."""

PROJECTED = {kind.name.lower(): kind for kind in KINDS}
"""Optimizers that project, by name."""

ADAM = ("lr", "betas", "eps", "weight_decay")
"""Settings of an optimizer of a run that those optimizers have too."""
PROJECTION = ("rank", "update_proj_gap")


@dataclass(frozen=True)
class InsertedMethod(Method):
    """A method that inserts modules of its own.

    Attributes:
        name: In ``INSERTED``.
    """

    name: str = ""

    @property
    @override
    def size_field(self) -> str:
        return INSERTED[self.name][1]

    @override
    def callbacks(self, task: Task, seed: int) -> list[Settings]:
        return [{"class_path": INSERTED[self.name][0], "init_args": dict(self.options)}]

    @override
    def apply(self, model: nn.Module, paca: PaCAConfig) -> nn.Module:
        INSERTED[self.name][2](model, **self.options)
        return model


@dataclass(frozen=True)
class ProjectedMethod(Method):
    """Full fine-tuning with an optimizer that projects gradients.

    Attributes:
        name: In ``PROJECTED``.
    """

    name: str = ""

    @property
    @override
    def size_field(self) -> str:
        return "rank"

    @override
    def callbacks(self, task: Task, seed: int) -> list[Settings]:
        own = {name: value for name, value in self.options.items() if name in PROJECTION}
        further = {name: value for name, value in self.options.items() if name not in PROJECTION}
        init_args = own | ({"settings": further} if further else {})
        return [{"class_path": "paca_lightning.ProjectedGradients", "init_args": init_args}]

    @override
    def optimizer(self, model: nn.Module) -> Optimizer:
        return projected_optimizer(model, PROJECTED[self.name], self.options)

    @override
    def changed(self, settings: Settings, task: Task) -> Settings:
        """The settings of a run with the method's optimizer in place of the run's own.

        Raises:
            PaCAError: If the config does not name the optimizer beside its learning rate.
        """
        *place, init_args, _ = task.lr_key
        entry: Any = settings
        for key in place:
            entry = entry[key]
        if init_args != "init_args" or "class_path" not in entry:
            raise PaCAError(
                f"Method {self.label!r} needs an optimizer with class_path and init_args in the config, where the "
                f"learning rate is ({'.'.join(task.lr_key)})."
            )
        kept = {name: value for name, value in entry["init_args"].items() if name in ADAM and value is not None}
        own = {"no_deprecation_warning": True}
        return replaced(
            settings, tuple(place), {"class_path": PROJECTED[self.name].class_path, "init_args": kept | own}
        )


def own_method(name: str, label: str, options: dict[str, Any]) -> Method:
    """The method of that name.

    Raises:
        PaCAError: If it has no such option.
    """
    if name in PROJECTED:
        known = [*PROJECTION, *PROJECTED[name].settings]
    else:
        known = list(inspect.signature(INSERTED[name][2]).parameters)[1:]
    for option in options:
        if option not in known:
            meant = did_you_mean(option, known)
            raise PaCAError(f"Method {label!r} has no option {option!r}.{meant} Options: {', '.join(known)}.")
    return (
        ProjectedMethod(label, options=options, name=name)
        if name in PROJECTED
        else InsertedMethod(label, options=options, name=name)
    )
