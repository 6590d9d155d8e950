"""Conversion in place and back: nothing is lost, nothing is done twice, and the base weight returns bitwise."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    PaCALinear,
    apply_paca,
    attach,
    disable_paca,
    merge,
    paca_layers,
    save_adapter,
    unload,
    write_columns,
)
from paca_lightning.conversion.saved_modules import saved_modules
from paca_lightning.conversion.state import config_of
from tests.peak_memory import peak_bytes
from tests.tiny import tiny_llama

CONFIG = PaCAConfig(r=4, alpha=6.0)  # scaling 1.5
IDS = torch.randint(0, 384, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: LlamaForCausalLM, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = attach(optimizer, model)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "paca" not in name}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


# -- There


def test_a_converted_model_computes_bitwise_the_same_and_trains_only_deltas() -> None:
    model, base = tiny_llama().eval(), tiny_llama().eval()
    report = apply_paca(model, CONFIG)
    assert torch.equal(logits(model), logits(base))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{path}.paca_delta" for path, _ in paca_layers(model)}

    outputs = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)  # of both blocks' projections
    assert report.trainable_parameters == 4 * outputs
    assert report.delta_bytes == 4 * 4 * outputs
    assert report.optimizer_bytes == 2 * 4 * 4 * outputs
    assert report.total_parameters == sum(p.numel() for p in base.parameters()) + 4 * outputs


def test_the_report_reads_as_a_table() -> None:
    report = apply_paca(tiny_llama(), CONFIG)
    report.learning_rate = 1e-3
    text = str(report)
    rows = {line.split()[1]: line for line in text.splitlines() if "->" in line}
    assert set(rows) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [cell.strip() for cell in rows["down_proj"].split("│")[1:-1]] == [
        "down_proj",
        "2",
        "96 -> 64",
        "4",
        "1.5",
        "512",
    ]
    assert "Trainable: 3,584 of 114,496 parameters (3.13%); deltas 14.0 KiB, Adam's state 28.0 KiB." in text
    assert "Adam's step on a column, scaling * lr: 0.0015." in text
    assert "Left alone: lm_head: output head." in text


def test_training_lowers_the_loss_and_moves_only_the_selected_columns() -> None:
    model, base = tiny_llama(), tiny_llama()
    apply_paca(model, CONFIG)
    before = model(input_ids=IDS, labels=IDS).loss.item()
    train(model)
    assert model(input_ids=IDS, labels=IDS).loss.item() < before
    for path, layer in paca_layers(model):
        moved = (layer.weight != base.get_parameter(f"{path}.weight")).any(dim=0).nonzero().flatten()
        assert set(moved.tolist()) <= set(layer.paca_indices.tolist())
        assert len(moved) > 0


def test_indices_depend_on_the_seed_and_the_path_alone() -> None:
    def drawn(model: nn.Module, **settings: Any) -> dict[str, list[int]]:
        apply_paca(model, PaCAConfig(r=4, **settings))
        return {path: layer.paca_indices.tolist() for path, layer in paca_layers(model)}

    class Wrapper(nn.Module):  # as a LightningModule holds one
        def __init__(self) -> None:
            super().__init__()
            self.model, self.teacher_head = tiny_llama(seed=5), nn.Linear(8, 8)

    expected = drawn(tiny_llama())
    torch.manual_seed(99)
    assert drawn(tiny_llama(seed=1)) == expected  # other weights, another global state
    wrapped = drawn(Wrapper(), exclude_modules=["teacher_head"])
    assert wrapped == {f"model.{path}": indices for path, indices in expected.items()}
    assert drawn(tiny_llama(), target_modules=["down_proj"]).items() <= expected.items()
    assert drawn(tiny_llama(), seed=1) != expected
    assert len({tuple(indices) for indices in expected.values()}) > 10  # layers differ


def test_given_indices_are_taken_and_the_rest_drawn() -> None:
    model, drawn = tiny_llama(), tiny_llama()
    path = "model.layers.1.mlp.up_proj"
    apply_paca(model, CONFIG, indices={path: torch.tensor([0, 5, 6, 63])})
    apply_paca(drawn, CONFIG)
    for (name, layer), (_, other) in zip(paca_layers(model), paca_layers(drawn), strict=True):
        expected = [0, 5, 6, 63] if name == path else other.paca_indices.tolist()
        assert layer.paca_indices.tolist() == expected


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"mlp": torch.arange(4)}, r"indices are given for \['mlp'\], which are not among the target layers"),
        (
            {"model.layers.0.mlp.up_proj": torch.tensor([1, 1, 2, 3])},
            "'model.layers.0.mlp.up_proj' are not sorted and unique",
        ),
        (
            {"model.layers.0.mlp.up_proj": torch.tensor([1, 2, 3, 64])},
            "reach from 1 to 64, outside the 64 input columns",
        ),
    ],
)
def test_given_indices_that_do_not_fit_are_refused(indices: dict[str, Tensor], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(PaCAError, match=message):
        apply_paca(model, CONFIG, indices=indices)
    assert list(paca_layers(model)) == []


# -- Twice


def test_converting_again_changes_nothing() -> None:
    model = tiny_llama()
    first = apply_paca(model, CONFIG)
    train(model)
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    second = apply_paca(model, CONFIG)
    assert second == first
    assert_same(model.state_dict(), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_converting_again_takes_late_targets_along() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_paca(model, PaCAConfig(r=2))
    first = model[0].paca_indices.clone()
    model.append(nn.Linear(8, 8))
    assert [layer.path for layer in apply_paca(model, PaCAConfig(r=2)).layers] == ["0", "1"]
    assert torch.equal(model[0].paca_indices, first)
    assert not model[1].weight.requires_grad


def test_another_configuration_is_refused() -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    with pytest.raises(PaCAError, match=r"converted before with another configuration \(different: \['r', 'seed'\]\)"):
        apply_paca(model, PaCAConfig(r=8, alpha=6.0, seed=1))
    unload(model)
    apply_paca(model, PaCAConfig(r=8, alpha=6.0, seed=1))
    assert config_of(model) == PaCAConfig(r=8, alpha=6.0, seed=1)


def test_other_indices_for_a_converted_layer_are_refused() -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    path, layer = next(paca_layers(model))
    apply_paca(model, CONFIG, indices={path: layer.paca_indices})
    with pytest.raises(PaCAError, match=f"indices: '{path}' was converted before and trains other columns"):
        apply_paca(model, CONFIG, indices={path: (layer.paca_indices + 1) % 64})


class Sharded(nn.Parameter):
    """Looks like a DTensor."""

    def to_local(self) -> Tensor:
        return self.data


def test_a_sharded_target_is_refused_but_not_a_converted_model_that_was_sharded_since() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    apply_paca(model, PaCAConfig(r=2))
    model[0].weight = Sharded(model[0].weight.data)
    apply_paca(model, PaCAConfig(r=2))  # as a Trainer does that fits and then tests
    model.append(nn.Linear(8, 8))
    model[2].weight = Sharded(model[2].weight.data)
    with pytest.raises(PaCAError, match=r"'2' is sharded already. Call apply_paca before fully_shard"):
        apply_paca(model, PaCAConfig(r=2))


# -- And back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_model_comes_back_bitwise(dtype: torch.dtype) -> None:
    model, base = tiny_llama().to(dtype).eval(), tiny_llama().to(dtype).eval()
    apply_paca(model, CONFIG)
    train(model)
    tuned, trained = logits(model), weights(model)
    assert not torch.equal(tuned, logits(base))

    with disable_paca(model):
        assert torch.equal(logits(model), logits(base))
        with disable_paca(model):
            assert_same(weights(model), weights(base))
        assert_same(weights(model), weights(base))
        write_columns(model)  # a callback may: there is nothing to write
        assert_same(weights(model), weights(base))
    assert_same(weights(model), trained)

    with pytest.raises(RuntimeError, match="inside"), disable_paca(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), tuned)

    merged, unloaded = merge(copy.deepcopy(model)), unload(model)
    assert_same(merged.state_dict(), trained)
    assert torch.equal(logits(merged), tuned)
    assert_same(unloaded.state_dict(), weights(base))
    for plain in (merged, unloaded):
        assert not any(isinstance(module, PaCALinear) for module in plain.modules())
        assert repr(plain) == repr(base)
        assert {name for name, _ in plain.named_parameters()} == {name for name, _ in base.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_reloads_the_trained_weight_bitwise(dtype: torch.dtype, tmp_path: Any) -> None:
    model = tiny_llama().to(dtype)
    apply_paca(model, CONFIG)
    train(model)
    trained = weights(model)
    merge(model).save_pretrained(tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict(), trained)


def test_merging_inside_disable_paca_is_refused() -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    with disable_paca(model), pytest.raises(PaCAError, match=r"(merge|unload) does not work inside disable_paca"):
        merge(model)


# -- Modules trained whole


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(input))


def trained_with_head() -> WithHead:
    model = WithHead()
    apply_paca(model, PaCAConfig(r=2, modules_to_save=["head"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(optimizer, model)
    model(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    return model


def test_a_module_to_save_is_trained_whole_and_its_linears_left_alone() -> None:
    model = WithHead()
    report = apply_paca(model, PaCAConfig(r=2, modules_to_save=["head"]))
    assert [path for path, _ in paca_layers(model)] == ["body"]
    assert report.skipped == {"head.0": "trained whole (modules_to_save)"}
    assert report.saved == ["head"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["body.paca_delta", "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
    assert report.trainable_parameters == 8 * 2 + 4 * 8 + 4 + 4 + 4
    assert [path for path, _ in saved_modules(model)] == ["head"]


def test_a_module_to_save_goes_back_with_its_running_statistics() -> None:
    base = WithHead().state_dict()
    model = trained_with_head()
    trained = weights(model)
    assert all(not torch.equal(trained[name], base[name]) for name in ("head.0.weight", "head.1.running_mean"))
    with disable_paca(model):
        assert_same(weights(model), base)
    assert_same(weights(model), trained)
    assert_same(merge(copy.deepcopy(model)).state_dict(), trained)
    assert_same(unload(model).state_dict(), base)
    assert saved_modules(model) == []


# -- Optimizers


def test_an_optimizer_built_before_the_conversion_is_refused() -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_paca(model, CONFIG)
    with pytest.raises(PaCAError, match=r"SGD has none of the model's paca_delta parameters.*Build it after"):
        attach(optimizer, model)


def test_each_optimizer_writes_back_its_own_layers_until_its_handle_is_removed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_paca(model, PaCAConfig(r=2))
    first = torch.optim.SGD([model[0].paca_delta], lr=1.0)
    handle = attach(first, model)
    start = weights(model)
    model(torch.randn(3, 8)).sum().backward()
    first.step()
    assert not torch.equal(model[0].weight, start["0.weight"])
    assert torch.equal(model[1].weight, start["1.weight"])
    handle.remove()
    written = model[0].weight.clone()
    first.step()
    assert torch.equal(model[0].weight, written)
    write_columns(model)
    assert not torch.equal(model[0].weight, written)


# -- Cost


class CountOperators(TorchDispatchMode):
    """Counts the operators that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_conversion_copies_no_weight() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    addresses = [layer.weight.data_ptr() for layer in model]
    weights = sum(layer.weight.nbytes for layer in model)
    assert peak_bytes(lambda: apply_paca(model, PaCAConfig(r=8))) < 0.1 * weights
    assert [layer.weight.data_ptr() for layer in model] == addresses
    extra = sum(p.nbytes for name, p in model.state_dict().items() if "paca" in name)
    # Of each weight of 1024 columns in 2 bytes: 8 in fp32 and 8 in bf16 are added, and 8 indices.
    assert extra == 4 * (1024 * 8 * (4 + 2) + 8 * 8)


