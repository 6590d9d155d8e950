"""Selective checkpointing: bitwise the gradients without it, for any decoder, and it keeps what is expensive."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paca_lightning import PaCAConfig, PaCAError, apply_paca, disable_paca, paca_layers
from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.activation_checkpointing.selective import contexts
from paca_lightning.tasks import CausalLMModule
from paca_lightning.tools.memory.baselines import FLOOR, PACA, Baseline
from paca_lightning.tools.memory.timeline import Kind
from paca_lightning.tools.memory.traced_model import TracedModel
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.presets import preset_config
from tests.tiny import tiny_config, tiny_llama, tiny_model_directory

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
DECODERS = {
    "grouped-query attention": ("Llama", {}),
    "attention of single operators": ("Llama", {"attn_implementation": "eager"}),
    "norms of queries and keys, tied head": ("Qwen3", {"tie_word_embeddings": True}),
    "norms behind the last product": ("Olmo2", {}),
    "norms on both sides, soft-capping": ("Gemma2", {"sliding_window": 16}),
    "attention beside the MLP": ("GPTNeoX", {"use_parallel_residual": True}),
    "biases, attention beside the MLP": ("Phi", {}),
    "Conv1D, dropout": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 8}),
    "experts": ("Mixtral", {"num_local_experts": 4}),
}


def decoder(name: str, dtype: torch.dtype = torch.float32) -> Any:
    family, settings = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**(SHAPE if family != "GPT2" else {}) | settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def gradients(model: Any, *, selective: bool, autocast: bool = False) -> list[Tensor]:
    """Gradients of a copy of a model, with all blocks checkpointed or none."""
    model = copy.deepcopy(model)
    if selective:
        checkpoint_blocks(find_blocks(model), selective=True)
    ids = torch.arange(64).view(2, 32)
    torch.manual_seed(1)  # of the dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=True).loss
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def assert_bitwise(model: Any, **how: Any) -> None:
    plain, ours = gradients(model, selective=False, **how), gradients(model, selective=True, **how)
    assert plain
    for expected, found in zip(plain, ours, strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or torch.equal(expected, found)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["paca", "full", "nf4"])
def test_gradients_equal_those_without_checkpointing(name: str, method: str) -> None:
    model = decoder(name)
    if method != "full":
        apply_paca(model, PaCAConfig(r=4, quantize="nf4" if method == "nf4" else None))
    assert_bitwise(model)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_gradients_in_narrow_precision(dtype: torch.dtype, autocast: bool) -> None:
    model = decoder("grouped-query attention", dtype)
    apply_paca(model, PaCAConfig(r=4))
    assert_bitwise(model, autocast=autocast)


def test_gradients_beside_lora() -> None:
    peft = pytest.importorskip("peft")
    model = decoder("grouped-query attention")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert_bitwise(adapted)


def recorded_calls(model: Any) -> list[tuple[Any, bool]]:
    """For each GEMM and attention of the first block: the operator, and whether its output is kept."""
    recorded: list[Any] = []

    def recording() -> Any:
        forward, recomputation = contexts()
        recorded.append(forward.calls)
        return forward, recomputation

    block = find_blocks(model)[0]
    original = functools.partial(type(block).forward, block)
    block.forward = lambda *args, **kwargs: checkpoint(
        original, *args, use_reentrant=False, context_fn=recording, **kwargs
    )
    model(input_ids=torch.arange(32).view(1, 32), use_cache=False)
    return [(call.func.name(), call.output is not None) for call in recorded[0]]


def test_keeps_wide_gemms_and_attention_but_not_what_is_only_added() -> None:
    model = decoder("grouped-query attention")
    apply_paca(model, PaCAConfig(r=4))
    kept = [kept for _, kept in recorded_calls(model)]
    #                queries, keys, values, attention, output projection, gate, up, down
    assert kept == [True, False, False, True, False, True, True, False]


def test_keeps_the_last_gemm_if_a_norm_follows() -> None:
    assert recorded_calls(decoder("norms behind the last product"))[-1] == ("aten::mm", True)


class OwnLoss(CausalLMModule):
    """A module that computes the model's own loss, which needs all logits."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss


