"""Gaudi support, on a simulated HPU: PyTorch's HPU device on host memory (``tests/simulated_hpu``).

Code for the device runs in a process of its own, where the simulated Gaudi software is installed. The functions that
run there are at the end of this file. The test process itself is a host without Gaudi software.
"""

import ast
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import DeviceStatsMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy
from paca_lightning.strategies import HPUAccelerator
from paca_lightning.strategies.hpu import bridge
from paca_lightning.strategies.hpu.connector import patch_connector
from tests.distributed_launch import launch as launch_ranks
from tests.simulated_hpu import build
from tests.simulated_hpu.build import build_extension
from tests.simulated_hpu.processes import BRIDGE, ROOT, Run, launch
from tests.simulated_hpu.training import TinyModule, batches, train, trainer, whole_weights

PACA = PaCAConfig(r=4)
NF4 = PaCAConfig(r=4, quantize="nf4")
pytest_plugins = ["tests.simulated_hpu.fixtures"]


# ---- a host without Gaudi software ---------------------------------------------------------------------------------


def test_other_hosts_are_left_alone() -> None:
    assert {"hpu_single", "hpu_ddp", "hpu_fsdp2"} <= set(StrategyRegistry)
    assert "hpu" in AcceleratorRegistry
    assert not hasattr(_AcceleratorConnector, "_paca_patched")
    assert "habana_frameworks" not in sys.modules
    assert trainer(accelerator="auto").accelerator.__class__.__name__ != "HPUAccelerator"
    with pytest.raises(PaCAError, match=r"not installed.*container"):
        trainer(accelerator="hpu")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"_choose_strategy": None}, "_choose_strategy is gone"),
        ({"_choose_strategy": lambda self, flag: None}, "_choose_strategy takes other arguments"),
        ({"_choose_strategy": lambda self: "ddp"}, "_choose_strategy no longer uses _parallel_devices"),
    ],
)
def test_another_lightning_is_refused_at_registration(change: dict[str, Any], complaint: str) -> None:
    connector = type("Connector", (), {**vars(_AcceleratorConnector), **change})
    before = dict(vars(connector))
    with pytest.raises(PaCAError, match=complaint):
        patch_connector(connector)
    assert dict(vars(connector)) == before


