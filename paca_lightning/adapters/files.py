"""The files of an adapter directory: PEFT's PaCA layout in safetensors and JSON, and one file of our own."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError

CONFIG, TENSORS, SETTINGS = "adapter_config.json", "adapter_model.safetensors", "paca_lightning.json"
PREFIX = "base_model.model."


def adapter_config(directory: str | os.PathLike[str]) -> PaCAConfig:
    """The settings an adapter was trained with.

    Raises:
        PaCAError: If the directory is not a PaCA adapter, or its two files of settings contradict each other.
    """
    peft = read_json(Path(directory) / CONFIG)
    if peft.get("peft_type") != "PACA":
        raise PaCAError(f"{Path(directory) / CONFIG}: peft_type is {peft.get('peft_type')!r}, not 'PACA'.")
    ours = read_settings(Path(directory))
    if ours is not None:
        for name, value in shared_settings(ours.config).items():
            here = peft.get(name)
            if here != value and not (isinstance(here, list) and isinstance(value, list) and set(here) == set(value)):
                raise PaCAError(
                    f"{directory}: {CONFIG} says {name}={here!r} and {SETTINGS} says {value!r}. Undo the change, "
                    "or save the adapter again."
                )
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


def peft_config(base_model: nn.Module | None, config: PaCAConfig) -> dict[str, Any]:
    """The settings under PEFT's names (0.22).

    Args:
        base_model: The Hugging Face model that was converted, if there is one.
        config: The settings.
    """
    return {
        "peft_type": "PACA",
        **base_model_entries(base_model),
        **shared_settings(config),
        "exclude_modules": config.exclude_modules or None,
        "modules_to_save": config.modules_to_save or None,
        "inference_mode": True,
    }


def base_model_entries(base_model: nn.Module | None) -> dict[str, Any]:
    """What a PEFT configuration tells of its base model.

    PEFT's ``AutoPeftModel`` classes go by the task, and ``AutoPeftModel`` itself by the class if there is no task.
    """
    entries: dict[str, Any] = {
        "task_type": _task_of(base_model),
        "base_model_name_or_path": getattr(getattr(base_model, "config", None), "name_or_path", None) or None,
    }
    if base_model is not None and entries["task_type"] is None:
        kind = type(base_model)
        entries["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return entries


TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's tasks by the ends of class names of Hugging Face models."""


def _task_of(base_model: nn.Module | None) -> str | None:
    name = type(base_model).__name__
    encodes = getattr(getattr(base_model, "config", None), "is_encoder_decoder", False)
    if name.endswith("ForConditionalGeneration") and encodes:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def shared_settings(config: PaCAConfig) -> dict[str, Any]:
    """The settings that both JSON files hold, under PEFT's names."""
    return {
        "r": config.r,
        "paca_alpha": config.alpha_of(None, config.r),
        "random_seed": config.seed,
        "target_modules": config.target_modules,
    }


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class AdapterSettings:
    """What our own file holds: PEFT's layout has no place for it."""

    config: PaCAConfig
    scalings: dict[str, float]
    fingerprint: dict[str, list[float]]
    changed: list[str]
    left: list[str]


def read_settings(directory: Path) -> AdapterSettings | None:
    """Our own file of an adapter directory; None if PEFT wrote the adapter.

    Raises:
        PaCAError: If it is damaged.
    """
    path = directory / SETTINGS
    if not path.exists():
        return None
    content = read_json(path)
    try:
        return AdapterSettings(
            config=PaCAConfig.from_dict(content["config"]),
            scalings={name: layer["alpha"] / layer["r"] for name, layer in content["layers"].items()},
            fingerprint={name: list(map(float, values)) for name, values in content["fingerprint"].items()},
            changed=[str(name) for name in content.get("changed", [])],  # not in files of version 0.1.0
            left=[str(path) for path in content.get("left", [])],  # nor this
        )
    except PaCAError as error:
        raise PaCAError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise PaCAError(f"{path} is damaged ({type(error).__name__}: {error}). Save the adapter again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        PaCAError: If it is missing, damaged or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PaCAError(f"{path} is missing: {str(path.parent)!r} is not a complete adapter directory.") from error
    except (OSError, ValueError) as error:
        raise PaCAError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise PaCAError(f"{path} holds {type(content).__name__}, not an object.")
    return content


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Indices and deltas of an adapter by layer path, and its other tensors by name.

    Raises:
        PaCAError: If the file is missing or damaged, or a tensor is missing or has NaN or Inf.
    """
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in _load_tensors(directory).items()}
    found: dict[str, dict[str, Tensor]] = {"paca_indices": {}, "paca_delta": {}}
    others = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind in found:
            found[kind][path] = tensor
        else:
            others[name] = tensor
    for path in found["paca_indices"].keys() ^ found["paca_delta"].keys():
        raise PaCAError(f"{directory / TENSORS} lacks the indices or the delta of {path!r}.")
    if (broken := not_finite(tensors)) is not None:
        raise PaCAError(f"{directory / TENSORS}: {broken!r} has NaN or Inf.")
    return found["paca_indices"], found["paca_delta"], others


def adapter_layers(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The columns that an adapter trains, by layer path, and the layers that its training left frozen by hand.

    Raises:
        PaCAError: If its files cannot be read.
    """
    settings = read_settings(Path(directory))
    return read_tensors(Path(directory))[0], [] if settings is None else settings.left


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name.removeprefix(PREFIX)
    return None


def _load_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise PaCAError(f"{path} is missing: {str(directory)!r} is not a complete adapter directory.") from error
    except (OSError, SafetensorError) as error:
        raise PaCAError(f"{path} is damaged or truncated: {error}") from error
