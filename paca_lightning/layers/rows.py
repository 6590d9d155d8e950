"""Embeddings and output heads of which a few rows are trained, such as those of new tokens.

N tokens, V vocabulary, D features, n trained rows. A suffix names the dimensions of a tensor::

    embedding  ids_N ---> lookup in W_VD ---> y_ND ---> tap ---> y_ND, the same tensor
               backward: dR_nD = sum of dY_ND over the tokens of each trained row

    head       x_ND ---> GEMM with W_VD ---> y_NV ---> tap ---> y_NV, the same tensor
               backward: dR_nD = dY_NV[:, ids]^T @ x_ND

The weight is frozen and holds the rows: W_VD[ids] = R_nD, cast to its dtype, after every optimizer step. R is fp32,
as a step of a bf16 weight would be lost. A tied head has the embedding's rows, which get both gradients.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from paca_lightning.core.dtensor import first_row, gathered, local
from paca_lightning.core.new_tokens import IDS, ROWS
from paca_lightning.layers.autograd import column_product, refuse_second_derivatives
from paca_lightning.layers.casting import keeping_precision
from paca_lightning.layers.plain import inside_transform, is_replaced


class _LookupGradient(torch.autograd.Function):
    """Identity on an embedding's output; its backward gives the trained rows their gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, input: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        # The place of each token's row among the trained ones; n for the others.
        slots = torch.searchsorted(ids, input.long())
        found = ids[slots.clamp(max=len(ids) - 1)] == input
        ctx.save_for_backward(torch.where(found, slots, len(ids)))
        ctx.rows = rows.dtype, len(ids)  # type: ignore[attr-defined]
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, Tensor, None]:
        refuse_second_derivatives()
        (slots,), (dtype, count) = ctx.saved_tensors, ctx.rows
        # The kernel of nn.Embedding, whose sums are in a fixed order on every device; it passes over padding.
        grad = torch.ops.aten.embedding_dense_backward(grad_output.to(dtype), slots, count + 1, count, False)
        return None, None, grad[:count], None