@pytest.mark.slow
def test_llama3_8b_keeps_at_most_55_percent_of_what_the_floor_keeps(tmp_path: Any) -> None:
    """Traced at 2,048 tokens in bf16. The floor is the frozen model with its own loss."""
    preset_config("llama3-8b").save_pretrained(tmp_path)

    def activations(module_class: Any, method: Baseline, how: Any) -> int:
        run = TracedRun(
            module=module_class(str(tmp_path), dtype="bfloat16", activation_checkpointing=how),
            convert=lambda module: method.convert(module, PaCAConfig(r=16)),
            precision="bf16-true",
            tokens=2048,
        )
        return TracedModel(run).step().at_peak[Kind.ACTIVATIONS]

    floor = activations(OwnLoss, FLOOR, False)
    assert activations(CausalLMModule, PACA, "selective") <= 0.55 * floor


class InPlace(nn.Module):
    """A block that changes the output of a GEMM in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).relu_())


def test_a_gemm_whose_output_is_changed_in_place_is_recomputed() -> None:
    torch.manual_seed(0)
    block, input = InPlace(), torch.randn(4, 8)
    block(input).square().sum().backward()
    expected = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    checkpoint_blocks([block], selective=True)
    block(input).square().sum().backward()
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(expected, block.parameters(), strict=True))


@torch.library.custom_op("paca_tests::attention_with_dropout", mutates_args=())
def attention_with_dropout(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """An operator that the policy keeps and that draws its own dropout, like attention kernels on a GPU."""
    mask = (torch.rand_like(hidden) > 0.5).to(hidden.dtype)
    return hidden * mask, mask


attention_with_dropout.register_autograd(
    lambda ctx, grad, _: grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class DropoutAround(nn.Module):
    """Dropout before, inside and after attention, as in GPT-2 on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        attended, _ = attention_with_dropout(self.up(self.dropout(hidden)))
        return hidden + self.dropout(self.down(torch.tanh(self.dropout(attended))))


def test_dropout_after_kept_attention_with_dropout_has_the_same_mask() -> None:
    torch.manual_seed(0)
    blocks, input = nn.Sequential(DropoutAround(), DropoutAround()), torch.randn(4, 8)
    gradients, states = [], []
    for selective in (False, True):
        if selective:
            checkpoint_blocks(blocks, selective=True)
        blocks.zero_grad()
        torch.manual_seed(1)
        blocks(input).square().sum().backward()
        gradients.append([parameter.grad for parameter in blocks.parameters()])
        states.append(torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(*states)  # the recomputation leaves the generator as it found it


def test_a_copy_computes_with_its_own_weights() -> None:
    """Averaged models are such copies."""
    block = InPlace()
    checkpoint_blocks([block], selective=True)
    other = copy.deepcopy(block)
    with torch.no_grad():
        block.up.weight.zero_()
        block.up.bias.zero_()
    input = torch.randn(4, 8)
    assert torch.equal(other(input), other.down(other.up(input).relu()) + input)


def test_a_second_backward_is_refused() -> None:
    block = InPlace()
    checkpoint_blocks([block], selective=True)
    loss = block(torch.randn(4, 8)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_a_changed_forward_is_noticed() -> None:
    block = InPlace()
    checkpoint_blocks([block], selective=True)
    loss = block(torch.randn(4, 8)).sum()
    block.up.bias = None  # another operator multiplies now
    with pytest.raises(RuntimeError, match=r"called aten::mm in its recomputation only"):
        loss.backward()


def test_disable_paca_and_evaluation_still_work() -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    ids = torch.arange(16).view(1, 16)
    expected = model(input_ids=ids).logits
    checkpoint_blocks(find_blocks(model), selective=True)
    with disable_paca(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    model.eval()
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False)[:, :16], ids)
    assert all(layer.paca_delta.grad is None for _, layer in paca_layers(model))


def test_the_module_has_selective_checkpointing(tmp_path: Any) -> None:
    directory = str(tiny_model_directory(tmp_path))
    batch = {"input_ids": torch.arange(32).view(2, 16), "labels": torch.arange(32).view(2, 16)}
    grads = []
    for how in (False, "selective"):
        module = CausalLMModule(directory, activation_checkpointing=how)
        module.configure_model()
        module.train()
        module.training_step(batch, 0).backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_module_refuses_selective_checkpointing_with_compile() -> None:
    with pytest.raises(PaCAError, match=r"torch\.compile chooses itself"):
        CausalLMModule("any", compile=True, activation_checkpointing="selective")


def test_the_module_refuses_selective_checkpointing_without_blocks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_no_split_modules", None)
    monkeypatch.setattr(transformers.LlamaModel, "_no_split_modules", None)
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_no_split_modules", None)
    tiny_config().save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), pretrained=False, activation_checkpointing="selective")
    with pytest.raises(PaCAError, match="does not name its decoder blocks, which `activation_checkpointing` needs"):
        module.configure_model()
