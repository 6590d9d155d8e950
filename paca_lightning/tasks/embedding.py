"""A LightningModule that trains a model to embed texts: those that belong together become neighbours."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from paca_lightning.tasks.contrastive_loss import Pooling, check_pooling, info_nce, pooled
from paca_lightning.tasks.data.text_batch import TextBatch, forward_arguments
from paca_lightning.tasks.decoder_blocks import check_block_settings
from paca_lightning.tasks.metrics import MeanTokenLoss
from paca_lightning.tasks.pretrained import build_for_training, check_complete, load_model
from paca_lightning.tasks.tuning import TuningModule

PairBatch = dict[str, TextBatch]
"""``anchor``, ``positive`` and perhaps ``negative``: each ``input_ids`` (B, T) and, where needed, its mask."""


class EmbeddingModule(TuningModule):
    """Trains any ``AutoModel`` to embed texts, by the contrastive loss with the other rows of a batch as negatives.

    The embedding of a text is the pooled last hidden state, with length 1. The loss of a row is InfoNCE
    (:func:`~paca_lightning.tasks.contrastive_loss.info_nce`) among the positives and negatives of its micro-batch, on
    its process. The loss of an optimizer step is the mean over its rows.

    Logged: ``train/loss``, ``train/grad_norm``, ``val/loss`` and ``val/retrieval``, the share of anchors whose nearest
    candidate of the batch is their own positive; after a test ``test/...``. ``predict`` returns the embeddings.

    Args:
        model: Hugging Face directory or hub id of an encoder or decoder. A head in its files is left out, and so is a
            pooler, which nothing here would train.
        pooling: ``mean`` of the tokens, ``last`` token (decoders), or ``cls``, the first one (encoders).
        temperature: Divides the cosines. Lower looks harder at the nearest negatives.
        dtype: Dtype of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ... Default: what the model has.
        activation_checkpointing: As for :class:`~paca_lightning.tasks.CausalLMModule`.
        compile: Compile each block with ``torch.compile``.
        pretrained: False starts from random weights of the shape in ``config.json``, for debugging.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the model.
        optimizer: Called with the parameters to train.
        lr_scheduler: Called with the optimizer. Default: a constant learning rate.

    Raises:
        PaCAError: If a setting is unknown, out of range, or excluded by another one.
    """

    def __init__(
        self,
        model: str,
        *,
        pooling: Pooling = "mean",
        temperature: float = 0.05,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        activation_checkpointing: bool | Literal["selective"] = False,
        compile: bool = False,
        pretrained: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        check_block_settings(activation_checkpointing, compile)
        check_pooling(pooling, temperature)
        self.retrieval = MeanTokenLoss()

    def configure_model(self) -> None:
        """Build the model, once.

        Raises:
            PaCAError: If it cannot be loaded, checkpointed or compiled.
        """
        if self.model is not None:
            return
        # Not streamed: files with a head name their tensors otherwise than the model below it.
        settings = self.build_settings() | {"streamed": False}
        del settings["pooling"], settings["temperature"]
        self.model = build_for_training(**settings, build=build_embedder)

    def forward(self, batch: TextBatch) -> Tensor:
        """Embeddings of texts (B, D), each of length 1."""
        model = self.built()
        hidden: Tensor = model(**forward_arguments(model, batch)).last_hidden_state
        return pooled(hidden, batch.get("attention_mask"), self.hparams["pooling"])

    def summed_loss(self, batch: PairBatch) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Summed loss of a batch's rows, and their number."""
        total, _, rows = self._compared(batch)
        return total, rows

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Add a batch to what is measured."""
        self._measure(batch, self.val_loss)

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Add a batch to what is measured."""
        self._measure(batch, self.test_loss)

    def log_evaluation(self, split: str, loss: Tensor) -> None:
        """Log the loss and the retrieval accuracy of a whole split."""
        super().log_evaluation(split, loss)
        self.log(f"{split}/retrieval", self.retrieval.compute(), prog_bar=True, sync_dist=True)
        self.retrieval.reset()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """The embeddings of each text of a row, by name, on the CPU."""
        return {name: self(texts).cpu() for name, texts in batch.items()}

    def _measure(self, batch: PairBatch, loss: MeanTokenLoss) -> None:
        total, right, rows = self._compared(batch)
        loss.update(total, rows)
        self.retrieval.update(right, rows)

    def _compared(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        vectors = {name: self(texts) for name, texts in batch.items()}
        return info_nce(
            vectors["anchor"],
            vectors["positive"],
            vectors.get("negative"),
            self.hparams["temperature"],
            left_out="repeated" in batch["anchor"],
        )


def build_embedder(model: str, **settings: Any) -> PreTrainedModel:
    """A model without a head, and without a pooler.

    Args:
        model: Directory with ``config.json`` and weights, or hub id.
        **settings: As for :func:`~paca_lightning.tasks.pretrained.load_model`.

    Raises:
        PaCAError: As ``load_model``, or if the files lack more than a pooler.
    """
    built, missing = load_model(AutoModel, model, **settings)
    check_complete(model, [name for name in missing if "pooler" not in name.split(".")])
    if isinstance(getattr(built, "pooler", None), nn.Module):
        built.pooler = None  # type: ignore[assignment]
    return built
