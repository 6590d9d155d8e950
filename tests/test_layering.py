"""The layers of the package: a folder imports from folders below it, and some libraries stay behind fences."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TOGETHER
from tests.private_apis import is_private, module_name, own_names, private_uses, private_uses_in_test

PACKAGE = "paca_lightning"
ROOT = Path(__file__).parents[1] / PACKAGE

# Folder (or module of the package's root): the folders it may import. Whatever is not here has no place yet.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "activation_checkpointing": {"core"},
    "layers": {"core"},
    "conversion": {"core", "layers"},
    "strategies": {"core", "activation_checkpointing", "layers"},
    "tasks": {"core", "activation_checkpointing", "strategies"},  # knows nothing of PaCA
    "adapters": {"core", "layers", "conversion"},
    "other_methods": {"core", "activation_checkpointing", "layers", "conversion", "adapters"},
    "callbacks": {"core", "layers", "conversion", "strategies", "adapters", "other_methods"},
    "tools": {
        "core",
        "activation_checkpointing",
        "layers",
        "conversion",
        "strategies",
        "tasks",
        "adapters",
        "other_methods",
        "callbacks",
    },
    "registration": {"strategies", "callbacks"},
    "cli": {"core", "tools"},
}
FENCES: dict[str, set[str]] = {  # library: where it may be imported
    "lightning": {"callbacks", "strategies", "tasks", "tools", "cli", "core.private"},
    "transformers": {"tasks", "tools", "adapters.export", "callbacks.hf_trainer", "core.private"},
    "datasets": {"tasks", "tools"},
    "bitsandbytes": {"layers.bitsandbytes", "layers.linear4bit", "core.private"},
    "habana_frameworks": {"strategies.hpu"},
    "optuna": {"tools.compare"},
    "lm_eval": {"tools.evaluation"},
    "torchft": {"strategies.diloco", "core.private"},
}
NO_DISTRIBUTED_AT_IMPORT = {"core", "layers", "conversion", "adapters"}


@dataclass(frozen=True)
class Import:
    name: str  # dotted, absolute
    line: int
    at_import_time: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import in a module's source; ``package`` is the one it lies in, for relative imports."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, top)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, top)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top and not inside)

    yield from walk(ast.parse(source), top=True)


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What a module of the package (``tasks.loss``) imports and must not."""
    folder = module.split(".")[0]
    if folder not in MAY_IMPORT:
        return [f"{module} has no place: add {folder!r} to MAY_IMPORT in tests/test_layering.py"]
    found = []
    package = f"{PACKAGE}.{module}" if is_package else f"{PACKAGE}.{module}".rpartition(".")[0]
    for item in imports(source, package):
        where, (library, _, inner) = f"{module}:{item.line} imports {item.name}", item.name.partition(".")
        if library in FENCES and not within(module, FENCES[library]):
            found.append(f"{where}, which belongs in {sorted(FENCES[library])}")
        if (
            item.at_import_time
            and within(item.name, {"torch.distributed"})
            and within(module, NO_DISTRIBUTED_AT_IMPORT)
        ):
            found.append(f"{where} at import time: {folder} works without it, so import it inside the function")
        if library == PACKAGE:
            found += [f"{where}{problem}" for problem in _problems(folder, inner)]
    return found


def _problems(folder: str, inner: str) -> Iterator[str]:
    """What is wrong with a folder's import of ``paca_lightning.<inner>``."""
    other, name = inner.split(".")[0], inner.rpartition(".")[2]
    if other == folder:
        return
    if other not in MAY_IMPORT:
        yield ": name the module, not the package's __init__"
    elif other not in MAY_IMPORT[folder]:
        yield f", but {folder} may import {sorted(MAY_IMPORT[folder])}"
    elif name.startswith("_"):
        yield ", a private name of another folder"


SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_imports_from_below_only(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(module_name(path, ROOT), source, is_package=path.stem == "__init__") == []


def test_every_place_exists_and_imports_go_down_only() -> None:
    present = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(MAY_IMPORT) == present - {"__init__"}
    for folder, below in MAY_IMPORT.items():
        assert all(folder not in MAY_IMPORT[other] for other in below)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("layers.linear", "from paca_lightning.conversion.convert import apply_paca", "layers may import ['core']"),
        (
            "layers.linear",
            "def f():\n    import paca_lightning.callbacks.paca",
            "layers.linear:2 imports paca_lightning.callbacks.paca, but layers may",
        ),
        ("core.files", "from ..layers import autograd", "core may import []"),
        ("strategies.fsdp2.sharding", "from ...callbacks.paca import PaCAStrategy", "strategies may import"),
        ("tasks.loss", "from paca_lightning.layers.linear import PaCALinear", "tasks may import"),
        ("adapters.adapter", "from paca_lightning import PaCAConfig", "not the package's __init__"),
        ("adapters.adapter", "from paca_lightning.core.files import _umask", "a private name of another folder"),
        ("conversion.report", "import lightning.pytorch as pl", "which belongs in"),
        ("strategies.fsdp2.sharding", "from transformers import AutoModel", "which belongs in"),
        (
            "layers.linear",
            "def f():\n    import bitsandbytes",
            "in ['core.private', 'layers.bitsandbytes', 'layers.linear4bit']",
        ),
        ("strategies.fsdp2.sharding", "import habana_frameworks.torch", "which belongs in ['strategies.hpu']"),
        ("layers.linear", "from torch import distributed", "at import time"),
        ("layers.linear", "if True:\n    import torch.distributed as dist", "at import time"),
        ("mystery", "", "add 'mystery' to MAY_IMPORT"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("conversion.convert", "from paca_lightning.layers.linear import PaCALinear\nfrom .targets import resolve"),
        ("layers.base", "def f():\n    from torch.distributed.tensor import DTensor"),
        ("strategies.hpu.bridge", "import habana_frameworks.torch\nfrom paca_lightning.core.errors import PaCAError"),
        ("strategies.fsdp2.strategy", "from .sharding import shard\nfrom lightning.pytorch.strategies import Strategy"),
        ("tasks.causal_lm", "import transformers\nfrom paca_lightning.strategies.fsdp2 import FSDP2Strategy"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_private_apis_of_other_libraries_are_used_in_core_private_only() -> None:
    sources = {module_name(path, ROOT): path.read_text(encoding="utf-8") for path in SOURCES}
    own = own_names(sources.values())
    found = [use for module, source in sources.items() for use in private_uses(module, source, own)]
    assert found == [], "use a public API, or add a function to core/private and a canary to tests/core/private"


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("from torch._guards import active_fake_mode", "torch._guards.active_fake_mode"),
        ("from torch.nn.modules.module import _IncompatibleKeys", "torch.nn.modules.module._IncompatibleKeys"),
        ("def f():\n    import torch._dynamo", "torch._dynamo"),
        ("key = tensor.untyped_storage()._cdata", "tensor.untyped_storage()._cdata"),
        ("module._apply(fn)", "module._apply"),
        ("def _version(tensor): return tensor._version", "tensor._version"),
        ("names = getattr(model, '_no_split_modules', None)", "'_no_split_modules'"),
        ("SET = '_non_persistent_buffers_set'", "'_non_persistent_buffers_set'"),
        ("vars(module).pop('_forward_hooks')", "'_forward_hooks'"),
        ("class Layer(nn.Module):\n    def _apply(self, fn): ...", "Layer._apply"),
        ("class Strategy(Base):\n    def f(self):\n        self._timeout = 1", "self._timeout"),
    ],
)
def test_a_planted_private_api_is_found(source: str, use: str) -> None:
    found = private_uses("tasks.loss", source, own_names([source]))
    assert use in {line.partition(" uses ")[2] for line in found}


@pytest.mark.parametrize(
    "source",
    [
        "from paca_lightning.core.private.torch import storage_id\nfrom . import _helpers",
        "from __future__ import annotations",
        "class Loss:\n    def __init__(self):\n        self._total = 0\n\n    def _add(self): self._total += 1",
        "name = f'{split}_split' + path.removesuffix('_bias')",
        "class _Call: ...\n\ndef f(call: '_Call') -> '_Call | None': ...",
        "vars(module)['_paca_hooks'] = module.__dict__",
    ],
)
def test_our_own_private_names_are_not_found(source: str) -> None:
    assert private_uses("tasks.loss", source, own_names([source])) == []


def test_an_override_is_allowed_where_it_is_listed() -> None:
    source = "class Layer(nn.Module):\n    def _apply(self, fn):\n        super()._apply(fn)"
    assert private_uses("layers.base", source, own_names([source])) == []
    assert private_uses("layers.linear", source, own_names([source])) != []


@functools.cache
def all_private_names() -> set[str]:
    """Private functions, classes, attributes and methods of the package."""
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    functions = {
        node.name for source in sources for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    return own_names(sources) | {name for name in functions if is_private(name)}


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(Path(__file__).parent)))
def test_tests_use_public_names_only(path: Path) -> None:
    assert private_uses_in_test(path.read_text(encoding="utf-8"), all_private_names()) == []


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("from paca_lightning.tasks.loss import _chunked", "1: _chunked"),
        ("from paca_lightning.tasks import loss\nloss._chunked(1)", "2: loss._chunked"),
    ],
)
def test_a_planted_private_name_in_a_test_is_found(source: str, use: str) -> None:
    assert private_uses_in_test(source, {"_chunked"}) == [use]


FOLDERS = sorted(path.parent for path in ROOT.rglob("__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(ROOT.parent).as_posix())
def test_each_folder_says_what_lives_there(folder: Path) -> None:
    documented = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert documented is not None
    assert documented.splitlines()[0].endswith(".")


def test_what_stays_together_exists() -> None:
    assert all((Path(__file__).parents[1] / place).exists() for place in TOGETHER)


def test_each_folder_has_its_tests() -> None:
    tests = Path(__file__).parent
    tested = {folder for path in tests.rglob("test_*.py") for folder in path.relative_to(tests).parents}
    assert {folder.relative_to(ROOT) for folder in FOLDERS} <= tested


MOST_LINES_OF_A_MODULE, MOST_LINES_OF_A_FUNCTION = 250, 60


def long_functions(source: str) -> list[str]:
    """Functions with too many lines, their docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1 - (documented.count("\n") + 1 if documented else 0)
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{node.name} has {lines} lines")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES_OF_A_MODULE
    assert long_functions(source) == []


def test_a_long_function_is_found_without_its_docstring() -> None:
    body = "    x = 1\n" * 58
    assert long_functions(f'def f():\n    """One\n    two\n    """\n{body}') == []
    assert long_functions(f'def f():\n    """One\n    two\n    """\n{body}    y = 1\n    z = 1\n') == ["f has 61 lines"]
