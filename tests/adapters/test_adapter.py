"""An adapter directory has PEFT's layout, comes back bitwise, and is refused with a reason when it is damaged."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, load_adapter, paca_layers, save_adapter, write_columns
from paca_lightning.adapters.files import PREFIX, sealed
from paca_lightning.adapters.fingerprint import sample_columns
from paca_lightning.adapters.saved import saved_config
from paca_lightning.core.checksums import tensor_checksum
from tests.tiny import tiny_llama

UP = "model.layers.0.mlp.up_proj"


def trained(model: nn.Module, seed: int = 1, **settings: Any) -> nn.Module:
    """A model converted with some settings, and everything that is trained moved at random."""
    apply_paca(model, PaCAConfig(**({"r": 4, "alpha": 6.0, "target_modules": ["q_proj", "up_proj"]} | settings)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_columns(model)
    return model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(trained(tiny_llama()), tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    assert [name for name, value in found.state_dict().items() if not torch.equal(value, theirs[name])] == []


# -- The layout


def test_the_directory_is_in_pefts_layout(adapter: Path) -> None:
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "paca_lightning.json",
    }
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "base_model.model.model.layers.0.self_attn.q_proj.paca_delta": ((64, 4), torch.float32),
        "base_model.model.model.layers.0.self_attn.q_proj.paca_indices": ((4,), torch.int64),
        "base_model.model.model.layers.0.mlp.up_proj.paca_delta": ((96, 4), torch.float32),
        "base_model.model.model.layers.0.mlp.up_proj.paca_indices": ((4,), torch.int64),
        "base_model.model.model.layers.1.self_attn.q_proj.paca_delta": ((64, 4), torch.float32),
        "base_model.model.model.layers.1.self_attn.q_proj.paca_indices": ((4,), torch.int64),
        "base_model.model.model.layers.1.mlp.up_proj.paca_delta": ((96, 4), torch.float32),
        "base_model.model.model.layers.1.mlp.up_proj.paca_indices": ((4,), torch.int64),
    }
    assert json.loads((adapter / "adapter_config.json").read_text()) == {
        "peft_type": "PACA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 4,
        "paca_alpha": 6.0,
        "random_seed": 0,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": None,
        "modules_to_save": None,
        "inference_mode": True,
    }


def test_a_sharper_eye_finds_the_delta_in_the_weights(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    model, base = trained(tiny_llama()), tiny_llama()
    delta, indices = (tensors[f"base_model.model.{UP}.{name}"] for name in ("paca_delta", "paca_indices"))
    moved = (model.get_parameter(f"{UP}.weight") - base.get_parameter(f"{UP}.weight"))[:, indices]
    assert torch.allclose(moved, 1.5 * delta, atol=1e-6)


# -- There and back


def test_a_fresh_base_model_becomes_the_trained_one_bitwise(adapter: Path) -> None:
    model = tiny_llama()
    report = load_adapter(model, adapter)
    assert_same(model, trained(tiny_llama()))
    assert [layer.path.rpartition(".")[2] for layer in report.layers] == ["q_proj", "up_proj"] * 2
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [f"{path}.paca_delta" for path, _ in paca_layers(model)]  # it can be trained on


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
        {"selection": "weight_norm"},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "seed": 5},
        {"modules_to_save": ["lm_head", "model.norm"]},
    ],
)
def test_all_settings_come_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected, model = trained(tiny_llama(), **settings), tiny_llama()
    save_adapter(expected, tmp_path)
    load_adapter(model, tmp_path)
    assert_same(model, expected)


def test_columns_chosen_by_data_come_back_without_the_data(tmp_path: Path) -> None:
    ids = torch.arange(16).reshape(2, 8)
    expected, model = tiny_llama(), tiny_llama()
    config = PaCAConfig(r=4, selection="activation_norm", column_steps="equal")  # an adapter does not hold steps
    apply_paca(expected, config, calibration=[{"input_ids": ids}])
    save_adapter(expected, tmp_path)
    load_adapter(model, tmp_path)
    assert_same(model, expected)


def test_a_converted_model_takes_the_adapters_columns_in_place_of_its_own(adapter: Path) -> None:
    config = PaCAConfig(r=4, alpha=6.0, target_modules=["q_proj", "up_proj"], seed=77)
    model = tiny_llama()
    apply_paca(model, config)
    load_adapter(model, adapter)
    assert_same(model, trained(tiny_llama()))


def test_a_wrapper_and_the_bare_model_share_adapters(adapter: Path, tmp_path: Path) -> None:
    wrapper = nn.Module()
    wrapper.net = tiny_llama()
    load_adapter(wrapper, adapter)
    assert_same(wrapper.net, trained(tiny_llama()))
    save_adapter(wrapper, tmp_path / "again")
    again, once = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "again", adapter))
    assert again.keys() == once.keys()


def test_the_same_base_in_bf16_takes_the_adapter(adapter: Path) -> None:
    model = tiny_llama().bfloat16()
    load_adapter(model, adapter)
    fp32 = trained(tiny_llama())
    for path, layer in paca_layers(model):
        assert layer.paca_delta.dtype == torch.float32
        assert torch.allclose(layer.weight.float(), fp32.get_parameter(f"{path}.weight"), atol=4e-3)


def test_a_model_of_plain_torch_with_running_statistics_comes_back(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    expected, model = trained(network(), target_modules=["0"], modules_to_save=["1"]), network()
    expected(torch.randn(16, 8))
    save_adapter(expected, tmp_path)
    load_adapter(model, tmp_path)
    assert_same(model, expected)
    assert not torch.equal(model[1].running_mean, network()[1].running_mean)


def test_an_adapter_without_our_own_file_is_loaded_as_pefts(adapter: Path) -> None:
    (adapter / "paca_lightning.json").unlink()
    model = tiny_llama()
    load_adapter(model, adapter)
    assert_same(model, trained(tiny_llama()))


def test_saving_again_replaces_the_adapter_and_keeps_other_files(adapter: Path) -> None:
    (adapter / "README.md").write_text("mine")
    save_adapter(trained(tiny_llama(), seed=2), adapter)
    model = tiny_llama()
    load_adapter(model, adapter)
    assert_same(model, trained(tiny_llama(), seed=2))
    assert (adapter / "README.md").read_text() == "mine"


def test_a_model_without_paca_layers_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"no PaCA layers, so there is no adapter to save. Call apply_paca first"):
        save_adapter(tiny_llama(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PaCAError, match="file' cannot be written"):
        save_adapter(trained(tiny_llama()), tmp_path / "file")


def test_a_diverged_model_is_not_saved_over_a_good_adapter(adapter: Path) -> None:
    model = tiny_llama()
    load_adapter(model, adapter)
    model.model.layers[0].mlp.up_proj.paca_delta.data[3, 1] = float("nan")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(
        PaCAError, match=r"'model\.layers\.0\.mlp\.up_proj\.paca_delta' has NaN or Inf: training diverged"
    ):
        save_adapter(model, adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


# -- Damage: each error names the file or the layer, and leaves the model as it was


def edit_tensors(**changes: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Change the delta or the indices of one layer; a change to None removes it."""

    def damage(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        for kind, change in changes.items():
            value = change(tensors.pop(f"base_model.model.{UP}.paca_{kind}"))
            if value is not None:
                tensors[f"base_model.model.{UP}.paca_{kind}"] = value
        save_file(tensors, adapter / "adapter_model.safetensors")
        seal(adapter)

    return damage


def seal(adapter: Path) -> None:
    """Give changed files the right checksums, so that the checks behind them are tried."""
    if (adapter / "paca_lightning.json").exists():
        tensors = load_file(adapter / "adapter_model.safetensors")
        content = json.loads((adapter / "paca_lightning.json").read_text())
        content["checksums"] = {name.removeprefix(PREFIX): tensor_checksum(t) for name, t in tensors.items()}
        content.pop("checksum", None)
        (adapter / "paca_lightning.json").write_text(json.dumps(sealed(content)))


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        content = json.loads((adapter / file).read_text())
        (adapter / file).write_text(json.dumps(change(content)))
        seal(adapter)

    return damage


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda adapter: [damage(adapter) for damage in damages] and None


def truncate(file: str, size: int) -> Callable[[Path], None]:
    return lambda adapter: (adapter / file).write_bytes((adapter / file).read_bytes()[:size]) and None


def rename_layer(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name.replace("up_proj", "upp"): t for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    seal(adapter)


def put(tensor: Tensor, position: int, value: float) -> Tensor:
    tensor.view(-1)[position] = value
    return tensor


def drop(content: dict[str, Any], key: str) -> dict[str, Any]:
    del content[key]
    return content


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda a: (a / "adapter_config.json").unlink(),
        r"adapter_config\.json is missing: .* not a complete adapter",
    ),
    "no tensors": (
        lambda a: (a / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors is missing: .* not a comp",
    ),
    "truncated tensors": (
        truncate("adapter_model.safetensors", 2000),
        r"adapter_model\.safetensors is damaged or truncated",
    ),
    "empty tensors": (truncate("adapter_model.safetensors", 0), r"adapter_model\.safetensors is damaged or truncated"),
    "truncated config": (truncate("adapter_config.json", 30), r"adapter_config\.json cannot be read: .* line 3"),
    "truncated ours": (truncate("paca_lightning.json", 30), r"paca_lightning\.json cannot be read: .* line 3"),
    "config not UTF-8": (
        lambda a: (a / "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
        r"adapter_config\.json cannot be read",
    ),
    "config not an object": (
        edit_json("adapter_config.json", lambda c: [c]),
        r"adapter_config\.json holds list, not an object",
    ),
    "contradicting settings": (
        edit_json("adapter_config.json", lambda c: c | {"paca_alpha": 8.0}),
        r"adapter_config\.json says paca_alpha=8\.0 and paca_lightning\.json says 6\.0",
    ),
    "another method": (
        edit_json("adapter_config.json", lambda c: c | {"peft_type": "LORA"}),
        "peft_type is 'LORA', not 'PACA'",
    ),
    "ours without layers": (
        edit_json("paca_lightning.json", lambda c: drop(c, "layers")),
        r"paca_lightning\.json is damaged \(KeyError: 'layers'\)",
    ),
    "ours without settings": (
        edit_json("paca_lightning.json", lambda c: drop(c, "config")),
        r"paca_lightning\.json is damaged \(KeyError: 'config'\)",
    ),
    "ours with nonsense": (
        edit_json("paca_lightning.json", lambda c: c | {"fingerprint": 3}),
        r"paca_lightning\.json is damaged \(AttributeError",
    ),
    "ours without a layer": (
        edit_json("paca_lightning.json", lambda c: c | {"layers": drop(c["layers"], UP)}),
        "disagree about 'model.layers.0.mlp.up_proj'",
    ),
    "a bad setting": (
        edit_json("paca_lightning.json", lambda c: c | {"config": c["config"] | {"r": 0}}),
        r"paca_lightning\.json: r must be a positive integer, not 0",
    ),
    "an unknown setting": (
        edit_json("paca_lightning.json", lambda c: c | {"config": c["config"] | {"s": 0}}),
        r"Unknown PaCA settings \['s'\]",
    ),
    "unknown targets": (
        both(
            edit_json("adapter_config.json", lambda c: c | {"target_modules": ["c_attn"]}),
            edit_json("paca_lightning.json", lambda c: c | {"config": c["config"] | {"target_modules": ["c_attn"]}}),
        ),
        "'c_attn' matched no linear layer",
    ),
    "no indices": (
        edit_tensors(indices=lambda _: None),
        "lacks the indices or the delta of 'model.layers.0.mlp.up_proj'",
    ),
    "a missing layer": (
        edit_tensors(indices=lambda _: None, delta=lambda _: None),
        "'model.layers.0.mlp.up_proj' is not in the adapter",
    ),
    "another layer": (rename_layer, r"adapter: indices are given for \['model.layers.0.mlp.upp'"),
    "a narrow delta": (
        edit_tensors(delta=lambda t: t[:, :3].contiguous()),
        r"the delta of 'model.layers.0.mlp.up_proj' has shape \(96, 3\), the model needs \(96, 4\)",
    ),
    "a short delta": (
        edit_tensors(delta=lambda t: t[:90].contiguous()),
        r"has shape \(90, 4\), the model needs \(96, 4\)",
    ),
    "too few indices": (
        edit_tensors(indices=lambda t: t[:3].contiguous()),
        r"'model.layers.0.mlp.up_proj' have shape \(3,\), not \(4,\)",
    ),
    "indices out of range": (
        edit_tensors(indices=lambda t: put(t, 3, 64)),
        "'model.layers.0.mlp.up_proj' reach from .* to 64, outside the 64 input columns",
    ),
    "negative indices": (edit_tensors(indices=lambda t: put(t, 0, -1)), "'model.layers.0.mlp.up_proj' reach from -1"),
    "unsorted indices": (
        edit_tensors(indices=lambda t: t.flip(0)),
        "'model.layers.0.mlp.up_proj' are not sorted and unique",
    ),
    "repeated indices": (
        edit_tensors(indices=lambda t: put(t, 1, int(t[0]))),
        "'model.layers.0.mlp.up_proj' are not sorted and unique",
    ),
    "float indices": (
        edit_tensors(indices=lambda t: t.float()),
        "'model.layers.0.mlp.up_proj' are torch.float32, not torch.int64",
    ),
    "NaN": (
        edit_tensors(delta=lambda t: put(t, 7, float("nan"))),
        "'model.layers.0.mlp.up_proj.paca_delta' has NaN or Inf",
    ),
    "Inf": (
        edit_tensors(delta=lambda t: put(t, 7, float("-inf"))),
        "'model.layers.0.mlp.up_proj.paca_delta' has NaN or Inf",
    ),
}


def assert_refused(model: nn.Module, adapter: Path, message: str) -> None:
    before, flags = copy.deepcopy(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(PaCAError, match=message):
        load_adapter(model, adapter)
    assert repr(model) == repr(before)
    assert_same(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_and_leaves_the_base_model(adapter: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(adapter)
    assert_refused(tiny_llama(), adapter, message)


# A converted model has settings of its own: the adapter's names are held against its layers.
BESIDE_SETTINGS = {"unknown targets", "another layer"}


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage not in BESIDE_SETTINGS])
def test_a_damaged_adapter_is_refused_and_leaves_the_trained_model(adapter: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(adapter)
    assert_refused(trained(tiny_llama(), seed=3), adapter, message)


@pytest.mark.parametrize("converted", [False, True], ids=["fresh", "converted"])
def test_another_base_model_is_refused(adapter: Path, converted: bool) -> None:
    model = trained(tiny_llama(seed=1), seed=3) if converted else tiny_llama(seed=1)
    assert_refused(model, adapter, r"adapter: it was trained on another base model: .* most in 'model\.layers")


def test_a_base_model_of_another_shape_is_refused(adapter: Path) -> None:
    with pytest.raises(
        PaCAError, match=r"the delta of 'model\.layers.*has shape \(96, 4\), the model needs \(128, 4\)"
    ):
        load_adapter(tiny_llama(intermediate_size=128), adapter)
    with pytest.raises(PaCAError, match=r"'model\.layers\.2\.mlp\.up_proj' is not in the adapter"):
        load_adapter(tiny_llama(num_hidden_layers=3), adapter)


def test_other_settings_are_refused(adapter: Path) -> None:
    for settings, message in [
        ({"alpha": 4.0}, "was trained with scaling 1.5, the model has 1. Use the adapter's alpha"),
        ({"r": 2, "alpha": 3.0}, r"was trained with r=4, the model has r=2"),
        ({"target_modules": ["q_proj"]}, "is in the adapter but not a PaCA layer of the model"),
        ({"modules_to_save": ["lm_head"]}, r"'lm_head\.weight' is not in the adapter. Use the modules_to_save"),
    ]:
        with pytest.raises(PaCAError, match=message):
            load_adapter(trained(tiny_llama(), **settings), adapter)


def test_the_order_of_the_target_modules_does_not_matter(adapter: Path) -> None:
    edit_json("adapter_config.json", lambda c: c | {"target_modules": ["up_proj", "q_proj"]})(adapter)
    load_adapter(tiny_llama(), adapter)


def test_the_settings_can_be_read_alone(adapter: Path) -> None:
    expected = PaCAConfig(r=4, alpha=6.0, target_modules=["q_proj", "up_proj"])
    assert saved_config(adapter) == expected
    with pytest.raises(PaCAError, match=r"nowhere/adapter_config\.json is missing"):
        saved_config(adapter.parent / "nowhere")


def test_values_of_large_layers_are_sampled_within_them() -> None:
    columns = torch.zeros(28672, 1024, dtype=torch.bfloat16)  # more values than fp32 counts exactly
    columns[-1, -1] = 3.0
    assert sample_columns(columns) == [0.0] * 15 + [3.0]
    assert sample_columns(torch.tensor([[5.0]])) == [5.0]
