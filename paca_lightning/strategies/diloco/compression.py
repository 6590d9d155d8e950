"""How a replica's change is made smaller before it is sent, and what becomes of the rest.

A change is one vector, of all parameters that are exchanged together. It travels as bytes of a length that depends on
the vector's alone, so that one all-gather takes it.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.strategies.diloco.settings import Outer

BLOCK = 256
"""Values that share a scale in int8."""


class Code(Protocol):
    """A way to write a vector in fewer bytes.

    Attributes:
        feedback: Whether what the bytes do not hold is added to the next change.
    """

    feedback: bool

    def pack(self, change: Tensor) -> Tensor:
        """The bytes of a vector of shape (n,): a uint8 vector."""

    def unpack(self, payload: Tensor, size: int) -> Tensor:
        """The vector that bytes stand for, of shape (size,), in fp32."""


class BFloat16:
    """Two bytes a value, rounded to nearest."""

    feedback = False

    def pack(self, change: Tensor) -> Tensor:
        """The values in bf16."""
        return as_bytes(change.bfloat16())

    def unpack(self, payload: Tensor, size: int) -> Tensor:
        """The values of :meth:`pack`."""
        return payload.view(torch.bfloat16).float()


class Int8:
    """A byte a value, in steps of 1/127 of the largest magnitude among its ``BLOCK`` neighbours.

    A block with a NaN or Inf arrives as NaN, so that nothing broken looks sound.
    """

    feedback = True

    def pack(self, change: Tensor) -> Tensor:
        """fp32 scales of all blocks, then the values."""
        blocks = math.ceil(change.numel() / BLOCK)
        padded = torch.zeros(blocks, BLOCK)
        padded.view(-1)[: change.numel()] = change
        scales = padded.abs().amax(1) / 127
        steps = (
            (padded / scales.where(scales != 0, 1.0)[:, None]).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
        )
        return torch.cat([as_bytes(scales), as_bytes(steps.view(-1)[: change.numel()])])

    def unpack(self, payload: Tensor, size: int) -> Tensor:
        """The values of :meth:`pack`."""
        blocks = math.ceil(size / BLOCK)
        scales, steps = payload[: 4 * blocks].view(torch.float32), payload[4 * blocks :].view(torch.int8)
        return steps * scales.repeat_interleave(BLOCK)[:size]


class TopK:
    """The largest magnitudes alone: four bytes for the place of each, two for its value in bf16.

    Args:
        share: Of the values; at least one is sent.
    """

    feedback = True

    def __init__(self, share: float) -> None:
        self._share = share

    def pack(self, change: Tensor) -> Tensor:
        """int32 places in rising order, then bf16 values."""
        places = change.abs().topk(self._count(change.numel()), sorted=False).indices.sort().values
        return torch.cat([as_bytes(places.int()), as_bytes(change[places].bfloat16())])

    def unpack(self, payload: Tensor, size: int) -> Tensor:
        """The values of :meth:`pack`, and zeros between them."""
        count = self._count(size)
        places, values = payload[: 4 * count].view(torch.int32), payload[4 * count :].view(torch.bfloat16)
        return torch.zeros(size).index_put_((places.long(),), values.float())

    def _count(self, size: int) -> int:
        return max(1, int(size * self._share))


def code(settings: Outer) -> Code | None:
    """The code that settings name; None if the change is sent as it is."""
    codes: dict[str, Code | None] = {
        "none": None,
        "bf16": BFloat16(),
        "int8": Int8(),
        "top_k": TopK(settings.top_k),
    }
    return codes[settings.compression]


class Compressor:
    """Compresses a replica's changes, with error feedback (arXiv 1809.07599) where the code has it.

    What the bytes of a change do not hold is kept and added to the next change of the same parameters. An exchange
    that fails leaves what was kept before it, as the steps behind its change are lost as well.

    Args:
        code: The code.
        sizes: Values of each fragment.

    Attributes:
        residuals: What is still to be sent of each fragment, in fp32; none without error feedback.
    """

    def __init__(self, code: Code, sizes: Sequence[int]) -> None:
        self._code = code
        self.residuals = [torch.zeros(size) for size in sizes] if code.feedback else []
        self._after: dict[int, Tensor] = {}

    def pack(self, change: Tensor, exchange: int) -> Tensor:
        """The bytes to send of a change of shape (n,). The exchange's number tells which fragment's turn it is."""
        if not self._code.feedback:
            return self._code.pack(change)
        fragment = exchange % len(self.residuals)
        change = change.float() + self.residuals[fragment]
        payload = self._code.pack(change)
        self._after[fragment] = change - self._code.unpack(payload, change.numel())
        return payload

    def total(self, payloads: Sequence[Tensor], size: int) -> Tensor:
        """The sum of what replicas sent, of shape (size,): the same bits wherever it is computed."""
        total = torch.zeros(size)
        for payload in payloads:
            total += self._code.unpack(payload, size)
        return total

    def settle(self, done: bool) -> None:
        """Take over what an exchange left, or forget it if the exchange failed."""
        if done:
            for fragment, residual in self._after.items():
                self.residuals[fragment] = residual
        self._after = {}

    def clear(self) -> None:
        """Start without anything left to send."""
        for residual in self.residuals:
            residual.zero_()


def compressor(parts: Sequence[nn.ParameterList], settings: Outer) -> Compressor | None:
    """What compresses changes of fragments; None if they are sent as they are.

    Raises:
        PaCAError: If parameters have several dtypes, which one vector cannot hold, or are more than top_k can count.
    """
    chosen, dtypes = code(settings), {parameter.dtype for part in parts for parameter in part}
    if chosen is None:
        return None
    if len(dtypes) > 1:
        raise PaCAError(
            f"compression={settings.compression!r} needs trained parameters of one dtype; here are "
            f"{', '.join(sorted(map(str, dtypes)))}. Set compression: none, or train modules_to_save in float32."
        )
    sizes = [sum(parameter.numel() for parameter in part) for part in parts]
    if settings.compression == "top_k" and max(sizes) > torch.iinfo(torch.int32).max:
        raise PaCAError(
            f"compression='top_k' counts up to 2,147,483,647 values; here are {max(sizes):,}. Set fragments."
        )
    return Compressor(chosen, sizes)


def as_bytes(values: Tensor) -> Tensor:
    """A contiguous tensor's bytes."""
    return values.contiguous().view(torch.uint8)
