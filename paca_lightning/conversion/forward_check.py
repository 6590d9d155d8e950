"""Which subclasses of ``nn.Linear`` with a forward of their own still compute what ``nn.Linear`` computes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from paca_lightning.core.private.torch import real_tensors
from paca_lightning.layers.autograd import tapped

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of input, weight and bias


def computes_as_linear(module: nn.Module, base_class: type[nn.Module]) -> bool:
    """Whether a linear layer computes what its base class computes, and can be trained with the tap behind it.

    A subclass may write the same product in another way: Falcon adds the bias in a step of its own. Such a forward is
    run once, on a small weight in double precision, with the tap behind it: its output and all gradients must be those
    of ``nn.Linear``.

    Args:
        module: The layer, on any device.
        base_class: ``nn.Linear``, or another class of linear layers.
    """
    if type(module).forward is base_class.forward:
        return True
    own = dict(module.named_parameters(recurse=False))
    if base_class is not nn.Linear or not own.keys() <= {"weight", "bias"}:
        return False
    has_bias = own.get("bias") is not None
    with real_tensors(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        try:
            results = [_results(forward, has_bias) for forward in (_own_forward(module), F.linear)]
        except Exception:  # whatever a class that we do not know may raise, on a weight that it did not expect
            return False
        return all(torch.allclose(mine, theirs, rtol=1e-9, atol=0) for mine, theirs in zip(*results, strict=True))


def _own_forward(module: nn.Module) -> Forward:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: Tensor = functional_call(module, values, (x,))
        return result

    return forward


def _results(forward: Forward, has_bias: bool) -> list[Tensor]:
    """Output of a forward, and the gradients of its input and of a delta of one column."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    x, weight, bias, upstream = random(5, 3), random(4, 3), random(4) if has_bias else None, random(5, 4)
    delta, indices = torch.zeros(4, 1, dtype=torch.float64, device="cpu"), torch.tensor([1], device="cpu")
    x.requires_grad_(True)
    delta.requires_grad_(True)
    output = tapped(lambda flat: forward(flat, weight, bias), x, delta, indices, 1.0)
    return [output.detach(), *torch.autograd.grad(output, (x, delta), upstream)]
