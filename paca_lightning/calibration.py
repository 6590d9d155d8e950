"""Column scores from data: which inputs are large, or which gradients are."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.errors import PaCAError
from paca_lightning.layers import PaCALayer


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
    scores = {path: torch.zeros(layer.in_features, device=layer.weight.device) for path, layer in layers.items()}
    handles = [_watch(layer, scores[path], with_gradients) for path, layer in layers.items()]
    run = step or (lambda batch: _forward(model, batch))
    training = model.training
    count = 0
    try:
        model.eval()
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            with torch.set_grad_enabled(with_gradients):
                output = run(batch)
                if with_gradients:
                    _loss(output).backward()
            model.zero_grad(set_to_none=True)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if count == 0:
        raise PaCAError(f"selection={selection!r} needs calibration batches, and there are none.")
    return scores


def _watch(layer: PaCALayer, score: Tensor, with_gradients: bool) -> RemovableHandle:
    def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = inputs[0].detach().flatten(0, -2)
        if not with_gradients:
            score.add_(tokens.float().square().sum(0))
        elif output.requires_grad:
            output.register_hook(lambda grad: _add_gradient(score, grad, tokens))

    return layer.register_forward_hook(on_forward)


def _add_gradient(score: Tensor, grad: Tensor, tokens: Tensor) -> None:
    dense = grad.flatten(0, -2).t() @ tokens.to(grad.dtype)
    score.add_(dense.float().square().sum(0))


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
