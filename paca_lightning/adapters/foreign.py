"""PaCA adapters of other programs: PEFT's own (0.22), and those of the fork of PEFT by PaCA's authors.

Both write ``adapter_config.json`` with ``peft_type: PACA``, and in ``adapter_model.safetensors`` the indices of each
layer. PEFT writes ``paca_delta``, which is added to the columns. The fork writes ``paca_w``, the columns themselves
over the scaling, in the order in which their indices were drawn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paca_lightning.adapters.files import CONFIG, TENSORS
from paca_lightning.adapters.head import HEADS_BY_TASK
from paca_lightning.core.config import ALL_LINEAR, PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import is_suffix, matches_wholly

INDICES, DELTA, COLUMNS = ".paca_indices", ".paca_delta", ".paca_w"
ENDS = (INDICES, DELTA, COLUMNS)

READ = {"r", "paca_alpha", "target_modules", "exclude_modules", "modules_to_save", "random_seed", "layers_to_transform"}
WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "layers_pattern"),  # the layers are those of the tensors
    *("init_weights", "gradient_accumulation_steps", "select_grad", "megatron_core"),  # of the training only
}
CLASSIFIERS = HEADS_BY_TASK["SEQ_CLS"]
NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})


def foreign_config(peft: Mapping[str, Any], names: Sequence[str], directory: Path) -> PaCAConfig:
    """The settings of a conversion that gives the layers of a foreign adapter.

    Its tensors say which layers have columns. Their names are taken as targets where ``target_modules`` alone would
    not give the same layers here.

    Args:
        peft: The content of its ``adapter_config.json``.
        names: Of its tensors, counted from the base model.
        directory: Of the adapter, for messages.

    Raises:
        PaCAError: If a setting is missing or has no meaning, is not known, or contradicts the tensors.
    """
    file = directory / CONFIG
    for name, value in peft.items():
        if name not in READ | WITHOUT_EFFECT and value not in NEUTRAL:
            raise PaCAError(
                f"{file}: {name}={value!r} is not supported, and may change what the tensors mean. Merge the adapter "
                "in the program that wrote it (merge_and_unload), and use the merged model."
            )
    try:
        if peft["paca_alpha"] is None:
            raise PaCAError("paca_alpha is null, and the deltas mean nothing without it")
        config = PaCAConfig(
            r=peft["r"],
            alpha=peft["paca_alpha"],
            target_modules=peft["target_modules"],
            exclude_modules=_as_list(peft.get("exclude_modules")),
            seed=peft.get("random_seed") or 0,
            modules_to_save=_as_list(peft.get("modules_to_save")),
        )
    except KeyError as error:
        raise PaCAError(f"{file} has no {error}.") from error
    except PaCAError as error:
        raise PaCAError(f"{file}: {error}") from error
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(ENDS)))
    whole = _modules_in([name for name in names if not name.endswith(ENDS)], config.modules_to_save, directory)
    some_only = bool(config.exclude_modules) or peft.get("layers_to_transform") not in (None, [])
    if some_only or not _targets_alone_say(config.target_modules, layers, file):
        exact = "|".join(re.escape(layer) for layer in layers)
        config = replace(config, target_modules=exact or config.target_modules, exclude_modules=[])
    return replace(config, modules_to_save=whole)


def _targets_alone_say(targets: str | list[str], layers: list[str], file: Path) -> bool:
    """Whether each name in target_modules is that of a layer with columns: PEFT ignores others, and we refuse them."""
    if targets == ALL_LINEAR:
        return True
    if isinstance(targets, str):
        named = [layer for layer in layers if matches_wholly(targets, layer)]
    else:
        named = [layer for layer in layers if any(is_suffix(name, layer) for name in targets)]
    if len(named) < len(layers):
        other = next(layer for layer in layers if layer not in named)
        raise PaCAError(
            f"{file}: target_modules={targets!r} does not name {other!r}, which has columns in {TENSORS}. The two "
            "files are not of one adapter; copy both again."
        )
    return isinstance(targets, str) or all(any(is_suffix(name, layer) for layer in layers) for name in targets)


def _modules_in(names: list[str], listed: list[str], directory: Path) -> list[str]:
    """The modules trained whole, so named that they mean the same here: PEFT takes any end of a path (0.21).

    Raises:
        PaCAError: If there is a tensor of another module.
    """
    present: set[str] = set()
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts)))
        owner = next((path for path in paths if path.endswith(tuple(listed))), None)
        if owner is None:
            raise PaCAError(
                f"{directory / TENSORS} has {name!r}, and {CONFIG} does not list its module in modules_to_save (PEFT "
                "adds embeddings when the vocabulary was resized). Merge the adapter in the program that wrote it "
                "(merge_and_unload), and use the merged model."
            )
        present.add(owner)
    with_head = any(is_suffix(head, path) for head in CLASSIFIERS for path in present)
    result: list[str] = []
    for name in listed:
        paths_here = sorted(path for path in present if path.endswith(name))
        if not all(is_suffix(name, path) for path in paths_here):
            result += paths_here
        elif paths_here or not (with_head and name in CLASSIFIERS):
            result.append(name)
    return result


def foreign_tensors(tensors: Mapping[str, Tensor], config: PaCAConfig, file: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a foreign adapter under our names, with sorted indices, and whether it is the fork's.

    Args:
        tensors: By name from the base model.
        config: From :func:`foreign_config`.
        file: What they were read from, for messages.

    Raises:
        PaCAError: If a layer has no indices, or both kinds of columns, or another rank than the settings say.
    """
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(ENDS)}
    kinds = {end for name in tensors for end in (DELTA, COLUMNS) if name.endswith(end)}
    if len(kinds) == 2:
        raise PaCAError(
            f"{file} has both {DELTA[1:]!r} (PEFT's) and {COLUMNS[1:]!r} (the authors' fork). It is damaged."
        )
    end = kinds.pop() if kinds else DELTA
    layers = {name.removesuffix(each) for name in tensors for each in (INDICES, end) if name.endswith(each)}
    for layer in sorted(layers):
        values, indices = tensors.get(layer + end), tensors.get(layer + INDICES)
        if values is None or indices is None:
            missing = INDICES if indices is None else end
            raise PaCAError(
                f"{file} lacks {layer + missing!r}. Without it nothing tells which columns were trained, or how: save "
                "the adapter again where it was trained."
            )
        if indices.dim() == 1 and indices.dtype == torch.int64 and values.dim() == 2:
            if {len(indices), values.shape[1]} != {config.r}:
                raise PaCAError(
                    f"{file}: {layer!r} has {len(indices)} indices and values of shape {tuple(values.shape)}, and "
                    f"{CONFIG} says r={config.r}. Ranks of single layers are not supported: merge the adapter in the "
                    "program that wrote it (merge_and_unload)."
                )
            order = indices.argsort()
            indices, values = indices[order], values[:, order]
        result[layer + DELTA], result[layer + INDICES] = values, indices
    return result, end == COLUMNS


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []
