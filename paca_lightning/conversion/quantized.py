"""Weights that other libraries quantized: told by name, as PaCA cannot read and write their columns."""

from torch import nn

REMEDY = "Load the unquantized model and set quantize='nf4', or load it by bitsandbytes in 4 bits (nf4)"

PACKED = ("qweight", "weight_packed", "W_q")
"""Tensors that stand for the weight in layers of GPTQ and AWQ, of compressed-tensors, and of HQQ."""


def quantized_obstacle(module: nn.Module) -> str | None:
    """Why the weight of a linear layer is no matrix of numbers whose columns can be trained; None if it is one.

    bitsandbytes' 4 bits are not meant: ``linear4bit_obstacle`` is of them.
    """
    kind = type(module)
    if kind.__name__ == "Linear8bitLt" and kind.__module__.startswith("bitsandbytes."):
        return f"its weight is quantized to 8 bits by bitsandbytes. {REMEDY}"
    weight = type(dict(module.named_parameters(recurse=False)).get("weight"))
    # A subclass of Tensor that shows the dtype from before.
    if weight.__module__.partition(".")[0] == "torchao":
        return f"its weight is quantized by torchao ({weight.__name__}). {REMEDY}"
    return packed_obstacle(module)


def packed_obstacle(module: nn.Module) -> str | None:
    """The same for a layer that need not be a linear one by its class: it has packed tensors and no weight."""
    own = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
    name = next((name for name in PACKED if name in own), None)
    return None if name is None else f"{type(module).__name__} holds a quantized weight ({name!r}). {REMEDY}"
