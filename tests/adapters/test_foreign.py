"""Adapters of PEFT's own PaCA (0.22) and of the fork by PaCA's authors load as what they mean, and ours as PEFT's.

The files are written here as the two programs write them, read in their sources. What they mean is said by a plain
model whose columns are changed. ``test_pefts_paca.py`` asks PEFT itself, once it has the method.
"""

import copy
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    export_peft_paca,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
    write_columns,
)
from paca_lightning.adapters.saved import adapter_layers, saved_config
from paca_lightning.tools.export import export
from paca_lightning.tools.model_with_adapters import ModelWithAdapters
from tests.adapters.test_adapter import assert_refused, assert_same, trained
from tests.adapters.test_export import in_bf16, logits, tiny_gpt2
from tests.moe import tiny_moe
from tests.tiny import tiny_config, tiny_llama, tiny_model_directory

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

PEFT_SETTINGS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "models/tiny",
    "exclude_modules": None,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "paca_alpha": 6,
    "peft_type": "PACA",
    "peft_version": "0.22.0",
    "r": 4,
    "random_seed": None,
    "revision": None,
    "target_modules": ["up_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}

FORK_SETTINGS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "models/tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "gradient_accumulation_steps": 4,
    "inference_mode": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "paca_alpha": 6,
    "peft_type": "PACA",
    "r": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "revision": None,
    "target_modules": ["up_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}


@dataclass
class Foreign:
    """An adapter as another program has it in memory: its tensors by name, counted from the base model."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        named = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(named, directory / TENSORS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(self.settings, indent=2, sort_keys=True))
        (directory / "README.md").write_text("a model card\n")
        return directory

    @torch.no_grad()
    def applied(self, model: nn.Module) -> nn.Module:
        """The plain model that computes what the adapter means, made from its base model."""
        scaling = self.settings["paca_alpha"] / self.settings["r"]
        for name, value in self.tensors.items():
            path, _, kind = name.rpartition(".")
            if kind == "paca_indices":
                continue
            if kind not in ("paca_delta", "paca_w"):
                model.get_parameter(name).copy_(value)
                continue
            weight, indices = model.get_parameter(f"{path}.weight"), self.tensors[f"{path}.paca_indices"]
            if kind == "paca_w":
                weight[:, indices] = scaling * value.to(weight.dtype)
            else:
                weight[:, indices] = torch.add(weight[:, indices], value, alpha=scaling).to(weight.dtype)
        return model


def seeded(*names: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(names).encode()))


def chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.endswith(tuple(names))}


def of_peft(model: nn.Module, layers: Sequence[str] = ("q_proj", "up_proj"), **settings: Any) -> Foreign:
    """What PEFT's PaCA would have trained: sorted columns, drawn per layer; fp32 deltas."""
    adapter = Foreign(PEFT_SETTINGS | settings)
    for path, module in chosen(model, layers).items():
        columns = torch.randperm(module.in_features, generator=seeded("columns", path))[: adapter.settings["r"]]
        delta = 0.05 * torch.randn(module.out_features, len(columns), generator=seeded("delta", path))
        adapter.tensors |= {f"{path}.paca_delta": delta, f"{path}.paca_indices": columns.sort().values}
    return adapter


def of_fork(model: nn.Module, *, moved: float = 0.05, dtype: torch.dtype | None = None, **settings: Any) -> Foreign:
    """What the fork would have trained: columns over the scaling, in the weight's dtype, in the order of the draw."""
    adapter = Foreign(FORK_SETTINGS | settings)
    scaling = adapter.settings["paca_alpha"] / adapter.settings["r"]
    for path, module in chosen(model, ("q_proj", "up_proj")).items():
        columns = torch.randperm(module.in_features, generator=seeded("columns", path))[: adapter.settings["r"]]
        values = module.weight.detach()[:, columns] / scaling
        values = values + moved * torch.randn(values.shape, generator=seeded("values", path)).to(values)
        adapter.tensors |= {f"{path}.paca_w": values.to(dtype or values.dtype), f"{path}.paca_indices": columns}
    return adapter


def assert_means(directory: Path, build: Callable[[], nn.Module], adapter: Foreign) -> None:
    """Loading gives, bitwise in the weights, the plain model that the adapter means."""
    model = build()
    load_adapter(model, directory)
    expected = adapter.applied(build())
    found = dict(merge(model).named_parameters())
    assert [name for name, value in expected.named_parameters() if not torch.equal(value, found[name])] == []


# -- PEFT's PaCA to ours


@pytest.mark.parametrize("cast", [lambda model: model, in_bf16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [6, 8])
def test_an_adapter_of_peft_means_its_columns(tmp_path: Path, cast: Callable[..., nn.Module], alpha: int) -> None:
    adapter = of_peft(tiny_llama(), paca_alpha=alpha)
    assert_means(adapter.write(tmp_path), lambda: cast(tiny_llama()), adapter)
    model = cast(tiny_llama())
    load_adapter(model, tmp_path)
    assert not torch.equal(logits(model), logits(cast(tiny_llama())))
    assert torch.equal(logits(model), logits(adapter.applied(cast(tiny_llama()))))
    assert saved_config(tmp_path) == PaCAConfig(r=4, alpha=alpha, target_modules=["up_proj", "q_proj"])


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (("layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"), {"layers_to_transform": [1]}),
        (("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"), {"layers_to_transform": 0, "layers_pattern": "layers"}),
        (("q_proj", "layers.1.mlp.up_proj"), {"exclude_modules": r".*0\.mlp\..*"}),
        (("q_proj",), {"exclude_modules": ["up_proj", "no_such_layer"]}),
        (("q_proj", "up_proj"), {"target_modules": ["q_proj", "up_proj", "c_attn"]}),
        (("layers.1.mlp.up_proj",), {"target_modules": r".*1\.mlp\.up_proj"}),
        (("lm_head", "q_proj"), {"target_modules": ["lm_head", "q_proj"]}),
    ],
)
def test_the_layers_are_those_that_peft_converted(
    tmp_path: Path, layers: tuple[str, ...], settings: dict[str, Any]
) -> None:
    adapter = of_peft(tiny_llama(), layers, **settings)
    assert_means(adapter.write(tmp_path), tiny_llama, adapter)
    model = nn.ModuleDict({"net": tiny_llama()})  # as inside a LightningModule
    load_adapter(model, tmp_path)
    assert [path.removeprefix("net.") for path, _ in paca_layers(model)] == list(chosen(tiny_llama(), layers))


@pytest.mark.parametrize(
    ("listed", "tensors"),
    [
        (["lm_head"], ["lm_head.weight"]),
        (["norm", "lm_head"], ["model.norm.weight", "lm_head.weight"]),
        (["_head"], ["lm_head.weight"]),  # PEFT takes any end of a path
        (["embed_tokens"], ["model.embed_tokens.weight"]),
    ],
)
def test_modules_to_save_come_along(tmp_path: Path, listed: list[str], tensors: list[str]) -> None:
    adapter = of_peft(tiny_llama(), modules_to_save=listed)
    for name in tensors:
        adapter.tensors[name] = tiny_llama(seed=3).get_parameter(name).detach()
    assert_means(adapter.write(tmp_path), tiny_llama, adapter)
    model = tiny_llama()
    load_adapter(model, tmp_path)
    assert [name for name in tensors if not model.get_parameter(name).requires_grad] == []  # to be trained on


def test_a_classifier_of_peft_lists_heads_that_its_model_has_not(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny_config(num_labels=3))

    adapter = of_peft(build(), modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    adapter.tensors["score.weight"] = torch.randn(3, 64)
    assert_means(adapter.write(tmp_path), build, adapter)
    del adapter.tensors["score.weight"]
    assert_refused(build(), adapter.write(tmp_path), "'classifier' matched no module")


def test_a_plain_model_with_biases(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    adapter = of_peft(build(), ("0", "2"), target_modules=["2", "0"], task_type=None)
    assert_means(adapter.write(tmp_path), build, adapter)
    model, x = build(), torch.randn(5, 8)
    load_adapter(model, tmp_path)
    assert torch.equal(model(x), adapter.applied(build())(x))


def test_a_foreign_adapter_is_trained_on_and_saved_as_ours(tmp_path: Path) -> None:
    adapter = of_peft(tiny_llama(), layers=("q_proj",), exclude_modules=["up_proj"], layers_to_transform=[0, 1])
    model, again = tiny_llama(), tiny_llama()
    load_adapter(model, adapter.write(tmp_path / "theirs"))
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.add_(0.01)
    write_columns(model)
    save_adapter(model, tmp_path / "ours")
    load_adapter(again, tmp_path / "ours")
    assert_same(again, model)


# -- The fork's to ours


@pytest.mark.parametrize("alpha", [16, 2, 6], ids=["s=4", "s=0.5", "s=1.5"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_an_adapter_of_the_fork_means_its_columns_bitwise_in_bf16(
    tmp_path: Path, alpha: int, saved: torch.dtype
) -> None:
    adapter = of_fork(tiny_llama(), paca_alpha=alpha, dtype=saved)
    assert any(not torch.equal(t, t.sort().values) for n, t in adapter.tensors.items() if n.endswith("indices"))
    assert_means(adapter.write(tmp_path), lambda: in_bf16(tiny_llama()), adapter)
    model = in_bf16(tiny_llama())
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(adapter.applied(in_bf16(tiny_llama()))))


@pytest.mark.parametrize("alpha", [16, 6])
def test_an_adapter_of_the_fork_means_its_columns_up_to_rounding_in_fp32(tmp_path: Path, alpha: int) -> None:
    adapter = of_fork(tiny_llama(), paca_alpha=alpha)
    model = tiny_llama()
    load_adapter(model, adapter.write(tmp_path))
    expected = adapter.applied(tiny_llama())
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-6)
    for path, layer in paca_layers(model):
        # the sum C + s D rounds once, to an ulp of the larger of the two
        torch.testing.assert_close(layer.weight, expected.get_parameter(f"{path}.weight"), rtol=3e-7, atol=1e-7)


def test_an_untrained_adapter_of_the_fork_is_the_base_model(tmp_path: Path) -> None:
    model = tiny_llama()
    load_adapter(model, of_fork(tiny_llama(), moved=0.0, paca_alpha=8).write(tmp_path))
    assert all(not layer.paca_delta.any() for _, layer in paca_layers(model))
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_an_adapter_of_the_fork_loads_beside_another_one_and_into_a_converted_model(tmp_path: Path) -> None:
    adapter = of_fork(tiny_llama())
    directory = adapter.write(tmp_path / "fork")
    expected = logits(adapter.applied(tiny_llama()))
    other = of_peft(tiny_llama(), ("down_proj",), target_modules=["down_proj"]).write(tmp_path / "other")
    several = tiny_llama()
    load_adapter(several, other, "other")
    load_adapter(several, directory, "fork")
    converted, indices = tiny_llama(), adapter_layers(directory)[0]
    apply_paca(converted, saved_config(directory), indices=indices)  # as PaCAStrategy(adapter=...) does
    load_adapter(converted, directory)
    for model in (several, converted):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


# -- The commands


@pytest.mark.parametrize("make", [of_peft, of_fork])
def test_the_commands_take_foreign_adapters(tmp_path: Path, make: Callable[..., Foreign]) -> None:
    base = tiny_model_directory(tmp_path / "model")
    adapter = make(tiny_llama())
    directory = adapter.write(tmp_path / "adapter")
    expected = logits(adapter.applied(tiny_llama()))
    model = ModelWithAdapters(str(base), [str(directory)], "float32").model
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    export(str(base), str(directory), str(tmp_path / "peft"), format="peft-paca")
    again = tiny_llama()
    load_adapter(again, tmp_path / "peft")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)


def test_the_commands_say_what_a_foreign_classifier_lacks(tmp_path: Path) -> None:
    base = tiny_model_directory(tmp_path / "model")
    adapter = of_peft(tiny_llama(), task_type="SEQ_CLS", modules_to_save=["score"])
    directory = adapter.write(tmp_path / "adapter")
    with pytest.raises(PaCAError, match=r"adapter of a head \(SEQ_CLS\), without its labels. Build the model"):
        export(str(base), str(directory), str(tmp_path / "merged"))


# -- Refused, and the model is as it was

UP = "model.layers.0.mlp.up_proj"
Change = Callable[[Foreign], Any]


def setting(**values: Any) -> Change:
    return lambda adapter: adapter.settings.update(values)


def tensor(kind: str, change: Callable[[Tensor], Tensor]) -> Change:
    def apply(adapter: Foreign) -> None:
        adapter.tensors[f"{UP}.{kind}"] = change(adapter.tensors[f"{UP}.{kind}"])

    return apply


def without(kind: str) -> Change:
    return lambda adapter: adapter.tensors.pop(f"{UP}.{kind}")


def of_another_model(adapter: Foreign) -> None:
    adapter.settings["target_modules"] = ["c_attn"]
    adapter.tensors = {n.replace("q_proj", "c_attn"): t for n, t in adapter.tensors.items() if "q_proj" in n}


BOTH: dict[str, tuple[Change, str]] = {
    "an unknown setting": (setting(use_dora=True), r"adapter_config\.json: use_dora=True is not supported.*Merge"),
    "ranks by pattern": (setting(rank_pattern={"q_proj": 8}), r"rank_pattern=\{'q_proj': 8\} is not supported"),
    "no rank": (lambda a: a.settings.pop("r"), r"adapter_config\.json has no 'r'"),
    "another rank": (setting(r=3), r"'model.layers.0.*' has 4 indices and values of shape \(.*, 4\), and .* says r=3"),
    "no indices": (without("paca_indices"), rf"lacks '{UP}\.paca_indices'\. Without it nothing tells which columns"),
    "repeated indices": (tensor("paca_indices", lambda t: t.clone().fill_(3)), "not sorted and unique"),
    "indices of floats": (tensor("paca_indices", lambda t: t.float()), "torch.float32, not torch.int64"),
    "indices out of range": (tensor("paca_indices", lambda t: t + 60), "outside the 64 input columns"),
    "other targets": (setting(target_modules=["q_proj"]), rf"target_modules=\['q_proj'\] does not name '{UP}'"),
    "a missing layer": (
        lambda a: [a.tensors.pop(f"{UP}.{kind}", None) for kind in ("paca_indices", "paca_delta", "paca_w")],
        rf"'{UP}' is not in the adapter",
    ),
    "resized embeddings": (
        lambda a: a.tensors.update({"lm_head.weight": torch.zeros(400, 64)}),
        r"has 'lm_head.weight', and adapter_config\.json does not list its module.*vocabulary was resized",
    ),
    "a head that is not there": (setting(modules_to_save=["lm_head"]), "'lm_head.weight' is not in the adapter"),
    "layers of another model": (of_another_model, r"'c_attn' matched no linear layer"),
}


OF_PEFT: dict[str, tuple[Change, str]] = {
    "NaN": (tensor("paca_delta", lambda t: t * float("nan")), rf"'{UP}\.paca_delta' has NaN or Inf"),
    "absurd": (tensor("paca_delta", lambda t: t * 1e30), r"values as large as"),
    "short": (tensor("paca_delta", lambda t: t[:90]), r"has shape \(90, 4\), the model needs \(96, 4\)"),
    "narrow": (tensor("paca_delta", lambda t: t[:, :3]), r"values of shape \(96, 3\), and .* says r=4"),
    "integers": (tensor("paca_delta", lambda t: t.long()), "torch.int64, no floating-point numbers"),
    "one dimension": (tensor("paca_delta", lambda t: t[:, 0]), "no matrix and list"),
    "no delta": (without("paca_delta"), rf"lacks '{UP}\.paca_delta'"),
    "both kinds": (
        lambda a: a.tensors.update({f"{UP}.paca_w": torch.zeros(96, 4)}),
        r"both 'paca_delta' \(PEFT's\) and 'paca_w' \(the authors' fork\)",
    ),
}

OF_FORK: dict[str, tuple[Change, str]] = {
    "NaN": (tensor("paca_w", lambda t: t * float("nan")), rf"'{UP}\.paca_delta' has NaN or Inf"),
    "biases": (setting(bias="all"), "bias='all' is not supported"),
    "transposed": (setting(fan_in_fan_out=True), "fan_in_fan_out=True is not supported"),
    "replicated": (setting(layer_replication=[[0, 2], [1, 2]]), "layer_replication=.* is not supported"),
}

CASES = [
    *((of_peft, name, *case) for name, case in (BOTH | OF_PEFT).items()),
    *((of_fork, name, *case) for name, case in (BOTH | OF_FORK).items()),
]


@pytest.mark.parametrize(("make", "name", "change", "message"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, make: Callable[..., Foreign], name: str, change: Change, message: str
) -> None:
    adapter = make(tiny_llama())
    change(adapter)
    assert_refused(tiny_llama(), adapter.write(tmp_path), message)


def test_a_transposed_layer_of_the_fork_is_refused(tmp_path: Path) -> None:
    """Its columns are outputs there. A square layer has the right shape all the same."""
    path = "transformer.h.0.attn.c_proj"
    adapter = Foreign(FORK_SETTINGS | {"target_modules": ["attn.c_proj"]})
    adapter.tensors = {f"{path}.paca_w": torch.zeros(64, 4), f"{path}.paca_indices": torch.arange(4)}
    assert_refused(tiny_gpt2(), adapter.write(tmp_path), rf"'{path}' is a Conv1D, and the fork .* trains outputs")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    directory = of_peft(tiny_llama()).write(tmp_path)
    torch.save({}, directory / "adapter_model.bin")
    (directory / TENSORS).unlink()
    assert_refused(tiny_llama(), directory, "adapter_model.bin is a pickle, .*: save it with safe_serialization=True")


# -- Ours to PEFT's


def as_peft_reads(directory: Path, model: nn.Module) -> nn.Module:
    """A base model with an adapter as PEFT 0.22 loads it: its layers by PEFT's own matching, the rest as it says."""
    settings, tensors = json.loads((directory / CONFIG).read_text()), load_file(directory / TENSORS)
    assert settings["peft_type"] == "PACA"
    assert not settings.keys() - PEFT_SETTINGS.keys()
    config = SimpleNamespace(**(PEFT_SETTINGS | settings))
    if isinstance(config.target_modules, list):
        config.target_modules = set(config.target_modules)
    adapter = Foreign(vars(config))
    for path, module in model.named_modules():
        if check_target_module_exists(config, path) is True:
            assert type(module) is nn.Linear  # what PEFT's PaCA supports
            adapter.tensors[f"{path}.paca_delta"] = delta = tensors.pop(f"{PREFIX}{path}.paca_delta")
            adapter.tensors[f"{path}.paca_indices"] = indices = tensors.pop(f"{PREFIX}{path}.paca_indices")
            assert delta.shape == (module.out_features, config.r)
            assert delta.dtype == torch.float32
            assert indices.dtype == torch.int64
            assert len(indices.unique()) == config.r
        for name, value in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if path.endswith(tuple(config.modules_to_save or ["no such module"])):
                adapter.tensors[full] = tensors.pop(PREFIX + full)
                assert adapter.tensors[full].shape == value.shape
    assert not tensors  # PEFT would ignore the rest
    return adapter.applied(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"rank_pattern": {"up_proj": 2}},
        {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj": 3.0}},
        {"modules_to_save": ["lm_head", "model.norm"]},
        {"target_modules": ["lm_head", "0.self_attn.q_proj"]},
    ],
)
def test_an_export_computes_the_same_in_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(tiny_llama(), **settings)
    export_peft_paca(model, tmp_path / "peft")
    found = as_peft_reads(tmp_path / "peft", tiny_llama())
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-6)
    again = tiny_llama()
    load_adapter(again, tmp_path / "peft")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_one_rank_and_one_scaling_is_exported_bitwise(tmp_path: Path) -> None:
    model = trained(in_bf16(tiny_llama()))
    export_peft_paca(model, tmp_path)
    assert torch.equal(logits(as_peft_reads(tmp_path, in_bf16(tiny_llama()))), logits(model))


def test_a_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(tiny_config(num_labels=3))
    model = trained(copy.deepcopy(base), modules_to_save=["score"])
    export_peft_paca(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    torch.testing.assert_close(logits(as_peft_reads(tmp_path, base)), logits(model), rtol=1e-5, atol=1e-6)


def test_a_quantized_run_says_by_how_much_the_bases_differ(tmp_path: Path) -> None:
    model = trained(tiny_llama(), quantize="nf4")
    with pytest.warns(UserWarning, match=r"trained on an NF4 base.*\d\.\d%"):
        export_peft_paca(model, tmp_path)
    dense = trained(tiny_llama())
    torch.testing.assert_close(logits(as_peft_reads(tmp_path, tiny_llama())), logits(dense), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (tiny_gpt2, {"target_modules": ["c_attn"]}, "nn.Linear alone, and 'transformer.h.0.attn.c_attn' is a Conv1D"),
        (tiny_llama, {"train_norms": True}, "A PaCA adapter cannot hold 'model.*norm.weight'"),
        (
            lambda: tiny_moe("mixtral"),
            {"target_modules": "all-linear"},
            "nn.Linear alone, and .* are stacked experts",
        ),
        (
            lambda: tiny_llama(intermediate_size=32),
            {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 40}},
            r"one rank for all layers, here 40, and 'model.layers.0.mlp.down_proj' has 32 input columns",
        ),
    ],
)
def test_what_pefts_paca_cannot_hold_is_refused(
    tmp_path: Path, build: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    model = trained(build(), **settings)
    with pytest.raises(PaCAError, match=message):
        export_peft_paca(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_our_own_file_in_the_directory_would_contradict(tmp_path: Path) -> None:
    model = trained(tiny_llama())
    save_adapter(model, tmp_path)
    with pytest.raises(PaCAError, match="holds an adapter that save_adapter wrote"):
        export_peft_paca(model, tmp_path)
