"""Methods as a user writes them: ``paca:16,selection=weight_norm,lr=1e-3,name=norm``."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import yaml

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.compare.methods import FloorMethod, Method, PaCAMethod
from paca_lightning.tools.compare.own_methods import INSERTED, PROJECTED, own_method
from paca_lightning.tools.compare.peft_methods import peft_method
from paca_lightning.tools.compare.search import parse_space
from paca_lightning.tools.compare.task import Task

FLOOR, FULL, PACA = "floor", "full", "paca"
RANK, PARAMETERS = "rank", "parameters"
LARGEST = 4096
"""The largest size that is tried to reach a number of parameters."""


def parse_method(text: str) -> Method:
    """The method that a user writes as ``NAME[:SIZE][,OPTION=VALUE]...``.

    Options are ``name`` (its label), ``lr`` (``auto``, a number, or a range ``LOW:HIGH``), and fields of the method's
    own config. Values are read as YAML; lists and dictionaries keep their commas, in brackets.

    Raises:
        PaCAError: If the method is unknown, or the text is not of that form.
    """
    head, *parts = re.split(r",(?![^\[{]*[\]}])", text.strip())
    name, colon, size = head.partition(":")
    given = dict(_option(part, text) for part in parts)
    space = parse_space(str(given.pop("lr", "auto")), f"method {text!r}: lr")
    label = given.pop("name", None)
    if label is None:
        label = ",".join([head, *(part for part in parts if _option(part, text)[0] in given)])
    method = replace(_named(name, str(label), given), space=space)
    if not colon:
        return method
    if not size.isdecimal() or int(size) == 0:
        raise PaCAError(f"Method {text!r}: {size!r} is no size. Write a positive whole number, such as {name}:16.")
    if method.size_field is None:
        raise PaCAError(f"Method {name!r} has no size, and {text!r} gives it one.")
    return replace(method, options={method.size_field: int(size)} | method.options)


def _option(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip():
        raise PaCAError(f"Method {text!r}: {part!r} is no option. Write OPTION=VALUE, such as selection=weight_norm.")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise PaCAError(f"Method {text!r}: the value of {name} is not YAML: {value!r}.") from error
    if isinstance(read, str) and name.strip() != "name":
        with suppress(ValueError):  # 1e-3 is text in YAML 1.1
            read = float(read)
    return name.strip(), value.strip() if name.strip() == "lr" else read


def _named(name: str, label: str, options: dict[str, Any]) -> Method:
    if name == PACA:
        return PaCAMethod(label, options=options)
    if name in (*INSERTED, *PROJECTED):
        return own_method(name, label, options)
    if name not in (FLOOR, FULL):
        return peft_method(name, label, options)
    if options:
        raise PaCAError(f"Method {name!r} has no options but name and lr, not {', '.join(options)}.")
    return FloorMethod(label) if name == FLOOR else Method(label)


def parse_methods(texts: Sequence[str], match: str, task: Task) -> list[Method]:
    """The methods of a comparison on a task. Those without a size get one that matches the first method.

    Args:
        texts: As for :func:`parse_method`.
        match: What a method without a size shares with the first one that trains: its ``rank``, or the number of
            trained ``parameters``, as nearly as whole sizes allow.
        task: Its model says how many parameters a size takes.

    Raises:
        PaCAError: If a method is unknown or refused by the model, or two have one label.
    """
    methods = [parse_method(text) for text in texts]
    first = next((method for method in methods if not isinstance(method, FloorMethod)), None)
    if first is None:
        raise PaCAError("There is no method to compare but the floor. Give some, such as --methods paca:16 lora:8.")
    matched = [first if method is first else _matched(method, first, match, task) for method in methods]
    labels = [method.slug for method in matched]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise PaCAError(f"Two methods are called {twice[0]!r}. Tell them apart with name=..., such as lora:8,name=b.")
    return matched


def _matched(method: Method, first: Method, match: str, task: Task) -> Method:
    size = method.size_field
    if size is None or size in method.options:
        return method
    if match == PARAMETERS:
        return nearest_size(method, first.count(task), task)
    rank = first.options.get("r", task.paca.r if isinstance(first, PaCAMethod) else None)
    return method.resized(rank) if size == "r" and rank is not None else method


def nearest_size(method: Method, wanted: int, task: Task) -> Method:
    """The method at the size at which it trains most nearly a number of parameters.

    Args:
        method: One with a size.
        wanted: How many parameters.
        task: The model.
    """
    low, high = 1, 2
    while high < LARGEST and method.resized(high).count(task) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if method.resized(middle).count(task) < wanted else (low, middle)
    return min((method.resized(size) for size in (low, high)), key=lambda one: abs(one.count(task) - wanted))
