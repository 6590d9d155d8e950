"""An adapter of someone else is read without trust: wrong bytes, odd files and hostile patterns change nothing."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, load_adapter, paca_layers, save_adapter
from paca_lightning.core.checksums import tensor_checksum
from tests.adapters.test_adapter import UP, adapter, assert_refused, assert_same, edit_json, edit_tensors, seal, trained
from tests.tiny import tiny_llama

__all__ = ["adapter"]  # the fixture
TENSORS, SETTINGS, CONFIG = "adapter_model.safetensors", "paca_lightning.json", "adapter_config.json"
DELTA = f"base_model.model.{UP}.paca_delta"


def flip(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def start_of(file: Path, name: str) -> int:
    """Where a tensor's bytes begin in a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    start: int = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    return 8 + length + start


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def forget_checksums(directory: Path) -> None:
    """Make an adapter of version 0.1.0."""
    content = json.loads((directory / SETTINGS).read_text())
    del content["checksums"], content["checksum"]
    (directory / SETTINGS).write_text(json.dumps(content))


# -- Checksums


@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_of_a_delta_is_refused_and_names_it(adapter: Path, bit: int) -> None:
    flip(adapter / TENSORS, start_of(adapter / TENSORS, DELTA) + 8, bit)
    assert_refused(tiny_llama(), adapter, rf"'{UP}\.paca_delta' is not what was saved: its checksum differs")


def test_one_flipped_bit_of_the_settings_is_refused(adapter: Path) -> None:
    text = (adapter / SETTINGS).read_text()
    digit = text.index("0.0", text.index('"fingerprint"')) + 4
    (adapter / SETTINGS).write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    assert_refused(tiny_llama(), adapter, r"paca_lightning\.json is not what was saved: its checksum differs")


def test_a_header_that_lies_about_a_dtype_is_refused(adapter: Path) -> None:
    edit_header(adapter / TENSORS, lambda header: header[DELTA].update(dtype="I32"))
    assert_refused(tiny_llama(), adapter, rf"'{UP}\.paca_delta' is not what was saved")
    seal(adapter)
    assert_refused(tiny_llama(), adapter, rf"the delta of '{UP}' is torch\.int32, no floating-point numbers")


def test_an_adapter_without_checksums_loads_and_one_line_says_so(
    adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget_checksums(adapter)
    model = tiny_llama()
    with caplog.at_level(logging.WARNING):
        load_adapter(model, adapter)
    assert_same(model, trained(tiny_llama()))
    (line,) = caplog.messages
    assert line == f"{adapter}: the adapter has no checksums, so whether its bytes are as saved was not verified."


def test_an_adapter_with_checksums_loads_without_a_word(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_adapter(tiny_llama(), adapter)
    assert caplog.messages == []


# -- What no checksum tells


def test_an_absurd_value_is_refused_with_the_right_checksum(adapter: Path) -> None:
    edit_tensors(delta=lambda t: t.index_fill(0, torch.tensor([3]), 2e36))(adapter)
    assert_refused(tiny_llama(), adapter, rf"'{UP}\.paca_delta' has values as large as 2e\+36")


def test_an_absurd_value_is_not_saved_over_a_good_adapter(adapter: Path) -> None:
    model = tiny_llama()
    load_adapter(model, adapter)
    model.get_parameter(f"{UP}.paca_delta").data[0, 0] = -1e20
    with pytest.raises(PaCAError, match=rf"'{UP}\.paca_delta' has values as large as 1e\+20.* training diverged"):
        save_adapter(model, adapter)
    load_adapter(tiny_llama(), adapter)


def test_a_tensor_that_is_there_twice_is_refused(adapter: Path) -> None:
    tensors = load_file(adapter / TENSORS)
    tensors[DELTA.removeprefix("base_model.model.")] = tensors[DELTA] + 1
    save_file(tensors, adapter / TENSORS)
    assert_refused(tiny_llama(), adapter, rf"has '{UP}\.paca_delta' twice, with and without 'base_model\.model\.'")


def test_an_empty_tensor_of_any_dtype_is_saved_and_loaded(tmp_path: Path) -> None:
    """An empty bf16 tensor has no bytes to look at, and NumPy has no bf16."""

    def network() -> nn.Module:
        head = nn.Linear(4, 0, dtype=torch.bfloat16)
        return nn.ModuleDict({"body": nn.Linear(4, 4), "head": head})

    with pytest.warns(UserWarning, match="zero-element"):
        one, two = network(), network()
    two.load_state_dict(one.state_dict())
    save_adapter(trained(one, target_modules=["body"], modules_to_save=["head"]), tmp_path / "adapter")
    load_adapter(two, tmp_path / "adapter")
    assert_same(two, one)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_no_adapter_has_are_refused(adapter: Path, dtype: torch.dtype) -> None:
    (adapter / SETTINGS).unlink()
    edit_tensors(delta=lambda t: t.to(dtype))(adapter)
    assert_refused(tiny_llama(), adapter, rf"'{UP}\.paca_delta' is {dtype}, which no adapter holds")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("paca_alpha", None, "paca_alpha is null"),
        ("paca_alpha", 1e308, r"alpha must lie between 1e-09 and 1e\+09, not 1e\+308"),
        ("paca_alpha", 10**400, r"alpha must lie between"),
        ("target_modules", [[]], r"target_modules holds \[\], which is not a module name"),
        ("target_modules", {"q_proj": 1}, "target_modules must be a string or a list of names"),
        ("exclude_modules", 3, "exclude_modules must be a list"),
        ("random_seed", "x", "seed must be an integer"),
    ],
)
def test_settings_without_a_meaning_are_refused(adapter: Path, setting: str, value: Any, message: str) -> None:
    (adapter / SETTINGS).unlink()
    edit_json(CONFIG, lambda content: content | {setting: value})(adapter)
    assert_refused(tiny_llama(), adapter, rf"adapter_config\.json: {message}")


def test_nested_names_beside_our_own_settings_are_a_contradiction(adapter: Path) -> None:
    edit_json(CONFIG, lambda content: content | {"target_modules": [[]]})(adapter)
    assert_refused(tiny_llama(), adapter, r"adapter_config\.json says target_modules=\[\[\]\]")


def test_an_infinite_fingerprint_fits_no_model(adapter: Path) -> None:
    edit_json(SETTINGS, lambda c: c | {"fingerprint": c["fingerprint"] | {UP: [10**400]}})(adapter)
    assert_refused(tiny_llama(seed=1), adapter, r"paca_lightning\.json is damaged")


# -- Files


