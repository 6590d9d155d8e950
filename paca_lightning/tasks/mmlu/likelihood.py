"""Log-likelihood of the four continuations of each prompt; shared prefixes run once, through the key-value cache."""

import copy
import inspect
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from paca_lightning.tasks.mmlu.prompts import Prompt

_LEAST_FILLED = 0.7  # of a row: below, a new batch is started rather than padding more
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # as configurations call them; the last: GPT-Neo's
_CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class ScoringBatch:
    """Rows (numbers of questions) and prompts that are scored together."""

    rows: list[int]
    prompts: list[Prompt]


def plan_batches(prompts: Sequence[Prompt], groups: Sequence[object], batch_size: int) -> list[ScoringBatch]:
    """Batches of prompts of one group and similar length, longest first.

    Prompts with examples should be grouped by subject: they share the examples, which then run once a batch. The
    batches do not depend on the number of processes, so neither do their padding and their results.

    Args:
        prompts: The prompts; a row is a position in this list.
        groups: The group of each prompt.
        batch_size: Most prompts in a batch.
    """
    by_group: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        by_group.setdefault(group, []).append(row)
    batches: list[ScoringBatch] = []
    for rows in by_group.values():
        longest = 0
        for row in sorted(rows, key=lambda row: -len(prompts[row].tokens)):
            length = len(prompts[row].tokens)
            if not longest or len(batches[-1].rows) == batch_size or length < _LEAST_FILLED * longest:
                batches.append(ScoringBatch([], []))
                longest = length
            batches[-1].rows.append(row)
            batches[-1].prompts.append(prompts[row])
    # The longest first, so that a batch too large for the memory fails at once.
    return sorted(batches, key=lambda batch: -max(len(prompt.tokens) for prompt in batch.prompts))


def deal(batches: Sequence[ScoringBatch], rank: int, world_size: int) -> Iterator[ScoringBatch]:
    """Every ``world_size``-th batch. The last round is filled up with the first batches.

    So all processes get equally many, as the forward of a sharded model is collective. The metric counts each question
    once.
    """
    for start in range(0, len(batches), world_size):
        yield batches[(start + rank) % len(batches)]


