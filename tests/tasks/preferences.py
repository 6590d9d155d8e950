"""Rows and batches of preferences."""

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 384


def preference_batch(labelled: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Three pairs, or three rows with labels and their strange answers, of uneven length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (6, 16), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, (start, end) in enumerate([(4, 16), (6, 11), (3, 9), (4, 8), (6, 16), (3, 12)]):
        labels[row, :start] = labels[row, end:] = -100
        mask[row, end:] = 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "rows": torch.arange(3)}
    return batch | {"good": torch.tensor([True, False, True])} if labelled else batch


def pairs(count: int) -> list[dict[str, Any]]:
    """Rows of pairs, of uneven length."""
    return [
        {
            "prompt": f"What is {i}?" * (i % 3 + 1),
            "chosen": f"It is {i}.",
            "rejected": "A dog jumps" + " over" * (i % 5),
        }
        for i in range(count)
    ]


def labelled(count: int) -> list[dict[str, Any]]:
    """Rows of single answers with labels, of uneven length."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"] if i % 2 else row["rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs(count))
    ]
