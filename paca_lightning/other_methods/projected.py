"""GaLore and APOLLO: full weights trained through low-rank projections of their gradients, by their own packages.

Zhao et al. 2024, https://arxiv.org/abs/2403.03507, and Zhu et al. 2024, https://arxiv.org/abs/2412.05270. Their
optimizers project the parameters of groups with a ``rank``; which those are is chosen here, and their state is made
such that a checkpoint can hold it.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.targets import resolve
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError

PROJECTOR = "projector"
"""Of a parameter's state in these optimizers."""

KEPT = ("ortho_matrix", "seed")
"""What a projector knows beside the settings of its group."""


DEFAULTS = {"rank": 128, "update_proj_gap": 200}
"""Of projected groups."""


@dataclass(frozen=True)
class Kind:
    """An optimizer that projects.

    Attributes:
        name: Of the method.
        class_path: Of the optimizer.
        settings: Of its projected groups, beside the rank: their authors' for fine-tuning.
    """

    name: str
    class_path: str
    settings: dict[str, Any]


KINDS = (
    Kind("GaLore", "galore_torch.GaLoreAdamW", {"scale": 0.25, "proj_type": "std"}),
    Kind(
        "APOLLO",
        "apollo_torch.APOLLOAdamW",
        {"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"},
    ),
)


def kind_of(optimizer: Optimizer) -> Kind | None:
    """Which of them an optimizer is; None if none."""
    for kind in KINDS:
        package, _, name = kind.class_path.rpartition(".")
        if type(optimizer) is getattr(sys.modules.get(package), name, None):
            return kind
    return None


def projected_optimizer(model: nn.Module, kind: Kind, settings: dict[str, Any]) -> Optimizer:
    """One of the optimizers over a model's parameters, as ``ProjectedGradients`` would make its groups.

    Args:
        model: All of its parameters are trained.
        kind: Which optimizer.
        settings: Of the projected groups that differ from ``DEFAULTS`` and the kind's own.

    Raises:
        PaCAError: If the package is not installed, or nothing can be projected.
    """
    package, _, name = kind.class_path.rpartition(".")
    try:
        optimizer_class = getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise PaCAError(f"{kind.name} needs {package}. Run: pip install {package.replace('_', '-')}.") from error
    settings = DEFAULTS | kind.settings | settings
    weights = projectable(model, PaCAConfig(), settings["rank"]).values()
    groups = split_group({"params": list(model.parameters())}, weights, settings)
    optimizer: Optimizer = optimizer_class(groups, lr=1e-4, no_deprecation_warning=True)
    return optimizer


def projectable(module: nn.Module, config: PaCAConfig, rank: int) -> dict[str, nn.Parameter]:
    """The weights of linear layers that are trained and larger than the rank on both sides, by path.

    Args:
        module: Of a run.
        config: Its ``target_modules`` and ``exclude_modules`` choose layers as PaCA chooses them; no output head.
        rank: Of the projections.

    Raises:
        PaCAError: If there is none.
    """
    targets = resolve(take_inventory(module), config).targets
    weights = {target.path: target.module.get_parameter("weight") for target in targets}
    found = {path: w for path, w in weights.items() if w.requires_grad and w.dim() == 2 and min(w.shape) > rank}
    if not found:
        raise PaCAError(
            f"None of {len(weights)} linear layers has a trained weight larger than rank {rank} on both sides. Nothing "
            "can be projected: lower the rank."
        )
    return found


def split_group(group: dict[str, Any], projected: Iterable[nn.Parameter], settings: dict[str, Any]) -> list[Any]:
    """A parameter group as two: the projected parameters with their settings, behind the others.

    Args:
        group: As a user gives it.
        projected: Parameters to project, in this group or not.
        settings: Of a projected group. A group of the user's own with a rank stays as it is.
    """
    if "rank" in group:
        return [group]
    params = group["params"]
    params = [params] if isinstance(params, nn.Parameter) else list(params)
    chosen = {id(parameter) for parameter in projected}
    plain = [p for p in params if id(p[1] if isinstance(p, tuple) else p) not in chosen]
    own = [p for p in params if id(p[1] if isinstance(p, tuple) else p) in chosen]
    parts = [group | {"params": plain}, group | {"params": own} | settings]
    return [part for part in parts if part["params"]]


def keep_projectors(optimizer: Optimizer) -> None:
    """Let an optimizer's state dict hold its projectors as tensors and numbers, and be loaded from them.

    The packages put objects of their own there, which no checkpoint that is read with ``weights_only=True`` may hold.
    """
    optimizer.register_state_dict_post_hook(_without_objects)
    optimizer.register_load_state_dict_post_hook(_with_objects)


def _without_objects(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def plain(state: Any) -> Any:
        if not isinstance(state, dict) or PROJECTOR not in state:
            return state
        known = vars(state[PROJECTOR])
        return state | {PROJECTOR: {name: known[name] for name in KEPT if known.get(name) is not None}}

    return state_dict | {"state": {key: plain(state) for key, state in state_dict["state"].items()}}


def _with_objects(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get(PROJECTOR), dict):
                projector = _projector_class(group)(
                    group["rank"],
                    update_proj_gap=group["update_proj_gap"],
                    scale=group["scale"],
                    proj_type=group["proj_type"],
                )
                vars(projector).update(state[PROJECTOR])
                state[PROJECTOR] = projector


def _projector_class(group: dict[str, Any]) -> Callable[..., Any]:
    place = {
        None: "galore_torch.galore_projector.GaLoreProjector",
        "random": "apollo_torch.random_projector.GradientProjector",
        "svd": "apollo_torch.svd_projector.GaLoreProjector",
    }[group.get("proj")]
    module, _, name = place.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
