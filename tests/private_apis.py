"""Finds uses of private APIs of other libraries in the package's source: what tests/test_layering.py forbids."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from paca_lightning.core.private import OVERRIDES

PRIVATE = re.compile(r"_[a-zA-Z]\w*")
STRING_METHODS = {"endswith", "join", "partition", "removeprefix", "removesuffix", "replace", "rpartition", "split"}
OUR_PREFIX = "_paca_"  # of attributes that we put on objects of other libraries
USED_IN: dict[str, set[str]] = {}
for _override in OVERRIDES:
    USED_IN.setdefault(_override.name, set()).update(_override.used_in)


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore, and is not marked as ours."""
    return PRIVATE.fullmatch(name) is not None and not name.startswith(OUR_PREFIX)


def own_names(sources: Iterable[str]) -> set[str]:
    """Private names that the package defines: classes, and attributes and methods of classes."""
    names: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                names.update([node.name, *class_names(node)])
    return {name for name in names if is_private(name)}


def class_names(node: ast.ClassDef) -> Iterator[str]:
    """Names that a class defines in its body or on ``self``."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef):
            yield child.name
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and is_self(child.value):
            yield child.attr
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def is_self(node: ast.expr) -> bool:
    """Whether an expression is ``self`` or ``super()``."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return called or (isinstance(node, ast.Name) and node.id == "self")


def private_uses(module: str, source: str, own: set[str]) -> list[str]:
    """Uses of other libraries' private APIs in a module of the package (``tasks.loss``), by line."""
    if module == "core.private" or module.startswith("core.private."):
        return []
    tree = ast.parse(source)
    allowed = {name for name, modules in USED_IN.items() if module in modules}
    known = (own - USED_IN.keys()) | allowed
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(node.lineno, name) for name in _imported(node) if _is_private_import(name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in known:
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.ClassDef):
            overrides = USED_IN.keys() - allowed
            found += [(node.lineno, f"{node.name}.{name}") for name in overrides.intersection(class_names(node))]
    found += [(line, repr(name)) for line, name in _strings(tree) if name not in known]
    return [f"{module}:{line} uses {use}" for line, use in sorted(set(found))]


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.level:  # relative: the package's own
        return []
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _is_private_import(name: str) -> bool:
    parts = name.split(".")
    return parts[0] not in ("paca_lightning", "__future__") and any(PRIVATE.fullmatch(part) for part in parts)


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that may name a private attribute: not parts of f-strings, annotations or string operations."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.JoinedStr):
            inside = list(node.values)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in STRING_METHODS:
            inside = [*node.args, node.func.value]
        elif isinstance(node, ast.FunctionDef):
            inside = [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation]
            inside += [node.returns] if node.returns else []
        elif isinstance(node, ast.AnnAssign):
            inside = [node.annotation]
        skipped.update(id(child) for part in inside for child in ast.walk(part))
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if id(node) not in skipped and is_private(text):
            yield getattr(node, "lineno", 0), text


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file's module below the package's root: ``tasks.loss``, ``tasks`` for ``tasks/__init__.py``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def private_uses_in_test(source: str, own: set[str]) -> list[str]:
    """Uses of our private names in a test's source: imports, and attributes of anything but ``self``."""
    tree = ast.parse(source)
    own_here = own_names([source])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paca_lightning"):
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and node.attr in own - own_here - USED_IN.keys():
            found += [f"{node.lineno}: {ast.unparse(node)}"]
    return found