def cache_serves(config: PreTrainedConfig, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts can be continued from a padded cache. They cannot if a layer sees less than a whole sequence.

    In a sliding window, padding would take the place of tokens, and the cache has dropped tokens that shorter prompts
    of the batch still see. Recurrent layers would process the padding as tokens.

    Args:
        config: Config of the model.
        prompts: All prompts to be scored.
    """
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None):  # RWKV
        return False
    layers = set(getattr(text, "layer_types", None) or _CACHED_LAYERS)
    if layers == {"full_attention"} or not getattr(text, "use_sliding_window", True):
        return True
    windows = [window for name in _WINDOWS if (window := getattr(text, name, None)) is not None]
    longest = max(len(prompt.tokens) + max(map(len, prompt.options)) for prompt in prompts)
    return layers <= _CACHED_LAYERS and all(longest <= window for window in windows)


@torch.no_grad()
def score(model: PreTrainedModel, prompts: Sequence[Prompt], *, several_tokens: bool, cached: bool = True) -> Tensor:
    """Length-normalized log-likelihood of each prompt's options.

    With a cache, the tokens shared by all prompts run once, then the rest of each prompt, then its options from its
    cache. Options are sorted by length and run as many at a time as there are prompts, so there is little padding, and
    the cache is at most doubled. Only the last position of a prompt has logits. Without a cache, each option runs with
    its whole prompt, which takes several times as long if options have more than one token.

    Args:
        model: A causal language model.
        prompts: Prompts with at least one token in common, each with N options.
        several_tokens: Whether any option of any prompt, on any process, has more than one token. It alone decides the
            number of forward passes, which must be equal on all processes of a sharded model.
        cached: Whether to use a key-value cache, see :func:`cache_serves`.

    Returns:
        Scores, shape (B, N), float32.
    """
    count = len(prompts[0].options)
    tokens = [prompt.tokens for prompt in prompts]
    cache, mask, logits = _read(model, tokens) if cached else (None, None, _read_whole(model, tokens, 1)[:, -1])

    options = [option for prompt in prompts for option in prompt.options]  # B * N
    first_tokens = torch.tensor([option[0] for option in options], device=logits.device).view(-1, count)
    scores = logits.float().log_softmax(-1).gather(1, first_tokens).flatten()
    if several_tokens:
        by_length = sorted(range(len(options)), key=lambda number: len(options[number]))
        for start in range(0, len(options), len(prompts)):
            numbers = by_length[start : start + len(prompts)]
            chunk = torch.tensor(numbers, device=logits.device)
            chosen = [options[number] for number in numbers]
            if mask is None:
                scores[chunk] += _continue_whole(model, [tokens[number // count] for number in numbers], chosen)
            else:
                scores[chunk] += _continue(model, cache, mask, chunk // count, chosen)
    lengths = torch.tensor([prompt.lengths for prompt in prompts], device=logits.device)
    return scores.view(-1, count) / lengths


def _read(model: PreTrainedModel, prompts: Sequence["array[int]"]) -> tuple[Any, Tensor, Tensor]:
    """Cache of all prompts, its attention mask (B, P + Q), and the logits (B, V) after each prompt's last token."""
    shared = _shared_length(prompts)
    ids = torch.tensor([prompts[0][:shared]], dtype=torch.long, device=model.device)  # (1, P)
    mask = torch.ones_like(ids)
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    cache = getattr(output, _cache_name(model))
    cache.batch_repeat_interleave(len(prompts))

    ids, rest_mask = _padded([prompt[shared:] for prompt in prompts], model.device, left=True)  # (B, Q)
    mask = torch.cat([mask.expand(len(prompts), -1), rest_mask], dim=1)
    return cache, mask, _forward(model, ids, mask, cache, logits_to_keep=1)[:, -1]


def _continue(
    model: PreTrainedModel, cache: Any, mask: Tensor, rows: Tensor, options: Sequence["array[int]"]
) -> Tensor:
    """Log-likelihood of each option's tokens after the first, given the prompt at its row of the cache."""
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(rows)
    ids, option_mask = _padded(options, mask.device, left=False)  # (B, L)
    if ids.shape[1] == 1:
        ids, option_mask = pad(ids, (0, 1)), pad(option_mask, (0, 1))
    logits = _forward(model, ids[:, :-1], torch.cat([mask[rows], option_mask[:, :-1]], dim=1), cache)  # (B, L - 1, V)
    total = torch.zeros(len(options), device=mask.device)
    for position in range(logits.shape[1]):  # one at a time, as float32 logits take much memory
        log_likelihood = logits[:, position].float().log_softmax(-1).gather(1, ids[:, position + 1, None])
        total += log_likelihood.squeeze(1) * option_mask[:, position + 1]
    return total


def _read_whole(model: PreTrainedModel, sequences: Sequence["array[int]"], kept: int) -> Tensor:
    """Logits (B, kept, V) of the last tokens of each sequence, without a cache."""
    ids, mask = _padded(sequences, model.device, left=True)
    return _forward(model, ids, mask, None, logits_to_keep=kept)


def _continue_whole(model: PreTrainedModel, prompts: Sequence["array[int]"], options: Sequence["array[int]"]) -> Tensor:
    """Log-likelihood of each option's tokens after the first, given its prompt."""
    sequences = [prompt + option for prompt, option in zip(prompts, options, strict=True)]
    longest = max(map(len, options))
    logits = _read_whole(model, sequences, longest)
    total = torch.zeros(len(options), device=logits.device)
    for last in range(1, longest):  # counted from the end
        ids = torch.tensor([sequence[-last] for sequence in sequences], device=logits.device)
        inside = torch.tensor([last < len(option) for option in options], device=logits.device)
        log_likelihood = logits[:, -1 - last].float().log_softmax(-1).gather(1, ids[:, None])
        total += log_likelihood.squeeze(1) * inside
    return total


def _shared_length(sequences: Sequence["array[int]"]) -> int:
    """Length of the prefix common to all sequences, less one token if a sequence has no other."""
    first, last = min(sequences), max(sequences)  # sequences between these two in sorting order share their prefix
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    """Logits of tokens after those in a cache, which is extended if given. Masked tokens take no position."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    caching = {_cache_name(model): cache, "use_cache": cache is not None}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **caching, **kwargs).logits


def _cache_name(model: PreTrainedModel) -> str:
    """What a model calls its key-value cache, as an argument and in its output: transformers 5.24 renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _padded(sequences: Sequence["array[int]"], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Sequences padded with zeros on one side, and their attention mask."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), None) if left else slice(len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)
