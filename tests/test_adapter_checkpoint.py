"""AdapterCheckpoint: the tokenizer of training goes with the adapter."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from transformers import AutoTokenizer

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAStrategy, load_adapter, paca_layers
from paca_lightning.cli import main
from paca_lightning.tasks import CausalLMModule, InstructionDataModule
from paca_lightning.tasks.data.tokenizer import DEFAULT_CHAT_TEMPLATE
from tests.tiny import tiny_llama, tiny_tokenizer

OF_THE_MODEL = "{% for message in messages %}{{ '[' + message['content'] + ']' }}{% endfor %}"
OF_THE_USER = "{% for message in messages %}{{ '<' + message['content'] + '>' }}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}{{ ':' }}{% endif %}"


def model_directory(path: Path, chat_template: str | None) -> str:
    tiny_llama().save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return str(path)


def conversations(path: Path) -> str:
    rows = [{"instruction": f"What is {n}?", "output": f"{n} is a number."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(directory: Path, model: str, *callbacks: Any, **data: Any) -> CausalLMModule:
    """Fit a module on a few conversations, and return it."""
    module = CausalLMModule(model)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), *callbacks],
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, InstructionDataModule(model, conversations(directory / "data.jsonl"), **data))
    return module


@pytest.mark.parametrize(
    ("of_the_model", "given", "expected"),
    [
        (None, None, DEFAULT_CHAT_TEMPLATE),
        (None, OF_THE_USER, OF_THE_USER),
        (OF_THE_MODEL, OF_THE_USER, OF_THE_USER),
        (OF_THE_MODEL, None, OF_THE_MODEL),
    ],
)
def test_the_chat_template_of_training_is_that_of_answers_and_exports(
    of_the_model: str | None,
    given: str | None,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_directory(tmp_path / "base", of_the_model)
    module = train(tmp_path, model, AdapterCheckpoint(), chat_template=given, loss_on="all", max_length=64)
    adapter = tmp_path / "adapter"
    loaded = tiny_llama()
    load_adapter(loaded, adapter)
    for (_, layer), (_, trained) in zip(paca_layers(loaded), paca_layers(module), strict=True):
        assert layer.weight.equal(trained.weight)
    for output in ("merged", "lora"):
        arguments = [f"--model={model}", f"--adapter={adapter}", f"--output={tmp_path / output}", f"--format={output}"]
        main(["export", *arguments])
        assert AutoTokenizer.from_pretrained(tmp_path / output).chat_template == expected
    asked: list[str] = []
    monkeypatch.setattr(
        "paca_lightning.tools.generate.greedy_answer",
        lambda model, tokenizer, prompt, length: asked.append(tokenizer.chat_template) or "",
    )
    main(["generate", f"--model={model}", f"--adapter={adapter}", '--prompts=["hi"]'])
    assert asked == [expected]


def test_a_data_module_without_a_tokenizer_leaves_an_adapter_alone(tmp_path: Path) -> None:
    data = InstructionDataModule(model_directory(tmp_path / "base", OF_THE_MODEL), conversations(tmp_path / "d.jsonl"))
    data.setup("fit")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), AdapterCheckpoint(str(tmp_path / "adapter"))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLMModule(str(tmp_path / "base")), data.train_dataloader())
    names = {"adapter_config.json", "adapter_model.safetensors", "paca_lightning.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names
