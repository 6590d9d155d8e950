"""The Hugging Face model inside a LightningModule."""

from typing import Any, cast

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel

from paca_lightning.core.errors import PaCAError


def language_model(pl_module: LightningModule, asked_by: str) -> PreTrainedModel:
    """The Hugging Face causal language model in a module's attribute ``model``.

    Args:
        pl_module: Any module whose ``configure_model`` has run.
        asked_by: The callback that needs it, for the message.

    Raises:
        PaCAError: If there is none.
    """
    model: Any = getattr(pl_module, "model", None)
    # Not by class, as PEFT wraps models.
    if not hasattr(getattr(model, "config", None), "get_text_config") or not hasattr(model, "generate"):
        raise PaCAError(
            f"{asked_by} needs a Hugging Face causal language model in the attribute 'model' of "
            f"{type(pl_module).__name__}, where there is {type(model).__name__}. Keep the model there, or leave the "
            "callback out."
        )
    return cast(PreTrainedModel, model)
