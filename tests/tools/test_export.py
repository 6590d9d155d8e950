"""The command ``export`` writes what was trained, in the precision in which it was trained."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from paca_lightning import PaCAConfig, PaCAError, apply_paca, save_adapter
from paca_lightning.tools.export import export
from paca_lightning.tools.model_with_adapters import ModelWithAdapters
from tests.adapters.test_export import in_bf16, logits
from tests.adapters.test_export_matrix import moved
from tests.tiny import tiny_llama, tiny_model_directory, tiny_tokenizer


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


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_a_classifier_is_written_with_its_labels(kind: str, tmp_path: Path) -> None:
    model = tiny_model_directory(tmp_path / "model")
    names = {0: "cat", 1: "dog", 2: "fox"}
    auto = {"Sequence": hf.AutoModelForSequenceClassification, "Token": hf.AutoModelForTokenClassification}[kind]
    trained = auto.from_pretrained(model, id2label=names, label2id={v: k for k, v in names.items()}, num_labels=3)
    apply_paca(trained, PaCAConfig(r=4, modules_to_save=["score"]))
    expected = logits(moved(trained.eval()))
    save_adapter(trained, tmp_path / "adapter")

    export(str(model), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    written = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert written.config.id2label == names
    torch.testing.assert_close(logits(written), expected, atol=0.05, rtol=0.05)  # bf16
    with pytest.raises(PaCAError, match="of a model with a head over 3 labels, which writes no text"):
        ModelWithAdapters(str(model), [str(tmp_path / "adapter")])
