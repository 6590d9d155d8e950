"""Runs chat templates within limits: they are programs that come with a model or an adapter, and may never end.

transformers runs them in Jinja's sandbox, which keeps them from the machine, but not from looping or allocating. Here
loops, calls and filters count steps, texts have a largest size, and a render has a limit of CPU time.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any, ClassVar

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.private.transformers import templates_compiled_by

STEPS = 200_000
SECONDS = 20.0
"""Of CPU time for one conversation, which takes milliseconds."""
LARGEST = 10_000_000
"""Characters of a text, elements of a list, and numbers given to a function."""
SHORT = 1_000
"""Characters of a text that any operation handles in microseconds."""
UNTIMED = 64 * SHORT
"""Characters after which the clock is read, which costs more than most steps; a step counts as `SHORT` at least."""
_WIDTH = re.compile(r"\d{6,}")  # of a field in a format


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **arguments: Any) -> Any:
    """``tokenizer.apply_chat_template`` within limits.

    Args:
        tokenizer: With a chat template.
        messages: The turns.
        **arguments: Of ``apply_chat_template``.

    Raises:
        SecurityError: The template takes more than the limits.
        Exception: Whatever the template raises.
    """
    with templates_compiled_by(_compile):
        return tokenizer.apply_chat_template(messages, **arguments)


def _compile(source: str, environment: Any) -> Template:
    template = _compiled(source, environment)
    template.environment.limits = Limits()  # type: ignore[attr-defined]
    return template


@lru_cache(maxsize=8)
def _compiled(source: str, environment: Any) -> Template:
    bounded = environment.overlay()
    bounded.__class__ = BoundedEnvironment
    bounded.finalize = bounded.measured
    bounded.filters = {name: bounded.bounded_filter(name, function) for name, function in bounded.filters.items()}
    bounded.filters |= {COUNTED: bounded.counted, MEASURED: bounded.measured}
    template: Template = bounded.from_string(source)
    return template


class Limits:
    """What a render may still use."""

    def __init__(self) -> None:
        self.steps, self.untimed = STEPS, 0
        self.until: float | None = None  # unknown before the clock is read, which a short render never does

    def charge(self, steps: int = 1, size: int = 0) -> None:
        """Take steps off, and read the clock if enough was done since.

        Args:
            steps: How many.
            size: Characters or elements that are handled; `UNTIMED` for work of unknown size.

        Raises:
            SecurityError: None are left, or the time is over.
        """
        self.steps -= steps
        self.untimed += size if size > SHORT else SHORT
        if self.steps < 0 or (self.untimed >= UNTIMED and self._late()):
            raise SecurityError(f"it runs without end: more than {STEPS:,} steps, or {SECONDS:g} s, for a conversation")

    def _late(self) -> bool:
        now, self.untimed = time.thread_time(), 0
        if self.until is None:
            self.until = now + SECONDS
        return now > self.until


COUNTED, MEASURED = "paca_counted", "paca_measured"


class BoundedCode(CodeGenerator):
    """Generates code that counts the turns of loops and measures what is joined."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """Wrap what is looped over and what is joined in filters, then generate."""
        for loop in node.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, COUNTED)
        for joined in node.find_all(nodes.Concat):
            joined.nodes = [_filtered(part, MEASURED) for part in joined.nodes]
        super().visit_Template(node, frame)


def _filtered(node: Any, name: str) -> Any:
    filtered = nodes.Filter(node, name, [], [], None, None)
    return filtered.set_lineno(node.lineno).set_environment(node.environment)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment with limits."""

    code_generator_class = BoundedCode
    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"+", "*", "**", "%"})  # type: ignore[misc]
    limits = Limits()

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; its arguments and its result have a bounded size."""
        __obj_itself = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(__obj_itself, "__self__", None)
        name = __obj_itself.__name__ if isinstance(owner, str) else ""
        __self._check(name, owner, *args, *kwargs.values())
        return __self.measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator that may make much of little."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            size = len(left) + len(right)
            _refuse_above(LARGEST, size)
            self.limits.charge(size=size)
            return left + right
        self.limits.charge(size=0 if _is_short(left) and _is_short(right) else UNTIMED)
        sizes = [_size(side) for side in (left, right)]
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str):
            self._check("format", left)
        elif operator == "**" and whole:
            _refuse_above(LARGEST, left.bit_length() * abs(right))
        elif operator == "*" and not whole:
            factor = left if isinstance(left, int) else right if isinstance(right, int) else 1
            _refuse_above(LARGEST, max(factor, 0) * max(sizes))
        else:
            _refuse_above(LARGEST, sum(sizes))
        return super().call_binop(context, operator, left, right)

    def bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result have a bounded size."""

        @wraps(function)  # with the marks of filters that take the context or the environment
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check(name, *args, *kwargs.values())
            return self.measured(function(*args, **kwargs))

        return bounded

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, each of which is a step."""
        for value in values:
            self.limits.charge()
            yield value

    def measured(self, value: Any) -> Any:
        """The same value, if its size is within the limits."""
        if isinstance(value, str):
            _refuse_above(LARGEST, len(value))
            self.limits.charge(1 + len(value) // 1000, len(value))
        elif isinstance(value, list | tuple | dict):
            size = _size(value)
            self.limits.charge(1 + size // 1000, size)
        elif not _is_short(value):  # such as a range, whose elements a filter goes through
            self.limits.charge(0, UNTIMED)
        return value

    def _check(self, name: str, *arguments: Any) -> None:
        self.limits.charge()
        for argument in arguments:
            self.measured(argument)
            if isinstance(argument, int):
                _refuse_above(LARGEST, abs(argument))
            if name in ("format", "format_map") and isinstance(argument, str) and _WIDTH.search(argument):
                raise SecurityError("it formats a field of a width of six digits or more")


def _is_short(value: Any) -> bool:
    """Whether any operation on a number, or on what has no value, takes microseconds."""
    return abs(value) < SHORT if isinstance(value, int | float) else value is None or isinstance(value, Undefined)


def _size(value: Any) -> int:
    """Characters of a text, bits of a number, or elements of a collection with those inside it.

    Raises:
        SecurityError: It is too large.
    """
    if isinstance(value, int):
        return value.bit_length()
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | list | tuple | dict):
            size += len(item)
            _refuse_above(LARGEST, size)
            if isinstance(item, dict):
                waiting.extend(item.values())
            elif not isinstance(item, str):
                waiting.extend(item)
    return size


def _refuse_above(limit: int, size: int) -> None:
    if size > limit:
        raise SecurityError(f"it makes a value of a size above {limit:,}")