def test_simulated_bridge_offers_exactly_the_names_that_we_call() -> None:
    """A call of a name that was never checked against the real bridge must fail in these tests."""
    called, imported = set(), set()
    for path in [*ROOT.glob("paca_lightning/**/*.py"), *ROOT.glob("scripts/hpu_*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Attribute(value=ast.Name("torch"), attr="hpu"), attr=name):
                    called.add(name)
                case ast.Attribute(
                    value=ast.Call(ast.Attribute(attr="get_device_module"), [ast.Constant("hpu")]), attr=name
                ):
                    called.add(name)
                case ast.ImportFrom(module=str(module)) if module.startswith("habana_frameworks"):
                    imported |= {f"{module}.{alias.name}" for alias in node.names}
                case ast.Import(names=names):
                    imported |= {alias.name for alias in names if alias.name.startswith("habana_frameworks")}
    assigned = next(
        node.value
        for node in ast.parse((BRIDGE / "habana_frameworks/torch/__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CALLED_BY_US"
    )
    assert called == set(ast.literal_eval(assigned))
    assert imported == {"habana_frameworks.torch.distributed.hccl"}


def test_without_a_compiler_ci_fails_and_others_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="NOTHING ABOUT GAUDI"):
        build_extension()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="NOTHING ABOUT GAUDI"):
        build_extension()


# ---- one card ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", ["hpu", "auto"])
def test_one_card_computes_what_the_cpu_computes(hpu: Run, accelerator: str) -> None:
    on_hpu, on_cpu = hpu(train, accelerator), train("cpu")
    assert on_hpu.devices == {"hpu:0"}
    assert on_hpu.losses == on_cpu.losses
    assert _same_weights(on_hpu, on_cpu)


def test_the_simulated_card_repeats_tensors(hpu: Run) -> None:
    """PyTorch's ``repeat`` writes through ``unfold``, which must be a view: a copy would stay empty."""
    assert hpu(_repeat_on_the_card) == [[0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_paca_on_one_card_computes_what_it_computes_on_the_cpu(hpu: Run, precision: str) -> None:
    on_hpu, on_cpu = (
        run(_train_paca, accelerator, precision=precision) for run, accelerator in [(hpu, "hpu"), (_here, "cpu")]
    )
    # Autocast has its own operator lists for CPUs, so mixed precision rounds at other places.
    assert on_hpu.losses == (on_cpu.losses if precision != "bf16-mixed" else pytest.approx(on_cpu.losses, rel=1e-2))
    deltas = [p for name, p in on_hpu.named_parameters() if name.endswith("paca_delta")]
    assert deltas
    assert all(delta.dtype == torch.float32 and delta.any() for delta in deltas)


def test_nf4_base_trains_on_one_card(hpu: Run) -> None:
    on_hpu, on_cpu = (
        run(_train_paca, accelerator, NF4, precision="bf16-true") for run, accelerator in [(hpu, "hpu"), (_here, "cpu")]
    )
    assert any(name.endswith("packed") for name, _ in on_hpu.named_parameters())
    assert on_hpu.losses == pytest.approx(on_cpu.losses, rel=1e-2)
    assert on_hpu.losses != train("cpu", precision="bf16-true").losses


def test_nf4_base_is_refused_before_training_where_bitsandbytes_is_too_old(hpu: Run) -> None:
    with pytest.raises(PaCAError, match=r"bitsandbytes 0.46.1 has no NF4 operators for Gaudi.*pip install"):
        hpu(_train_nf4_with, bitsandbytes="0.46.1")
    hpu(_train_nf4_with, bitsandbytes="0.47.0")


def test_mixed_precision_autocasts_on_the_hpu(hpu: Run) -> None:
    mixed = hpu(train, "hpu", precision="bf16-mixed")
    assert mixed.dtypes == {torch.bfloat16}
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert mixed.losses == pytest.approx(train("cpu").losses, rel=0.02)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_other_precisions_are_refused(hpu: Run, precision: str) -> None:
    with pytest.raises(PaCAError, match=f"{precision}.*bf16-mixed"):
        hpu(_make_trainer, precision=precision)


@pytest.mark.parametrize("config", [None, PACA, NF4])
def test_compiled_model_computes_what_the_eager_one_does(hpu: Run, config: PaCAConfig | None) -> None:
    compiled, graphs = hpu(_train_compiled, config)
    eager = train("cpu", callbacks=PaCAStrategy(config) if config else [])
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-2 if config is NF4 else 1e-5)
    assert graphs == 1, "static shapes: one graph serves every step"


def test_resumed_run_ends_as_an_uninterrupted_one(hpu: Run, tmp_path: Path) -> None:
    straight, resumed = hpu(_train_straight_and_resumed, tmp_path)
    assert len(resumed.losses) == 4
    assert resumed.losses == straight.losses[4:]
    assert _same_weights(resumed, straight)


def test_device_stats_are_logged(hpu: Run, tmp_path: Path) -> None:
    hpu(_train_with_device_stats, tmp_path)
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "DeviceStatsMonitor.on_train_batch_end/InUse" in header
    assert "DeviceStatsMonitor.on_train_batch_end/MaxInUse" in header


# ---- what is chosen, and what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "strategy", "cards"),
    [
        ({"devices": 1}, "SingleHPUStrategy", 1),
        ({"devices": 8}, "HPUDDPStrategy", 8),
        ({"devices": "4"}, "HPUDDPStrategy", 4),
        ({"devices": "auto"}, "HPUDDPStrategy", 8),
        ({"devices": -1}, "HPUDDPStrategy", 8),
        ({"devices": 1, "num_nodes": 2}, "HPUDDPStrategy", 1),
        ({"devices": 2, "strategy": "hpu_ddp", "accelerator": "auto"}, "HPUDDPStrategy", 2),
        ({"devices": 1, "accelerator": "cpu"}, "SingleDeviceStrategy", 0),
        ({"devices": 2, "accelerator": "cpu"}, "DDPStrategy", 0),
    ],
)
def test_choice_of_strategy_and_devices(hpu: Run, options: dict[str, Any], strategy: str, cards: int) -> None:
    chosen = hpu(_describe_trainer, **options)
    assert chosen.strategy == strategy
    assert chosen.devices.count(torch.device("hpu", 0)) == cards


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"strategy": "ddp", "devices": 2}, "strategy 'ddp' does not run on HPU.*hpu_ddp"),
        ({"strategy": "ddp_spawn", "devices": 2}, "does not run on HPU"),
        ({"strategy": ModelParallelStrategy(), "devices": 2}, "strategy 'ModelParallelStrategy'.*hpu_fsdp2"),
        ({"devices": [0, 1]}, "HABANA_VISIBLE_MODULES"),
        ({"devices": [1]}, "HABANA_VISIBLE_MODULES"),
        ({"devices": "two"}, "number of cards"),
        ({"devices": 9}, r"devices=9: 8 HPU\(s\) are visible"),
    ],
)
def test_unsupported_options_are_refused(hpu: Run, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PaCAError, match=complaint):
        hpu(_make_trainer, **options)


