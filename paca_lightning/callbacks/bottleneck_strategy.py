"""BottleneckStrategy: the callback that trains bottleneck adapters in any LightningModule."""

from typing import Literal

from paca_lightning.callbacks.inserted_strategy import InsertedStrategy
from paca_lightning.other_methods.bottleneck import METHOD, insert_bottlenecks


class BottleneckStrategy(InsertedStrategy):
    """Train bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2021), as ``PaCAStrategy`` trains columns.

    Add it to a Trainer's callbacks, with any LightningModule whose optimizer takes
    ``[p for p in self.parameters() if p.requires_grad]``. Checkpoints hold the adapters; ``AdapterCheckpoint`` writes
    them to a directory. ``disable()`` is a context in which the model is the base model. The adapters are fp32 in
    every true precision. They cannot be merged.

    Args:
        size: Width of the bottleneck.
        placement: ``houlsby``: after attention and after the feed-forward layer, each before its residual connection.
            ``pfeiffer``: one after each block.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``. Default: ``gelu`` for Houlsby, ``relu`` for Pfeiffer.
        block_classes: Names of the blocks' classes. Default: those that a Hugging Face model declares.
        sublayers: Names of the two sublayers in a block, for ``houlsby``. Default: those of Hugging Face models.
        adapter: Directory of a trained adapter to start from, or to evaluate. Its settings replace those above.
        path: Of the model to adapt, inside the LightningModule. Default: the Hugging Face model.
        full_checkpoints: Keep the base weights in checkpoints. Default: only what is trained.
        nonfinite: At NaN or Inf in the loss or a gradient, ``stop`` the run or ``skip`` the step.
        resume_lr: Whose learning rate a resumed run takes, ``checkpoint`` or ``config``, as in ``PaCAStrategy``.

    Raises:
        PaCAError: From a run: if a setting is unknown, the model has no such blocks, or the run cannot do it.
    """

    method = METHOD
    insert = staticmethod(insert_bottlenecks)

    def __init__(
        self,
        size: int = 64,
        *,
        placement: Literal["houlsby", "pfeiffer"] = "houlsby",
        activation: str | None = None,
        block_classes: list[str] | None = None,
        sublayers: list[str] | None = None,
        adapter: str | None = None,
        path: str | None = None,
        full_checkpoints: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        resume_lr: Literal["checkpoint", "config"] = "checkpoint",
    ) -> None:
        settings = {
            "size": size,
            "placement": placement,
            "activation": activation,
            "block_classes": block_classes,
            "sublayers": sublayers,
        }
        super().__init__(
            settings,
            adapter=adapter,
            path=path,
            full_checkpoints=full_checkpoints,
            nonfinite=nonfinite,
            resume_lr=resume_lr,
        )
