"""The head over labels of the model that an adapter was trained on: what it takes to build that model again."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from paca_lightning.core.errors import PaCAError

KINDS = ("ForSequenceClassification", "ForTokenClassification")
"""Ends of class names of transformers' models with such a head."""

HEADS_BY_TASK = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
"""Modules that PEFT (0.21) looks for in an adapter of a task, trained or not; it lists all of them."""


@dataclass(frozen=True)
class Head:
    """A head over labels.

    Attributes:
        kind: One of ``KINDS``.
        labels: Their names, in the order of their numbers.
        problem_type: What transformers calls the task, if the model's config says it.
    """

    kind: str
    labels: tuple[str, ...]
    problem_type: str | None


def head_entries(base_model: nn.Module | None) -> dict[str, Any] | None:
    """The head of a Hugging Face model as plain values; None if it has no such head."""
    kind = next((kind for kind in KINDS if type(base_model).__name__.endswith(kind)), None)
    if kind is None or base_model is None:
        return None
    config: Any = base_model.config
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    return {"kind": kind, "labels": names, "problem_type": config.problem_type}


def check_labels(base_model: nn.Module | None, head: Head | None) -> None:
    """Refuse a model whose labels are called otherwise than those that an adapter's head was trained on.

    Raises:
        PaCAError: If both have names, and they differ or are in another order: each prediction would get a wrong one.
    """
    here = parse_head(head_entries(base_model))
    if here is None or head is None or here.labels == head.labels or not (_named(here) and _named(head)):
        return
    raise PaCAError(
        f"its head was trained on the labels {list(head.labels)}, in this order, and the model has "
        f"{list(here.labels)}. Build the model with the adapter's labels (id2label), or with num_labels alone: it then "
        "takes their names."
    )


def take_labels(base_model: nn.Module | None, head: Head | None) -> None:
    """Give the labels of a model, if they have no names, those of an adapter's head."""
    here = parse_head(head_entries(base_model))
    if here is None or head is None or base_model is None or _named(here) or len(here.labels) != len(head.labels):
        return
    config: Any = base_model.config
    config.id2label, config.label2id = dict(enumerate(head.labels)), {name: i for i, name in enumerate(head.labels)}


def _named(head: Head) -> bool:
    """Whether labels have names: transformers numbers them as LABEL_0, LABEL_1, and our data by their digits."""
    return not all(name.removeprefix("LABEL_").isdigit() for name in head.labels)


def parse_head(content: dict[str, Any] | None) -> Head | None:
    """The head from plain values.

    Raises:
        KeyError, TypeError, ValueError: If they are damaged.
    """
    if content is None:  # another model, or a file of version 0.1.0
        return None
    kind, labels, problem = content["kind"], content["labels"], content["problem_type"]
    if kind not in KINDS or not isinstance(labels, list) or not labels or not isinstance(problem, str | None):
        raise ValueError(f"head is {content!r}")
    return Head(kind, tuple(str(name) for name in labels), problem)
