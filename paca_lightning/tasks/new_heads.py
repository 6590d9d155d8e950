"""Builds models with a head over labels, and declares which of their modules are new."""

from typing import Any, Literal

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_modules import declare_new
from paca_lightning.core.paths import lies_in
from paca_lightning.tasks.pretrained import load_model, read_config

HeadTask = Literal["sequence", "tokens", "multi_label", "regression"]
"""One class for a text, one for each word, any number of labels for a text, or a number for a text."""

PROBLEM_TYPES = {
    "sequence": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls a task in a model's config."""


def build_with_head(
    model: str,
    *,
    task: HeadTask,
    labels: list[str] | None,
    head_seed: int = 0,
    pad_token_id: int | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A model with a head for a task: that of its files, or a new one, equal on every process.

    The head, and a pooler that the files lack, are declared as new (``core.new_modules``), so that whatever trains the
    model in part trains them whole.

    Args:
        model: Directory with ``config.json`` and weights, or hub id: of a model with or without a head.
        task: The task.
        labels: Names of the labels. None: those that the model knows; for regression there are none.
        head_seed: Seed of what is drawn at random.
        pad_token_id: What the data pads with: decoders take the last token that is none.
        **settings: As for :func:`~paca_lightning.tasks.pretrained.load_model`.

    Raises:
        PaCAError: As ``load_model``; if the labels are unknown or those of the model's head are others; or if the files
            lack more than a head.
    """
    source = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
    config = read_config(model, **source)
    labels = _settled_labels(model, config, task, labels)
    changes: dict[str, Any] = {"num_labels": len(labels)}
    if task != "regression":
        changes |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if task in PROBLEM_TYPES:
        changes["problem_type"] = PROBLEM_TYPES[task]
    if pad_token_id is not None and getattr(config, "pad_token_id", None) != pad_token_id:
        changes["pad_token_id"] = pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head_seed)
        built, missing = load_model(_auto_class(task), model, **settings, **changes)
    head = head_paths(built)
    poolers = sorted({name.rpartition(".")[0] for name in missing if not any(lies_in(name, path) for path in head)})
    if others := [path for path in poolers if "pooler" not in path.split(".")]:
        raise PaCAError(
            f"The weights of {model!r} lack more than a head, such as {others[0]!r}, which would stay random. Get the "
            "whole model, or set pretrained=False to train from random weights."
        )
    declare_new(built, [*head, *poolers])
    return built


def head_paths(model: PreTrainedModel) -> list[str]:
    """Paths of what is behind the base model of a Hugging Face model, as far as it has parameters."""
    base = model.base_model
    if base is model:
        return []
    return [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]


def has_head(config: PreTrainedConfig, task: HeadTask) -> bool:
    """Whether the files of a model hold a head for a task, as its config tells."""
    kind = _auto_class(task).__name__.removeprefix("AutoModel")
    return any(name.endswith(kind) for name in config.architectures or ())


def label_names(config: PreTrainedConfig) -> list[str]:
    """The names of a model's labels, in the order of their numbers."""
    names: dict[Any, str] = config.id2label or {}
    return [names[number] for number in sorted(names)]


def _auto_class(task: HeadTask) -> Any:
    return AutoModelForTokenClassification if task == "tokens" else AutoModelForSequenceClassification


def _settled_labels(model: str, config: PreTrainedConfig, task: HeadTask, labels: list[str] | None) -> list[str]:
    """The names of the labels, which those of the model's own head must agree with.

    Raises:
        PaCAError: If nobody names them, or the head has others.
    """
    known = label_names(config) if has_head(config, task) else None
    if task == "regression":
        labels = ["value"]
    if labels is None and known is None:
        raise PaCAError(
            f"The labels of the {task} task are unknown: {model!r} has no head for it, and there is no "
            "ClassificationDataModule to read them from. Set the module's `labels`, to their names or their number."
        )
    if labels is None or known is None:
        return labels if known is None else known  # type: ignore[return-value]  # one of them is there
    if len(known) != len(labels):
        raise PaCAError(
            f"The head of {model!r} has {len(known)} labels ({_listed(known)}), and {len(labels)} are asked for "
            f"({_listed(labels)}). Take the model that it was trained from, whose head is new, or data with its labels."
        )
    named = task != "regression" and not all(name.startswith("LABEL_") for name in known)
    if named and known != labels and not all(name.isdigit() for name in labels):
        raise PaCAError(
            f"The head of {model!r} knows the labels {_listed(known)}, in this order, and the data have "
            f"{_listed(labels)}. Set the data's `labels` to the head's, or take the model that it was trained from."
        )
    return known if named else labels


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