def test_conversion_asks_for_a_few_operators_a_layer() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(60)))  # a billion parameters
    with CountOperators() as operators:
        apply_paca(model, PaCAConfig(r=16))
    assert operators.count <= 10 * len(model)


def test_forward_before_disable_paca_and_backward_after_it() -> None:
    """Preference tuning takes the base model as its reference between the two."""
    model, inputs = tiny_llama(), torch.arange(12)[None]
    apply_paca(model, PaCAConfig(r=4))
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.normal_()
    write_columns(model)
    model(input_ids=inputs, labels=inputs).loss.backward()
    expected = {path: layer.paca_delta.grad.clone() for path, layer in paca_layers(model)}
    model.zero_grad()
    policy = model(input_ids=inputs, labels=inputs).loss
    with disable_paca(model), torch.no_grad():
        reference = model(input_ids=inputs, labels=inputs).loss
    (policy - reference).backward()
    for path, layer in paca_layers(model):
        assert torch.equal(layer.paca_delta.grad, expected[path])

    policy = model(input_ids=inputs, labels=inputs).loss
    with disable_paca(model), torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        policy.backward()


def test_modules_to_save_on_meta_have_no_original_to_go_back_to() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4, modules_to_save=["norm"]))
    with pytest.raises(PaCAError, match=r"'model\.norm' is trained whole and was converted on the meta device"):
        unload(model)


