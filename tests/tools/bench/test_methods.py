"""Methods of fine-tuning as changes to one base model."""

from pathlib import Path

import pytest
import torch

from paca_lightning import PaCAError
from paca_lightning.layers.experts import ExpertWeight
from paca_lightning.tools.bench.lora import features_of
from paca_lightning.tools.bench.measure import saved_bytes
from paca_lightning.tools.bench.methods import Method, parse_methods, stacked_experts, targets_of
from paca_lightning.tools.bench.step_runner import StepRunner
from paca_lightning.tools.bench.workload import Workload
from tests.moe import tiny_moe
from tests.tiny import tiny_llama

LAYERS, HIDDEN, MLP, KEYS = 2, 64, 96, 32
OUT_FEATURES = LAYERS * (HIDDEN + 2 * KEYS + HIDDEN + 2 * MLP + HIDDEN)
IN_FEATURES = LAYERS * (6 * HIDDEN + MLP)


def test_each_method_trains_what_it_says(workload: Workload) -> None:
    base = workload.build()
    everything = sum(parameter.numel() for parameter in base.parameters())
    expected = {
        Method("floor"): 0,
        Method("paca", 4): 4 * OUT_FEATURES,
        Method("qpaca", 4): 4 * OUT_FEATURES,
        Method("lora", 4): 4 * (OUT_FEATURES + IN_FEATURES),
        Method("lora-narrow", 4): 4 * (OUT_FEATURES + IN_FEATURES),
        Method("qfloor"): 0,
        Method("qlora", 4): 4 * (OUT_FEATURES + IN_FEATURES),
        Method("dora", 4): 4 * (OUT_FEATURES + IN_FEATURES) + OUT_FEATURES,
        Method("full"): everything,
    }
    counted = {method: StepRunner(method, base, workload).trainable_parameters for method in expected}
    assert counted == expected
    assert all(parameter.requires_grad for parameter in Method("full").apply(base).parameters())


def test_training_one_method_leaves_the_base_and_the_other_methods_alone(workload: Workload) -> None:
    base = workload.build()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    runners = [StepRunner(Method(name, r), base, workload) for name, r in (("paca", 4), ("lora", 4), ("full", None))]
    losses = []
    for runner in runners:
        batch = workload.micro_batch(0)
        losses.append(runner.forward(**batch).loss.item())
        for _ in range(3):
            runner.step([batch])
        assert runner.forward(**batch).loss.item() < losses[-1]
    assert losses == pytest.approx([losses[0]] * 3)  # all of them start as the same model
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_methods_share_the_weights_that_they_do_not_change(workload: Workload) -> None:
    base = workload.build()
    paca = Method("paca", 4).apply(base)
    assert paca.model.embed_tokens.weight is base.model.embed_tokens.weight
    assert paca.model.layers[0].mlp.up_proj.weight is not base.model.layers[0].mlp.up_proj.weight


def test_quantized_methods_train_on_one_base_and_leave_the_dense_one_alone(workload: Workload) -> None:
    base, batch = workload.build(), workload.micro_batch(0)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    floor, paca, lora = (
        StepRunner(Method(name, r), base, workload) for name, r in (("qfloor", None), ("qpaca", 4), ("qlora", 4))
    )
    # LoRA's base is the floor's. PaCA's trained columns are exact, so it begins a little nearer to the dense model.
    start = floor.forward(**batch).loss.item()
    assert lora.forward(**batch).loss.item() == start
    assert paca.forward(**batch).loss.item() == pytest.approx(start, rel=0.01)
    for runner in (paca, lora):
        for _ in range(3):
            runner.step([batch])
        assert runner.forward(**batch).loss.item() < start
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_qlora_is_pefts_adapters_on_nf4_in_a_quarter_of_the_bytes(workload: Workload) -> None:
    bitsandbytes, bnb = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft.tuners.lora.bnb")
    base = workload.build()
    model = Method("qlora", 4).apply(base)
    adapted = [module for module in model.modules() if isinstance(module, bnb.Linear4bit)]
    assert len(adapted) == 7 * LAYERS
    for layer in (module.base_layer for module in adapted):
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested, layer.compute_dtype) == (
            "nf4",
            64,
            True,
            torch.float32,
        )
        assert layer.weight.nbytes == layer.in_features * layer.out_features / 2
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.get_input_embeddings().weight is base.get_input_embeddings().weight


