"""The tap of stacked experts: their forward uses a weight that gives a delta its gradient, whichever product it calls.

E experts, T tokens, S pairs of a token and one of its experts, I in_features, O out_features, R rank. transformers
multiplies stacked weights in three ways, and each product gets the tap of dense layers behind it::

    eager        y_TO = x_TI W[e]^T for each expert       dD[e]  = s dy_TO^T x_TI[:, indices]
    grouped_mm   y_SO = x_SI W^T, pairs sorted by expert  dD[e]  = s dy_SO^T x_SI[:, indices] over the pairs of e
    batched_mm   y_SO = W[experts_S] x_SI                 dD[e] += s dy_O x_I[indices]^T for each pair of e

Saved for backward are the selected columns of x and nothing else of it. W has the trained columns, as in dense layers,
so the product is the library's own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.transformers import GROUPED_PRODUCTS
from paca_lightning.layers.autograd import column_product, refuse_second_derivatives, tapped

METADATA = frozenset({"data_ptr", "device", "dim", "dtype", "element_size", "is_cpu", "is_cuda", "is_meta", "ndim"})
"""What a forward may ask of a weight without computing with it, beside its shape."""

PRODUCTS = {"linear", "matmul", "mm", "bmm", *GROUPED_PRODUCTS}


class _ExpertGradient(torch.autograd.Function):
    """Identity on a product's output; its backward gives the delta the gradient of each expert's columns."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, output: Tensor, selected: Tensor, delta: Tensor, groups: Tensor, sorted: bool, scaling: Any
    ) -> Tensor:
        tensors = [scaling] if isinstance(scaling, Tensor) else []
        ctx.save_for_backward(selected, groups, *tensors)
        ctx.sorted, ctx.scaling = sorted, scaling  # type: ignore[attr-defined]
        ctx.shape, ctx.dtype = delta.shape, delta.dtype  # type: ignore[attr-defined]
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        refuse_second_derivatives()
        selected, groups, *scale = ctx.saved_tensors
        product = sorted_products if ctx.sorted else pair_products
        grad = product(grad_output.flatten(1), selected, groups, ctx.shape[0], ctx.dtype)
        return grad_output, None, grad * (scale[0] if scale else ctx.scaling), None, None, None


