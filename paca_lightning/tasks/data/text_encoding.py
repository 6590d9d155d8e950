"""Tokenizes texts, pairs of texts and words for heads and embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.data.ragged import Ragged

_BATCH = 1000  # texts that are tokenized at a time


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as tokens.

    Attributes:
        input_ids: Of each text.
        token_type_ids: Which of two texts each token is of, for models that read it.
        truncated: How many texts were cut to the limit.
        labels: Of each token, for words with labels.
    """

    input_ids: Ragged
    token_type_ids: Ragged | None
    truncated: int
    labels: Ragged | None = None


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], max_length: int) -> EncodedTexts:
    """Tokenize texts or pairs of texts, with the tokenizer's special tokens.

    A tokenizer that puts nothing between the texts of a pair gets them on two lines.

    Args:
        tokenizer: The tokenizer.
        texts: One or two texts each.
        max_length: Most tokens of a text or pair; of a pair, the longer text is cut first.
    """
    separates = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    if not separates:
        texts = [("\n".join(parts),) for parts in texts]
    ids: list[list[int]] = []
    kinds: list[list[int]] = []
    truncated = 0
    for some in _batches(texts):
        columns = [list(column) for column in zip(*some, strict=True)]
        whole = tokenizer(*columns, return_attention_mask=False, verbose=False)
        long = sum(len(row) > max_length for row in whole["input_ids"])
        if long:
            whole = tokenizer(*columns, return_attention_mask=False, truncation=True, max_length=max_length)
        truncated += long
        ids += whole["input_ids"]
        kinds += whole.get("token_type_ids", [])
    types = Ragged(kinds, np.int8) if kinds and "token_type_ids" in tokenizer.model_input_names else None
    return EncodedTexts(Ragged(ids), types, truncated)


def encode_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[list[str]], labels: Sequence[list[int]], max_length: int
) -> EncodedTexts:
    """Tokenize words that have labels. The first token of a word has its label, the others -100.

    Args:
        tokenizer: A fast one, which tells the word of each token.
        words: Of each row.
        labels: A number for each word.
        max_length: Most tokens of a row; what is behind is cut, with its labels.

    Raises:
        PaCAError: The tokenizer does not tell the words of tokens.
    """
    if not tokenizer.is_fast:
        raise PaCAError(f"the tokenizer {tokenizer.name_or_path!r} does not tell the word of a token: take a fast one.")
    # Byte-level tokenizers tell a word at the start of a text from one behind a space; in a list there are no spaces.
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer)
    ids: list[list[int]] = []
    marked: list[list[int]] = []
    truncated = 0
    for some in _batches(list(zip(words, labels, strict=True))):
        rows = [[" " * (byte_level and number > 0) + word for number, word in enumerate(row)] for row, _ in some]
        settings = {"is_split_into_words": True, "return_attention_mask": False}
        whole = tokenizer(rows, **settings, verbose=False)
        if long := sum(len(row) > max_length for row in whole["input_ids"]):
            whole = tokenizer(rows, **settings, truncation=True, max_length=max_length)
        truncated += long
        ids += whole["input_ids"]
        for number, (_, own) in enumerate(some):
            marked.append(_first_of_words(whole.word_ids(number), own))
    return EncodedTexts(Ragged(ids), None, truncated, Ragged(marked))


def _first_of_words(word_ids: list[int | None], labels: list[int]) -> list[int]:
    before = [None, *word_ids[:-1]]
    return [
        IGNORE_INDEX if word is None or word == last else labels[word]
        for word, last in zip(word_ids, before, strict=True)
    ]


def _batches(rows: Sequence) -> Iterator[list]:
    remaining = iter(rows)
    while batch := list(islice(remaining, _BATCH)):
        yield batch
