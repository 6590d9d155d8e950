"""paca-lightning estimate: memory traced without weights, against memory measured in real steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.strategies.hpu import HPUDDPStrategy, HPUFSDP2Strategy, SingleHPUStrategy
from paca_lightning.tasks import CausalLMModule
from paca_lightning.tools.memory.baselines import FLOOR, FULL, LORA, PACA, Baseline
from paca_lightning.tools.memory.command import main
from paca_lightning.tools.memory.from_config import known_strategy, read_config, run_to_trace
from paca_lightning.tools.memory.search import largest_fitting
from paca_lightning.tools.memory.timeline import Kind
from paca_lightning.tools.memory.traced_model import TracedModel
from paca_lightning.tools.memory.traced_run import TracedRun
from tests.distributed_launch import launch
from tests.tiny import tiny_config

CONFIG = PaCAConfig(r=8)
SHAPE = (2, 256)


@pytest.fixture
def model_directory(tmp_path: Path) -> str:
    """A Llama of 8 layers; weights are never written."""
    _llama(8).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def _llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


def _run(directory: str, baseline: Baseline = PACA, config: PaCAConfig = CONFIG, **settings: Any) -> TracedRun:
    module = CausalLMModule(directory, pretrained=False, dtype="float32")
    defaults = {"batch_size": SHAPE[0], "tokens": SHAPE[1]}
    return TracedRun(module=module, convert=lambda m: baseline.convert(m, config), **(defaults | settings))


def test_the_parts_of_a_single_device_are_what_arithmetic_says(model_directory: str) -> None:
    step = TracedModel(_run(model_directory)).step()

    module = CausalLMModule(model_directory, pretrained=False, dtype="float32")
    module.configure_model()
    apply_paca(module, CONFIG)
    tensors = [*module.parameters(), *module.buffers()]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert step.trainable_parameters == trained
    assert step.at_peak[Kind.PARAMETERS] == sum(tensor.nbytes for tensor in tensors)
    assert step.at_peak[Kind.OPTIMIZER] == pytest.approx(2 * 4 * trained, rel=0.01)  # AdamW: two moments
    assert step.sizes[-1, Kind.GRADIENTS] == 4 * trained
    assert step.at_peak[Kind.GATHERED_PARAMETERS] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 4},
        {"precision": "bf16-mixed"},
        {"strategy": FSDP2Strategy(activation_checkpointing=True), "ranks": 4},
        {"strategy": FSDP2Strategy(), "ranks": 4, "shard_size": 2, "accumulate": 2},
        {"strategy": FSDP2Strategy(cpu_offload=True), "ranks": 2, "accumulate": 2, "baseline": FULL},
        {"config": PaCAConfig(r=8, quantize="nf4"), "strategy": FSDP2Strategy(), "ranks": 2},
        {"baseline": FULL},
        {"baseline": LORA},
        {"baseline": FLOOR},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_few_of_many_equal_blocks_tell_the_peak_exactly(model_directory: str, settings: dict[str, Any]) -> None:
    model = TracedModel(_run(model_directory, **settings))
    few, all_blocks = model.step(), model.step(whole=True)

    assert len(few.phases) < len(all_blocks.phases)
    assert few.at_peak == all_blocks.at_peak
    assert few.peak_phase == all_blocks.peak_phase
    assert few.trainable_parameters == all_blocks.trainable_parameters


def test_sharding_divides_what_is_held_and_gathers_a_block_at_a_time(model_directory: str) -> None:
    alone = TracedModel(_run(model_directory)).step()
    sharded = TracedModel(_run(model_directory, strategy=FSDP2Strategy(), ranks=4)).step()

    assert sharded.at_peak[Kind.PARAMETERS] == pytest.approx(alone.at_peak[Kind.PARAMETERS] / 4, rel=0.01)
    assert sharded.at_peak[Kind.OPTIMIZER] == pytest.approx(alone.at_peak[Kind.OPTIMIZER] / 4, rel=0.01)
    block = (alone.at_peak[Kind.PARAMETERS] - 2 * 4 * 512 * 256) / 8
    gathered = sharded.sizes[:, Kind.GATHERED_PARAMETERS].max()
    assert block < gathered < 5 * block  # in use, as received, and the same of the block that comes next
    assert sharded.trainable_parameters == alone.trainable_parameters


def test_offloaded_block_inputs_leave_the_device(model_directory: str) -> None:
    kept, offloaded = (
        TracedModel(_run(model_directory, strategy=FSDP2Strategy(activation_checkpointing=how), ranks=2)).step()
        for how in (True, "offload")
    )
    block_input = SHAPE[0] * SHAPE[1] * 256 * 4
    activations = [int(step.sizes[:, Kind.ACTIVATIONS].max()) for step in (kept, offloaded)]
    assert activations[0] - activations[1] >= 6 * block_input


@pytest.mark.parametrize("baseline", [PACA, FULL])
def test_a_model_in_host_memory_takes_the_device_only_to_gather_it(model_directory: str, baseline: Baseline) -> None:
    here, host = (
        TracedModel(_run(model_directory, baseline, strategy=FSDP2Strategy(cpu_offload=offload), ranks=2)).step()
        for offload in (False, True)
    )
    largest = {kind: int(host.sizes[:, kind].max()) for kind in Kind}
    assert largest[Kind.PARAMETERS] < 4096  # the rotary embedding's buffers are not sharded
    assert largest[Kind.OPTIMIZER] == largest[Kind.GRADIENTS] == 0
    assert largest[Kind.ACTIVATIONS] == here.sizes[:, Kind.ACTIVATIONS].max()
    assert "optimizer" not in host.peak_phase
    # A copy of a shard lies on the device while its block is gathered.
    gathered = [
        max(row[Kind.GATHERED_PARAMETERS] for phase, row in zip(step.phases, step.sizes, strict=True) if "7" in phase)
        for step in (here, host)
    ]
    assert gathered[0] < gathered[1] <= 1.5 * gathered[0]


def test_lora_keeps_its_layers_inputs_and_paca_does_not(model_directory: str) -> None:
    floor, paca, lora = (
        TracedModel(_run(model_directory, baseline)).step().at_peak[Kind.ACTIVATIONS]
        for baseline in (FLOOR, PACA, LORA)
    )
    assert paca < 1.05 * floor
    assert lora > 1.15 * floor


def test_lora_is_pefts(model_directory: str) -> None:
    peft = pytest.importorskip("peft")

    def real_lora(module: CausalLMModule) -> None:
        names = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        module.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=names), module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)

    theirs = TracedModel(_run(model_directory, Baseline("PEFT", lambda m, _: real_lora(m)))).step()  # type: ignore[arg-type]
    ours = TracedModel(_run(model_directory, LORA, PaCAConfig(r=8))).step()
    assert ours.at_peak[Kind.ACTIVATIONS] == pytest.approx(theirs.at_peak[Kind.ACTIVATIONS], rel=0.01)


def _measured_peak(directory: str, strategy: FSDP2Strategy | None = None) -> int:
    """Most bytes of tensors in a real training step on this CPU, from PyTorch's allocator."""
    torch.manual_seed(0)
    module = CausalLMModule(directory, pretrained=False, dtype="float32")
    module.configure_model()
    apply_paca(module, CONFIG)
    if strategy is not None:
        strategy.shard_model(module, dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer: Any = module.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    attach(optimizer, module)
    ids = torch.randint(512, SHAPE)

    def step() -> None:
        loss = module.training_step({"input_ids": ids, "labels": ids}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    held = sum(
        getattr(t, "_local_tensor", t).nbytes
        for t in [*module.parameters(), *module.buffers()]
        + [p.grad for p in module.parameters() if p.grad is not None]
        + [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    change = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            change += event.nbytes()
            peak = max(peak, change)
    return held + peak


def test_the_trace_is_what_a_real_step_needs(model_directory: str) -> None:
    measured = _measured_peak(model_directory)
    traced = TracedModel(_run(model_directory, accelerator=False)).step().peak
    assert traced == pytest.approx(measured, rel=0.03)


def _sharded_peak(directory: str) -> int:
    dist.init_process_group("gloo")
    return _measured_peak(directory, FSDP2Strategy(activation_checkpointing=True))


@pytest.mark.distributed
def test_the_trace_is_what_a_real_sharded_step_needs(model_directory: str) -> None:
    measured = launch(_sharded_peak, 2, model_directory)[0]
    strategy = FSDP2Strategy(activation_checkpointing=True)
    traced = TracedModel(_run(model_directory, strategy=strategy, ranks=2, accelerator=False)).step().peak
    assert traced == pytest.approx(measured, rel=0.03)


DEBUG = ["--config", "configs/debug.yaml"]


def test_the_command_says_whether_a_config_fits_and_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "estimate.json"
    assert main([*DEBUG, "--budget", "64MiB", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    paca, lora, _, full = report["rows"]
    assert [row["method"] for row in (paca, lora, full)] == ["PaCA", "LoRA", "full fine-tuning"]
    assert paca["peak_bytes"] == sum(paca[f"{kind.name.lower()}_bytes"] for kind in Kind)
    assert report["setup"]["tokens"] == 192
    assert paca["max_tokens"] >= 192
    assert paca["max_tokens"] > lora["max_tokens"]
    assert "fits 64MiB" in capsys.readouterr().out

    module, datamodule, trainer = read_config(DEBUG)
    most = paca["max_tokens"]
    fitting, beyond = (
        TracedModel(run_to_trace(module, datamodule, trainer, tokens=tokens)[0]).step().peak
        for tokens in (most, round(1.02 * most) + 64)
    )
    assert fitting <= 64 * 2**20 < beyond
    assert main([*DEBUG, "--budget", f"{paca['peak_bytes'] - 1}"]) == 1


ROOT = Path(__file__).parents[3]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS)
def test_each_config_is_estimated(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine, whatever devices it is for."""
    monkeypatch.chdir(ROOT)
    tiny_config().save_pretrained(tmp_path)
    described = read_config(["--config", config, "--model.init_args.model", str(tmp_path)])
    run, paca = run_to_trace(*described, tokens=64, batch=1)
    assert (run.strategy is not None) == ("fsdp2" in config or "70b" in config)
    assert paca is not None
    assert TracedModel(run).step().trainable_parameters > 0


@pytest.mark.parametrize(
    ("strategy", "sharded", "copied"),
    [
        ("auto", False, True),
        ("ddp", False, True),
        ("ddp_spawn_find_unused_parameters_false", False, True),
        (DDPStrategy(static_graph=True), False, True),
        ("hpu_single", False, True),
        (SingleHPUStrategy(), False, True),
        ("hpu_ddp", False, True),
        (HPUDDPStrategy(), False, True),
        ("paca_fsdp2", True, False),
        ("hpu_fsdp2", True, False),
        (HPUFSDP2Strategy(), True, False),
    ],
)
def test_strategies_are_known_by_name_and_as_objects(strategy: Any, sharded: bool, copied: bool) -> None:
    found, gradients_copied = known_strategy(strategy, ranks=2)
    assert (found is not None, gradients_copied) == (sharded, copied)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "xla", "single_tpu", "dpp", FSDPStrategy()])
def test_other_strategies_are_refused(strategy: Any) -> None:
    with pytest.raises(PaCAError, match=r"is not estimated\. Use auto, ddp or paca_fsdp2"):
        known_strategy(strategy, ranks=2)


class Inheriting(CausalLMModule):
    """A user's module, which builds its model as ours does."""


class Eager(LightningModule):
    """A user's module, which builds its model at once."""


def test_a_module_may_inherit_how_it_builds_its_model(model_directory: str) -> None:
    _, datamodule, trainer = read_config(DEBUG)
    run, _ = run_to_trace(Inheriting(model_directory, pretrained=False), datamodule, trainer, tokens=64, batch=1)
    assert TracedModel(run).step().peak > 0
    with pytest.raises(PaCAError, match="Eager does not build its model in configure_model"):
        run_to_trace(Eager(), datamodule, trainer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama9"], "no preset 'llama9'"),
        (["--budget", "1KiB"], "below the model itself"),
        (["--budget", "much"], "'much' is not an amount of memory. Write it as 24GiB, 512MiB or 80GB"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--json", "/nowhere/at/all.json"], "there is no directory '/nowhere/at'"),
        (["--trainer.devices", "auto"], "depends on the machine"),
        (["--trainer.strategy", "fsdp"], "not estimated"),
        (["--model.init_args.model", "./nothing"], "does not exist"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        main([*DEBUG, *arguments])


@pytest.mark.parametrize("arguments", [[], ["--budget", "24GiB"]])
def test_without_a_config_the_way_to_give_one_is_shown(arguments: list[str]) -> None:
    with pytest.raises(PaCAError, match="paca-lightning estimate --config FILE"):
        main(arguments)


def test_help_teaches_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--budget",
        "--json",
        "--preset",
        "--tokens",
        "--batch",
        "24GiB",
        "llama3-8b",
        "examples:",
        "fit --help",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("fixed", "each", "limit", "most"), [(500, 10, 1000, 50), (0, 1, 1000, 1000), (990, 3, 1000, 3), (1000, 1, 1000, 0)]
)
@pytest.mark.parametrize("known", [1, 40, 900])
def test_the_largest_that_fits_is_found_to_a_percent_in_a_few_tries(
    fixed: int, each: int, limit: int, most: int, known: int
) -> None:
    tried = []

    def peak(units: int) -> int:
        tried.append(units)
        return fixed + each * units

    found = largest_fitting(peak, limit, (known, fixed + each * known), resident=fixed // 2)
    assert found <= most <= found + max(1, found // 100)
    assert len(tried) <= 8


def test_a_config_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  devices: 1\n")
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(tmp_path / "config.yaml")])
    assert stop.value.code == 2
    assert "model" in capsys.readouterr().err


def test_llama3_8b_needs_less_than_three_quarters_of_loras_memory(tmp_path: Path) -> None:
    from paca_lightning.tools.presets import preset_config

    preset_config("llama3-8b").save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), dtype="bfloat16")
    paca, lora = (
        TracedModel(
            TracedRun(
                module=module,
                convert=lambda m, b=baseline: b.convert(m, PaCAConfig(r=16)),  # type: ignore[misc]
                precision="bf16-true",
                tokens=2048,
            )
        )
        .step()
        .peak
        for baseline in (PACA, LORA)
    )
    assert paca < 0.75 * lora


@pytest.mark.parametrize(
    ("ranks", "tokens", "offload", "gib"), [(8, 8192, False, 22), (8, 8192, True, 16), (4, 4096, False, 23)]
)
def test_llama3_70b_trains_on_small_devices(tmp_path: Path, ranks: int, tokens: int, offload: bool, gib: int) -> None:
    from paca_lightning.tools.presets import preset_config

    preset_config("llama3.1-70b").save_pretrained(tmp_path)
    run = TracedRun(
        module=CausalLMModule(str(tmp_path), dtype="bfloat16"),
        convert=lambda m: PACA.convert(m, PaCAConfig(r=64, quantize="nf4")),
        strategy=FSDP2Strategy(activation_checkpointing="offload" if offload else True),
        ranks=ranks,
        precision="bf16-true",
        tokens=tokens,
    )
    assert TracedModel(run).step().peak < gib * 2**30
