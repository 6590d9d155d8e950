"""What the callbacks of inserted modules share: whose settings are taken, and where the modules go."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from typing_extensions import override

from paca_lightning.callbacks.adapter_method import AdapterMethodStrategy
from paca_lightning.other_methods.adapted import AdaptedModel, find_model
from paca_lightning.other_methods.inserted import InsertedModel, read_settings


class InsertedStrategy(AdapterMethodStrategy):
    """Trains modules that are inserted into a model.

    Args:
        settings: Of the method. Those of a given adapter replace them.
        adapter: Directory of a trained adapter to start from, or to evaluate.
        path: Of the model to adapt, inside the LightningModule. Default: the Hugging Face model.
        full_checkpoints: Keep the base weights in checkpoints. Default: only what is trained.
        nonfinite: At NaN or Inf in the loss or a gradient, ``stop`` the run or ``skip`` the step.
        resume_lr: Whose learning rate a resumed run takes, ``checkpoint`` or ``config``, as in ``PaCAStrategy``.
    """

    method: ClassVar[str]
    insert: ClassVar[Callable[..., InsertedModel]]

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        adapter: str | None,
        path: str | None,
        full_checkpoints: bool,
        nonfinite: Literal["stop", "skip"],
        resume_lr: Literal["checkpoint", "config"],
    ) -> None:
        super().__init__(
            adapter=adapter,
            path=path,
            full_checkpoints=full_checkpoints,
            nonfinite=nonfinite,
            resume_lr=resume_lr,
        )
        self.settings = settings if adapter is None else read_settings(adapter, self.method, settings)

    @override
    def adapt(self, pl_module: LightningModule) -> AdaptedModel:
        """Insert the modules, and freeze the rest of the LightningModule."""
        pl_module.requires_grad_(False)
        return self.insert(find_model(pl_module, self.path)[1], **self.settings)
