"""PromptPositions: the first and last tokens of each row's prompt, found anew at each forward of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a batch lie.

    Attributes:
        input_ids: The rows (B, T).
        start: First token of each row's prompt (B,), int64.
        stop: The token behind its last one (B,), int64.
    """

    input_ids: Tensor
    start: Tensor
    stop: Tensor


@dataclass(frozen=True)
class Positions:
    """Tokens of each row.

    Attributes:
        index: Their positions (B, P), int64: those of the first tokens, then those of the last ones.
        valid: Which of them there are (B, P), bool. The index of others is any position.
    """

    index: Tensor
    valid: Tensor


def prompts_of(batch: Any) -> Prompts:
    """The prompts of a batch: in each row, the tokens before the first one that is trained.

    Args:
        batch: ``input_ids`` and ``labels`` (B, T), perhaps ``attention_mask`` (B, T).

    Raises:
        PaCAError: If it is none of that form, or its rows are packed.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor) or "input_ids" not in batch:
        raise PaCAError(
            "LoReFT edits the tokens of the prompt, which a batch must tell: a dictionary with input_ids and labels "
            f"(-100 in the prompt). This one is {type(batch).__name__}. Override LoReFTStrategy.prompts for others."
        )
    if batch.get("position_ids") is not None:
        raise PaCAError("LoReFT edits one prompt a row, and packed rows hold several: set packing: false.")
    ids, trained = batch["input_ids"], batch["labels"] != IGNORE_INDEX
    start, stop = _bounds(ids, batch.get("attention_mask"))
    return Prompts(ids, start, torch.where(trained.any(1), trained.long().argmax(1), stop).clamp(min=start))


class PromptPositions:
    """Knows the positions that a method edits. Its ``begin`` is a hook of the model around the blocks.

    Args:
        first: Number of the prompt's first tokens.
        last: Number of its last ones.

    Attributes:
        current: Of the present forward. None in a step of generation after the prompt.
        must_be_told: Whether rows that are trained must be those of :meth:`tell`. Otherwise the prompt of rows that
            are not is the whole row.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.current: Positions | None = None
        self.must_be_told = False
        self._prompts: Prompts | None = None

    def tell(self, prompts: Prompts | None) -> None:
        """Use these prompts for forwards of their rows from now on; None: forget them."""
        self._prompts = prompts

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the positions of the rows of a forward.

        Raises:
            PaCAError: If rows are trained whose prompts are unknown.
        """
        rows = next(t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if t is not None)
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # renamed in transformers 5.24
        if cache is not None and int(cache.get_seq_length()) > 0:
            self.current = None
            return
        prompts = self._prompts
        trains = torch.is_grad_enabled()  # which a model's mode does not tell: Lightning leaves an eval mode as it is
        if prompts is not None and _are_rows_of(prompts, rows, exactly=not trains):
            start, stop = prompts.start, prompts.stop
        elif self.must_be_told and trains:
            shape = tuple(rows.shape[:2])
            raise PaCAError(
                f"LoReFT: the model is trained on rows {shape}, which are not those of the batch, so their prompts are "
                "unknown. Pass the batch's input_ids as they are."
            )
        else:
            start, stop = _bounds(rows, kwargs.get("attention_mask"))
        self.current = positions_of(start, stop, self.first, self.last, rows.shape[1])


def positions_of(start: Tensor, stop: Tensor, first: int, last: int, length: int) -> Positions:
    """The first and the last tokens of each prompt; of a short prompt at most half from each end.

    Args:
        start: First token of each prompt (B,).
        stop: The token behind its last one (B,).
        first: How many of the first tokens.
        last: How many of the last ones.
        length: T, of a row.
    """
    count = (stop - start).unsqueeze(1)
    share = count // 2 if first and last else count
    ahead = torch.arange(first, device=start.device)
    behind = torch.arange(-last, 0, device=start.device)
    index = torch.cat([start.unsqueeze(1) + ahead, stop.unsqueeze(1) + behind], 1)
    valid = torch.cat([ahead < share, -behind <= share], 1)
    return Positions(index.clamp(0, length - 1), valid)


def _bounds(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """First token of each row, and the one behind its last: rows are padded on either side."""
    size, length = rows.shape[:2]
    if mask is None or mask.dim() != 2:
        return rows.new_zeros(size, dtype=torch.int64), rows.new_full((size,), length, dtype=torch.int64)
    seen = mask.bool()
    return seen.long().argmax(1), length - seen.flip(1).long().argmax(1)


def _are_rows_of(prompts: Prompts, rows: Tensor, *, exactly: bool) -> bool:
    """Whether rows are those of a batch: by their shape in training, by their tokens in evaluation.

    In evaluation other rows are met as well, such as those of ``generate``.
    """
    ids = prompts.input_ids
    if rows.shape[:2] != ids.shape:
        return False
    if rows.data_ptr() == ids.data_ptr() or not exactly or rows.dim() != 2:
        return True
    return torch.equal(rows, ids)
