"""New tokens of a model: whoever builds it declares them on it, with the rows that they have in its embeddings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

Trained = Literal["rows", "all"]
"""What is trained for new tokens: their rows alone, or the whole embedding and the whole output head."""

NEW_TOKENS = "declared_new_tokens"
"""Attribute of a Hugging Face model: its :class:`NewTokens`."""

ROWS, IDS = "paca_rows", "paca_ids"
"""Attributes of an embedding or a head of which some rows are trained: their values, and their numbers."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a vocabulary was extended by.

    Attributes:
        tokens: The tokens, in the order of their numbers.
        ids: Their numbers, ascending.
        vocabulary: Rows of the model's embeddings before.
        train: What is trained for them.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    vocabulary: int
    train: Trained

    def entries(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def parse_new_tokens(content: Mapping[str, Any] | None) -> NewTokens | None:
    """New tokens from plain values; None if there are none.

    Raises:
        KeyError, TypeError, ValueError: If they are damaged.
    """
    if content is None:  # or a file of version 0.1.0
        return None
    tokens, ids, vocabulary, train = (content[name] for name in ("tokens", "ids", "vocabulary", "train"))
    numbers = all(type(number) is int for number in (*ids, vocabulary))
    ascending = numbers and all(first < second for first, second in zip([-1, *ids], ids, strict=False))
    sound = ascending and tokens and len(set(tokens)) == len(ids) and all(isinstance(token, str) for token in tokens)
    if not sound or vocabulary < 1 or train not in get_args(Trained):
        raise ValueError(f"new_tokens is {content!r}")
    return NewTokens(tuple(tokens), tuple(ids), vocabulary, train)


def declare_new_tokens(model: nn.Module, new: NewTokens | None) -> None:
    """Declare the new tokens of a Hugging Face model, or with None that it has none: conversions train them."""
    if new is None:
        vars(model).pop(NEW_TOKENS, None)
    else:
        vars(model)[NEW_TOKENS] = new


def declared_new_tokens(model: nn.Module) -> NewTokens | None:
    """The new tokens of a Hugging Face model; None if it has none."""
    found: NewTokens | None = vars(model).get(NEW_TOKENS)
    return found


def new_tokens_in(module: nn.Module) -> NewTokens | None:
    """The new tokens of the first Hugging Face model in a module that has some."""
    return next((new for part in module.modules() if (new := declared_new_tokens(part)) is not None), None)


def trained_rows(module: nn.Module) -> tuple[nn.Parameter, Tensor] | None:
    """The rows of a head's weight that are trained apart from it, shape (n, D), and their numbers (n,); None: none.

    The weight holds their values, and takes no gradient: a loss that uses it gives theirs. None, too, where
    ``torch.func.functional_call`` has put other values in their place: the module's forward has to use these.
    """
    rows = getattr(module, ROWS, None)
    return (rows, getattr(module, IDS)) if isinstance(rows, nn.Parameter) else None
