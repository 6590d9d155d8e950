"""Memorization: how much of a row a model recites, word by word, from what comes before and its first k tokens.

A row is memorized if the model's greedy continuation of its first k tokens is the row's own (Carlini et al., arXiv
2202.07646; Biderman et al., arXiv 2304.11158: k = 32, and 32 tokens of continuation). In a conversation, k counts
tokens that are trained: what comes before them, such as the question, is shown in full, as nothing teaches a model to
recite it.

One forward tells all. Up to its first error, greedy decoding has the row's own tokens before it, so its choices are
the likeliest tokens at each position of the row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

LONGEST, SHORTEST = 32, 8
"""Tokens of a continuation: most, and fewest that count. A shorter one is soon right by chance."""
LOGITS = 2**28
"""Logits that exist at a time."""


class Excerpt(NamedTuple):
    """What a model is shown of a row, and what it should recite.

    Attributes:
        row: Number of the row in its set.
        context: Tokens it is shown, (C,).
        continuation: Tokens to recite, at least ``SHORTEST`` and at most ``LONGEST``.
    """

    row: int
    context: list[int]
    continuation: list[int]


def excerpts_of(rows: Sequence[dict[str, Any]], k: int) -> list[Excerpt]:
    """An excerpt of each row that has a stretch of at least k + ``SHORTEST`` trained tokens: of the first such one.

    Args:
        rows: ``input_ids`` (T,) and whether each is ``trained`` (T,).
        k: Trained tokens that are shown.
    """
    found = []
    for number, row in enumerate(rows):
        edges = np.flatnonzero(np.diff(np.asarray(row["trained"], dtype=np.int8), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2).tolist():
            first = max(start + k, 1)  # the first token of all is never predicted
            if end - first >= SHORTEST:
                ids = row["input_ids"]
                found.append(Excerpt(number, ids[:first], ids[first : min(end, first + LONGEST)]))
                break
    return found


@torch.no_grad()
def recited(model: PreTrainedModel, excerpts: Sequence[Excerpt], batch_size: int) -> list[int]:
    """How many tokens of each continuation greedy decoding gives before its first error.

    Args:
        model: In eval mode.
        excerpts: Of rows.
        batch_size: Rows at a time, at most: fewer if their logits take too much memory.
    """
    lengths = [len(one.context) + len(one.continuation) - 1 for one in excerpts]
    order = sorted(range(len(excerpts)), key=lambda number: -lengths[number])
    counts = [0] * len(excerpts)
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    while order:
        size = max(1, min(batch_size, LOGITS // (lengths[order[0]] * vocabulary)))
        chosen, order = order[:size], order[size:]
        likeliest = _likeliest(model, [(excerpts[n].context + excerpts[n].continuation)[:-1] for n in chosen])
        for number, ids in zip(chosen, likeliest, strict=True):
            one = excerpts[number]
            said = ids[len(one.context) - 1 :][: len(one.continuation)]
            right = said == torch.tensor(one.continuation)
            counts[number] = int(right.long().cumprod(0).sum())
    return counts


def _likeliest(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """The likeliest token after each token of some rows, (B, T), in host memory."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return model(**inputs, use_cache=False).logits.argmax(-1).cpu()
