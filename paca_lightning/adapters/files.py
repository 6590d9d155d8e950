"""The files of an adapter directory: PEFT's PaCA layout in safetensors and JSON, and one file of our own."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from paca_lightning.adapters.settings import AdapterSettings, parse_settings
from paca_lightning.core.checksums import settings_checksum
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import read_json_file

CONFIG, TENSORS, SETTINGS = "adapter_config.json", "adapter_model.safetensors", "paca_lightning.json"
PREFIX = "base_model.model."


def read_files(directory: Path) -> tuple[dict[str, Any], AdapterSettings | None]:
    """The settings of an adapter under PEFT's names, and what PEFT's layout has no place for (None: others wrote it).

    Raises:
        PaCAError: If the directory is not a PaCA adapter, or its two files of settings contradict each other.
    """
    peft = read_json(directory / CONFIG)
    if peft.get("peft_type") != "PACA":
        method = (
            f"it is an adapter of {peft['method']!r}" if "method" in peft else f"peft_type is {peft.get('peft_type')!r}"
        )
        raise PaCAError(f"{directory / CONFIG}: {method}, not 'PACA'.")
    ours = read_settings(directory)
    for name, value in {} if ours is None else shared_settings(ours.config).items():
        here = peft.get(name)
        if not _same_setting(here, value):
            raise PaCAError(
                f"{directory}: {CONFIG} says {name}={here!r} and {SETTINGS} says {value!r}. Undo the change, "
                "or save the adapter again."
            )
    return peft, ours


def _same_setting(here: Any, value: Any) -> bool:
    """Whether two values are equal, up to the order of a list of names."""
    lists = isinstance(here, list) and isinstance(value, list)
    if lists and all(isinstance(name, str) for name in here):
        return sorted(set(here)) == sorted(set(value))
    return bool(here == value) and isinstance(here, bool) == isinstance(value, bool)


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_settings(directory: Path) -> AdapterSettings | None:
    """Our own file of an adapter directory; None if PEFT wrote the adapter.

    Raises:
        PaCAError: If it is damaged.
    """
    path = directory / SETTINGS
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    settings = parse_settings(content, str(path))
    sealed = content.pop("checksum", None)
    if (sealed is None) != (settings.checksums is None) or sealed not in (None, settings_checksum(content)):
        raise PaCAError(
            f"{path} is not what was saved: its checksum differs, so it was damaged or changed since. Copy the adapter "
            "again, or save it again."
        )
    return settings


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of our own file with its checksum."""
    return {**content, "checksum": settings_checksum(content)}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        PaCAError: If it is missing, damaged or holds something else.
    """
    try:
        content: Any = read_json_file(path)
    except FileNotFoundError as error:
        raise PaCAError(f"{path} is missing: {str(path.parent)!r} is not a complete adapter directory.") from error
    except PaCAError:
        raise
    except (OSError, ValueError) as error:
        raise PaCAError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise PaCAError(f"{path} holds {type(content).__name__}, not an object.")
    return content