@pytest.mark.parametrize("file", [CONFIG, TENSORS, SETTINGS])
def test_what_is_no_regular_file_is_refused(adapter: Path, file: str) -> None:
    def fifo(path: Path) -> None:
        os.mkfifo(path)

    for replace in (fifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        (adapter / file).unlink()
        replace(adapter / file)
        assert_refused(tiny_llama(), adapter, rf"{file} is no regular file")
        if (adapter / file).is_dir():
            (adapter / file).rmdir()
        else:
            (adapter / file).unlink()
        (adapter / file).touch()


@pytest.mark.parametrize("file", [CONFIG, TENSORS, SETTINGS])
def test_a_link_out_of_the_directory_is_refused(adapter: Path, tmp_path: Path, file: str) -> None:
    shutil.move(adapter / file, tmp_path / "elsewhere")
    (adapter / file).symlink_to(Path("..", "elsewhere"))
    assert_refused(tiny_llama(), adapter, rf"{file} is a link that leads out of its directory, to .*elsewhere")


def test_the_links_of_a_hugging_face_cache_are_followed(adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--adapter" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in adapter.iterdir():
        shutil.move(file, blobs / f"sum of {file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sum of {file.name}")
    model = tiny_llama()
    load_adapter(model, snapshot)
    assert_same(model, trained(tiny_llama()))


def test_a_file_of_an_implausible_size_is_refused(adapter: Path) -> None:
    for file, size in ((CONFIG, 2**30), (TENSORS, 2**40)):
        before = (adapter / file).read_bytes()
        os.truncate(adapter / file, size)  # sparse
        assert_refused(tiny_llama(), adapter, rf"{file} has [\d,]+ bytes, and at most [\d,]+ are plausible")
        (adapter / file).write_bytes(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 deep"),
        ('{"r": ' + '{"a":' * 200_000, "nested more than 100 deep"),
        ('{"r": 4, "r": 8}', r"a key stands twice in the object with the keys \['r'\]"),
        ('{"r": NaN}', "NaN is no JSON"),
        ('{"r": ' + "1" * 5000 + "}", "cannot be read"),
    ],
    ids=["lists", "objects", "twice", "NaN", "digits"],
)
def test_odd_json_is_refused(adapter: Path, text: str, message: str) -> None:
    for file in (CONFIG, SETTINGS):
        before = (adapter / file).read_text()
        (adapter / file).write_text(text)
        assert_refused(tiny_llama(), adapter, rf"{file} cannot be read: .*{message}" if "can" not in message else file)
        (adapter / file).write_text(before)


# -- Patterns


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_pattern_that_backtracks_without_end_is_stopped(adapter: Path, setting: str) -> None:
    hostile = r"(a|aa)+$"
    value = hostile if setting == "target_modules" else [hostile]
    edit_json(CONFIG, lambda content: content | {setting: value})(adapter)
    edit_json(SETTINGS, lambda content: content | {"config": content["config"] | {setting: value}})(adapter)
    model = nn.Module()
    model.add_module("a" * 60, tiny_llama())
    assert_refused(model, adapter, "takes more than 0.5 s on 'a")


# -- All or nothing


def snapshot(model: nn.Module) -> list[tuple[str, str, bool]]:
    """Every bit of a model's tensors, and what is trained."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor_checksum(tensor), tensor.requires_grad) for name, tensor in tensors]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


REFUSED = {
    "transposed delta": edit_tensors(delta=transposed),
    "missing layer": edit_tensors(delta=lambda _: None, indices=lambda _: None),
    "indices out of range": edit_tensors(indices=lambda t: t + 60),
    "absurd": edit_tensors(delta=lambda t: t * 1e30),
}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("damage", [*REFUSED, "another base"])
def test_a_refusal_changes_no_bit_of_a_converted_model(adapter: Path, damage: str, quantize: str | None) -> None:
    if damage != "another base":
        REFUSED[damage](adapter)
    # Base columns of fp32 over a bf16 weight: going to other columns and back would round them.
    model = tiny_llama(seed=int(damage == "another base"))
    apply_paca(model, PaCAConfig(r=4, alpha=6.0, target_modules=["q_proj", "up_proj"], seed=9, quantize=quantize))
    model.bfloat16()
    for _, layer in paca_layers(model):
        layer.paca_delta.data.normal_()
        layer.write_columns()
    before = snapshot(model)
    with pytest.raises(PaCAError):
        load_adapter(model, adapter)
    assert snapshot(model) == before


def test_a_fresh_model_is_quantized_only_after_all_checks(tmp_path: Path) -> None:
    save_adapter(trained(tiny_llama(), quantize="nf4"), tmp_path)
    edit_tensors(delta=transposed)(tmp_path)
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(PaCAError, match="has shape"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


def test_a_weight_that_cannot_be_quantized_is_found_before_the_first_is(tmp_path: Path) -> None:
    save_adapter(trained(tiny_llama(), quantize="nf4"), tmp_path)
    model = tiny_llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(PaCAError, match=r"NaN|another base"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


def test_the_checksums_are_of_what_is_in_the_file(adapter: Path) -> None:
    named = json.loads((adapter / SETTINGS).read_text())["checksums"]
    with safe_open(adapter / TENSORS, framework="pt") as file:
        assert {name.removeprefix("base_model.model.") for name in file.keys()} == named.keys()  # noqa: SIM118
    assert all(len(value) == 32 for value in named.values())
