"""Models from directories and the hub, and what is wrong with them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from tests.tiny import tiny_model_directory


def test_random_weights_need_no_weight_file(tmp_path):
    directory = tiny_model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    module = CausalLMModule(str(directory), pretrained=False)
    module.configure_model()
    assert sum(p.numel() for p in module.parameters()) > 100_000

    with torch.device("meta"):
        shape = CausalLMModule(str(directory))
        shape.configure_model()
    assert {p.device.type for p in shape.parameters()} == {"meta"}


def test_a_directory_without_a_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(PaCAError, match=r"no config.json.*notes\.txt"):
        CausalLMModule(str(tmp_path)).configure_model()


def test_a_directory_without_weights_is_named(tmp_path):
    directory = tiny_model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(PaCAError, match="could not be loaded"):
        CausalLMModule(str(directory)).configure_model()


def test_a_hub_id_while_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match="Without network, give a local directory"):
        CausalLMModule("nobody/no-such-model").configure_model()


def test_weights_that_are_missing_or_cut_off_are_named(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, file, {"format": "pt"})
    with pytest.raises(PaCAError, match=r"lack 2 tensors .*'model\.layers\.0\.mlp\.up_proj\.weight'"):
        CausalLMModule(str(tmp_path)).configure_model()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(PaCAError, match="could not be loaded"):
        CausalLMModule(str(tmp_path)).configure_model()
