"""Canaries for the private APIs of transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from paca_lightning.core.private import transformers as private
from tests.core.private.canary import canary, check_coverage
from tests.moe import tiny_moe
from tests.tiny import tiny_llama, tiny_tokenizer


@canary("transformers.is_pretrained_model", "transformers.block_classes", "transformers.initialises")
def test_what_a_hugging_face_model_declares() -> None:
    model = tiny_llama()
    assert private.is_pretrained_model(model)
    assert private.initialises(model)
    assert private.block_classes(model) == {"LlamaDecoderLayer"}
    assert not private.is_pretrained_model(model.lm_head)
    assert not private.initialises(model.lm_head)
    assert private.block_classes(model.lm_head) == set()


@canary("transformers.is_llama_norm")
def test_norms_that_compute_as_llamas_do() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    class Doubled(Qwen3RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    assert private.is_llama_norm(tiny_llama().model.norm)
    assert private.is_llama_norm(Qwen3RMSNorm(4))
    assert not any(map(private.is_llama_norm, (GemmaRMSNorm(4), nn.RMSNorm(4), nn.LayerNorm(4), Doubled(4))))


@canary("transformers.initialise")
def test_initialise() -> None:
    model = tiny_llama()
    projection, rotary = model.model.layers[0].self_attn.q_proj, model.model.rotary_emb
    frequencies = rotary.inv_freq.clone()
    with torch.no_grad():
        projection.weight.zero_()
        rotary.inv_freq.zero_()
    private.initialise(model, projection)
    private.initialise(model, rotary)
    assert projection.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert torch.equal(rotary.inv_freq, frequencies)


@canary("transformers.ignored_keys")
def test_ignored_keys() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    patterns = {pattern for module in model.modules() for pattern in private.ignored_keys(module)}
    assert any("attn" in pattern and "bias" in pattern for pattern in patterns)
    assert private.ignored_keys(nn.Linear(1, 1)) == set()


@canary("transformers.attention_of")
def test_attention_of() -> None:
    model = tiny_llama()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert private.attention_of(model.config) == implementation


@canary(
    "transformers.experts_implementation",
    "transformers.is_experts",
    "transformers.splits_experts",
    "transformers.GROUPED_PRODUCTS",
)
def test_experts_say_how_they_compute() -> None:
    model = tiny_moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    assert [module for module in model.modules() if private.is_experts(module)] == [
        layer.mlp.experts for layer in model.model.layers
    ]
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert private.experts_implementation(experts.config) == implementation
    assert not private.splits_experts(experts)
    experts._is_expert_parallel = True
    assert private.splits_experts(experts)
    products = []

    class Weight:
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
            products.append(func.__name__)

    ends = torch.tensor([1, 3], dtype=torch.int32)
    nn.functional.grouped_mm(torch.zeros(3, 4), Weight(), offs=ends)  # type: ignore[arg-type]
    torch.ops.transformers.grouped_mm_fallback(torch.zeros(3, 4), Weight(), offs=ends)
    assert set(products) <= private.GROUPED_PRODUCTS
    assert len(set(products)) == 2


@canary("transformers.peft_takes_for_experts")
def test_peft_takes_dense_layers_for_experts() -> None:
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for kind in ("llama", "mixtral", "minimax", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"):
        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
        names = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
        assert private.peft_takes_for_experts(SimpleNamespace(model_type=kind)) == set(names), kind
    assert private.peft_takes_for_experts(None) == set()


@canary("transformers.names_in_model")
def test_tensors_of_a_checkpoint_have_the_models_names() -> None:
    model = tiny_moe("mixtral", num_hidden_layers=1)
    experts = "model.layers.0.block_sparse_moe.experts"
    names = [f"{experts}.{expert}.w{part}.weight" for expert in (0, 10, 2) for part in (3, 2, 1)]
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    renamed, merged = private.names_in_model(model, [*names, gate, "lm_head.weight"], model.state_dict())
    assert renamed == {"model.layers.0.mlp.gate.weight": gate}
    assert set(merged) == {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    fused = merged["model.layers.0.mlp.experts.gate_up_proj"]
    by_name = {sources[0][-9:-7]: kind for kind, sources in fused.parts.items()}
    assert fused.parts[by_name["w1"]] == [f"{experts}.{expert}.w1.weight" for expert in (0, 2, 10)]
    gates, ups = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    parts = {by_name["w1"]: list(gates), by_name["w3"]: list(ups)}
    assert torch.equal(fused.merge(parts), torch.cat([gates, ups], dim=1))


@canary("transformers.packing_not_detected")
def test_packing_not_detected() -> None:
    model = tiny_llama().eval()
    inputs = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(4).repeat(2)[None], "use_cache": False}
    with torch.no_grad():
        apart = model(**inputs).logits
        alone = model(**inputs | {name: inputs[name][:, 4:] for name in ("input_ids", "position_ids")}).logits
        with private.packing_not_detected():
            together = model(**inputs).logits
    torch.testing.assert_close(apart[:, 4:], alone)
    assert (together[:, 4:] - alone).abs().max() > 1e-3
    torch.testing.assert_close(together[:, :4], apart[:, :4])


@canary("transformers.templates_compiled_by")
def test_templates_compiled_by() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    with private.templates_compiled_by(lambda source, environment: environment.from_string(source + "!")):
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == plain + "!"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == plain


def test_every_function_has_a_canary() -> None:
    check_coverage("transformers")
