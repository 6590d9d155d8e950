"""Linear layers whose weight the module around them reads without calling them, found in its source.

A layer that is not called has no tap in the graph: its delta would get no gradient. Mamba multiplies by
``self.dt_proj.weight``; WavLM passes ``self.q_proj.weight`` to a function of PyTorch.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

SETUP = ("init", "reset")
"""Beginnings of the names of methods that fill weights: what they read says nothing about the forward."""

METADATA = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "data_ptr", "is_meta", "requires_grad"})
OWN_TENSORS = frozenset({"weight", "bias", "in_features", "out_features"})


def bypassed_linears(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers, direct children of a module, whose weight its methods read and which they never call.

    A layer that is called on one path and read on another one, such as for a fused kernel, is among them only if
    transformers declares it.
    """
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    cls: Any = type(module)
    if linears:
        yield from (linears[name] for name in _read_not_called(cls) & linears.keys())


@functools.cache
def _read_not_called(cls: type[nn.Module]) -> frozenset[str]:
    """Attributes of a class whose ``weight`` its methods read, and that they use in no other way or declare to read."""
    read, used, declared = set[str](), set[str](), set[str]()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in _methods(base):
            declared.update(_declared(method))
            parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    outer = parents[node]
                    if not (isinstance(outer, ast.Attribute) and outer.attr in OWN_TENSORS):
                        used.add(node.attr)
                    elif outer.attr == "weight" and not _is_metadata(parents[outer]):
                        read.add(node.attr)
    return frozenset(read - used | declared)


def _declared(method: ast.FunctionDef) -> Iterator[str]:
    """Children that a method of transformers declares to use without calling them, as ``accelerate`` has to know."""
    for decorator in method.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("force_accelerate_hooks"):
            yield from (str(node.value) for node in ast.walk(decorator) if isinstance(node, ast.Constant))


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods of a class but for those that fill weights; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.lstrip("_").startswith(SETUP):
            yield node


def _is_metadata(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in METADATA
