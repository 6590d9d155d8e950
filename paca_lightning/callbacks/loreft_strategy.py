"""LoReFTStrategy: the callback that trains LoReFT's edits of hidden states in any LightningModule."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from paca_lightning.callbacks.inserted_strategy import InsertedStrategy
from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.loreft import METHOD, LoReFTModel, insert_loreft
from paca_lightning.other_methods.prompt_positions import Prompts, prompts_of


class LoReFTStrategy(InsertedStrategy):
    """Train LoReFT (Wu et al. 2024): low-rank edits of hidden states at the first and last tokens of each prompt.

    Add it to a Trainer's callbacks, with any LightningModule whose optimizer takes
    ``[p for p in self.parameters() if p.requires_grad]`` and whose batches are dictionaries of ``input_ids`` and
    ``labels``: a row's prompt is what lies before its first trained token. In ``generate`` the prompt is the whole
    input. Checkpoints hold the edits; ``AdapterCheckpoint`` writes them to a directory. ``disable()`` is a context in
    which the model is the base model. The edits are fp32, begin as none, and cannot be merged.

    Args:
        rank: Rows of R.
        first: Number of the prompt's first tokens to edit. A prompt shorter than ``first + last`` gives half to each.
        last: Number of its last ones.
        layers: Blocks to edit, counted from 0; negative ones from the end. Default: all.
        tied: Whether the first and the last tokens share one edit.
        block_classes: Names of the blocks' classes. Default: those that a Hugging Face model declares.
        adapter: Directory of a trained adapter to start from, or to evaluate. Its settings replace those above.
        path: Of the model to adapt, inside the LightningModule. Default: the Hugging Face model.
        full_checkpoints: Keep the base weights in checkpoints. Default: only what is trained.
        nonfinite: At NaN or Inf in the loss or a gradient, ``stop`` the run or ``skip`` the step.
        resume_lr: Whose learning rate a resumed run takes, ``checkpoint`` or ``config``, as in ``PaCAStrategy``.

    Raises:
        PaCAError: From a run: if a setting is out of range, the batches tell no prompts or are packed, or the run
            cannot do it.
    """

    method = METHOD
    insert = staticmethod(insert_loreft)

    def __init__(
        self,
        rank: int = 4,
        *,
        first: int = 4,
        last: int = 4,
        layers: list[int] | None = None,
        tied: bool = False,
        block_classes: list[str] | None = None,
        adapter: str | None = None,
        path: str | None = None,
        full_checkpoints: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        resume_lr: Literal["checkpoint", "config"] = "checkpoint",
    ) -> None:
        settings = {
            "rank": rank,
            "first": first,
            "last": last,
            "layers": layers,
            "tied": tied,
            "block_classes": block_classes,
        }
        super().__init__(
            settings,
            adapter=adapter,
            path=path,
            full_checkpoints=full_checkpoints,
            nonfinite=nonfinite,
            resume_lr=resume_lr,
        )
        self._tried = False

    def prompts(self, batch: Any) -> Prompts:
        """Where the prompts of a batch lie. Override it for batches of another form.

        Raises:
            PaCAError: If the batch does not tell.
        """
        return prompts_of(batch)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on what is trained must be a batch whose prompts are told."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(self._adapted, LoReFTModel)
        self._adapted.positions.must_be_told = True
        self._tried = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the batch's prompts; the first batch must have some."""
        prompts = self._tell(batch)
        if not self._tried and not bool((prompts.stop > prompts.start).any()):
            raise PaCAError(
                "LoReFT edits the tokens of the prompt, and no row of the first batch has one: all its tokens are "
                "trained. Train on answers only, or use another method."
            )
        self._tried = True

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the batch's prompts."""
        self._tell(batch)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the batch's prompts."""
        self._tell(batch)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the batch's prompts, if it has labels; without, rows are prompts."""
        if isinstance(batch, Mapping) and "labels" in batch:
            self._tell(batch)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove our hooks and forget the last batch; the model stays adapted."""
        self._forget()
        super().teardown(trainer, pl_module, stage)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error, when there is no teardown."""
        self._forget()
        super().on_exception(trainer, pl_module, exception)

    def _tell(self, batch: Any) -> Prompts:
        assert isinstance(self._adapted, LoReFTModel)
        prompts = self.prompts(batch)
        self._adapted.positions.tell(prompts)
        return prompts

    def _forget(self) -> None:
        if isinstance(self._adapted, LoReFTModel):
            self._adapted.positions.tell(None)
            self._adapted.positions.must_be_told = False
