"""Memory traced without weights, against memory measured in real steps, and of models that do not fit here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.targets import resolve
from paca_lightning.layers.experts import ExpertWeight
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.tasks import CausalLMModule, EmbeddingModule
from paca_lightning.tools.bench.lora import features_of, lora_rank
from paca_lightning.tools.memory.baselines import FULL, LORA, PACA, Baseline
from paca_lightning.tools.memory.traced_model import TracedModel
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.presets import preset_config
from tests.distributed_launch import launch
from tests.moe import moe_config
from tests.peak_memory import peak_bytes
from tests.tools.memory.runs import CONFIG, SHAPE, llama_run


def _paca(module: CausalLMModule) -> None:
    apply_paca(module, CONFIG)


def _pefts_lora(module: CausalLMModule) -> None:
    """LoRA on the layers of PaCA, each of the rank that makes them equally large."""
    import peft

    targets = resolve(take_inventory(module), CONFIG).targets
    stacked = [target.path for target in targets if isinstance(target.module, ExpertWeight)]
    ranks = {target.path: lora_rank(CONFIG.r, *features_of([target])) for target in targets}
    config = peft.LoraConfig(
        target_modules=[target.path for target in targets if target.path not in stacked],
        target_parameters=stacked,
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )
    module.requires_grad_(False)
    peft.inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _full(module: CausalLMModule) -> None:
    module.requires_grad_(True)


def _measured_peak(
    directory: str,
    strategy: FSDP2Strategy | None = None,
    dtype: str = "float32",
    convert: Callable[[Any], None] = _paca,
    embeddings: bool = False,
) -> int:
    """Most bytes of tensors in a real training step on this CPU, from PyTorch's allocator."""
    torch.manual_seed(0)
    module: Any = (EmbeddingModule if embeddings else CausalLMModule)(directory, pretrained=False, dtype=dtype)
    module.configure_model()
    convert(module)
    if strategy is not None:
        strategy.shard_model(module, dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer: Any = module.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    if convert is _paca:
        attach(optimizer, module)
    ids = torch.randint(512, SHAPE)
    texts = {name: {"input_ids": ids} for name in ("anchor", "positive")}

    def step() -> None:
        loss = module.training_step(texts if embeddings else {"input_ids": ids, "labels": ids}, 0)
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
    # On a busy machine ranks wait for each other, and what they exchange lives longer than it must.
    return held + min(peak_bytes(step) for _ in range(3))


def test_the_trace_is_what_a_real_step_needs(model_directory: str) -> None:
    measured = _measured_peak(model_directory)
    traced = TracedModel(llama_run(model_directory, accelerator=False)).step().peak
    assert traced == pytest.approx(measured, rel=0.03)


def test_the_trace_of_embeddings_is_what_a_real_step_needs(model_directory: str) -> None:
    measured = _measured_peak(model_directory, embeddings=True)
    module = EmbeddingModule(model_directory, pretrained=False, dtype="float32")
    settings: Any = {"batch_size": SHAPE[0], "tokens": SHAPE[1], "texts": 2, "accelerator": False}
    traced = TracedModel(TracedRun(module=module, convert=PACA.converter(CONFIG), **settings))
    assert traced.step().peak == pytest.approx(measured, rel=0.01)
    assert traced.step().peak == traced.step(whole=True).peak


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT's: they match parameters
@pytest.mark.parametrize(("baseline", "convert"), [(PACA, _paca), (LORA, _pefts_lora), (FULL, _full)])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_trace_of_experts_is_what_a_real_step_needs(
    kind: str, baseline: Baseline, convert: Any, tmp_path: Path
) -> None:
    """Also with PEFT's LoRA, which holds a second weight of all experts while it trains."""
    inner = {"qwen3_moe": "moe_intermediate_size"}.get(kind, "intermediate_size")
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "head_dim": 32, inner: 192}
    moe_config(kind, **sizes, max_position_embeddings=SHAPE[1], num_hidden_layers=3).save_pretrained(tmp_path)
    measured = _measured_peak(str(tmp_path), dtype="bfloat16", convert=convert)
    module = CausalLMModule(str(tmp_path), pretrained=False, dtype="bfloat16")
    settings: Any = {"precision": "bf16-true", "batch_size": SHAPE[0], "tokens": SHAPE[1], "accelerator": False}
    step = TracedModel(TracedRun(module=module, convert=baseline.converter(CONFIG), **settings)).step()
    assert step.peak == pytest.approx(measured, rel=0.03)


class Looping(CausalLMModule):
    """A user's module, whose experts loop."""

    def configure_model(self) -> None:
        super().configure_model()
        self.model.set_experts_implementation("eager")


def test_experts_that_cannot_be_traced_are_refused(tmp_path: Path) -> None:
    moe_config("mixtral").save_pretrained(tmp_path)
    run = llama_run(str(tmp_path))
    with pytest.raises(PaCAError, match=r"layers\.0\.mlp\.experts' has stacked experts in float32, .*--trainer.precis"):
        TracedModel(run)
    looping = Looping(str(tmp_path), pretrained=False, dtype="bfloat16")
    for convert in (run.convert, lambda module: None):
        with pytest.raises(PaCAError, match=r"experts' loops over the experts that its tokens chose"):
            TracedModel(TracedRun(module=looping, convert=convert, precision="bf16-true"))


def _sharded_peak(directory: str) -> int:
    dist.init_process_group("gloo")
    return _measured_peak(directory, FSDP2Strategy(activation_checkpointing=True))


@pytest.mark.distributed
def test_the_trace_is_what_a_real_sharded_step_needs(model_directory: str) -> None:
    measured = launch(_sharded_peak, 2, model_directory)[0]
    strategy = FSDP2Strategy(activation_checkpointing=True)
    traced = TracedModel(llama_run(model_directory, strategy=strategy, ranks=2, accelerator=False)).step().peak
    assert traced == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
def test_llama3_8b_needs_less_than_three_quarters_of_loras_memory(tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tokens", "offload", "gib"), [(8, 8192, False, 22), (8, 8192, True, 16), (4, 4096, False, 23)]
)
def test_llama3_70b_trains_on_small_devices(tmp_path: Path, ranks: int, tokens: int, offload: bool, gib: int) -> None:
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
