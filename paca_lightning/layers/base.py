"""The base class of all PaCA layers: columns, their write-back, and how they are cast, moved and loaded."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paca_lightning.core.dtensor import local
from paca_lightning.layers.autograd import tapped
from paca_lightning.layers.casting import keeping_precision
from paca_lightning.layers.columns import (
    PendingSelection,
    check_loaded_columns,
    check_not_parametrized,
    column_factor,
    trained_columns,
)
from paca_lightning.layers.loading import load_columns
from paca_lightning.layers.plain import inside_transform, is_replaced, on_jagged_rows
from paca_lightning.layers.write_watch import check_written, is_written, note_written

_KEPT = ("paca_indices", "paca_scale")  # buffers that no cast changes and no move loses


class PaCALayer(nn.Module):
    """A frozen linear layer with trained columns: the delta, the base columns and the indices.

    Outside ``disable_paca``, the selected columns of the weight are ``base columns + scaling * delta``, cast to the
    weight's dtype. ``write_columns`` writes them, once after each optimizer step. A forward never writes.

    Attributes:
        paca_delta: Trainable update, shape (out_features, r), fp32 (fp64 for an fp64 weight), zero at the start.
        paca_base_columns: The columns before training, shape (out_features, r), a frozen parameter so that it is
            sharded like the weight.
        paca_indices: The selected columns, shape (r,), int64, sorted and unique.
        r: Rank.
        scaling: ``alpha / r``.
        paca_scale: A step for each column, shape (r,), powers of two. None: 1.
        paca_pending: The selection that will choose the columns. None once they are chosen.
        paca_conversion: What the converted model knows of its conversion; its layers share it. None without a model.
        paca_path: Path of the layer in the module that was converted.
        paca_reshard: Frees gathered parameters before a write, which has to reach the shards. None if none are kept.
    """

    base_name: ClassVar[str] = "weight"  # of the parameter that holds the base weight
    keeps_weight: ClassVar[bool] = True  # whether there is a weight to write the columns into
    weight: Tensor
    in_features: int
    out_features: int
    paca_delta: nn.Parameter
    paca_base_columns: nn.Parameter
    paca_indices: Tensor
    r: int
    scaling: float
    paca_scale: Tensor | None
    paca_enabled: bool
    paca_base_class: type[nn.Module]
    paca_pending: PendingSelection | None = None
    paca_conversion: Any = None
    paca_path: str = ""
    paca_written: tuple[int, int] | None = None  # the delta that the weight has, by id and version; None: unknown
    paca_written_at: int = -1  # the step of an optimizer after which it was written
    paca_reshard: Callable[[], None] | None = None

    @property
    def base(self) -> Tensor:
        """The frozen parameter that holds the base weight."""
        return getattr(self, self.base_name)

    @property
    def factor(self) -> float | Tensor:
        """What the delta is multiplied by in the weight: the scaling, times each column's step."""
        return column_factor(self.scaling, self.paca_scale)

    def base_path(self, path: str) -> str:
        """Name of the base parameter of the layer at ``path``."""
        return f"{path}.{self.base_name}".lstrip(".")  # the model may be the layer itself

    @classmethod
    def adopt(cls, module: nn.Module, indices: Tensor, scaling: float) -> None:
        """Turn a linear layer into one of this class, in place.

        The object stays the same, so its hooks, its weight and all references to it stay valid. Swapping the class is
        what ``torch.nn.utils.parametrize`` and ``fully_shard`` do, too.

        Args:
            module: The layer.
            indices: Columns to train, shape (r,).
            scaling: ``alpha / r``.
        """
        base_class = type(module)
        module.__class__ = cls
        module._add_columns(indices, scaling, base_class)  # type: ignore[operator]

    def _add_columns(self, indices: Tensor, scaling: float, base_class: type[nn.Module]) -> None:
        self.r, self.scaling = len(indices), scaling
        self.paca_enabled, self.paca_base_class = True, base_class
        self.base.requires_grad_(False)
        # On a meta model the indices are real, too: the code that fills its weights reads them.
        self.register_buffer("paca_indices", indices.cpu() if self.base.is_meta else indices.to(self.base.device))
        self.register_buffer("paca_scale", None)
        self.paca_base_columns = nn.Parameter(self._read_columns(), requires_grad=False)
        dtype = torch.promote_types(self.paca_base_columns.dtype, torch.float32)
        self.paca_delta = nn.Parameter(torch.zeros_like(self.paca_base_columns, dtype=dtype))
        if self.keeps_weight:
            note_written(self, self.paca_delta)

    def release(self, *, trained: bool) -> None:
        """Turn back into the base layer, in place.

        Args:
            trained: Whether the weight keeps the trained columns. Otherwise it gets the base columns.
        """
        if trained:
            self.write_columns()
        else:
            self.restore_columns()
        del self.paca_delta, self.paca_base_columns, self.paca_indices, self.paca_scale
        base_class = self.paca_base_class
        for name in [name for name in vars(self) if name in ("r", "scaling") or name.startswith("paca_")]:
            del vars(self)[name]
        self.__class__ = base_class  # type: ignore[assignment]

    def _reshard(self) -> None:
        """Free the gathered parameters, if FSDP2 kept them after a forward."""
        if self.paca_reshard is not None:
            self.paca_reshard()

    def _rows(self) -> Tensor:
        """A view of this rank's rows of the weight, shape (rows, in_features)."""
        return local(self.weight).detach()

    def _read_columns(self, indices: Tensor | None = None) -> Tensor:
        """Columns of this rank's rows of the weight, shape (rows, r). Default: the selected ones."""
        return self._rows().index_select(-1, (self.paca_indices if indices is None else indices).to(self.base.device))

    def _put_columns(self, columns: Tensor) -> None:
        """Overwrite the selected columns of this rank's rows of the weight, shape (rows, r)."""
        self._rows().index_copy_(-1, self.paca_indices.to(self.base.device), columns.to(self.base.dtype))

    @torch.no_grad()
    def write_columns(self) -> None:
        """Write the trained columns into the weight. All are sharded alike, so there is no communication."""
        if self.paca_enabled:
            check_not_parametrized(self, self.base, self.paca_path)
            self._reshard()
            base, delta = local(self.paca_base_columns), local(self.paca_delta)
            self._put_columns(trained_columns(base, delta, self.factor))
            note_written(self, self.paca_delta)

    @torch.no_grad()
    def restore_columns(self) -> None:
        """Write the base columns: the weight is bitwise the one before the conversion."""
        self._reshard()
        self._put_columns(local(self.paca_base_columns))

    @torch.no_grad()
    def move_to_columns(self, indices: Tensor) -> None:
        """Train other columns (r,) from now on. The delta stays, and the previous columns are restored."""
        if torch.equal(indices, self.paca_indices):
            return  # the base columns may be more precise than the weight
        self.restore_columns()
        self.paca_indices.copy_(indices)
        self.begin_from_weight()

    @torch.no_grad()
    def reread_columns(self) -> None:
        """Read the base columns again, in the weight's present precision."""
        self.restore_columns()
        self.begin_from_weight()

    @torch.no_grad()
    def begin_from_weight(self) -> None:
        """Read the base columns from a weight without the delta, then write the trained columns."""
        local(self.paca_base_columns).copy_(self._read_columns())
        self.write_columns()

    def _columns(self) -> tuple[Tensor, Tensor | None, Tensor, float | Tensor]:
        """What makes the trained columns: base columns, delta (None while disabled), indices and factor."""
        delta = self.paca_delta if self.paca_enabled else None
        return self.paca_base_columns, delta, self.paca_indices, self.factor

    def _base_forward(self, input: Tensor) -> Tensor:
        """The base layer's forward, for an input of shape (..., in_features)."""
        raise NotImplementedError

    def _plain_forward(self, input: Tensor) -> Tensor:
        """The same in plain operators, with the weight computed from the delta: see ``layers/plain.py``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output, shape (..., out_features), or jagged like the input."""
        if input.is_nested:
            return on_jagged_rows(self.forward, input)
        delta = self.paca_delta
        if is_replaced(delta):
            return self._plain_forward(input)
        trainable = self.paca_enabled and delta.requires_grad
        if (trainable or not self.keeps_weight) and inside_transform():
            return self._plain_forward(input)
        if not (trainable and torch.is_grad_enabled()):
            return self._base_forward(input)
        if self.keeps_weight and not torch.compiler.is_compiling() and not is_written(self, delta):
            check_written(self, delta)
        return tapped(self._base_forward, input, delta, self.paca_indices, self.factor)

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy: its delta is another tensor, so what was noted of this one does not hold."""
        return {**vars(self), "paca_written": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "PaCALayer":
        """Move or cast the layer. Delta and base columns are never narrowed, and known indices never lost."""
        widened = (self.paca_delta, self.paca_base_columns, self.paca_delta.grad)
        known = {name: each for name, each in self.named_buffers() if name in _KEPT and not each.is_meta}
        dtype = self.base.dtype
        in_step = is_written(self, self.paca_delta)
        super()._apply(keeping_precision(fn, widened, self._uncast()), recurse)
        if in_step:
            note_written(self, self.paca_delta)
        for name, buffer in known.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        if self.base.dtype != dtype and not self.base.is_meta:
            self.write_columns()  # a wider weight holds more of the delta
        return self

    def _uncast(self) -> tuple[Tensor, ...]:
        """Tensors that keep their dtype whatever the model is cast to."""
        return ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load any mix of base weight, indices and delta, then write the trained columns."""
        self._check_loaded(state_dict, prefix, prefix.removesuffix("."))
        with torch.no_grad():
            load_columns(self, state_dict, prefix, super()._load_from_state_dict, *args)

    def _check_loaded(self, state_dict: dict[str, Any], prefix: str, path: str) -> None:
        delta, indices = (state_dict.get(prefix + name) for name in ("paca_delta", "paca_indices"))
        check_loaded_columns(delta, indices, self.paca_delta.shape, self.in_features, path=path)

    def _describe(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def paca_layers(model: nn.Module) -> Iterator[tuple[str, PaCALayer]]:
    """Path and layer of every PaCA layer in a model. A shared layer comes once."""
    for path, module in model.named_modules():
        if isinstance(module, PaCALayer):
            yield path, module
