"""Embeddings of texts, and the contrastive loss between them."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.batch import IGNORE_INDEX

Pooling = Literal["mean", "last", "cls"]
"""The mean of a text's tokens, its last token, or its first one."""


def check_pooling(pooling: str, temperature: float) -> None:
    """Check what an embedding model is asked for.

    Raises:
        PaCAError: If the pooling is unknown, or the temperature is not positive.
    """
    if pooling not in ("mean", "last", "cls"):
        raise PaCAError(f"pooling={pooling!r} is unknown. Choose mean, last or cls.")
    if not 0 < temperature < float("inf"):
        raise PaCAError(f"temperature is {temperature}, but must be a positive number, such as 0.05.")


def pooled(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector of length 1 for each text, fp32 or wider (B, D).

    Args:
        hidden: Of each token (B, T, D).
        mask: 1 for tokens, 0 for padding on the right (B, T); None without padding.
        pooling: What becomes of the tokens.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "last":
        last = hidden.shape[1] - 1 if mask is None else mask.sum(1) - 1
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), last]
    elif mask is None:
        vectors = hidden.mean(1)
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1)
    return F.normalize(vectors, dim=-1)


def info_nce(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, temperature: float, left_out: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The contrastive loss of a batch (InfoNCE, arXiv 1807.03748), summed over its rows.

    For row i with anchor a, candidates c (all positives, then all negatives of the batch) and temperature t:
    ``-log(exp(a_i c_i / t) / sum_j exp(a_i c_j / t))``.

    Args:
        anchors: Vectors of length 1 (B, D).
        positives: What belongs to each anchor (B, D).
        negatives: What does not (B, D), if there are such.
        temperature: Divides the cosines.
        left_out: Whether the rows repeat those of another rank, and count for nothing.

    Returns:
        The summed loss, how many anchors are nearest to their own positive, and how many rows count: scalars.
    """
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    scores = anchors @ candidates.T / temperature
    own = torch.arange(len(anchors), device=anchors.device)
    right = (scores.argmax(1) == own).sum()
    if left_out:
        own, right = torch.full_like(own, IGNORE_INDEX), torch.zeros_like(right)
    return F.cross_entropy(scores, own, ignore_index=IGNORE_INDEX, reduction="sum"), right, (own >= 0).sum()
