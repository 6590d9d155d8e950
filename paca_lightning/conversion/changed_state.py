"""State that changes beside deltas and modules trained whole: parameters that are thawed, and buffers that move.

Norms or biases may be thawed for a run or for a part of it; the running statistics of a BatchNorm move with every
forward. Both belong to what was learned, so adapters and checkpoints hold them, and going back restores them.
"""

import torch
from torch import Tensor, nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.saved_modules import is_marked
from paca_lightning.conversion.state import Conversion, conversions_in, root_names
from paca_lightning.core.dtensor import copy_into, local
from paca_lightning.core.paths import clean_path


def remember_buffers(inventory: Inventory, conversion: Conversion) -> None:
    """Keep copies of a model's persistent buffers, in host memory, before training moves them."""
    for name, buffer in inventory.buffers.items():
        if name not in conversion.originals and not buffer.is_meta:
            conversion.originals[name] = _host_copy(buffer)


def remember_thawed(model: nn.Module, parameters: set[int]) -> None:
    """Note parameters that are about to be trained, and keep copies of them in host memory.

    Args:
        model: The converted model, or a module around it.
        parameters: The ``id`` of each. Deltas and modules that are trained whole are passed over.
    """
    to_root = root_names(model)
    inside_saved = {id(p) for module in model.modules() if is_marked(module) for p in module.parameters()}
    for raw_name, parameter in model.named_parameters():
        name = to_root(clean_path(raw_name))
        if name is None or id(parameter) not in parameters - inside_saved or name.endswith(".paca_delta"):
            continue
        if parameter.is_meta:  # noted when the optimizer is attached, by when its values are there
            continue
        for conversion, _, _ in conversions_in(model):
            if name not in conversion.originals:
                conversion.originals[name] = _host_copy(parameter)
            conversion.frozen.discard(name)


def changed_state(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What has changed since the conversion: the tensor in the model and its original, by name in the model.

    Thawed parameters are always among them, so that the ranks of a sharded model agree.
    """
    originals: dict[str, Tensor] = {}
    for conversion, _, _ in conversions_in(model):
        originals |= conversion.originals
    if not originals:
        return {}
    to_root = root_names(model)
    inside_saved = {id(t) for m in model.modules() if is_marked(m) for t in (*m.parameters(), *m.buffers())}
    tensors = {clean_path(name): t for name, t in (*model.named_parameters(), *model.named_buffers())}
    found = {}
    for name, tensor in tensors.items():
        original = originals.get(to_root(name) or "")
        if original is None or id(tensor) in inside_saved:
            continue
        if isinstance(tensor, nn.Parameter) or not torch.equal(tensor.detach().cpu(), original.to(tensor.dtype)):
            found[name] = (tensor, original)
    return found


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor that may be sharded with a whole one, or with this rank's rows of one."""
    if value.shape == tensor.shape:
        copy_into(tensor, value)
    else:
        local(tensor).copy_(value)


def _host_copy(tensor: Tensor) -> Tensor:
    return local(tensor).detach().to("cpu", copy=True)
