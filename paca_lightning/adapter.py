"""Adapter directories: indices and deltas in PEFT's PaCA layout, as safetensors and JSON."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paca_lightning.config import PaCAConfig
from paca_lightning.conversion import config_of, convert
from paca_lightning.errors import PaCAError
from paca_lightning.files import written_aside
from paca_lightning.fingerprint import QUANTIZED_TOLERANCE, TOLERANCE, differing_layer, sample_columns
from paca_lightning.layers import PaCALayer, copy_into
from paca_lightning.report import ConversionReport
from paca_lightning.reversal import undone_on_error
from paca_lightning.selection import check_indices
from paca_lightning.targets import base_model_prefix, clean_path, paca_layers, relative_path
from paca_lightning.trained_whole import saved_modules

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "paca_lightning.json"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a converted model's indices, deltas and modules trained whole to a directory.

    A sharded model is gathered layer by layer: call it on every rank, of which the first writes.

    Args:
        model: The converted model, or a module around it.
        directory: Is created; files of the same names in it are replaced.

    Raises:
        PaCAError: If the model has no PaCA layers.
    """
    layers = _relative_layers(model)
    config = config_of(model)
    if not layers or config is None:
        raise PaCAError("The model has no PaCA layers, so there is no adapter to save. Call apply_paca first.")
    tensors: dict[str, Tensor] = {}
    samples: dict[str, list[float]] = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.paca_delta"] = _whole(layer.paca_delta)
        tensors[f"{PREFIX}{path}.paca_indices"] = _whole(layer.paca_indices)
        samples[path] = sample_columns(_whole(layer.paca_base_columns))
    for path, module in _relative_saved(model).items():
        for name, tensor in module.state_dict().items():
            tensors[f"{PREFIX}{path}.{name}"] = _whole(tensor)
    if not _is_first_rank():
        return
    with written_aside(directory) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        _write_json(scratch / CONFIG, _peft_config(model, config))
        ranks = {path: {"r": layer.r, "alpha": layer.scaling * layer.r} for path, layer in layers.items()}
        ours = {"version": version("paca-lightning"), "config": config.to_dict(), "layers": ranks}
        _write_json(scratch / OURS, ours | {"fingerprint": samples})


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> ConversionReport:
    """Convert a fresh base model as an adapter says, or take a converted one, and load the adapter into it.

    Args:
        model: The base model the adapter was trained on, or a module around it.
        directory: What ``save_adapter`` wrote, or PEFT's own PaCA adapter.

    Returns:
        The report of the conversion.

    Raises:
        PaCAError: If a file is missing or damaged, a tensor does not fit (naming the layer), or the base model is
            another one. The model is then as it was, unless it was quantized on the way: that cannot be undone.
    """
    config, ours = adapter_config(directory), _ours(Path(directory))
    indices, deltas, whole = _sorted_out(_tensors(Path(directory)), directory)
    known = config_of(model)
    with _says_where(directory), undone_on_error(model):
        # Whatever the selection, the columns are the adapter's: no data needs to follow.
        report, _ = convert(model, known or config, indices if known is None else None, data_follows=True)
        layers = _relative_layers(model)
        before = {path: layer.paca_indices.clone() for path, layer in layers.items()}
        _check_layers(layers, indices, deltas, ours)
        targets = _whole_targets(model, whole)
        try:
            for path, layer in layers.items():
                layer.move_to_columns(indices[path].to(layer.paca_indices.device))
            _check_base_model(layers, ours, directory, QUANTIZED_TOLERANCE if config.quantize else TOLERANCE)
        except PaCAError:
            for path, layer in layers.items():
                layer.move_to_columns(before[path])
            raise
    with torch.no_grad():
        for path, layer in layers.items():
            copy_into(layer.paca_delta, deltas[path])
            layer.write_columns()
        for tensor, value in targets:
            copy_into(tensor, value)
    return report


