"""PEFTStrategy: the callback that brings any method of PEFT to any LightningModule."""

import warnings
from typing import TYPE_CHECKING, Literal

from lightning.pytorch import LightningModule
from typing_extensions import override

from paca_lightning.callbacks.adapter_method import AdapterMethodStrategy
from paca_lightning.conversion.linear4bit_base import quantize_base
from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.adapted import AdaptedModel
from paca_lightning.other_methods.peft_model import adapt, read_peft_config

if TYPE_CHECKING:
    from peft import PeftConfig


class PEFTStrategy(AdapterMethodStrategy):
    """Train a model by any method of PEFT (LoRA, DoRA, IA3, prompt tuning, ...), as ``PaCAStrategy`` trains columns.

    Add it to a Trainer's callbacks, with any LightningModule whose optimizer takes
    ``[p for p in self.parameters() if p.requires_grad]``. PEFT puts its layers into the Hugging Face model, or without
    one into the module. Checkpoints hold what is trained; ``AdapterCheckpoint`` writes an adapter that PEFT reads.
    ``disable()`` is a context in which the model is the base model.

    Prompt methods put PEFT's model in the place of the Hugging Face model; its logits are those of the given tokens.

    Args:
        config: Any configuration of PEFT. Default: that of the adapter.
        adapter: Directory of an adapter of PEFT to start from, or to evaluate.
        path: Of the module to adapt, inside the LightningModule. Default: the Hugging Face model, or without one the
            LightningModule itself.
        quantize: ``nf4`` quantizes the frozen linear layers first, but no output head (QLoRA).
        full_checkpoints: Keep the base weights in checkpoints. Default: only what is trained.
        nonfinite: At NaN or Inf in the loss or a gradient, ``stop`` the run or ``skip`` the step.
        resume_lr: Whose learning rate a resumed run takes, ``checkpoint`` or ``config``, as in ``PaCAStrategy``.

    Raises:
        PaCAError: If PEFT is not installed, there is neither a config nor an adapter, or PEFT or a run cannot do what
            is asked for.
    """

    def __init__(
        self,
        config: "PeftConfig | None" = None,
        *,
        adapter: str | None = None,
        path: str | None = None,
        quantize: str | None = None,
        full_checkpoints: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        resume_lr: Literal["checkpoint", "config"] = "checkpoint",
    ) -> None:
        super().__init__(
            adapter=adapter,
            path=path,
            full_checkpoints=full_checkpoints,
            nonfinite=nonfinite,
            resume_lr=resume_lr,
        )
        if config is None:
            if adapter is None:
                raise PaCAError("PEFTStrategy needs a config, such as peft.LoraConfig(r=8), or an adapter.")
            config = read_peft_config(adapter)
            config.inference_mode = False
        if quantize not in (None, "nf4"):
            raise PaCAError(f"quantize={quantize!r} is unknown. Choose 'nf4' or leave it out.")
        self.config = config
        self.quantize = quantize

    @override
    def adapt(self, pl_module: LightningModule) -> AdaptedModel:
        """Put PEFT's layers into a module, after its base is quantized, if asked for."""
        quantized = quantize_base(pl_module) if self.quantize == "nf4" else 0
        with warnings.catch_warnings(record=True) as caught:  # said once, in the summary
            warnings.simplefilter("always")
            adapted = adapt(pl_module, self.config, self.path)
        said = [warning.message for warning in caught if not issubclass(warning.category, FutureWarning)]
        adapted.notes += dict.fromkeys(f"PEFT: {message}" for message in said)
        if quantized:
            adapted.notes.append(f"Quantized to NF4: {quantized} linear layers.")
        return adapted
