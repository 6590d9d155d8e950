"""Whether an adapter fits a model: checked in full before anything of the model changes."""

from collections.abc import Mapping

from torch import Tensor

from paca_lightning.adapters.fingerprint import QUANTIZED_TOLERANCE, TOLERANCE, differing_layer, sample_columns
from paca_lightning.adapters.saved import SavedAdapter
from paca_lightning.adapters.settings import AdapterSettings
from paca_lightning.adapters.tensors import FLOATS, AdapterTensors
from paca_lightning.conversion.inventory import Inventory
from paca_lightning.core.dtensor import whole_tensor
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import ROWS
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import check_indices
from paca_lightning.layers.other_columns import base_columns_at
from paca_lightning.layers.rows import row_modules


def check_layers(layers: Mapping[str, PaCALayer], adapter: AdapterTensors, settings: AdapterSettings | None) -> None:
    """Raise unless an adapter has indices and a delta for each PaCA layer of a model, and they fit.

    Raises:
        PaCAError: Naming the layer.
    """
    indices, deltas = adapter.indices, adapter.deltas
    for path in sorted(layers.keys() ^ deltas.keys()):
        where = "in the adapter but not a PaCA layer of the model" if path in deltas else "not in the adapter"
        raise PaCAError(f"{path!r} is {where}. Use the settings and the base model it was trained with.")
    for path in deltas:
        if settings is None:
            continue
        sampled = settings.fingerprint
        if path not in settings.scalings or (sampled is not None and path not in sampled):
            raise PaCAError(f"settings and tensors disagree about {path!r}: the adapter is damaged. Save it again.")
    for path, layer in layers.items():
        if layer.r != len(indices[path]) == deltas[path].shape[-1]:
            raise PaCAError(
                f"{path!r} was trained with r={len(indices[path])}, the model has r={layer.r}. Use the adapter's "
                "settings (PaCAStrategy(adapter=...) takes them), or unload(model) first."
            )
        expected = tuple(layer.paca_delta.shape)
        if tuple(deltas[path].shape) != expected:
            raise PaCAError(
                f"the delta of {path!r} has shape {tuple(deltas[path].shape)}, the model needs {expected}. Use the "
                "settings and the base model it was trained with."
            )
        check_indices(indices[path], layer.in_features, layer.r, path=path)
        if settings is not None and settings.scalings[path] != layer.scaling:
            raise PaCAError(
                f"{path!r} was trained with scaling {settings.scalings[path]:g}, the model has {layer.scaling:g}. Use "
                "the adapter's alpha."
            )


def check_base_model(layers: Mapping[str, PaCALayer], adapter: SavedAdapter) -> None:
    """Raise unless a model's base columns at an adapter's indices are those that the adapter was trained on.

    Args:
        layers: By path.
        adapter: Its columns need not be those of the layers.

    Raises:
        PaCAError: If they differ by more than rounding, naming the layer; or if a layer cannot train those columns.
    """
    indices, settings = adapter.tensors.indices, adapter.settings
    here = {path: base_columns_at(layer, indices[path].to(layer.paca_indices.device)) for path, layer in layers.items()}
    if settings is None or settings.fingerprint is None:
        return
    samples = {path: sample_columns(whole_tensor(columns)) for path, columns in here.items()}
    # The columns of a quantized layer may have started from quantized weights.
    tolerance = TOLERANCE if adapter.config.quantize is None else QUANTIZED_TOLERANCE
    if (path := differing_layer(settings.fingerprint, samples, tolerance)) is not None:
        name = adapter.base_model
        raise PaCAError(
            f"it was trained on another base model: its weights differ from those here, most in {path!r}. Load the one "
            f"it was trained on{f', {name!r}' if name else ''}."
        )


def whole_targets(
    inventory: Inventory, whole: Mapping[str, Tensor], settings: AdapterSettings | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of the model that an adapter holds beside the deltas, and their values, by name from the base model.

    They are those of modules trained whole, and what else had changed when the adapter was saved.

    Raises:
        PaCAError: If one is missing, or has another shape or kind of numbers.
    """
    here = {
        f"{path}.{name}": tensor
        for path, module in inventory.named_saved().items()
        for name, tensor in module.state_dict().items()
    }
    changed = () if settings is None else settings.changed
    rows = {f"{clean_path(path)}.{ROWS}": module.paca_rows for path, module in row_modules(inventory.root)}
    present = {inventory.relative(name): t for name, t in (inventory.parameters | inventory.buffers | rows).items()}
    here |= {name: present[name] for name in changed if name in present}
    for name in sorted(here.keys() ^ whole.keys()):
        where = "not in the adapter" if name in here else "in the adapter but not in modules_to_save"
        raise PaCAError(f"{name!r} is {where}. Use the modules_to_save it was trained with.")
    for name, value in whole.items():
        target = here[name]
        if value.shape != target.shape:
            raise PaCAError(
                f"{name!r} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}. Use the base model "
                "it was trained with."
            )
        if value.dtype != target.dtype and not (value.dtype in FLOATS and target.dtype in FLOATS):
            raise PaCAError(
                f"{name!r} is {value.dtype}, the model has {target.dtype}. Use the base model it was trained with."
            )
    return {name: (here[name], value) for name, value in whole.items()}
