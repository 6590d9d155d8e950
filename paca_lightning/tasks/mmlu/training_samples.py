"""Tokenizes questions with their answers as training samples."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.mmlu.prompts import continuations, encode, prompt_text, start_tokens
from paca_lightning.tasks.mmlu.questions import LETTERS, Question

LossOn = Literal["answer", "text"]
Overlong = Literal["error", "drop", "cut"]

_CHUNK = 1000  # texts tokenized at a time: enough for the tokenizer's threads


@dataclass(frozen=True)
class TrainingSamples:
    """Tokenized samples.

    Attributes:
        dataset: Columns ``input_ids`` and ``trained`` (whether each token has a loss).
        lengths: Tokens of each sample, shape (samples,).
        trained_lengths: Tokens of each sample that have a loss, shape (samples,).
        cut: Number of samples that lost the beginning of their question.
        dropped: Number of samples dropped because they were too long.
    """

    dataset: Dataset
    lengths: np.ndarray
    trained_lengths: np.ndarray
    cut: int
    dropped: int


def training_samples(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn,
    overlong: Overlong,
) -> TrainingSamples:
    """Tokenize questions as zero-shot letter prompts, each followed by the letter of its answer.

    A sample begins with a beginning-of-sequence token if the tokenizer adds one, and has no end-of-sequence token.

    Args:
        questions: At least one.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a sample.
        loss_on: Train the ``answer`` alone, or the whole ``text``.
        overlong: What to do with a longer sample: raise an ``error``, ``drop`` it, or ``cut`` the beginning of its
            question.

    Raises:
        PaCAError: If a sample is too long, or none is left.
    """
    start, letters = start_tokens(tokenizer), continuations(tokenizer, LETTERS)
    ids, trained, lengths, cut = array("i"), bytearray(), [], 0
    for first in range(0, len(questions), _CHUNK):
        chunk = questions[first : first + _CHUNK]
        prompts = encode(tokenizer, [prompt_text(question, (), "letter") for question in chunk])
        for question, prompt in zip(chunk, prompts, strict=True):
            answer = letters[question.answer]
            room = max_length - len(answer)
            if len(prompt) > room and overlong == "drop":
                continue
            if len(prompt) > room and (overlong == "error" or room <= len(start)):
                raise PaCAError(
                    f"{question.where}: the question has {len(prompt)} tokens, which with its answer do not fit into "
                    f"max_length={max_length}. Raise max_length, or set overlong to 'drop' or 'cut'."
                )
            if len(prompt) > room:
                prompt = start + prompt[len(prompt) - room + len(start) :]
                cut += 1
            ids.extend(prompt + answer)
            trained += bytes([loss_on == "text"]) * len(prompt) + b"\1" * len(answer)
            lengths.append(len(prompt) + len(answer))
    if not lengths:
        raise PaCAError(f"No question fits into max_length={max_length}, such as {questions[0].where}. Raise it.")
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    columns = {"input_ids": np.asarray(ids), "trained": np.frombuffer(trained, dtype=bool)}
    lists = {name: pyarrow.ListArray.from_arrays(ends, pyarrow.array(values)) for name, values in columns.items()}
    # The first token of a sample has no loss, as nothing precedes it.
    trained_lengths = np.add.reduceat(columns["trained"], ends[:-1], dtype=np.int64) - columns["trained"][ends[:-1]]
    dropped = len(questions) - len(lengths)
    return TrainingSamples(Dataset.from_dict(lists), np.asarray(lengths), trained_lengths, cut, dropped)