class _HeadGradient(torch.autograd.Function):
    """Identity on a head's output; its backward gives the trained rows their gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, input: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(input.to(output.dtype), ids)  # in the precision that the head computed in
        ctx.dtype = rows.dtype  # type: ignore[attr-defined]
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, None]:
        refuse_second_derivatives()
        input, ids = ctx.saved_tensors
        return grad_output, None, column_product(grad_output.index_select(1, ids), input, ctx.dtype), None


class TrainedRows(nn.Module):
    """What an embedding and a head share: rows that are trained, and their write-back into the frozen weight.

    Attributes:
        paca_rows: Trained values, shape (n, D), fp32 (fp64 for an fp64 weight).
        paca_ids: Numbers of the rows in the weight, shape (n,), int64, ascending.
        paca_reshard: Frees gathered parameters before a write, which has to reach the shards. None if none are kept.
    """

    base_class: ClassVar[type[nn.Module]]
    weight: Tensor
    paca_rows: nn.Parameter
    paca_ids: Tensor
    paca_numbers: tuple[int, ...]
    paca_reshard: Callable[[], None] | None = None

    @classmethod
    def adopt(cls, module: nn.Module, rows: nn.Parameter, ids: Sequence[int]) -> None:
        """Train some rows of a module's weight, in place: the object stays the same.

        Args:
            module: An embedding or a head.
            rows: Their values, shape (n, D).
            ids: Their numbers, ascending.
        """
        module.__class__ = cls
        module.get_parameter("weight").requires_grad_(False)
        module.register_parameter(ROWS, rows)
        module.register_buffer(IDS, torch.tensor(ids, device=rows.device), persistent=False)
        vars(module)["paca_numbers"] = tuple(ids)

    def release(self) -> None:
        """Be a plain module again, whose weight keeps the rows, in place."""
        self.write_rows()
        del self.paca_rows, self.paca_ids
        for name in [name for name in vars(self) if name.startswith("paca_")]:
            del vars(self)[name]
        self.__class__ = self.base_class  # type: ignore[assignment]

    @torch.no_grad()
    def write_rows(self) -> None:
        """Write the rows into the weight. If they are sharded, they are gathered: call it on every rank."""
        if self.paca_reshard is not None:
            self.paca_reshard()
        rows, weight = gathered(self.paca_rows), local(self.weight)
        start = first_row(self.weight)
        here = slice(*(bisect_left(self.paca_numbers, start + offset) for offset in (0, len(weight))))
        weight.index_copy_(0, self.paca_ids[here] - start, rows[here].to(weight.device, weight.dtype))

    def _weight_for(self, rows: Tensor) -> Tensor:
        """A new weight with other rows, differentiable with respect to them, shape (V, D)."""
        return self.weight.index_copy(0, self.paca_ids, rows.to(self.weight.dtype))

    def _is_plain(self) -> bool:
        """Whether a forward has to see the rows in plain operators: see ``layers/plain.py``."""
        return is_replaced(self.paca_rows) or (self.paca_rows.requires_grad and inside_transform())

    def _is_tapped(self) -> bool:
        return self.paca_rows.requires_grad and torch.is_grad_enabled()

    def _apply(self, fn: Any, recurse: bool = True) -> "TrainedRows":
        """Move or cast the module; the rows are never narrowed."""
        dtype = self.weight.dtype
        super()._apply(keeping_precision(fn, (self.paca_rows, self.paca_rows.grad), ()), recurse)
        if self.weight.dtype != dtype and not self.weight.is_meta:
            self.write_rows()  # a wider weight holds more of them
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if {prefix + ROWS, prefix + "weight"} & state_dict.keys() and not self.weight.is_meta:
            self.write_rows()


class RowsEmbedding(TrainedRows, nn.Embedding):
    """An embedding of which some rows are trained."""

    base_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the weight, shape (..., D)."""
        if self._is_plain():
            return F.embedding(input, self._weight_for(self.paca_rows), self.padding_idx)
        output = nn.Embedding.forward(self, input)
        if not self._is_tapped():
            return output
        tapped: Tensor = _LookupGradient.apply(output, input, self.paca_rows, self.paca_ids)
        return tapped


class RowsHead(TrainedRows, nn.Linear):
    """An output head without a bias of which some rows are trained."""

    base_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Logits, shape (..., V)."""
        if self._is_plain():
            return F.linear(input, self._weight_for(self.paca_rows))
        if not self._is_tapped():
            return nn.Linear.forward(self, input)
        flat = input.reshape(-1, input.shape[-1])
        logits: Tensor = _HeadGradient.apply(F.linear(flat, self.weight), flat, self.paca_rows, self.paca_ids)
        return logits.view(*input.shape[:-1], logits.shape[-1])


def train_rows(embedding: nn.Embedding, head: nn.Linear, ids: Sequence[int]) -> None:
    """Train some rows of an embedding and of a head, once; of a tied weight the same ones."""
    if isinstance(embedding, TrainedRows):
        return
    tied = head.weight is embedding.weight
    rows = _rows_of(embedding.weight, ids)
    others = rows if tied else _rows_of(head.weight, ids)
    RowsEmbedding.adopt(embedding, rows, ids)
    RowsHead.adopt(head, others, ids)


def _rows_of(weight: Tensor, ids: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(weight.detach()[list(ids)].to(torch.promote_types(weight.dtype, torch.float32)))


def row_modules(model: nn.Module) -> Iterator[tuple[str, TrainedRows]]:
    """Path and module of each embedding and head with trained rows; of tied ones the first."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, TrainedRows) and id(module.paca_rows) not in seen:
            seen.add(id(module.paca_rows))
            yield path, module


def write_all_rows(model: nn.Module) -> None:
    """Bring the weight of each embedding and head up to date with its trained rows."""
    for _, module in row_modules(model):
        module.write_rows()


def release_all_rows(model: nn.Module) -> None:
    """Make all embeddings and heads plain again; their weights keep the rows."""
    for module in [module for module in model.modules() if isinstance(module, TrainedRows)]:
        module.release()
