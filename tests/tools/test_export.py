"""The command ``export`` writes what was trained, in the precision in which it was trained."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from paca_lightning import PaCAConfig, apply_paca, save_adapter
from paca_lightning.tools.export import export
from tests.adapters.test_export import in_bf16, logits
from tests.adapters.test_export_matrix import moved
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("saved", [[], ["norm"]], ids=["columns", "norm"])
def test_a_lora_adapter_of_a_bf16_model_is_exact(saved: list[str], tmp_path: Path) -> None:
    in_bf16(tiny_llama()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model, base = (AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32) for _ in range(2))
    apply_paca(model, PaCAConfig(r=4, modules_to_save=saved))
    expected = logits(moved(model))
    save_adapter(model, tmp_path / "adapter")
    export(str(tmp_path / "model"), str(tmp_path / "adapter"), str(tmp_path / "lora"), format="lora")
    found = logits(PeftModel.from_pretrained(base, tmp_path / "lora"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