def test_a_process_has_one_card(hpu: Run) -> None:
    with pytest.raises(RuntimeError, match="hpu:0"):
        hpu(torch.empty, 1, device="hpu:1")
    with pytest.raises(PaCAError, match=r"given a strategy for device 'cpu'.*'hpu_single'"):
        hpu(_set_up_device, "cpu")


@pytest.mark.parametrize(
    ("mutant", "complaint"),
    [
        ("without torch.hpu", "provides no torch.hpu"),
        ("no device", "finds no free device.*hl-smi"),
        ("not available", "finds no free device.*hl-smi"),
        (
            "for another torch",
            rf"cannot be imported with torch {torch.__version__}.*undefined symbol".replace("+", r"\+"),
        ),
    ],
)
def test_broken_gaudi_software_is_named(hpu: Run, mutant: str, complaint: str) -> None:
    with pytest.raises(PaCAError, match=complaint):
        hpu(_make_trainer_on, mutant)
    accelerator, messages = hpu(_choose_accelerator_on, mutant)
    assert accelerator == "CPUAccelerator"
    assert any("Training on the CPU although" in message for message in messages)


@pytest.mark.parametrize("accelerator", ["hpu", "auto"])
def test_lazy_mode_is_refused_with_the_remedy(hpu: Run, accelerator: str) -> None:
    with pytest.raises(PaCAError, match=r"PT_HPU_LAZY_MODE=1.*hpu_backend"):
        hpu(_make_trainer_on, "lazy mode", accelerator=accelerator)


# ---- several cards -------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_two_cards_compute_what_one_cpu_computes(library: Path, tmp_path: Path) -> None:
    output = launch("tests.simulated_hpu.ranks", str(tmp_path), library=library)
    assert set(re.findall(r"rank (\d) done", output)) == set("01")


@pytest.mark.distributed
def test_eight_cards(hpu_host: Run) -> None:
    ranks = hpu_host(launch_ranks, _train_on_all_cards, 8)
    assert [rank.modules for rank in ranks] == [list(range(8))] * 8
    assert all(torch.equal(rank.weights, ranks[0].weights) for rank in ranks)
    assert not torch.equal(ranks[0].weights, whole_weights(TinyModule()))


