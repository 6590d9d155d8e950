"""Column scores, from weights and from data: which columns are large, which quantization hurts, which are used."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.core.config import BY_ERROR
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.evaluating import evaluating
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import ExpertWeight
from paca_lightning.layers.linear import PaCAConv1D
from paca_lightning.layers.linear4bit import from_linear4bit, is_quantized_linear4bit
from paca_lightning.layers.nf4 import dequantize_rows, squared_errors

BY_WEIGHT = ("weight_norm", "quant_error")


def weight_scores(module: nn.Module, layer_class: type[PaCALayer], selection: str, path: str) -> Tensor:
    """Score the input columns of a linear layer by its weight.

    Args:
        module: The layer, converted or about to be.
        layer_class: What it is converted to.
        selection: ``weight_norm``; ``quant_error`` or ``output_error``, a sum of squares, of an unquantized layer.
        path: Names it in errors.

    Returns:
        Shape (in_features,), fp32 (fp64 for an fp64 weight).

    Raises:
        PaCAError: If the weight is on meta.
    """
    weight: Tensor = module.get_parameter("weight")
    if weight.is_meta:
        raise PaCAError(f"selection={selection!r} needs the weight of {path!r}, which is still on meta.")
    rows = weight.detach()
    if is_quantized_linear4bit(module):
        packed, scales, dtype = from_linear4bit(module)
        rows = dequantize_rows(packed, scales, 2 * packed.shape[1], dtype)
    elif layer_class is PaCAConv1D:
        rows = rows.t()
    elif isinstance(module, ExpertWeight):
        rows = module.rows()
    if selection in BY_ERROR:
        return squared_errors(rows, path)
    dims = tuple(range(rows.dim() - 1))
    return torch.linalg.vector_norm(rows, dim=dims, dtype=torch.promote_types(rows.dtype, torch.float32))


def refuse_quantized(module: nn.Module, selection: str, path: str) -> None:
    """Raise if a layer has lost what its quantization would be compared with.

    Raises:
        PaCAError: If its weight is quantized.
    """
    if is_quantized_linear4bit(module):
        raise PaCAError(
            f"selection={selection!r} compares a weight with its quantized values, and {path!r} is quantized already. "
            "Start from the full-precision model with quantize='nf4', or use another selection."
        )


def calibrate(
    model: nn.Module,
    layers: Mapping[str, PaCALayer],
    selection: str,
    batches: Iterable[Any],
    step: Callable[[Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Score the input columns of a model's PaCA layers on some batches.

    ``activation_norm`` scores column ``j`` by the sum of squares of input channel ``j`` over all tokens;
    ``gradient_norm`` by the squared norm of ``dL/dW[:, j]``, summed over batches. Only one weight-sized gradient
    exists at a time. The model's mode and gradients are left as they were.

    Args:
        model: A converted model.
        layers: Which of its layers to score, by path.
        selection: ``activation_norm`` or ``gradient_norm``.
        batches: What to look at.
        step: Runs one batch and returns the model's output or loss.

    Returns:
        By layer path, scores of shape (in_features,), fp32.

    Raises:
        PaCAError: If there is no batch, or no loss for ``gradient_norm``.
    """
    with_gradients = selection == "gradient_norm"
    scores: dict[str, Tensor] = {}
    handles = [_watch(layer, path, scores, with_gradients) for path, layer in layers.items()]
    run = step or (lambda batch: _forward(model, batch))
    count = 0
    try:
        with _evaluation_mode(model):
            for count, batch in enumerate(batches, start=1):  # noqa: B007
                with torch.set_grad_enabled(with_gradients):
                    output = run(batch)
                    if with_gradients:
                        _loss(output).backward()
                model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise PaCAError(f"selection={selection!r} needs calibration batches, and there are none.")
    # A layer that no batch reached has a score too: ranks add up scores together.
    device = next((score.device for score in scores.values()), None)
    return {
        path: scores[path] if path in scores else torch.zeros(layer.in_features, device=device)
        for path, layer in layers.items()
    }


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's mode and each parameter's gradient back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _watch(layer: PaCALayer, path: str, scores: dict[str, Tensor], with_gradients: bool) -> RemovableHandle:
    def add(score: Tensor) -> None:
        # Where the layer computes, which is not where an offloaded delta lies.
        scores[path] = scores[path] + score if path in scores else score

    def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        tokens = _rows((inputs[0] if inputs else named["input"]).detach())
        if not with_gradients:
            add(tokens.float().square().sum(0))
        elif output.requires_grad:
            output.register_hook(lambda grad: add(_gradient_scores(grad, tokens)))

    return layer.register_forward_hook(on_forward, with_kwargs=True)


def _gradient_scores(grad: Tensor, tokens: Tensor) -> Tensor:
    dense = _rows(grad).t() @ tokens.to(grad.dtype)
    return dense.float().square().sum(0)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _forward(model: nn.Module, batch: Any) -> Any:
    device = next(model.parameters()).device
    if isinstance(batch, dict):
        return model(**{name: _to(value, device) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*(_to(value, device) for value in batch))
    return model(_to(batch, device))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _loss(output: Any) -> Tensor:
    if isinstance(output, dict) and "loss" in output:
        output = output["loss"]
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise PaCAError(
            "selection='gradient_norm' needs a loss: the model must return a scalar tensor or an output with .loss. "
            "Include labels in the calibration batches."
        )
    return loss
