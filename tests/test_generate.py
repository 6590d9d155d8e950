"""paca-lightning generate: answers of a base model and of its adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from paca_lightning import PaCAConfig, PaCAError, apply_paca, paca_layers, save_adapter
from paca_lightning.tools.generate import generate
from tests.tiny import tiny_llama, tiny_model_directory

PROMPTS = ["What is your name?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("generate") / "base")


def answer(base: Path, capsys: pytest.CaptureFixture[str], adapter: Path | None = None) -> str:
    generate(str(base), PROMPTS, adapter=None if adapter is None else str(adapter), max_new_tokens=8)
    question, reply = capsys.readouterr().out.split("\n", 1)
    assert question == "> What is your name?"
    return reply


def test_adapter_changes_the_answer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = tiny_llama()
    apply_paca(trained, PaCAConfig(r=8))
    save_adapter(trained, tmp_path / "untrained")
    with torch.no_grad():
        for _, layer in paca_layers(trained):
            layer.paca_delta.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(trained, tmp_path / "trained")
    plain = answer(base, capsys)
    assert answer(base, capsys, tmp_path / "untrained") == plain
    assert answer(base, capsys, tmp_path / "trained") != plain


def test_missing_model_and_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match="nowhere"):
        generate(str(tmp_path / "nowhere"), PROMPTS)
    with pytest.raises(PaCAError, match=r"adapter_config\.json is missing"):
        generate(str(base), PROMPTS, adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "complaint"), [({"max_new_tokens": 0}, "at least 1"), ({"prompts": []}, "no prompt")]
)
def test_nothing_to_generate(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PaCAError, match=complaint):
        generate("/no/model/is/loaded", **({"prompts": PROMPTS} | arguments))
