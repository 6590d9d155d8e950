"""Several adapters on one base: each switch is a freshly loaded model, bitwise, and the base comes back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    attach,
    delete_adapter,
    disable_paca,
    export_merged,
    load_adapter,
    merge,
    merge_adapters,
    paca_layers,
    save_adapter,
    set_adapter,
    unload,
)
from paca_lightning.conversion.linear4bit_base import quantize_base
from paca_lightning.conversion.named_adapters import hold_quantized_base
from paca_lightning.layers.nf4_plain import NF4Linear
from tests.moe import tiny_moe
from tests.plain_training import move_trained
from tests.tiny import tiny_llama

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "alpha": 6.0, "target_modules": ["q_proj", "up_proj"]},
    "b": {"r": 8, "seed": 3, "train_norms": True, "rank_pattern": {"down_proj": 2}},
    "c": {"r": 4, "seed": 1, "target_modules": ["up_proj"], "modules_to_save": ["lm_head", "model.norm"]},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "fp32": tiny_llama,
    "bf16": lambda: tiny_llama().to(torch.bfloat16),
    "experts": lambda: tiny_moe("mixtral"),
}
EXPERTS = SETTINGS | {"a": {"r": 4, "alpha": 6.0, "target_modules": ["q_proj", "experts.gate_up_proj"]}}
EXPERTS["b"] = {"r": 8, "seed": 3, "train_norms": True}
EXPERTS["c"] = {"r": 3, "target_modules": ["experts.gate_up_proj"], "modules_to_save": ["lm_head"]}


def trained(model: nn.Module, seed: int, settings: dict[str, Any]) -> nn.Module:
    """A model converted with some settings, and everything that is trained moved at random."""
    apply_paca(model, PaCAConfig(**settings))
    move_trained(model, seed=seed, scale=0.1)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Three adapters of each model."""
    found: dict[str, dict[str, Path]] = {}
    for kind, build in MODELS.items():
        for number, (name, settings) in enumerate((EXPERTS if kind == "experts" else SETTINGS).items()):
            directory = tmp_path_factory.mktemp(kind) / name
            save_adapter(trained(build(), number, settings), directory)
            found.setdefault(kind, {})[name] = directory
    return found


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that tells two models apart: tensors and what requires a gradient."""
    flags = {f"{name} requires": parameter.requires_grad for name, parameter in model.named_parameters()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | flags


def assert_same(found: nn.Module, expected: dict[str, Any]) -> None:
    here = state(found)
    assert here.keys() == expected.keys()
    differ = [
        n for n, v in here.items() if not (torch.equal(v, expected[n]) if isinstance(v, Tensor) else v == expected[n])
    ]
    assert differ == []


def with_all(kind: str, directories: dict[str, dict[str, Path]]) -> nn.Module:
    model = MODELS[kind]()
    for name, directory in directories[kind].items():
        load_adapter(model, directory, name=name)
    return model


@pytest.fixture
def model(directories: dict[str, dict[str, Path]]) -> nn.Module:
    return with_all("fp32", directories)


@pytest.fixture(scope="module")
def expected(directories: dict[str, dict[str, Path]]) -> dict[str, dict[str | None, dict[str, Any]]]:
    """What freshly loaded models are, and base models."""
    found: dict[str, dict[str | None, dict[str, Any]]] = {}
    for kind, build in MODELS.items():
        found[kind] = {None: state(build())}
        for name, directory in directories[kind].items():
            fresh = build()
            load_adapter(fresh, directory)
            found[kind][name] = state(fresh)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_each_switch_gives_a_freshly_loaded_model(
    kind: str, directories: dict[str, dict[str, Path]], expected: dict[str, dict[str | None, dict[str, Any]]]
) -> None:
    model = with_all(kind, directories)
    assert_same(model, expected[kind]["c"])  # the last one is active
    for name in ("a", "b", "a", None, "c", "b", "c", "a", None, "b", None):
        set_adapter(model, name)
        assert_same(model, expected[kind][name])
        set_adapter(model, name)  # again: nothing to do
        assert_same(model, expected[kind][name])
    assert list(paca_layers(model)) == []


def test_a_wrapper_and_a_copy_switch_alike(
    model: nn.Module, expected: dict[str, dict[str | None, dict[str, Any]]]
) -> None:
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    set_adapter(nn.ModuleDict({"inner": copied}), "a")
    set_adapter(pickled, "b")
    assert_same(copied, expected["fp32"]["a"])
    assert_same(pickled, expected["fp32"]["b"])
    assert_same(model, expected["fp32"]["c"])


def test_a_model_that_was_cast_meanwhile(model: nn.Module, directories: dict[str, dict[str, Path]]) -> None:
    set_adapter(model, "a")
    model.to(torch.bfloat16)
    for name in ("c", "a", None, "a"):
        set_adapter(model, name)
    plain = tiny_llama().to(torch.bfloat16)
    with torch.no_grad():
        for path, layer in paca_layers(model):
            base = plain.get_parameter(f"{path}.weight")
            columns = layer.paca_base_columns + layer.scaling * layer.paca_delta  # fp32, as they were before the cast
            base[:, layer.paca_indices] = columns.to(torch.bfloat16)
            assert torch.equal(layer.weight, base)
    set_adapter(model, None)
    assert_same(model, state(tiny_llama().to(torch.bfloat16)))


def test_the_active_adapter_trains_and_the_others_stay(
    model: nn.Module, expected: dict[str, dict[str | None, dict[str, Any]]], tmp_path: Path
) -> None:
    set_adapter(model, "a")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    handle = attach(optimizer, model)
    ids = torch.arange(16).reshape(2, 8)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    set_adapter(model, "b")
    assert_same(model, expected["fp32"]["b"])
    set_adapter(model, "a")
    step()  # the same parameters: optimizer and write-back go on
    handle.remove()
    after = state(model)
    assert not torch.equal(
        after["model.layers.0.mlp.up_proj.weight"], expected["fp32"]["a"]["model.layers.0.mlp.up_proj.weight"]
    )
    save_adapter(model, tmp_path)
    for name in ("c", None, "b"):
        set_adapter(model, name)
        assert_same(model, expected["fp32"][name])
    set_adapter(model, "a")
    assert_same(model, after)
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path)
    assert_same(fresh, after)


def test_an_adapter_without_a_name_is_the_default(
    directories: dict[str, dict[str, Path]], expected: dict[str, dict[str | None, dict[str, Any]]]
) -> None:
    model = trained(tiny_llama(), 7, {"r": 2})
    own = state(model)
    load_adapter(model, directories["fp32"]["a"], name="a")
    assert_same(model, expected["fp32"]["a"])
    set_adapter(model, "default")
    assert_same(model, own)
    set_adapter(model, None)
    apply_paca(model, PaCAConfig(r=3))  # a new one, while "default" waits
    with pytest.raises(PaCAError, match="an adapter without a name, which would be 'default', and there is one"):
        set_adapter(model, "a")
    delete_adapter(model, "default")


def test_deleting(model: nn.Module, expected: dict[str, dict[str | None, dict[str, Any]]]) -> None:
    delete_adapter(model, "a")
    assert_same(model, expected["fp32"]["c"])
    delete_adapter(model, "c")
    assert_same(model, expected["fp32"][None])
    set_adapter(model, "b")
    assert_same(model, expected["fp32"]["b"])


def test_going_back_with_a_waiting_adapter(
    model: nn.Module, expected: dict[str, dict[str | None, dict[str, Any]]]
) -> None:
    with disable_paca(model), pytest.raises(PaCAError, match="set_adapter does not work inside disable_paca"):
        set_adapter(model, "a")
    assert_same(model, expected["fp32"]["c"])
    unload(model)  # forgets the active one
    with pytest.raises(PaCAError, match=r"no adapter 'c'.* Loaded: 'a', 'b'\."):
        set_adapter(model, "c")
    set_adapter(model, "a")
    merge(model)  # the others were trained on a base model that is gone
    with pytest.raises(PaCAError, match="No adapter was loaded by name"):
        set_adapter(model, "b")


def test_another_base_model_meanwhile_is_refused(
    model: nn.Module, expected: dict[str, dict[str | None, dict[str, Any]]]
) -> None:
    set_adapter(model, None)
    model.load_state_dict(tiny_llama(1).state_dict())
    with pytest.raises(
        PaCAError, match=r"'model.layers.0.self_attn.q_proj' has changed since the adapter was put aside"
    ):
        set_adapter(model, "b")
    assert_same(model, state(tiny_llama(1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: set_adapter(m, "aa"), r"There is no adapter 'aa'. Did you mean 'a'\? Loaded: 'a', 'b', 'c'\."),
        (lambda m, d: delete_adapter(m, "x"), "There is no adapter 'x'"),
        (lambda m, d: set_adapter(tiny_llama(), "a"), "No adapter was loaded by name into this LlamaForCausalLM"),
        (lambda m, d: set_adapter(m.model, "a"), "No adapter was loaded by name into this LlamaModel"),
        (lambda m, d: load_adapter(m, d["a"], name="b"), "There is an adapter 'b' already"),
        (lambda m, d: load_adapter(m, d["a"], name="c"), "There is an adapter 'c' already"),
        (lambda m, d: load_adapter(m, d["a"], name=""), "The name of an adapter is empty"),
        (lambda m, d: load_adapter(m, d["nf4"], name="d"), "cannot each start from the unquantized weight"),
        (lambda m, d: load_adapter(m, d["other"], name="d"), "trained on another base model"),
        (lambda m, d: load_adapter(m, d["a"].parent, name="d"), "adapter_config.json is missing"),
        (lambda m, d: merge_adapters(m, {"a": 1.0, "d": 1.0}, "sum"), "There is no adapter 'd'"),
        (lambda m, d: merge_adapters(m, {"a": float("nan")}, "sum"), "The weight of 'a' is nan"),
        (lambda m, d: merge_adapters(m, {"a": 1.0}, "b"), "There is an adapter 'b' already"),
        (lambda m, d: merge_adapters(m, {}, "sum"), "There is nothing to sum"),
    ],
)
def test_mistakes_leave_everything_as_it_was(
    call: Callable[[Any, dict[str, Path]], None],
    message: str,
    model: nn.Module,
    directories: dict[str, dict[str, Path]],
    expected: dict[str, dict[str | None, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    save_adapter(trained(tiny_llama(1), 0, {"r": 2}), tmp_path / "other")
    save_adapter(trained(tiny_llama(), 0, {"r": 2, "quantize": "nf4"}), tmp_path / "nf4")
    with pytest.raises(PaCAError, match=message):
        call(model, directories["fp32"] | {"other": tmp_path / "other", "nf4": tmp_path / "nf4"})
    assert_same(model, expected["fp32"]["c"])
    for name in ("a", "b"):
        set_adapter(model, name)
        assert_same(model, expected["fp32"][name])


def test_columns_that_started_unquantized_take_no_names(directories: dict[str, dict[str, Path]]) -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=2, quantize="nf4"))
    with pytest.raises(PaCAError, match=r"unquantized weight \('model.layers.0.self_attn.q_proj' of the model\)"):
        load_adapter(model, directories["fp32"]["a"], name="a")


# -- NF4 bases


def nf4_llama() -> nn.Module:
    """A tiny Llama that bitsandbytes has quantized."""
    model = tiny_llama(intermediate_size=128).requires_grad_(False)
    quantize_base(model)
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16).reshape(2, 8)).logits


def test_adapters_on_an_nf4_base(tmp_path: Path) -> None:
    model, plain = nf4_llama(), nf4_llama()
    by_bitsandbytes = outputs(nf4_llama())
    hold_quantized_base(plain, PaCAConfig())
    expected: dict[str | None, Tensor] = {None: outputs(plain)}
    assert torch.allclose(expected[None], by_bitsandbytes, atol=0.02)  # its kernel for CPUs computes in bf16
    for number, (name, settings) in enumerate(SETTINGS.items()):
        save_adapter(trained(nf4_llama(), number, settings), tmp_path / name)
        fresh = nf4_llama()
        hold_quantized_base(fresh, PaCAConfig())
        load_adapter(fresh, tmp_path / name)
        expected[name] = outputs(fresh)
        load_adapter(model, tmp_path / name, name=name)
    for name in ("a", "b", None, "c", "a", None, "b"):
        set_adapter(model, name)
        assert torch.equal(outputs(model), expected[name])
    set_adapter(model, None)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    model.to(torch.bfloat16).to(torch.float32)  # scales keep their dtype
    hidden = torch.randn(2, 64, requires_grad=True)
    layer = model.model.layers[0].mlp.up_proj
    layer(hidden).sum().backward()
    assert torch.allclose(hidden.grad, layer.weight.sum(0).expand(2, -1), atol=1e-4)
    set_adapter(model, "b")
    merge_adapters(model, {"a": 0.5, "b": 0.5}, "mean")
    mean = outputs(model)
    export_merged(model, tmp_path / "merged")
    assert torch.allclose(outputs(type(model).from_pretrained(tmp_path / "merged").float()), mean, atol=0.05)
    assert torch.allclose(outputs(merge(model)), mean, atol=1e-5)
    assert not any(isinstance(module, NF4Linear) for path, module in model.named_modules() if "lm_head" in path)


def test_an_adapter_that_was_trained_on_an_nf4_base_before(tmp_path: Path) -> None:
    save_adapter(trained(nf4_llama(), 1, {"r": 4, "seed": 3}), tmp_path)
    model = trained(nf4_llama(), 0, {"r": 2})
    before = outputs(model)
    load_adapter(model, tmp_path, name="other")
    fresh = nf4_llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(outputs(model), outputs(fresh))
    set_adapter(model, "default")
    assert torch.equal(outputs(model), before)


# -- Weighted sums


def dense(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model as plain parameters, in fp64."""
    return {n: t.detach().double() for n, t in model.named_parameters() if "paca_" not in n}