def test_gpt2_is_measured_on_nf4(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2).save_pretrained(tmp_path)
    shape = Workload(model=str(tmp_path), tokens=8, dtype="fp32")
    base = shape.skeleton().to_empty(device="cpu")
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name in ("qfloor", "qlora"):  # its Conv1D layers hold their weights transposed, and have biases
        quantized = Method(name, 4 if name == "qlora" else None).apply(base.eval())
        batch = shape.micro_batch(0)
        torch.testing.assert_close(quantized(**batch).logits, base(**batch).logits, atol=0.05, rtol=0)


def test_a_method_may_be_checkpointed_alone(workload: Workload) -> None:
    base, batch = workload.build(), workload.micro_batch(0)
    methods = parse_methods(["paca:4", "paca:4+selective", "paca:4+blocks"], [16], "both", base)
    assert [method.label for method in methods] == ["floor", "paca r=4", "paca+selective r=4", "paca+blocks r=4"]
    runners = [StepRunner(method, base, workload) for method in methods[1:]]
    saved = [saved_bytes(runner, batch) for runner in runners]
    assert saved[0] > saved[1] > saved[2]
    assert len({runner.forward(**batch).loss.item() for runner in runners}) == 1


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_trained_by_all_methods_alike(kind: str) -> None:
    base = tiny_moe(kind).requires_grad_(True)
    targets = targets_of("lora", base)
    experts = [target.module for target in targets if isinstance(target.module, ExpertWeight)]
    others = [target.module for target in targets if not isinstance(target.module, ExpertWeight)]
    assert (len(experts), len(others)) == (2 * 2, 2 * 4)
    inputs = sum(layer.in_features for layer in others) + sum(4 * each.in_features for each in experts)
    outputs = sum(layer.out_features for layer in others) + sum(4 * each.out_features for each in experts)
    assert features_of(targets) == (inputs, outputs)
    counted = {
        method: sum(p.numel() for p in method.apply(base).parameters() if p.requires_grad)
        for method in (Method("paca", 4), Method("lora", 2), Method("lora-narrow", 2))
    }
    assert list(counted.values()) == [4 * outputs, 2 * (inputs + outputs), 2 * (inputs + outputs)]
    with pytest.raises(PaCAError, match=r"DoRA cannot adapt stacked experts such as 'model\.layers\.0\.mlp\.experts"):
        Method("dora", 2).apply(base)


def test_dense_layers_that_peft_takes_for_experts_are_refused() -> None:
    with pytest.raises(
        PaCAError, match=r"PEFT .* takes 'model\.layers\.0\.mlp\.gate_proj' \(6 such layers\) for a part"
    ):
        Method("lora", 2).apply(tiny_moe("deepseek_v3"))


def test_an_nf4_base_has_its_experts_frozen_with_every_method() -> None:
    base = tiny_moe("mixtral", hidden_size=64, num_key_value_heads=4, head_dim=16)
    assert stacked_experts(base) == [
        f"model.layers.{block}.mlp.experts.{name}" for block in range(2) for name in ("gate_up_proj", "down_proj")
    ]
    for method in (Method("qpaca", 4), Method("qlora", 4)):
        trained = [name for name, p in method.apply(base).named_parameters() if p.requires_grad]
        assert trained
        assert not any("experts" in name for name in trained)


def test_an_unknown_recomputation_is_named(workload: Workload) -> None:
    with pytest.raises(PaCAError, match=r"paca\+all: choose what to recompute from selective, blocks"):
        parse_methods(["paca+all"], [16], "both", workload.skeleton())


def test_equal_parameters_and_equal_rank_are_both_offered() -> None:
    base = tiny_llama()
    assert parse_methods(["lora"], [8], "rank", base)[1:] == [Method("lora", 8)]
    assert parse_methods(["lora"], [8], "parameters", base)[1:] == [Method("lora", 4)]
    assert parse_methods(["paca", "lora"], [8, 16], "both", base)[1:] == [
        Method("paca", 8),
        Method("paca", 16),
        Method("lora", 8),
        Method("lora", 16),
        Method("lora", 4),
    ]
    assert parse_methods(["full", "floor", "lora:3"], [8], "both", base) == [
        Method("floor"),
        Method("full"),
        Method("lora", 3),
    ]
