"""Gives models new tokens: rows in their embeddings, and the numbers that a tokenizer has for them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_modules import declare_new
from paca_lightning.core.new_tokens import NewTokens, Trained
from paca_lightning.core.vocabulary import ends_of, make_room
from paca_lightning.tasks.data.new_tokens import extend_tokenizer, numbers_of
from paca_lightning.tasks.data.tokenizer import plain_tokenizer
from paca_lightning.tasks.pretrained import build_causal_lm


def add_new_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, train: Trained = "rows"
) -> None:
    """Give a model and its tokenizer new tokens, in place, before the model is converted.

    Each token begins as the mean of all others, in the input embedding and in the output head. Whatever converts the
    model trains its rows; a run without a method trains the whole model anyway.

    Args:
        model: A causal language model.
        tokenizer: Of the model.
        tokens: The tokens, as they stand in texts.
        train: ``rows`` trains those of the new tokens. ``all`` trains embedding and head whole.

    Raises:
        PaCAError: If a token is no text, is there already or is split, or the model's embeddings cannot have more rows.
    """
    if not tokens:
        return
    numbers = extend_tokenizer(tokenizer, tokens)
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    make_room(model, NewTokens(tuple(tokens), tuple(numbers), embeddings, train))
    if train == "all":
        ours = set(ends_of(model))
        declare_new(model, [path for path, module in model.named_modules() if module in ours])


def build_with_new_tokens(
    model: str,
    *,
    tokens: Sequence[str],
    train: Trained,
    tokenizer: str,
    tokenizer_revision: str | None,
    **settings: Any,
) -> PreTrainedModel:
    """A model as :func:`~paca_lightning.tasks.pretrained.build_causal_lm` builds it, with new tokens.

    Args:
        model: Directory or hub id.
        tokens: As for :func:`add_new_tokens`.
        train: As for :func:`add_new_tokens`.
        tokenizer: Directory or hub id of the tokenizer: of the data, or the model's own.
        tokenizer_revision: Branch, tag or commit of the tokenizer.
        **settings: As for :func:`~paca_lightning.tasks.pretrained.load_model`.

    Raises:
        PaCAError: As :func:`add_new_tokens`.
    """
    built = build_causal_lm(model, **settings)
    trusted = bool(settings.get("trust_remote_code"))
    own = plain_tokenizer(tokenizer, revision=tokenizer_revision, trust_remote_code=trusted)
    add_new_tokens(built, own, tokens, train=train)
    return built


def check_same_numbers(tokenizer: PreTrainedTokenizerBase, new: NewTokens | None) -> None:
    """Check that a tokenizer has the new tokens of a model, with the same numbers.

    Raises:
        PaCAError: If not.
    """
    if new is not None and (found := numbers_of(tokenizer, new.tokens)) != list(new.ids):
        raise PaCAError(
            f"new_tokens: the tokenizer {tokenizer.name_or_path!r} numbers them {found}, and the model has them as "
            f"{list(new.ids)}. Give the data, and the commands, the model's own tokenizer."
        )