@pytest.mark.slow
@pytest.mark.distributed
def test_smoke_script_passes(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_HPU_COUNT", "2")
    small = "--hidden-size 64 --layers 1 --length 32 --batch-size 1 --timing-steps 2"
    report = launch("scripts.hpu_smoke", *small.split(), library=library)
    assert "All checks passed." in report
    assert report.count("| ok |") == 11


# ---- run on the device ---------------------------------------------------------------------------------------------


def _here(function: Run, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def _repeat_on_the_card() -> list[list[int]]:
    bridge.require_hpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeated: list[list[int]] = torch.arange(3, device="hpu").repeat(1, 2).tolist()
    return repeated


def _train_paca(accelerator: str, config: PaCAConfig = PACA, **options: Any) -> TinyModule:
    return train(accelerator, callbacks=PaCAStrategy(config), **options)


def _train_nf4_with(bitsandbytes: str) -> None:
    """Train as if that version of bitsandbytes were installed. Without its operators no step may run."""
    import bitsandbytes as installed

    module = TinyModule()
    with mock.patch.object(installed, "__version__", bitsandbytes):
        try:
            train("hpu", module=module, callbacks=PaCAStrategy(NF4))
        except PaCAError:
            assert not module.losses
            raise


def _make_trainer(**options: Any) -> None:
    trainer(**({"accelerator": "hpu"} | options))


def _set_up_device(device: str) -> None:
    HPUAccelerator().setup_device(torch.device(device))


def _describe_trainer(**options: Any) -> SimpleNamespace:
    made = trainer(**({"accelerator": "hpu"} | options))
    devices = getattr(made.strategy, "parallel_devices", [made.strategy.root_device])
    return SimpleNamespace(strategy=type(made.strategy).__name__, devices=devices)


def _train_compiled(config: PaCAConfig | None) -> tuple[TinyModule, int]:
    """Train with ``hpu_backend``. Also returns the number of compiled graphs."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    module = TinyModule(backend="hpu_backend")
    train("hpu", module=module, callbacks=[PaCAStrategy(config)] if config else [])
    del module.forward_net  # compiled code cannot be pickled
    return module, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _train_straight_and_resumed(folder: Path) -> tuple[TinyModule, TinyModule]:
    """Train 2 epochs of 4 steps, and resume from the end of the first: there Lightning resumes any loader exactly."""
    options = {"accelerator": "hpu", "max_steps": -1}

    def fit(epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, TinyModule]:
        module = TinyModule(dropout=0)
        run = trainer(**options, max_epochs=epochs, callbacks=PaCAStrategy(PACA))
        run.fit(module, batches(samples=32), ckpt_path=ckpt_path)
        return run, module.cpu()

    _, straight = fit(2)
    first_half, _ = fit(1)
    first_half.save_checkpoint(folder / "half.ckpt")
    return straight, fit(2, folder / "half.ckpt")[1]


def _train_on_all_cards() -> SimpleNamespace:
    """One of eight ranks: its weights after training, and all ranks' numbers of their cards."""
    module = TinyModule()
    run = trainer(accelerator="hpu", devices=8, max_steps=2)
    run.fit(module, batches())
    cards = run.strategy.all_gather(torch.tensor(int(os.environ["HLS_MODULE_ID"]), device="hpu"))
    return SimpleNamespace(weights=whole_weights(module), modules=cards.tolist())


def _train_with_device_stats(folder: Path) -> None:
    train("hpu", logger=CSVLogger(folder), log_every_n_steps=1, callbacks=DeviceStatsMonitor())


def _make_trainer_on(mutant: str, accelerator: str = "hpu") -> None:
    with _mutants()[mutant]:
        trainer(accelerator=accelerator)


def _choose_accelerator_on(mutant: str) -> tuple[str, list[str]]:
    with _mutants()[mutant], warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = type(trainer(accelerator="auto").accelerator).__name__
    return chosen, [str(warning.message) for warning in caught]


def _mutants() -> dict[str, Any]:
    """Context managers that break the Gaudi software of a host in different ways."""
    import habana_frameworks.torch

    wrong_torch = ImportError("libhabana_pytorch_plugin.so: undefined symbol: _ZN3c10")
    hidden = mock.MagicMock(wraps=torch)
    del hidden.hpu
    return {
        "without torch.hpu": mock.patch.object(bridge, "torch", hidden),
        "no device": mock.patch.object(habana_frameworks.torch.hpu, "device_count", return_value=0),
        "not available": mock.patch.object(habana_frameworks.torch.hpu, "is_available", return_value=False),
        "for another torch": mock.patch.object(bridge.importlib, "import_module", side_effect=wrong_torch),
        "lazy mode": mock.patch.dict(os.environ, PT_HPU_LAZY_MODE="1"),
    }
