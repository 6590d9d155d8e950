"""New tokens of a tokenizer: those that the module of a run adds, so that it and the data agree."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError

GIVEN, USED = "_paca_given_tokens", "_paca_used_tokens"
"""Attributes of a data module: new tokens that it was given outside of a run, and those that its splits have."""


def check_new_tokens(tokens: Any) -> list[str]:
    """The setting ``new_tokens``, checked.

    Raises:
        PaCAError: If it is no list of different texts.
    """
    if tokens is None:
        return []
    if not isinstance(tokens, list | tuple):
        raise PaCAError(f"new_tokens must be a list of texts, such as ['<tool>', '</tool>'], not {tokens!r}.")
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise PaCAError(f"new_tokens holds {token!r}, which is no text that a token could stand for.")
        if list(tokens).count(token) > 1:
            raise PaCAError(f"new_tokens holds {token!r} twice. List it once.")
    return list(tokens)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer, which then finds each in any text as it is written; the numbers that they get.

    They are no special tokens: decoding with ``skip_special_tokens`` keeps them.

    Args:
        tokenizer: Is changed.
        tokens: What to add.

    Raises:
        PaCAError: If the tokenizer has one already, or does not take it as one token.
    """
    check_new_tokens(tokens)
    vocabulary = tokenizer.get_vocab()
    if present := [token for token in tokens if token in vocabulary]:
        raise PaCAError(
            f"new_tokens: the tokenizer {tokenizer.name_or_path!r} has {present[0]!r} already, as number "
            f"{vocabulary[present[0]]:,}, so it is not new. Leave it out, or give the base model's own tokenizer."
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return numbers_of(tokenizer, tokens)


def numbers_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """The numbers of new tokens in a tokenizer that has them.

    Raises:
        PaCAError: If it lacks one, takes one for several tokens, or numbers them in another order.
    """
    vocabulary, name = tokenizer.get_vocab(), tokenizer.name_or_path
    for token in tokens:
        if token not in vocabulary:
            raise PaCAError(
                f"new_tokens: the tokenizer {name!r} of the data lacks {token!r}. Data modules of this package add it "
                "by themselves; for another one call extend_tokenizer(tokenizer, tokens), of "
                "paca_lightning.tasks.data.new_tokens, before it tokenizes texts."
            )
        # Between letters, where a token that the tokenizer does not look for would be split or joined.
        found = tokenizer.encode(f"a{token}a", add_special_tokens=False)
        if vocabulary[token] not in found:
            raise PaCAError(
                f"new_tokens: the tokenizer {name!r} does not take {token!r} for one token, but splits it: "
                f"{tokenizer.convert_ids_to_tokens(found)}. Choose another text."
            )
    numbers = [vocabulary[token] for token in tokens]
    if numbers != sorted(numbers):
        raise PaCAError(f"new_tokens: the tokenizer {name!r} numbers them in another order. List them in its order.")
    return numbers


def new_tokens_of(datamodule: Any) -> list[str]:
    """The tokens that a data module adds: those of its run's module, or those given by :func:`give_new_tokens`."""
    module = getattr(getattr(datamodule, "trainer", None), "lightning_module", None)
    return list(getattr(module, "new_tokens", ()) or vars(datamodule).get(GIVEN, ()))


def give_new_tokens(datamodule: Any, tokens: Sequence[str]) -> None:
    """Let a data module, if there is one, add tokens outside of a run, where no module tells them."""
    if datamodule is not None:
        vars(datamodule)[GIVEN] = list(tokens)


def forget_other_splits(datamodule: Any) -> None:
    """Forget the splits of a data module that were tokenized with other new tokens, for another module."""
    tokens = new_tokens_of(datamodule)
    if vars(datamodule).setdefault(USED, tokens) != tokens:
        datamodule.splits, vars(datamodule)[USED] = {}, tokens
