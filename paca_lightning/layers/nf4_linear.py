"""Linear layers with an NF4 base, some of whose input columns are trained in full precision."""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.linear import BuiltLikeLinear, PaCALinear
from paca_lightning.layers.linear4bit import from_linear4bit, strip_linear4bit
from paca_lightning.layers.nf4 import Scales, dequantize_rows, quantize_rows
from paca_lightning.layers.nf4_autograd import dequantized_linear, merged_weight
from paca_lightning.layers.nf4_plain import NF4Linear, hold, scales_of
from paca_lightning.layers.plain import with_columns


class QPaCALinear(BuiltLikeLinear):
    """Linear layer ``y = x W^T + b`` with ``W`` in NF4, except for ``r`` input columns that are trained.

    Each forward and backward dequantizes the weight into a temporary, writes ``base columns + scaling * delta`` into it
    and runs one GEMM, in the input's dtype or autocast's. The backward keeps ``x[..., indices]`` and nothing else of
    the input. No weight is kept, so there is no write-back.

    ``disable_paca`` gives the plain NF4 base. ``release`` makes an ``nn.Linear`` of the dequantized weight. Its trained
    columns (``merge``) or base columns (``unload``) are exact, because nothing is quantized again.

    The arguments are those of :class:`~paca_lightning.layers.linear.BuiltLikeLinear`. The random weight is
    quantized, with rows padded to whole blocks of 64; on ``meta`` only the shapes are made. ``quantize`` and ``adopt``
    convert existing layers in place.

    Attributes:
        packed: Shape (out_features, padded in_features / 2), uint8: two weights a byte. Frozen, as all below.
        absmax: Scales, shape (out_features, blocks), bf16; of an adopted layer fp32, or uint8 if they were nested.
        absmax_scale: Of nested scales, shape (out_features, runs), fp32. Otherwise None, as all below.
        absmax_phase: Position of each row's first scale in its run of 256, shape (out_features, 1), uint8.
        absmax_code: Values of the 256 codes of the scales.
        absmax_offset: Mean of the scales.
        weight_dtype: Dtype of the weight before quantization and after a release.

    Shape:
        Input (..., in_features), output (..., out_features).
    """

    base_name: ClassVar[str] = "packed"
    keeps_weight: ClassVar[bool] = False
    packed: nn.Parameter
    absmax: nn.Parameter
    absmax_scale: nn.Parameter | None
    absmax_phase: nn.Parameter | None
    absmax_code: Tensor | None
    absmax_offset: Tensor | None
    bias: nn.Parameter | None
    weight_dtype: torch.dtype

    def _take_over(self, linear: nn.Linear, indices: Tensor, scaling: float) -> None:
        PaCALinear.adopt(linear, indices, scaling)
        dense = cast(PaCALayer, linear)
        type(self).quantize(dense)
        vars(self).update(vars(dense))

    @classmethod
    def quantize(cls, layer: PaCALayer, path: str = "") -> None:
        """Turn a dense PaCA layer into one of this class, in place: same indices, base columns and delta objects.

        Args:
            layer: The layer. Its base columns keep their precision.
            path: Names the layer in the error.

        Raises:
            PaCAError: If its weight is not finite.
        """
        layer.restore_columns()
        weight = layer.weight.detach()
        packed, absmax = quantize_rows(weight if isinstance(layer, PaCALinear) else weight.t(), path)
        shape = (layer.in_features, layer.out_features)
        del layer.weight
        layer.__class__ = cls
        layer.in_features, layer.out_features = shape
        hold(layer, packed, (absmax,), weight.dtype)

    @classmethod
    def adopt(cls, module: nn.Module, indices: Tensor, scaling: float) -> None:
        """Turn an NF4Linear or a ``bitsandbytes.nn.Linear4bit`` into one of this class, in place. Its bits are kept.

        The columns start from its quantized values, or from its full-precision weight if it is not quantized yet.
        """
        if isinstance(module, NF4Linear):
            module.__class__ = cls  # type: ignore[assignment]
            module._add_columns(indices, scaling, NF4Linear)  # type: ignore[operator]
            return
        weight: Any = module.weight
        whole = weight.detach() if weight.quant_state is None else None
        packed, scales, dtype = from_linear4bit(module)
        strip_linear4bit(module)
        module.__class__ = cls
        hold(module, packed, scales, dtype)
        module._add_columns(indices, scaling, nn.Linear)  # type: ignore[operator]
        if whole is not None:
            columns = whole.index_select(1, indices.to(whole.device))
            module.paca_base_columns = nn.Parameter(columns, requires_grad=False)

    @property
    def scales(self) -> Scales:
        """The scales as ``nf4.dequantize_rows`` takes them."""
        return scales_of(self)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight with its trained columns, dequantized at each access: some models, such as T5, read it."""
        return self.dequantize()

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None, *, trained: bool = True) -> Tensor:
        """This rank's rows of the weight with the full-precision columns, shape (rows, in_features).

        Args:
            dtype: Dtype of the result. Default: that of the weight before quantization.
            trained: Whether the columns are the trained ones. Otherwise they are the base columns.
        """
        columns, delta = local(self.paca_base_columns), local(self.paca_delta)
        return merged_weight(
            local(self.packed),
            tuple(map(local, self.scales)),
            self.in_features,
            dtype or self.weight_dtype,
            columns,
            delta if trained else torch.zeros_like(delta),
            self.paca_indices,
            self.factor,
        )

    def release(self, *, trained: bool) -> None:
        """Turn into a dense layer, of the dequantized weight with the trained or the base columns.

        A layer that was an NF4Linear is one again if it gets its base columns.
        """
        if self.paca_base_class is NF4Linear:
            if not trained:
                super().release(trained=False)
                return
            self.paca_base_class = nn.Linear
        weight = self.dequantize(trained=trained)
        del self.packed, self.absmax, self.absmax_scale, self.absmax_phase, self.absmax_code, self.absmax_offset
        del self.weight_dtype
        super().release(trained=trained)
        weight = weight if isinstance(self, nn.Linear) else weight.t()
        self.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))

    def _read_columns(self, indices: Tensor | None = None) -> Tensor:
        """Quantized values of columns of this rank's rows. Default: the selected ones. Shape (rows, r)."""
        if self.packed.is_meta:
            return torch.empty(self.out_features, self.r, device="meta")
        if indices is None and not self.r:  # columns that are known follow
            return self.packed.new_empty(self.out_features, 0, dtype=torch.float32)
        weight = dequantize_rows(local(self.packed), tuple(map(local, self.scales)), self.in_features, torch.float32)
        return weight.index_select(1, self.paca_indices if indices is None else indices)

    def write_columns(self) -> None:
        """Free a gathered copy of an older delta. There is nothing to write: every forward reads the delta."""
        self._reshard()

    def restore_columns(self) -> None:
        """Do nothing: the packed weight never changes."""

    def reread_columns(self) -> None:
        """Do nothing: a cast does not change the packed weight, and the base columns may be more precise."""

    @torch.no_grad()
    def move_to_columns(self, indices: Tensor) -> None:
        """Train other columns from now on, starting from their quantized values.

        Raises:
            PaCAError: If the present columns started from the unquantized weight. It is gone, so others would start
                less precise.
        """
        if torch.equal(indices, self.paca_indices):
            return
        self.check_movable()
        self.paca_indices.copy_(indices)
        local(self.paca_base_columns).copy_(self._read_columns())

    def check_movable(self) -> None:
        """Raise unless the layer can train other columns, as ``move_to_columns``."""
        if not self.starts_quantized():
            raise PaCAError(_other_columns(repr(self)))

    def starts_quantized(self) -> bool:
        """Whether the base columns are the quantized values."""
        return torch.equal(local(self.paca_base_columns).float(), self._read_columns())

    def _check_loaded(self, state_dict: dict[str, Any], prefix: str, path: str) -> None:
        super()._check_loaded(state_dict, prefix, path)
        indices = state_dict.get(prefix + "paca_indices")
        if indices is None or self.packed.is_meta or prefix + self.base_name in state_dict:
            return
        if not torch.equal(indices.to(self.paca_indices.device), self.paca_indices) and not self.starts_quantized():
            raise PaCAError(_other_columns(repr(path)))

    def _uncast(self) -> tuple[Tensor, ...]:
        return self.scales

    def _apply(self, fn: Any, recurse: bool = True) -> "QPaCALinear":
        super()._apply(fn, recurse)
        # A cast does not change the packed weight, but the dtype in which it is released.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.packed.device)).dtype
        return self

    def _base_forward(self, input: Tensor) -> Tensor:
        input = input.to(_computed_dtype(input))
        return dequantized_linear(input, self.bias, self.packed, self.scales, self.in_features, *self._columns())

    def _plain_forward(self, input: Tensor) -> Tensor:
        dtype = _computed_dtype(input)
        with torch.no_grad():  # frozen, also where a transform would differentiate all parameters
            weight = dequantize_rows(self.packed, self.scales, self.in_features, dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), with_columns(weight, *self._columns()), bias)

    def extra_repr(self) -> str:
        """Shape, rank and scaling."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._describe()}"


def _computed_dtype(input: Tensor) -> torch.dtype:
    """Dtype that a linear layer computes in: the input's, or autocast's, which leaves fp64 alone."""
    device = input.device.type
    casts = torch.is_autocast_enabled(device) and input.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else input.dtype


def _other_columns(layer: str) -> str:
    """The error for indices that differ from those of columns that started unquantized."""
    return (
        f"The columns of {layer} started from the unquantized weight, which is gone, so it cannot train others. Pass "
        "indices= to apply_paca (load_adapter does so for a fresh base model), or choose columns before quantizing."
    )
