"""Every method that a comparison knows trains two steps as it says, or is refused with the reason."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from paca_lightning import PaCAError
from paca_lightning.tools.compare.methods import FloorMethod, Method
from paca_lightning.tools.compare.own_methods import PROJECTED
from paca_lightning.tools.compare.parsing import parse_method
from paca_lightning.tools.compare.peft_methods import ALIASES, OWN, registry
from paca_lightning.tools.compare.task import Settings, Task
from paca_lightning.tools.compare.trial import make_trial
from tests.callbacks.test_inserted_methods import Answers
from tests.callbacks.test_peft_strategy import fit, trained
from tests.peft_warnings import PREFIXES
from tests.tools.compare.tasks import debug_task

pytestmark = [
    PREFIXES,
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # PEFT's LayerNorm tuning, of RMSNorm
    pytest.mark.filterwarnings("ignore:No value was provided for"),  # PEFT's X-LoRA
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # PEFT's SHiRA
]

WRITTEN = {  # where the name alone is not enough for a model as narrow as this one
    "c3a": "c3a,block_size=32",
    "galore": "galore:8",
    "apollo": "apollo:8",
    "oft": "oft,r=0,oft_block_size=32",
    "road": "road,group_size=32",
    "shira": "shira:4",
    "trainable_tokens": "trainable_tokens,token_indices=[5, 6]",
    "vblora": "vblora,vector_length=32",
    "waveft": "waveft:100",
}
REFUSED = {
    "adalora": "total_step",
    "adamss": "scikit-learn",
    "cpt": "CPTConfig cannot be trained",
    "multitask_prompt_tuning": "each batch must carry task_ids",
    "osf": "projects gradients by hooks",
    "poly": "each batch must carry task_ids",
    "shadow": "passes an object of its own",
    "xlora": "mixes adapters that were trained before",
}
NAMES = [name for name in dict.fromkeys([*OWN, *ALIASES, *registry()]) if name != "floor"]


@pytest.fixture(scope="module")
def task() -> Task:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["paca-lightning"])
        patch.chdir(__file__.rpartition("/tests/")[0])
        return debug_task("--trainer.callbacks=PaCAStrategy")


def built(node: Any) -> Any:
    """What a config describes with class_path and init_args, without a parser of its types."""
    if isinstance(node, dict) and "class_path" in node:
        module, _, name = node["class_path"].rpartition(".")
        arguments = {key: built(value) for key, value in node.get("init_args", {}).items()}
        found = getattr(importlib.import_module(module), name)
        return found.from_dict(arguments) if hasattr(found, "from_dict") else found(**arguments)
    return node


class Compared(Answers):
    """Trains with the optimizer of a config."""

    def __init__(self, entry: Settings) -> None:
        super().__init__()
        self.entry = entry

    def train_dataloader(self) -> DataLoader:
        return super().train_dataloader()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        module, _, name = self.entry["class_path"].rpartition(".")
        arguments = {key: value for key, value in self.entry["init_args"].items() if value is not None}
        optimizer = getattr(importlib.import_module(module), name)
        built: torch.optim.Optimizer = optimizer([p for p in self.parameters() if p.requires_grad], **arguments)
        return built


def train(method: Method, task: Task, directory: Path) -> Compared:
    """Two steps with the callbacks and the optimizer of a trial."""
    trial = make_trial(task, method, 1e-2, 0, searching=False, steps=2, metric="val/loss", parent=directory)
    callbacks = [entry for entry in trial.settings["trainer"]["callbacks"] if entry in method.callbacks(task, 0)]
    for entry in callbacks:
        if "PaCAStrategy" in entry["class_path"]:
            entry["init_args"]["config"] = {"class_path": "paca_lightning.PaCAConfig"} | {
                "init_args": entry["init_args"]["config"]
            }
    module = Compared(trial.settings["model"]["init_args"]["optimizer"])
    fit(module, directory, *map(built, callbacks), max_steps=2)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_two_steps(name: str, task: Task, tmp_path: Path) -> None:
    if name in PROJECTED:
        pytest.importorskip(PROJECTED[name].class_path.partition(".")[0], reason="its optimizer's package is missing")
    method = parse_method(WRITTEN.get(name, name))
    assert not isinstance(method, FloorMethod)
    if name in REFUSED:
        with pytest.raises((PaCAError, ValueError, ImportError), match=REFUSED[name]):
            train(method, task, tmp_path)
        return
    module = train(method, task, tmp_path)
    assert trained(module)
    assert all(bool(value.isfinite().all()) for value in trained(module).values())
