"""Prompt methods inside a model's own life: outputs for the given tokens alone, and what they cannot do, refused."""

from typing import Any

from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError

NO_PACKING = (
    "A prompt method puts its virtual tokens before each row, so only the first document of a packed row would see "
    "them, at the right positions. Set packing: false, and pass no position_ids."
)


class OwnPositions:
    """Lets a PEFT model with virtual tokens return logits of the given tokens alone.

    Prompt and P-tuning put V virtual tokens before the T tokens of a row, so that a model returns V + T rows of logits.
    The first V predict no label. They are dropped before the output head: a loss that is computed in the head meets
    (B, T, D) hidden states and (B, T) labels, as without the method. With ``labels`` PEFT pads the labels instead, and
    all rows stay.

    Its methods are hooks, so that they are copied and pickled with the model.
    """

    def __init__(self) -> None:
        self.length: int | None = None

    def install(self, model: nn.Module, head: nn.Module) -> None:
        """Add the hooks to a PEFT model and its output head."""
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, always_call=True)
        head.register_forward_pre_hook(self.cut)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the number of given tokens.

        Raises:
            PaCAError: If the rows are packed.
        """
        if kwargs.get("position_ids") is not None:
            raise PaCAError(NO_PACKING)
        tokens = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        self.length = None if kwargs.get("labels") is not None else tokens.shape[1]

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the number: ``generate`` calls the base model alone."""
        self.length = None

    def cut(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Drop the hidden states of the virtual tokens, which come first; there are none if PEFT is disabled."""
        if self.length is None or args[0].shape[1] <= self.length:
            return None
        return (args[0][:, -self.length :], *args[1:])
