"""The new tokens of an adapter: room for them in a base model, and whether the model has the same ones."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.state import conversion_of
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import NewTokens, new_tokens_in
from paca_lightning.core.vocabulary import Room, make_room


@contextmanager
def room_for(model: nn.Module, new: NewTokens | None) -> Iterator[Room | None]:
    """Make room for an adapter's new tokens in a base model without any; if the block fails, it is taken back.

    Args:
        model: The model to load into, or a module around it.
        new: The tokens; None: there are none, and a model may have some that the adapter knows nothing of.

    Raises:
        PaCAError: If the model has other new tokens, another vocabulary, or no embeddings that could have them.
    """
    if new is None or not is_missing(model, new):
        yield None
        return
    base = take_inventory(model).base_model
    if base is None:
        raise PaCAError(f"it has new tokens ({listed(new)}), and {type(model).__name__} holds no Hugging Face model.")
    if conversion_of(model) is not None:
        raise PaCAError(
            f"it has new tokens ({listed(new)}), and the model was converted without them. Load it into a base model, "
            "or add them before the conversion."
        )
    room = make_room(base, new)
    try:
        yield room
    except BaseException:
        room.take_back()
        raise


def is_missing(model: nn.Module, new: NewTokens) -> bool:
    """Whether a model lacks an adapter's new tokens.

    Raises:
        PaCAError: If it has others, or the same ones with other numbers.
    """
    here = new_tokens_in(model)
    if here is not None and here != new:
        own, theirs = here.entries(), new.entries()
        name = next(name for name in theirs if own[name] != theirs[name])
        raise PaCAError(
            f"it was trained with other new tokens than the model has: their {name} {theirs[name]!r}, here "
            f"{own[name]!r}. Give the same new tokens, in the same order, to the same base model and tokenizer."
        )
    return here is None


def check_run_has(module: nn.Module, new: NewTokens, source: str) -> None:
    """Refuse a run whose model has not the new tokens of its adapter: its data could not have them either.

    Args:
        module: With its model built.
        new: The adapter's.
        source: The adapter, or a checkpoint, for messages.

    Raises:
        PaCAError: If they are missing or others.
    """
    try:
        missing = is_missing(module, new)
    except PaCAError as error:
        raise PaCAError(f"{source}: {error}") from error
    if missing:
        raise PaCAError(
            f"{source}: it was trained with new tokens. Give them to the module, so that the data get them, too: "
            f"new_tokens: {list(new.tokens)!r}, new_tokens_train: {new.train}."
        )


def keep_room(model: nn.Module, room: Room | None) -> None:
    """Let ``unload`` take back the room that was made to load an adapter."""
    if room is not None:
        conversion = conversion_of(model)
        assert conversion is not None
        conversion.room = room


def check_can_wait(model: nn.Module) -> None:
    """Refuse new tokens in one of several adapters.

    Raises:
        PaCAError: If the model has some.
    """
    if (new := new_tokens_in(model)) is not None:
        raise PaCAError(
            f"an adapter with new tokens ({listed(new)}) cannot be one of several by name: each would need a "
            "vocabulary of its own. Load it alone, without a name."
        )


def listed(new: NewTokens) -> str:
    """The tokens for a message."""
    return ", ".join(map(repr, new.tokens[:5])) + (", ..." if len(new.tokens) > 5 else "")
