"""ProjectedGradients: the callback that makes the parameter groups of GaLore's and APOLLO's optimizers."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning.callbacks.adapter_method import AdapterMethodStrategy
from paca_lightning.callbacks.method_hooks import MethodHooks, replaced_methods
from paca_lightning.callbacks.paca import PaCAStrategy
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.projected import KINDS, keep_projectors, kind_of, projectable, split_group


class ProjectedGradients(Callback):
    """Train the full weights with GaLore or APOLLO, in any LightningModule that builds one of their optimizers.

    ``galore_torch.GaLoreAdamW`` and ``apollo_torch.APOLLOAdamW`` keep Adam's moments of a few directions of a weight's
    gradient. They project the parameters of groups that have a rank. This callback makes these groups while
    ``configure_optimizers`` runs, of whatever parameters it gives: weights of linear layers are projected; output
    heads, embeddings, norms and biases are trained by plain Adam. Learning-rate schedules see both groups. Checkpoints
    hold the full weights and the projections, and resume bitwise.

    Args:
        rank: Of the projections. Weights that are no larger on one side are not projected.
        update_proj_gap: Steps after which the directions are chosen again.
        settings: Other settings of the projected groups, such as ``scale``. Default: 0.25 for GaLore, 1 for APOLLO, and
            its ``proj: random``, ``scale_type: channel``.
        target_modules: Layers to project, as in ``PaCAConfig``.
        exclude_modules: Layers not to project.

    Raises:
        PaCAError: From a run: if the optimizer is none of these, nothing can be projected, the strategy shards the
            model, or PaCA or another method trains in place of the weights.
    """

    def __init__(
        self,
        rank: int = 128,
        *,
        update_proj_gap: int = 200,
        settings: dict[str, Any] | None = None,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: list[str] | None = None,
    ) -> None:
        if rank < 1 or update_proj_gap < 1:
            raise PaCAError(f"ProjectedGradients: rank={rank} and update_proj_gap={update_proj_gap} must be positive.")
        self.rank = rank
        self.update_proj_gap = update_proj_gap
        self.settings = settings or {}
        self.layers = PaCAConfig(target_modules=target_modules, exclude_modules=exclude_modules or [])
        self._hooks = MethodHooks()
        self._splitting = ExitStack()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run, and be there when its optimizers are built."""
        if stage != "fit":
            return
        name = type(self).__name__
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise PaCAError(
                f"{name}: {type(trainer.strategy).__name__} shards weights, and these optimizers project whole ones. "
                "Use strategy='auto' or 'ddp'."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PaCAStrategy | AdapterMethodStrategy):
                raise PaCAError(
                    f"{name} trains the full weights, and {type(other).__name__} freezes them: choose one of them."
                )
        self._hooks.add(
            pl_module, "configure_optimizers", self._splitting.close, first=lambda: self._split_groups(pl_module)
        )
        self._hooks.add(trainer.strategy, "setup_optimizers", lambda _: self._check(trainer, pl_module))

    def _split_groups(self, pl_module: LightningModule) -> None:
        """From now on optimizers get two groups for each one they are given."""
        weights = projectable(pl_module, self.layers, self.rank)
        add = Optimizer.add_param_group

        def add_split(optimizer: Optimizer, group: dict[str, Any]) -> None:
            kind = kind_of(optimizer)
            groups = [group] if kind is None else split_group(group, weights.values(), self._settings(kind.settings))
            for part in groups:
                add(optimizer, part)

        # A schedule counts the groups of its optimizer, so they must be right from the start.
        self._splitting.enter_context(replaced_methods(Optimizer, add_param_group=add_split))

    def _settings(self, defaults: dict[str, Any]) -> dict[str, Any]:
        return {"rank": self.rank, "update_proj_gap": self.update_proj_gap} | defaults | self.settings

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            kind = kind_of(optimizer)
            if kind is None:
                known = " or ".join(one.class_path for one in KINDS)
                raise PaCAError(
                    f"{type(self).__name__}: {type(optimizer).__module__}.{type(optimizer).__name__} projects nothing. "
                    f"Let configure_optimizers build {known}."
                )
            keep_projectors(optimizer)
            groups = optimizer.param_groups
            own = [parameter for group in groups if "rank" in group for parameter in group["params"]]
            others = [parameter for group in groups if "rank" not in group for parameter in group["params"]]
            if not own:
                raise PaCAError(f"{type(self).__name__}: none of the optimizer's parameters can be projected.")
            rank_zero_info(
                f"{kind.name}: {len(own)} weights of linear layers ({_numbers(own):,} parameters) are trained through "
                f"projections of rank {self.rank}, {len(others)} other tensors ({_numbers(others):,}) by plain Adam."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove our hooks."""
        self._splitting.close()
        self._hooks.remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove our hooks after an error, when there is no teardown."""
        self._splitting.close()
        self._hooks.remove()


def _numbers(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