@torch.library.custom_op("paca_lightning::sorted_products", mutates_args=())
def sorted_products(grad: Tensor, selected: Tensor, ends: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """The gradient of each expert's columns, for pairs sorted by expert.

    One operator, as compilers and tensors without data do not know how many pairs each expert has.

    Args:
        grad: dy_SO, shape (pairs, out_features).
        selected: x_SR, shape (pairs, r).
        ends: Number of pairs up to and with each expert's, shape (experts,). Pairs behind the last are no expert's.
        experts: How many there are.
        dtype: Of the result.

    Returns:
        Shape (experts, out_features, r).
    """
    if grad.is_cuda and grad.dtype == torch.bfloat16:  # without waiting for the device
        r = selected.shape[1]
        padded = F.pad(selected, (0, -r % 8))  # its kernel reads 16 bytes at a time
        return F.grouped_mm(grad.contiguous().t(), padded, offs=ends)[..., :r].to(dtype)
    result = torch.zeros(experts, grad.shape[1], selected.shape[1], dtype=dtype, device=grad.device)
    start = 0
    # On a CPU, oneDNN compiles a kernel for each new number of tokens, in more time than a product in fp32 takes.
    wide = dtype if grad.device.type == "cpu" else grad.dtype
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            result[expert] = column_product(grad[start:end].to(wide), selected[start:end].to(wide), dtype)
        start = end
    return result


@sorted_products.register_fake
def _(grad: Tensor, selected: Tensor, ends: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(experts, grad.shape[1], selected.shape[1], dtype=dtype)


def pair_products(grad: Tensor, selected: Tensor, owners: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """The gradient of each expert's columns, for pairs in any order.

    Its products take a share r / in_features of what ``batched_mm`` gathers of the weight.

    Args:
        grad: dy_SO, shape (pairs, out_features).
        selected: x_SR, shape (pairs, r).
        owners: The expert of each pair, shape (pairs,).
        experts: How many there are.
        dtype: Of the result.

    Returns:
        Shape (experts, out_features, r).
    """
    products = grad.to(dtype).unsqueeze(2) * selected.to(dtype).unsqueeze(1)
    return torch.zeros(experts, *products.shape[1:], dtype=dtype, device=grad.device).index_add_(0, owners, products)


class TappedWeight:
    """A stacked weight as the experts' forward sees it in training: its products have the tap behind them.

    It is no tensor, but takes a tensor's place in the functions that experts use, by ``__torch_function__``: indexing
    by expert, transposing, casting, ``linear``, ``@``, ``bmm`` and ``grouped_mm``. All else raises.

    Args:
        weight: The stacked weight, shape (experts, out_features, in_features), or with the last two the other way
            round.
        delta: Shape (experts, out_features, r).
        indices: Selected columns, shape (r,), int64.
        scaling: ``alpha / r``, or a number for each column, shape (r,).
        transposed: Whether ``weight`` ends with (in_features, out_features).
        path: Names the weight in errors.
    """

    def __init__(
        self, weight: Tensor, delta: Tensor, indices: Tensor, scaling: float | Tensor, transposed: bool, path: str
    ) -> None:
        self.weight, self.delta, self.indices, self.scaling = weight, delta, indices, scaling
        self.transposed, self.path = transposed, path
        self.owners: Tensor | None = None  # of a weight that was indexed by the expert of each pair
        self.of_one = False  # whether it is the weight of one expert

    @cached_property
    def deltas(self) -> Sequence[Tensor]:
        """The delta of each expert, as one node of the graph: of single ones, each would have a gradient for all."""
        return self.delta.unbind()

    def __getattr__(self, name: str) -> Any:
        if name in METADATA:
            return getattr(self.weight, name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._error(name)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.weight.shape

    def size(self, *dim: int) -> Any:
        """As of a tensor."""
        return self.weight.size(*dim)

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: Any) -> "TappedWeight":
        stacked = not self.of_one and self.owners is None
        if stacked and (isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)):
            found = self._with(self.weight[index], self.transposed)
            found.delta, found.of_one = self.deltas[int(index)], True
            return found
        if stacked and isinstance(index, Tensor) and index.dim() == 1 and index.dtype != torch.bool:
            found = self._with(self.weight[index], self.transposed)
            found.owners = index
            return found
        raise self._error("indexing")

    def transpose(self, first: int, second: int) -> "TappedWeight":
        """As of a tensor, of its last two dimensions."""
        last = self.weight.dim() - 1
        if {first % (last + 1), second % (last + 1)} != {last, last - 1}:
            raise self._error("transpose")
        return self._with(self.weight.transpose(first, second), not self.transposed)

    def t(self) -> "TappedWeight":
        """As of a tensor, for one expert."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> "TappedWeight":
        """As of a tensor."""
        return self.transpose(-2, -1)

    def to(self, dtype: torch.dtype) -> "TappedWeight":
        """As of a tensor, to a dtype."""
        if not isinstance(dtype, torch.dtype):
            raise self._error("to")
        return self._with(self.weight.to(dtype), self.transposed)

    def float(self) -> "TappedWeight":
        """As of a tensor."""
        return self.to(torch.float32)

    def _with(self, weight: Tensor, transposed: bool) -> "TappedWeight":
        other = TappedWeight(weight, self.delta, self.indices, self.scaling, transposed, self.path)
        other.owners, other.of_one = self.owners, self.of_one
        return other

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute a product with the weight, with the tap behind it."""
        own = next(each for each in (*args, *(kwargs or {}).values()) if isinstance(each, cls))
        name = str(getattr(func, "__name__", func))
        if name in PRODUCTS and len(args) >= 2 and (args[0] is own) != (args[1] is own):
            return own._product(func, name, args, dict(kwargs or {}))
        raise own._error(name)

    def _product(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        input = args[1] if args[0] is self else args[0]
        plain = [self.weight if each is self else each for each in args]
        first = args[0] is self
        if self.of_one and not first and self.transposed == (name != "linear") and name in ("linear", "matmul", "mm"):
            rest = plain[1:]
            return tapped(lambda flat: func(flat, *rest, **kwargs), input, self.delta, self.indices, self.scaling)
        if self.owners is not None and name == "bmm" and first != self.transposed:
            output = func(*plain, **kwargs)
            return self._tapped(output, input.squeeze(2 if first else 1), self.owners, sorted=False)
        grouped = name in GROUPED_PRODUCTS and not first and self.transposed
        if grouped and not self.of_one and self.owners is None and kwargs.get("offs") is not None:
            return self._tapped(func(*plain, **kwargs), input, kwargs["offs"], sorted=True)
        raise self._error(name)

    def _tapped(self, output: Tensor, input: Tensor, groups: Tensor, *, sorted: bool) -> Tensor:
        selected = input.index_select(-1, self.indices).to(output.dtype)
        result: Tensor = _ExpertGradient.apply(output, selected, self.delta, groups, sorted, self.scaling)
        return result

    def _error(self, use: str) -> PaCAError:
        return PaCAError(
            f"The experts' forward uses {self.path!r} in a way that PaCA does not know ({use}), so its columns would "
            "get no gradient. Load the model with experts_implementation='grouped_mm', or list it in exclude_modules."
        )