@pytest.mark.parametrize("kind", ["fp32", "experts"])
@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 1.0, "b": -0.25, "c": 2.0}, {"c": 0.5}])
def test_a_sum_is_the_sum_of_dense_updates(
    kind: str,
    weights: dict[str, float],
    directories: dict[str, dict[str, Path]],
    expected: dict[str, dict[str | None, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    model = with_all(kind, directories)
    set_adapter(model, None)
    base = dense(model)
    total = {name: value.clone() for name, value in base.items()}
    for name, weight in weights.items():
        set_adapter(model, name)
        for each, value in dense(model).items():
            total[each] += weight * (value - base[each])
    merge_adapters(model, weights, "sum")
    found = dense(model)
    assert found.keys() == total.keys()
    for each, value in total.items():
        torch.testing.assert_close(found[each], value, rtol=0, atol=2e-6)
    assert {layer.scaling for _, layer in paca_layers(model)} == {1.0}
    summed = state(model)
    save_adapter(model, tmp_path)  # an adapter as any other
    fresh = MODELS[kind]()
    load_adapter(fresh, tmp_path)
    assert_same(fresh, summed)
    for name in ("a", "sum", None, "b"):
        set_adapter(model, name)
        assert_same(model, summed if name == "sum" else expected[kind][name])


def test_columns_that_agree_keep_their_number(tmp_path: Path) -> None:
    model = tiny_llama()
    for number, name in enumerate("ab"):
        save_adapter(trained(tiny_llama(), number, {"r": 4}), tmp_path / name)
        load_adapter(model, tmp_path / name, name=name)
    merge_adapters(model, {"a": 0.5, "b": 0.5}, "mean")
    assert {layer.r for _, layer in paca_layers(model)} == {4}
    merge_adapters(model, {"mean": 2.0, "a": -1.0}, "b again")
    again = dense(model)
    set_adapter(model, "b")
    for name, value in dense(model).items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6)
    set_adapter(model, None)
    merge_adapters(model, {"a": 1.0}, "a again")


def test_running_statistics_are_summed_and_counts_must_agree(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    model = build()
    for name, steps in (("a", 1), ("b", 1), ("c", 2)):
        fresh = build()
        apply_paca(fresh, PaCAConfig(r=2))
        for step in range(steps):
            fresh(torch.full((4, 8), float(step + ord(name))).sin() * torch.arange(8))
        save_adapter(fresh, tmp_path / name)
        load_adapter(model, tmp_path / name, name=name)
    means = {}
    for name in "ab":
        set_adapter(model, name)
        means[name] = model[1].running_mean.clone()
    merge_adapters(model, {"a": 0.5, "b": 0.5}, "mean")
    assert torch.allclose(model[1].running_mean, (means["a"] + means["b"]) / 2)
    assert int(model[1].num_batches_tracked) == 1
    with pytest.raises(PaCAError, match=r"'1.num_batches_tracked' holds other counts"):
        merge_adapters(model, {"a": 0.5, "c": 0.5}, "other")
    assert torch.allclose(model[1].running_mean, (means["a"] + means["b"]) / 2)
