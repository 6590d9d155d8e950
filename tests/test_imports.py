"""Start-up: what an import loads, and what Lightning knows once it is imported, in any order."""

import ast
import sys
from pathlib import Path

import pytest

import paca_lightning
from tests import processes

SOURCE = Path(paca_lightning.__file__)

HEAVY = ("lightning", "pytorch_lightning", "transformers", "datasets", "bitsandbytes", "rich", "jsonargparse", "peft")


def run(code: str) -> str:
    """Standard output of Python code in a fresh process."""
    finished = processes.run([sys.executable, "-c", code], directory=SOURCE.parents[1])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


LOADED = "import sys; print([name for name in {!r} if name in sys.modules])"


def test_converting_a_model_needs_torch_alone() -> None:
    """No clock: on any machine, what is not loaded takes no time."""
    core = "from paca_lightning import PaCAConfig, apply_paca, attach, disable_paca, merge, paca_layers, save_adapter"
    model = "from torch import nn; model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))"
    convert = "apply_paca(model, PaCAConfig(r=2))"
    assert run("\n".join([core, model, convert, LOADED.format(HEAVY)])) == "[]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fitt"]])
def test_the_overview_and_a_mistyped_command_load_neither_torch_nor_lightning(arguments: list[str]) -> None:
    command = f"""
try:
    from paca_lightning.cli import main
    main({arguments})
except SystemExit as stop:
    assert stop.code == 2
"""
    heavy = ("torch", *(name for name in HEAVY if name != "rich"))
    assert run(command + LOADED.format(heavy)).splitlines()[-1] == "[]"


def test_types_and_python_agree_on_where_public_names_are() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module.removeprefix("paca_lightning.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert sorted(typed) == paca_lightning.__all__
    assert set(paca_lightning.__all__) <= set(dir(paca_lightning))
    for name in paca_lightning.__all__:
        assert getattr(paca_lightning, name).__module__ == f"paca_lightning.{typed[name]}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'paca_lightning' has no attribute 'apply_pacca'"):
        paca_lightning.apply_pacca  # noqa: B018
    with pytest.raises(ImportError, match="apply_pacca"):
        from paca_lightning import apply_pacca  # type: ignore[attr-defined]  # noqa: F401


ORDERS = (
    "import lightning; import paca_lightning",
    "import paca_lightning; import lightning",
    "import paca_lightning.core.config; import lightning.pytorch",
    "from paca_lightning import PaCAConfig; from lightning.pytorch.cli import LightningCLI",
    "from paca_lightning import PaCAStrategy",
    "import paca_lightning.callbacks.run_checks",
    "import paca_lightning.strategies.fsdp2.streaming",
    "import paca_lightning.tasks",
)
KNOWN = """
import lightning.pytorch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

assert {"paca_fsdp2", "hpu_single", "hpu_ddp", "hpu_fsdp2"} <= set(StrategyRegistry)
assert AcceleratorRegistry["hpu"]["accelerator"].__name__ == "HPUAccelerator"
assert type(Trainer(strategy="paca_fsdp2", accelerator="cpu", logger=False).strategy).__name__ == "FSDP2Strategy"
try:
    Trainer(strategy="PaCAStrategy", accelerator="cpu", logger=False)
except ValueError as error:
    assert "PaCAStrategy is a callback, not a Lightning strategy." in str(error)
else:
    raise AssertionError("not explained")
parser = ArgumentParser(exit_on_error=False)
parser.add_argument("--callbacks", type=list[Callback])
given = ["--callbacks+=PaCAStrategy", "--callbacks.config.r=4", "--callbacks+=AdapterCheckpoint"]
callbacks = [callback.class_path for callback in parser.parse_args(given).callbacks]
assert callbacks == ["paca_lightning.PaCAStrategy", "paca_lightning.AdapterCheckpoint"], callbacks
assert lightning.pytorch.__loader__.get_source("lightning.pytorch")  # debuggers ask the loader, which is Python's own
assert not any(type(finder).__module__.startswith("paca_lightning") for finder in sys.meta_path)
"""
FAILED = """
import paca_lightning
for broken in ("torchmetrics", "paca_lightning.callbacks.paca"):  # Lightning itself, then the registration
    sys.modules[broken] = None
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        del sys.modules[name]
    try:
        import lightning.pytorch
    except ImportError as error:
        assert broken in str(error), error
    else:
        raise AssertionError(f"{broken} was not missed")
    del sys.modules[broken]
import lightning.pytorch
"""
THREADS = """
import threading
import paca_lightning

def load(order):
    barrier.wait()
    try:
        exec(order)
    except BaseException:
        print("in a thread", traceback.format_exc(), flush=True)

orders = ["import lightning.pytorch", "import lightning.pytorch", "from paca_lightning import PaCAStrategy"]
orders += ["from paca_lightning import AdapterCheckpoint", "import paca_lightning.strategies"]
barrier = threading.Barrier(len(orders))
threads = [threading.Thread(target=load, args=(order,)) for order in orders]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
FORKED = """
import os, sys, traceback
import torch, {preloaded}  # once for all: most of the time that it takes to import Lightning
for order in {orders!r}:
    if os.fork() == 0:
        try:
            exec(order + {known!r})
        except BaseException:
            print("after", order, traceback.format_exc(), flush=True)
        os._exit(0)
    os.wait()
"""


def complaints(orders: tuple[str, ...], preloaded: str = "torchmetrics") -> list[str]:
    printed = run(FORKED.format(orders=orders, known=KNOWN, preloaded=preloaded)).splitlines()
    return [line for line in printed if "💡" not in line]


@pytest.mark.slow
def test_lightning_knows_us_in_whatever_order_we_are_imported_also_by_threads_at_once() -> None:
    # What Lightning and the package import of others, also once for all.
    others = "jsonargparse, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, transformers"
    assert complaints((*ORDERS, THREADS), preloaded=f"torchmetrics, {others}") == []


@pytest.mark.slow
def test_a_failed_import_of_lightning_is_reported_and_the_next_one_registers() -> None:
    assert complaints((FAILED,), preloaded="json") == []
