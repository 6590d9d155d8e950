"""The log-likelihood of four continuations of each prompt, computed with as little work as a key-value cache allows."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from paca_lightning.tasks.mmlu.prompts import Prompt

# B prompts, N options of each (4), P tokens of shared prefix, Q tokens of prompt after it, L tokens of option, V words.


@dataclass(frozen=True, slots=True)
class ScoringBatch:
    """Rows (numbers of questions) and prompts that are scored together."""

    rows: list[int]
    prompts: list[Prompt]


def plan_batches(prompts: Sequence[Prompt], groups: Sequence[object], batch_size: int) -> list[ScoringBatch]:
    """Batches of prompts of one group and of similar length, longest first.

    Prompts with examples should be grouped by subject: they share the examples, which are then computed once a batch.
    The plan does not depend on the number of processes, which deal the batches among themselves: each batch is
    computed with the same padding, and so with the same result, on any number of them.

    Args:
        prompts: The prompts; a row is a position in this list.
        groups: The group of each prompt.
        batch_size: Most prompts in a batch.
    """
    by_group: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        by_group.setdefault(group, []).append(row)
    batches = []
    for rows in by_group.values():
        rows.sort(key=lambda row: -len(prompts[row].tokens))
        chunks = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        batches += [ScoringBatch(chunk, [prompts[row] for row in chunk]) for chunk in chunks]
    # The longest first: what does not fit into memory shows at once.
    return sorted(batches, key=lambda batch: -max(len(prompt.tokens) for prompt in batch.prompts))


def deal(batches: Sequence[ScoringBatch], rank: int, world_size: int) -> Iterator[ScoringBatch]:
    """Every ``world_size``-th batch; all processes get equally many, the last round being filled up with the first.

    Sharded models communicate in their forward, so that each process must do as many. The metric counts a question
    once, however often it was scored.
    """
    for start in range(0, len(batches), world_size):
        yield batches[(start + rank) % len(batches)]


@torch.no_grad()
def score(model: PreTrainedModel, prompts: Sequence[Prompt], *, several_tokens: bool) -> Tensor:
    """Length-normalized log-likelihood of each prompt's options.

    The tokens that all prompts share are run once, the rest of each prompt once, and its options continue from its
    cache. Only the last position of a prompt has logits.

    Args:
        model: A causal language model with a key-value cache.
        prompts: Prompts that begin with the same token at least.
        several_tokens: Whether options of any prompt, on any process, have more than one token. It alone decides the
            number of forward passes, which sharded models need to be equal on all processes.

    Returns:
        Scores, shape (B, N), float32.
    """
    options = [option for prompt in prompts for option in prompt.options]  # B * N
    count = len(prompts[0].options)
    shared = _shared_length([prompt.tokens for prompt in prompts])
    rests = [prompt.tokens[shared:] for prompt in prompts]

    ids = torch.tensor([prompts[0].tokens[:shared]], dtype=torch.long, device=model.device)  # (1, P)
    mask = torch.ones_like(ids)
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(prompts))

    ids, rest_mask = _padded(rests, model.device, left=True)  # (B, Q)
    mask = torch.cat([mask.expand(len(prompts), -1), rest_mask], dim=1)
    output = _forward(model, ids, mask, cache, logits_to_keep=1)
    first = output.logits[:, -1].float().log_softmax(-1).repeat_interleave(count, dim=0)  # (B N, V)

    ids, option_mask = _padded(options, model.device, left=False)  # (B N, L)
    total = first.gather(1, ids[:, :1]).squeeze(1)
    if several_tokens:
        ids, option_mask = (t if t.shape[1] > 1 else pad(t, (0, 1)) for t in (ids, option_mask))
        cache.batch_repeat_interleave(count)
        mask = torch.cat([mask.repeat_interleave(count, dim=0), option_mask[:, :-1]], dim=1)
        logits = _forward(model, ids[:, :-1], mask, cache).logits  # (B N, L - 1, V)
        for position in range(logits.shape[1]):  # one at a time: the float32 copy of all of them would be large
            log_likelihood = logits[:, position].float().log_softmax(-1).gather(1, ids[:, position + 1, None])
            total = total + log_likelihood.squeeze(1) * option_mask[:, position + 1]
    lengths = torch.tensor([prompt.lengths for prompt in prompts], device=total.device)
    return total.view(len(prompts), count) / lengths


def _shared_length(sequences: Sequence["array[int]"]) -> int:
    """How many tokens all sequences begin with, but leaving each at least one."""
    first, last = min(sequences), max(sequences)  # in the order of sorting, those between share what these two share
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any, **kwargs: Any) -> Any:
    """Continue from a cache; masked tokens take no position."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
    )


def _padded(sequences: Sequence["array[int]"], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Sequences as one tensor filled up with zeros on one side, and its attention mask."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), None) if left else slice(len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)
