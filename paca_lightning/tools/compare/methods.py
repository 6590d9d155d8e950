"""The methods of a comparison: how each one trains a run's model."""

import copy
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning.conversion.convert import apply_paca
from paca_lightning.core.config import PaCAConfig
from paca_lightning.tools.bench.methods import fused_adamw, train_nothing
from paca_lightning.tools.compare.search import Space
from paca_lightning.tools.compare.task import Settings, Task


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. This one trains the whole model.

    Attributes:
        label: Its name in tables, unique in a comparison.
        space: Learning rates to search; None: those that suit the method.
        options: Fields of the method's own config that differ from what the run says.
    """

    label: str
    space: Space | None = field(default=None, compare=False)
    options: Settings = field(default_factory=dict, compare=False)

    @property
    def slug(self) -> str:
        """The label as the name of a directory."""
        return re.sub(r"[^\w.+=-]+", "-", self.label).strip("-")

    @property
    def size_field(self) -> str | None:
        """The field of the method's config that says how much is trained, such as its rank; None: there is none."""
        return None

    @property
    def replaces(self) -> bool:
        """Whether the run's own method has to go."""
        return True

    def resized(self, size: int) -> Self:
        """The same method at another size, which its label then tells."""
        name, comma, rest = self.label.partition(",")
        options = self.options | {str(self.size_field): size}
        return dataclasses.replace(self, label=f"{name.partition(':')[0]}:{size}{comma}{rest}", options=options)

    def callbacks(self, task: Task, seed: int) -> list[Settings]:
        """The callbacks that train this way, as a config has them."""
        return []

    def changed(self, settings: Settings, task: Task) -> Settings:
        """The settings of a run, with what the method changes beside callbacks.

        Raises:
            PaCAError: If the run does not allow it.
        """
        return settings

    def apply(self, model: nn.Module, paca: PaCAConfig) -> nn.Module:
        """Change a model as the method does; only what it trains requires a gradient then.

        Args:
            model: A Hugging Face model, perhaps on the meta device.
            paca: What the run's own PaCAStrategy says.

        Raises:
            PaCAError: If the model, or one of the options, is refused.
        """
        return model.requires_grad_(True)

    def left_frozen(self, task: Task) -> list[str]:
        """Paths of stacked experts that PaCA trains in a task's model and this method, which adapts layers, cannot."""
        return []

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer whose steps are timed: of what a model trains that the method was applied to."""
        return fused_adamw(model)

    def count(self, task: Task) -> int:
        """How many parameters it trains in a task's model."""
        try:
            model = self.apply(copy.deepcopy(task.model), task.paca)
        except NotImplementedError:  # some methods look at values, which the meta device has not
            model = self.apply(copy.deepcopy(task.model).to_empty(device="cpu"), task.paca)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class FloorMethod(Method):
    """Trains nothing: the model as it was, and the least that a step can cost."""

    @override
    def apply(self, model: nn.Module, paca: PaCAConfig) -> nn.Module:
        return train_nothing(model)


@dataclass(frozen=True)
class AsConfigured(Method):
    """Trains as the run's config says."""

    @property
    @override
    def replaces(self) -> bool:
        return False


@dataclass(frozen=True)
class PaCAMethod(Method):
    """PaCA with the settings of the run's own PaCAStrategy, changed by the options."""

    @property
    @override
    def size_field(self) -> str:
        return "r"

    def config(self, paca: PaCAConfig, seed: int = 0) -> PaCAConfig:
        """The settings.

        Raises:
            PaCAError: If an option is no setting of PaCA, or has a value that it does not take.
        """
        return PaCAConfig.from_dict(paca.to_dict() | {"seed": seed} | self.options)

    @override
    def callbacks(self, task: Task, seed: int) -> list[Settings]:
        config: dict[str, Any] = self.config(task.paca, seed).to_dict()
        return [{"class_path": "paca_lightning.PaCAStrategy", "init_args": {"config": config}}]

    @override
    def apply(self, model: nn.Module, paca: PaCAConfig) -> nn.Module:
        # Which columns are chosen, and how far they move, changes neither sizes nor times, and may look at data.
        apply_paca(model, dataclasses.replace(self.config(paca), selection="random", column_steps="equal"))
        return model
