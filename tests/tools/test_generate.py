"""paca-lightning generate: answers of a base model and of its adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from paca_lightning import PaCAConfig, PaCAError, apply_paca, paca_layers, save_adapter
from paca_lightning.tools.generate import generate
from paca_lightning.tools.model_with_adapters import ModelWithAdapters, named_sources
from tests.artefacts import write_random_adapter
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
    with pytest.raises(PaCAError, match=r"There is no checkpoint 'best.ckpt' \(looked for /"):
        generate(str(base), PROMPTS, adapter="best.ckpt")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": " "}, "no prompt"),
        ({"temperature": -1.0}, "temperature must be 0 .* or above, not -1"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 0.9}, "top_p=0.9 needs a temperature above 0"),
        ({"device": "frob"}, "device='frob' cannot be used: .*frob"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_the_model_is_loaded(
    arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(PaCAError, match=complaint):
        generate("/no/model/is/loaded", **({"prompts": PROMPTS} | arguments))


def test_drawn_answers_follow_the_seed(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(**settings: Any) -> str:
        generate(str(base), PROMPTS, max_new_tokens=8, **settings)
        return capsys.readouterr().out

    hot = {"temperature": 5.0}
    assert drawn(seed=1, **hot) == drawn(seed=1, **hot)
    assert drawn(seed=1, **hot) != drawn(seed=2, **hot)
    assert drawn(**hot) != drawn(**hot)
    assert drawn() == drawn()
    assert drawn(top_p=1e-6, **hot) == drawn()  # one token has more than that


def test_greedy_answers_are_hugging_faces(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ModelWithAdapters(str(base), [])
    model, tokenizer = models.model, models.tokenizer("base")
    chat = [{"role": "user", "content": PROMPTS[0]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer(base, capsys).strip() == tokenizer.decode(plain, skip_special_tokens=True).strip()


def test_system_message(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    apply = PreTrainedTokenizerBase.apply_chat_template

    def watched(tokenizer: Any, messages: Any, **settings: Any) -> Any:
        rendered.append(apply(tokenizer, messages, add_generation_prompt=True, tokenize=False))
        return apply(tokenizer, messages, **settings)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", watched)
    generate(str(base), "hi", system="Be brief.", max_new_tokens=1)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == [turns]


def test_chat_template_without_system_messages(tmp_path: Path) -> None:
    directory = tiny_model_directory(tmp_path)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(PaCAError, match="The chat template refuses these messages: System role not supported"):
        generate(str(directory), "hi", system="Be brief.")


def test_several_models_answer_side_by_side(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = [write_random_adapter(tmp_path / f"run{seed}" / "adapter", 8, seed) for seed in range(2)]
    alone = [answer(base, capsys, directory).split() for directory in (None, *directories)]
    generate(str(base), PROMPTS, [str(each) for each in directories], base=True, max_new_tokens=8)
    out = capsys.readouterr().out
    assert out.startswith("> What is your name?\n")
    assert all(name in out for name in ("base", "run0/adapter", "run1/adapter"))
    cells = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    columns = ["".join("".join(cell.split()) for cell in column) for column in zip(*cells, strict=True)]
    assert columns == ["".join(words) for words in alone]
    generate(str(base), PROMPTS, str(directories[1]), base=True, max_new_tokens=8)
    two = capsys.readouterr().out
    assert all(word in two for word in alone[0] + alone[2] if word.isalnum())


def test_adapters_have_names(base: Path, tmp_path: Path) -> None:
    (tmp_path / "with=sign").mkdir()
    sign = str(tmp_path / "with=sign")
    assert named_sources(["a/sql/v0", "x=b/mail/v0", sign]) == {
        "sql/v0": "a/sql/v0",
        "x": "b/mail/v0",
        "with=sign": sign,
    }
    assert named_sources(["runs/one.ckpt"]) == {"one.ckpt": "runs/one.ckpt"}
    with pytest.raises(PaCAError, match=r"Two models would be called 'x': 'b' and 'a'\. Name one: --adapter NAME=b"):
        named_sources(["x=a", "x=b"])
    with pytest.raises(PaCAError, match="Two models would be called 'base': 'a' and 'the base model'"):
        named_sources(["base=a"])
    with pytest.raises(PaCAError, match="Two models would be called"):
        named_sources(["a/b", "a/b"])
    with pytest.raises(PaCAError, match=r"adapter_config\.json is missing"):
        generate(str(base), PROMPTS, adapter=["x=nowhere", "y=nowhere"])


def test_code_that_comes_with_a_model_runs_only_when_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    directory = tiny_model_directory(tmp_path / "custom")
    for file, auto_class, parent, name in (
        ("config.json", "AutoModelForCausalLM", "LlamaForCausalLM", "own_model.Own"),
        ("tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast", "own_tokenizer.Own"),
    ):
        module = name.partition(".")[0]
        code = f"from transformers import {parent}\nprint('code of {module}')\nclass Own({parent}):\n    pass\n"
        (directory / f"{module}.py").write_text(code)
        settings = json.loads((directory / file).read_text())
        settings["auto_map"] = {auto_class: [None, name] if auto_class == "AutoTokenizer" else name}
        (directory / file).write_text(json.dumps(settings))
    generate(str(directory), PROMPTS, max_new_tokens=1)
    assert "code of" not in capsys.readouterr().out
    generate(str(directory), PROMPTS, max_new_tokens=1, trust_remote_code=True)
    printed = capsys.readouterr().out
    assert "code of own_model" in printed
    assert "code of own_tokenizer" in printed
