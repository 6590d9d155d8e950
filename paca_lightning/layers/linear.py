"""Dense linear layers whose frozen weight has some trained input columns."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import check_indices, random_indices
from paca_lightning.layers.plain import with_columns


class BuiltLikeLinear(PaCALayer):
    """A PaCA layer that is built like an ``nn.Linear``, from the same random weight.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether there is a (frozen) bias.
        device: Device of the weight.
        dtype: Dtype of the weight. The delta is fp32.
        r: Rank.
        alpha: Numerator of the scaling ``alpha / r``. Default: ``r``.
        indices: Columns to train, shape (r,). Default: drawn from seed 0.

    Raises:
        PaCAError: If the rank or the indices do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 16,
        alpha: float | None = None,
        indices: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not 0 < r <= in_features:
            raise PaCAError(f"r={r} must lie between 1 and in_features={in_features}.")
        if indices is None:
            indices = random_indices(in_features, r, seed=0, path="")
        check_indices(indices, in_features, r, path=type(self).__name__)
        linear = nn.Linear(in_features, out_features, bias, device, dtype).requires_grad_(False)
        self._take_over(linear, indices, (r if alpha is None else alpha) / r)

    def _take_over(self, linear: nn.Linear, indices: Tensor, scaling: float) -> None:
        """Become what a fresh linear layer is, and train its columns."""
        raise NotImplementedError


class PaCALinear(BuiltLikeLinear, nn.Linear):
    """Linear layer ``y = x W^T + b`` of which ``r`` input columns of ``W`` are trained (arXiv 2503.01905).

    The forward is the base layer's own single GEMM on an ordinary weight. The backward keeps ``x[..., indices]`` and
    nothing else of the input. The constructor's arguments are those of :class:`BuiltLikeLinear`.

    Shape:
        Input (..., in_features), output (..., out_features).
    """

    def _take_over(self, linear: nn.Linear, indices: Tensor, scaling: float) -> None:
        vars(self).update(vars(linear))
        self._add_columns(indices, scaling, nn.Linear)

    def _base_forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.paca_base_class.forward(self, input)  # F.linear, or what a subclass writes in its place
        return output

    def _plain_forward(self, input: Tensor) -> Tensor:
        return F.linear(input, with_columns(self.weight, *self._columns()), self.bias)

    def extra_repr(self) -> str:
        """Shape, rank and scaling."""
        return f"{nn.Linear.extra_repr(self)}, {self._describe()}"


class PaCAConv1D(PaCALayer):
    """Hugging Face's transposed linear layer (GPT-2): ``y = x W + b``, ``W`` of shape (in_features, out_features).

    Input columns are rows of this weight. It keeps its layout, so base checkpoints still load.
    """

    nx: int
    nf: int
    bias: nn.Parameter

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Size of the input's last dimension."""
        return self.nx

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Size of the output's last dimension."""
        return self.nf

    def _base_forward(self, input: Tensor) -> Tensor:
        output = torch.addmm(self.bias, input.reshape(-1, input.shape[-1]), self.weight)
        return output if input.dim() == 2 else output.view(*input.shape[:-1], self.nf)

    def _plain_forward(self, input: Tensor) -> Tensor:
        return input @ with_columns(self.weight, *self._columns(), transposed=True) + self.bias

    def _rows(self) -> Tensor:
        """A view of the weight, transposed: shape (out_features, in_features)."""
        return self.weight.detach().t()

    def _read_columns(self, indices: Tensor | None = None) -> Tensor:  # rows of the weight, which are faster to read
        indices = self.paca_indices if indices is None else indices
        return self.weight.detach().index_select(0, indices.to(self.weight.device)).t().contiguous()

    def extra_repr(self) -> str:
        """Shape, rank and scaling."""
        return f"in_features={self.nx}, out_features={self.nf}, {self._describe()}"