@contextmanager
def _says_where(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Begin the message of an error with the adapter's directory."""
    try:
        yield
    except PaCAError as error:
        raise PaCAError(f"{directory}: {error}") from error


def adapter_config(directory: str | os.PathLike[str]) -> PaCAConfig:
    """The settings an adapter was trained with.

    Raises:
        PaCAError: If the directory is not a PaCA adapter.
    """
    peft = _read_json(Path(directory) / CONFIG)
    if peft.get("peft_type") != "PACA":
        raise PaCAError(f"{Path(directory) / CONFIG}: peft_type is {peft.get('peft_type')!r}, not 'PACA'.")
    ours = _ours(Path(directory))
    if ours is not None:
        return ours.config
    try:
        return PaCAConfig(
            r=peft["r"],
            alpha=peft["paca_alpha"],
            target_modules=peft["target_modules"],
            exclude_modules=_as_list(peft.get("exclude_modules")),
            seed=peft.get("random_seed") or 0,
            modules_to_save=_as_list(peft.get("modules_to_save")),
        )
    except KeyError as error:
        raise PaCAError(f"{Path(directory) / CONFIG} has no {error}.") from error


def _peft_config(model: nn.Module, config: PaCAConfig) -> dict[str, Any]:
    """The settings under PEFT's names (0.22)."""
    base = next((m for m in model.modules() if hasattr(m, "get_output_embeddings") and hasattr(m, "config")), None)
    return {
        "peft_type": "PACA",
        "task_type": "CAUSAL_LM" if base is not None and type(base).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(getattr(base, "config", None), "_name_or_path", None) or None,
        "r": config.r,
        "paca_alpha": config.alpha_of(None, config.r),
        "random_seed": config.seed,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules or None,
        "modules_to_save": config.modules_to_save or None,
        "inference_mode": True,
    }


def _sorted_out(
    tensors: dict[str, Tensor], directory: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Indices and deltas by layer path, and the parameters of modules trained whole by their name."""
    found: dict[str, dict[str, Tensor]] = {"paca_indices": {}, "paca_delta": {}}
    whole = {}
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix(PREFIX).rpartition(".")
        if kind in found:
            found[kind][path] = tensor
        else:
            whole[name.removeprefix(PREFIX)] = tensor
    for path in found["paca_indices"].keys() ^ found["paca_delta"].keys():
        raise PaCAError(f"{Path(directory) / TENSORS} lacks the indices or the delta of {path!r}.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PaCAError(f"{Path(directory) / TENSORS}: {name.removeprefix(PREFIX)!r} has NaN or Inf.")
    return found["paca_indices"], found["paca_delta"], whole


def _check_layers(
    layers: dict[str, PaCALayer], indices: dict[str, Tensor], deltas: dict[str, Tensor], ours: "_Ours | None"
) -> None:
    for path in sorted(layers.keys() ^ deltas.keys()):
        where = "in the adapter but not a PaCA layer of the model" if path in deltas else "not in the adapter"
        raise PaCAError(f"{path!r} is {where}. Use the settings and the base model it was trained with.")
    for path in deltas:
        if ours is not None and not (path in ours.scalings and path in ours.fingerprint):
            raise PaCAError(f"{OURS} and {TENSORS} disagree about {path!r}: the adapter is damaged. Save it again.")
    for path, layer in layers.items():
        expected = (layer.out_features, layer.r)
        if tuple(deltas[path].shape) != expected:
            raise PaCAError(
                f"the delta of {path!r} has shape {tuple(deltas[path].shape)}, the model needs {expected}. Use the "
                "settings and the base model it was trained with."
            )
        check_indices(indices[path], layer.in_features, layer.r, path=path)
        if ours is not None and ours.scalings[path] != layer.scaling:
            raise PaCAError(
                f"{path!r} was trained with scaling {ours.scalings[path]:g}, the model has {layer.scaling:g}. Use the "
                "adapter's alpha."
            )


def _check_base_model(
    layers: dict[str, PaCALayer], ours: "_Ours | None", directory: str | os.PathLike[str], tolerance: float
) -> None:
    if ours is None:
        return
    here = {path: sample_columns(_whole(layer.paca_base_columns)) for path, layer in layers.items()}
    if (path := differing_layer(ours.fingerprint, here, tolerance)) is not None:
        name = _read_json(Path(directory) / CONFIG).get("base_model_name_or_path")
        raise PaCAError(
            f"it was trained on another base model: its weights differ from those here, most in {path!r}. Load the one "
            f"it was trained on{f', {name!r}' if name else ''}."
        )


def _whole_targets(model: nn.Module, whole: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What is trained whole in the model, and the value the adapter has for it."""
    here = {
        f"{path}.{name}": tensor
        for path, module in _relative_saved(model).items()
        for name, tensor in module.state_dict().items()
    }
    for name in sorted(here.keys() ^ whole.keys()):
        where = "not in the adapter" if name in here else "in the adapter but not in modules_to_save"
        raise PaCAError(f"{name!r} is {where}. Use the modules_to_save it was trained with.")
    for name, value in whole.items():
        if value.shape != here[name].shape:
            raise PaCAError(
                f"{name!r} has shape {tuple(value.shape)}, the model needs {tuple(here[name].shape)}. Use the base "
                "model it was trained with."
            )
    return [(here[name], value) for name, value in whole.items()]


def _relative_layers(model: nn.Module) -> dict[str, PaCALayer]:
    prefix = base_model_prefix(model)
    return {relative_path(clean_path(path), prefix): layer for path, layer in paca_layers(model)}


def _relative_saved(model: nn.Module) -> dict[str, nn.Module]:
    prefix = base_model_prefix(model)
    return {relative_path(clean_path(path), prefix): module for path, module in saved_modules(model)}


def _whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous().clone()


def _is_first_rank() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Ours:
    """What PEFT's layout has no place for."""

    config: PaCAConfig
    scalings: dict[str, float]
    fingerprint: dict[str, list[float]]


def _ours(directory: Path) -> _Ours | None:
    path = directory / OURS
    if not path.exists():
        return None
    content = _read_json(path)
    try:
        return _Ours(
            config=PaCAConfig.from_dict(content["config"]),
            scalings={name: layer["alpha"] / layer["r"] for name, layer in content["layers"].items()},
            fingerprint={name: list(map(float, values)) for name, values in content["fingerprint"].items()},
        )
    except PaCAError as error:
        raise PaCAError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise PaCAError(f"{path} is damaged ({type(error).__name__}: {error}). Save the adapter again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PaCAError(f"{path} is missing: {str(path.parent)!r} is not a complete adapter directory.") from error
    except (OSError, ValueError) as error:
        raise PaCAError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise PaCAError(f"{path} holds {type(content).__name__}, not an object.")
    return content


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise PaCAError(f"{path} is missing: {str(directory)!r} is not a complete adapter directory.") from error
    except (OSError, SafetensorError) as error:
        raise PaCAError(f"{path} is damaged or truncated: {error}") from error
