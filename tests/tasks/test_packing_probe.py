"""Which models keep packed documents apart, in which way they are told, and that trying them leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.packing_probe import choose_way
from tests.distributed_launch import launch
from tests.tasks.rows import QUICKSTART
from tests.tasks.runs import adamw, trainer
from tests.tiny import tiny_tokenizer

_SHAPE: dict[str, Any] = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SHAPE | {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}
_GPT: dict[str, Any] = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4}
_TOKENS = {"pad_token_id": 2, "bos_token_id": None, "eos_token_id": 1}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
_HYBRID = ["linear_attention", "full_attention"]
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}

APART = {
    "position_ids": {
        "llama": hf.LlamaConfig(**_LLAMA),
        "mistral": hf.MistralConfig(**_LLAMA, sliding_window=6),
        "gemma3": hf.Gemma3TextConfig(**_LLAMA, head_dim=16, sliding_window=8),
        "gpt2": hf.GPT2Config(**_GPT, n_positions=128),
        "gpt_neox": hf.GPTNeoXConfig(**_SHAPE, intermediate_size=96, max_position_embeddings=128),
        "mixtral": hf.MixtralConfig(**_LLAMA, num_local_experts=4),
    },
    "attention masks": {
        "gpt_oss": hf.GptOssConfig(**_LLAMA, **_EXPERTS, num_local_experts=4, sliding_window=4),
        "opt": hf.OPTConfig(**_SHAPE, ffn_dim=96, max_position_embeddings=128, word_embed_proj_dim=64),
        "mpt": hf.MptConfig(vocab_size=384, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    },
}
MIXED = {
    "bloom": hf.BloomConfig(vocab_size=384, hidden_size=64, n_layer=2, n_head=4),
    "mamba": hf.MambaConfig(vocab_size=384, hidden_size=64, num_hidden_layers=2),
    "bamba": hf.BambaConfig(**_LLAMA, **_MAMBA, mamba_chunk_size=8, attn_layer_indices=[1]),
    "lfm2": hf.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"]),
    "qwen3_next": hf.Qwen3NextConfig(
        **_LLAMA,
        **_EXPERTS,
        layer_types=_HYBRID,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}

# Since 5.24, transformers' Falcon makes its masks of the positions, also with ALiBi.
_FALCON, _ALIBI = hf.FalconConfig(**_SHAPE), hf.FalconConfig(**_SHAPE, alibi=True)
if Version(hf.__version__) >= Version("5.24"):
    APART["position_ids"] |= {"falcon": _FALCON, "falcon with ALiBi": _ALIBI}
else:
    APART["attention masks"]["falcon"] = _FALCON
    MIXED["falcon with ALiBi"] = _ALIBI


def module_of(config: Any, dtype: torch.dtype = torch.float32) -> CausalLMModule:
    """A module with a random model."""
    for name, value in _TOKENS.items():
        setattr(config, name, value)
    module = CausalLMModule("unused")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    return module


def chosen(module: CausalLMModule) -> str:
    assert module.model is not None
    choose_way(module, module.packed_rows, module.model)
    return module.packed_rows.way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("way", "name"), [(way, name) for way, named in APART.items() for name in named])
def test_a_model_that_keeps_documents_apart_is_told_in_the_first_way_that_works(
    way: str, name: str, dtype: torch.dtype
) -> None:
    module = module_of(APART[way][name], dtype)
    assert chosen(module) == way

    # The training loss of a packed row, through the way, is that of its documents.
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 384, (1, length), generator=generator) for length in (13, 19)]
    labels = [torch.cat([document.new_full((1, 1), -100), document[:, 1:]], 1) for document in documents]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    module.eval()
    packed = module.training_step(
        {"input_ids": torch.cat(documents, 1), "labels": torch.cat(labels, 1), "position_ids": positions}, 0
    )
    alone = [
        module.training_step({"input_ids": ids, "labels": own}, 0) * (ids.shape[1] - 1)
        for ids, own in zip(documents, labels, strict=True)
    ]
    expected = sum(alone) / (sum(document.shape[1] for document in documents) - 2)
    torch.testing.assert_close(packed, expected, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_documents_is_refused(name: str, dtype: torch.dtype) -> None:
    module = module_of(MIXED[name], dtype)
    with pytest.raises(PaCAError, match=r"does not keep packed documents apart, so .* Set packing: false"):
        chosen(module)


class RunningSum(nn.Module):
    """Adds the tokens so far to each token, of the same document if ``seq_idx`` tells the documents."""

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        length = hidden.shape[1]
        before = torch.ones(length, length).tril()
        if seq_idx is not None:
            before = before * (seq_idx[:, :, None] == seq_idx[:, None, :])
        return hidden + before.to(hidden.dtype) @ hidden


class StateLlama(hf.LlamaForCausalLM):
    """A Llama whose embeddings pass a recurrence. Its kernel takes ``seq_idx``, as those of Mamba do."""

    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        self.state = RunningSum()

    def forward(self, input_ids: Tensor, seq_idx: Tensor | None = None, **inputs: Any) -> Any:
        inputs = {name: value for name, value in inputs.items() if not name.startswith(("cu_seq", "max_length"))}
        return super().forward(inputs_embeds=self.state(self.get_input_embeddings()(input_ids), seq_idx), **inputs)


def test_kernels_that_take_the_bounds_of_documents_get_them() -> None:
    module = module_of(hf.LlamaConfig(**_LLAMA))
    module.model = StateLlama(module.model.config).train()  # type: ignore[union-attr]
    assert chosen(module) == "document bounds (seq_idx, cu_seq_lens)"
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
    batch = {"input_ids": torch.arange(12).view(2, 6), "position_ids": positions}
    told = module.packed_rows(module.model, batch)
    assert told["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4]]
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 10, 12]
    assert told["max_length_q"] == 4
    assert module(batch).shape == (2, 6, 384)


def test_trying_leaves_nothing_behind() -> None:
    module = module_of(hf.LlamaConfig(**_LLAMA, attention_dropout=0.5))
    assert module.model is not None
    module.model.model.norm.eval()
    modes = [part.training for part in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    buffers = [buffer.clone() for buffer in module.buffers()]
    compiled: list[int] = []
    for layer in module.model.model.layers:
        layer.compile(backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert chosen(module) == "position_ids"
    assert torch.rand(1) == expected
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(buffer, before) for buffer, before in zip(module.buffers(), buffers, strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not compiled


def model_directory(path: Path, config: Any) -> str:
    module_of(config).model.save_pretrained(path)  # type: ignore[union-attr]
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def packed_data(directory: str, cache: Path, **settings: Any) -> InstructionDataModule:
    rows, cache_dir = str(QUICKSTART / "train.jsonl"), str(cache / "cache")
    return InstructionDataModule(directory, rows, packing=True, max_length=128, cache_dir=cache_dir, **settings)


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "lfm2", MIXED["lfm2"])
    run = trainer(tmp_path, max_steps=1)
    with pytest.raises(PaCAError, match=r"Lfm2ForCausalLM does not keep packed documents apart"):
        run.fit(CausalLMModule(directory), packed_data(directory, tmp_path))
    assert run.global_step == 0
    unpacked = InstructionDataModule(directory, str(QUICKSTART / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    run.fit(CausalLMModule(directory), unpacked)
    assert run.global_step == 1


def test_packed_batches_of_another_data_module_are_tried_too(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "mamba", MIXED["mamba"])
    ids = torch.arange(3, 13)[None]

    def fit(positions: Tensor) -> int:
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions[None]}
        run = trainer(tmp_path)
        run.fit(CausalLMModule(directory, attn_implementation="eager"), DataLoader([batch], batch_size=None))
        return int(run.global_step)

    with pytest.raises(PaCAError, match=r"leave out `position_ids`"):
        fit(torch.arange(5).repeat(2))
    assert fit(torch.arange(10)) == 1


def fit_packed(directory: str, cache: str, **settings: Any) -> tuple[str, list[float]]:
    """The way, and trained numbers, after two steps on packed rows."""
    module = CausalLMModule(directory, optimizer=adamw(1e-3), attn_implementation="eager")
    run = trainer(Path(cache), max_steps=2, logger=False, **settings)
    run.fit(module, packed_data(directory, Path(cache), batch_size=2 // run.world_size))
    head = module.model.lm_head.weight  # type: ignore[union-attr]
    return module.packed_rows.way, (head.full_tensor() if hasattr(head, "full_tensor") else head).flatten().tolist()


def fit_packed_on_ranks(directories: dict[str, str], cache: str) -> dict[str, Any]:
    """What ``fit_packed`` returns, and the refusal, with both strategies; FSDP2 builds the models on meta."""
    results: dict[str, Any] = {}
    for strategy in ("ddp", "paca_fsdp2"):
        settings: dict[str, Any] = {"devices": 2, "strategy": strategy}
        results[strategy] = {name: fit_packed(directories[name], cache, **settings) for name in ("llama", "gpt_oss")}
        with pytest.raises(PaCAError, match="Lfm2ForCausalLM does not keep packed documents apart"):
            fit_packed(directories["lfm2"], cache, **settings)
    return results


@pytest.mark.distributed
def test_two_ranks_try_and_train_as_one(tmp_path: Path) -> None:
    configs = {"llama": hf.LlamaConfig(**_LLAMA), "gpt_oss": APART["attention masks"]["gpt_oss"], "lfm2": MIXED["lfm2"]}
    directories = {name: model_directory(tmp_path / name, config) for name, config in configs.items()}
    expected = {name: fit_packed(directories[name], str(tmp_path)) for name in ("llama", "gpt_oss")}
    assert [way for way, _ in expected.values()] == ["position_ids", "attention masks"]
    for rank in launch(fit_packed_on_ranks, 2, directories, str(tmp_path)):
        for results in rank.values():
            for name, (way, numbers) in results.items():
                assert way == expected[name][0]
                torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected[name][1]), rtol=0, atol=1e-4)