def test_columns_that_were_never_chosen_are_not_trained() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4, selection="weight_norm"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(PaCAError, match="were to be chosen by its weight"):
        attach(optimizer, model)


def test_what_is_thawed_after_the_conversion_stays_so_at_the_next_one() -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    model.model.norm.weight.requires_grad_(True)
    apply_paca(model, PaCAConfig(r=4))
    assert model.model.norm.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_what_comes_later_is_frozen_by_the_next_conversion() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.norm = tiny_llama(), nn.LayerNorm(4)

    around = Around()
    apply_paca(around.model, PaCAConfig(r=4))
    around.model.model.norm.weight.requires_grad_(True)
    apply_paca(around, PaCAConfig(r=4))
    assert not around.norm.weight.requires_grad
    assert around.model.model.norm.weight.requires_grad
    merge(around)
    apply_paca(around, PaCAConfig(r=4))
    assert not around.model.model.norm.weight.requires_grad  # an ordinary model again, converted anew


def test_two_layers_of_one_name_in_an_adapter_are_refused(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(4, 4)})})])

    model = Around().inner.model
    outer = nn.Module()
    outer.model, outer.layers = model, Around().layers
    apply_paca(outer, PaCAConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(PaCAError, match=r"Two layers are called 'layers\.0\.mlp\.up_proj'"):
        save_adapter(outer, tmp_path / "adapter")


def test_weights_in_8_bits_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    report = apply_paca(model, PaCAConfig(r=2))
    assert report.skipped == {"1": "its weight is torch.float8_e4m3fn"}
