"""The layers of the package: a module imports from rows below its own, and some libraries stay behind fences."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "paca_lightning"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom up. The groups of a row are siblings: they do not import each other. A name is a module or a
# subpackage with all that it holds. __init__.py, which re-exports, is exempt.
ROWS: list[list[set[str]]] = [
    [{"config", "errors", "files"}],
    [{"selection"}, {"functional"}, {"nf4"}],
    [{"gathering", "base_layer", "layers", "dequantized", "quantized"}],
    [
        {"paths", "targets", "report", "calibration", "trained_whole", "reversal", "conversion", "write_back"}
        | {"checkpoint", "fingerprint", "adapter_files", "adapter"}
    ],
    [
        {"callback", "averaging", "run_checks", "same_base", "following", "training_data", "adapter_checkpoint"},
        {"strategies"},
    ],
    [{"tasks"}],
    [{"tools"}],
    [{"cli"}],
]
TASKS_MAY_USE = {"errors", "files", "strategies", "tasks"}  # tasks know nothing of PaCA
FENCES: dict[str, set[str]] = {  # library: where it may be imported
    "lightning": set().union(*ROWS[4], *ROWS[5], *ROWS[6], *ROWS[7]),
    "transformers": set().union(*ROWS[5], *ROWS[6], *ROWS[7]),
    "datasets": set().union(*ROWS[5], *ROWS[6], *ROWS[7]),
    "bitsandbytes": {"nf4"},
    "habana_frameworks": {"strategies.hpu"},
}
NO_DISTRIBUTED_AT_IMPORT = set().union(*ROWS[0], *ROWS[1], *ROWS[2], *ROWS[3])


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


def place_of(module: str) -> tuple[int, int] | None:
    """Row and group of a module by its name inside the package."""
    top = module.split(".")[0]
    found = [(r, g) for r, row in enumerate(ROWS) for g, group in enumerate(row) if top in group]
    return found[0] if found else None


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What a module of the package (``tasks.loss``) imports and must not."""
    here = place_of(module)
    if here is None:
        return [
            f"{module} has no row: add it to ROWS in tests/test_layering.py, in the lowest row that its imports allow"
        ]
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
            found.append(f"{where} at import time: rows 0-3 work without it, so import it inside the function")
        if library == PACKAGE:
            there = place_of(inner)
            if inner.split(".")[0] == module.split(".")[0]:
                continue
            if there is None and here[0] < len(ROWS) - 1:
                found.append(f"{where}: name the module, not the package's __init__")
            elif there is None:
                continue  # the top row may use the public names
            elif there[0] > here[0]:
                found.append(f"{where}, from row {there[0]} above its own row {here[0]}")
            elif there[0] == here[0] and there[1] != here[1]:
                found.append(f"{where}, a sibling in row {here[0]}")
            elif within(module, {"tasks"}) and not within(inner, TASKS_MAY_USE):
                found.append(f"{where}: tasks know nothing of PaCA, they may use {sorted(TASKS_MAY_USE)}")
    return found


SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_keeps_to_its_row(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(module, path.read_text(encoding="utf-8"), is_package=is_package) == []


def test_every_row_is_of_modules_that_exist() -> None:
    present = {path.stem if path.is_file() else path.name for path in ROOT.iterdir()}
    optional = {"cli", "nf4", "quantized", "tools"}
    assert set().union(*(group for row in ROWS for group in row)) - optional <= present


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("layers", "from paca_lightning.conversion import apply_paca", "from row 3 above its own row 2"),
        (
            "layers",
            "def f():\n    import paca_lightning.callback",
            "layers:2 imports paca_lightning.callback, from row 4",
        ),
        ("selection", "from paca_lightning import functional", "a sibling in row 1"),
        ("callback", "from paca_lightning.strategies.fsdp2 import FSDP2Strategy", "a sibling in row 4"),
        ("strategies.fsdp2", "from ..callback import PaCAStrategy", "a sibling in row 4"),
        ("tasks.loss", "from paca_lightning.layers import PaCALinear", "tasks know nothing of PaCA"),
        ("adapter", "from paca_lightning import PaCAConfig", "not the package's __init__"),
        ("report", "import lightning.pytorch as pl", "which belongs in"),
        ("strategies.fsdp2", "from transformers import AutoModel", "which belongs in"),
        ("quantized", "def f():\n    import bitsandbytes", "which belongs in ['nf4']"),
        ("strategies.fsdp2", "import habana_frameworks.torch", "which belongs in ['strategies.hpu']"),
        ("layers", "from torch import distributed", "at import time"),
        ("layers", "if True:\n    import torch.distributed as dist", "at import time"),
        ("mystery", "", "add it to ROWS in tests/test_layering.py"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("conversion", "from paca_lightning.layers import PaCALinear\nfrom paca_lightning.targets import resolve"),
        ("layers", "def f():\n    from torch.distributed.tensor import DTensor"),
        ("strategies.hpu.bridge", "import habana_frameworks.torch\nfrom paca_lightning.errors import PaCAError"),
        ("strategies.fsdp2", "from .sharding import shard\nfrom lightning.pytorch.strategies import Strategy"),
        ("tasks.causal_lm", "import transformers\nfrom paca_lightning.strategies.fsdp2 import FSDP2Strategy"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(module, source) == []
