"""Memory of a traced step, kind by kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from paca_lightning import PaCAConfig, apply_paca
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.tasks import CausalLMModule
from paca_lightning.tools.memory.baselines import FLOOR, FULL, LORA, PACA, Baseline
from paca_lightning.tools.memory.timeline import Kind, Timeline
from paca_lightning.tools.memory.traced_model import TracedModel
from tests.tools.memory.runs import CONFIG, SHAPE, llama_run

SHARDED = FSDP2Strategy()
RECOMPUTED = FSDP2Strategy(activation_checkpointing=True)

Steps = Callable[..., Timeline]


@pytest.fixture(scope="module")
def step_of(model_directory: str) -> Steps:
    """Traces a step of the run with some settings; several tests compare the same runs."""
    steps: dict[str, Timeline] = {}

    def traced(**settings: Any) -> Timeline:
        settings = {"baseline": PACA} | settings
        key = repr(sorted(settings.items()))
        if key not in steps:
            steps[key] = TracedModel(llama_run(model_directory, **settings)).step()
        return steps[key]

    return traced


def test_the_parts_of_a_single_device_are_what_arithmetic_says(model_directory: str, step_of: Steps) -> None:
    step = step_of()

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 4},
        {"precision": "bf16-mixed"},
        {"strategy": RECOMPUTED, "ranks": 2},
        {"strategy": SHARDED, "ranks": 4, "shard_size": 2, "accumulate": 2},
        {"strategy": FSDP2Strategy(cpu_offload=True), "ranks": 2, "accumulate": 2, "baseline": FULL},
        {"config": PaCAConfig(r=8, quantize="nf4"), "strategy": SHARDED, "ranks": 2},
        {"baseline": FULL},
        {"baseline": LORA},
        {"baseline": FLOOR},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_few_of_many_equal_blocks_tell_the_peak_exactly(
    model_directory: str, step_of: Steps, settings: dict[str, Any]
) -> None:
    few = step_of(**settings)
    all_blocks = TracedModel(llama_run(model_directory, **settings)).step(whole=True)

    assert len(few.phases) < len(all_blocks.phases)
    assert few.at_peak == all_blocks.at_peak
    assert few.peak_phase == all_blocks.peak_phase
    assert few.trainable_parameters == all_blocks.trainable_parameters


@pytest.mark.slow
def test_sharding_divides_what_is_held_and_gathers_a_block_at_a_time(step_of: Steps) -> None:
    alone, sharded = step_of(), step_of(strategy=SHARDED, ranks=2)

    assert sharded.at_peak[Kind.PARAMETERS] == pytest.approx(alone.at_peak[Kind.PARAMETERS] / 2, rel=0.01)
    assert sharded.at_peak[Kind.OPTIMIZER] == pytest.approx(alone.at_peak[Kind.OPTIMIZER] / 2, rel=0.01)
    block = (alone.at_peak[Kind.PARAMETERS] - 2 * 4 * 512 * 256) / 8
    gathered = sharded.sizes[:, Kind.GATHERED_PARAMETERS].max()
    assert block < gathered < 5 * block  # in use, as received, and the same of the block that comes next
    assert sharded.trainable_parameters == alone.trainable_parameters


@pytest.mark.slow
def test_offloaded_block_inputs_leave_the_device(step_of: Steps) -> None:
    to_host = FSDP2Strategy(activation_checkpointing="offload")
    kept, offloaded = (step_of(strategy=strategy, ranks=2) for strategy in (RECOMPUTED, to_host))
    block_input = SHAPE[0] * SHAPE[1] * 256 * 4
    activations = [int(step.sizes[:, Kind.ACTIVATIONS].max()) for step in (kept, offloaded)]
    assert activations[0] - activations[1] >= 6 * block_input


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [PACA, FULL])
def test_a_model_in_host_memory_takes_the_device_only_to_gather_it(step_of: Steps, baseline: Baseline) -> None:
    in_host = FSDP2Strategy(cpu_offload=True)
    here, host = (step_of(baseline=baseline, strategy=strategy, ranks=2) for strategy in (SHARDED, in_host))
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


@pytest.mark.slow
def test_lora_keeps_its_layers_inputs_and_paca_does_not(step_of: Steps) -> None:
    floor, paca, lora = (step_of(baseline=baseline).at_peak[Kind.ACTIVATIONS] for baseline in (FLOOR, PACA, LORA))
    assert paca < 1.05 * floor
    assert lora > 1.15 * floor


@pytest.mark.slow
def test_lora_is_pefts(model_directory: str, step_of: Steps) -> None:
    peft = pytest.importorskip("peft")

    def real_lora(module: CausalLMModule) -> None:
        names = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        module.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=names), module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)

    theirs = TracedModel(llama_run(model_directory, Baseline("PEFT", lambda m, _: real_lora(m)))).step()  # type: ignore[arg-type]
    ours = step_of(baseline=LORA)
    assert ours.at_peak[Kind.ACTIVATIONS] == pytest.approx(theirs.at_peak[Kind.ACTIVATIONS], rel=0.01)
