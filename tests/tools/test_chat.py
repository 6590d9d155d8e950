"""A chat in the terminal: it streams, keeps the conversation, switches adapters, and survives what people type."""

import io
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from transformers import PreTrainedTokenizerBase

from paca_lightning import PaCAError
from paca_lightning.tools import chat
from paca_lightning.tools.generate import generate
from tests.artefacts import write_random_adapter
from tests.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base model and two adapters."""
    root = tmp_path_factory.mktemp("chat")
    found = {"base": str(tiny_model_directory(root / "base"))}
    for seed, name in enumerate(("sql", "mail")):
        found[name] = str(write_random_adapter(root / name, 8, seed))
    return found


class Terminal:
    """Types lines into a chat, and returns what is printed after each."""

    def __init__(
        self, places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.places, self.capsys, self.monkeypatch = places, capsys, monkeypatch

    def __call__(self, *lines: str, **settings: Any) -> list[str]:
        self.monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = {"adapter": [self.places["sql"], self.places["mail"]], "max_new_tokens": 4} | settings
        generate(self.places["base"], **given)
        return self.capsys.readouterr().out.split("> ")


@pytest.fixture
def typed(places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(places, capsys, monkeypatch)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The conversations that the chat template was asked for."""
    seen: list[list[dict[str, str]]] = []
    apply = PreTrainedTokenizerBase.apply_chat_template

    def watched(tokenizer: Any, messages: Any, **settings: Any) -> Any:
        seen.append(list(messages))
        return apply(tokenizer, messages, **settings)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", watched)
    return seen


def answer_to(place: str, adapter: str | None, capsys: pytest.CaptureFixture[str]) -> str:
    generate(place, "hi", adapter, max_new_tokens=4)
    return capsys.readouterr().out.removeprefix("> hi\n").strip()


def test_the_conversation_is_kept_until_a_reset(typed: Terminal, rendered: list[list[dict[str, str]]]) -> None:
    out = typed("hi", "", "and then", "/reset", "hi", system="Be brief.")
    assert [[m["role"] for m in messages] for messages in rendered] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert rendered[1][2]["content"] == out[1].strip()
    assert rendered[1][3]["content"] == "and then"
    assert out[0].startswith("Type a message.\n  /adapter NAME: go on with this adapter\n")
    assert "Adapters: sql, mail. Now: sql." in out[0]
    assert out[4] == "A new conversation.\n"
    assert out[5] == out[1]


def test_commands_switch_the_model(typed: Terminal, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    expected = {name: answer_to(places["base"], places.get(name), capsys) for name in ("sql", "mail", None)}
    lines = [
        "hi",
        "/reset",
        "/adapter mail",
        "hi",
        "/reset",
        "/base",
        "hi",
        "/reset",
        "/adapter sql",
        "hi",
        "/quit",
        "hi",
    ]
    out = [text.strip() for text in typed(*lines)]
    assert [out[1], out[4], out[7], out[10]] == [expected["sql"], expected["mail"], expected[None], expected["sql"]]
    assert out[3] == "Now: mail."
    assert out[6] == "Now: base."
    assert len(out) == 12  # nothing after /quit
    assert len(set(expected.values())) == 3


def test_one_adapter_and_its_base(typed: Terminal, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    expected = [answer_to(places["base"], adapter, capsys) for adapter in (places["sql"], None)]
    out = typed("hi", "/reset", "/base", "hi", "/reset", "/adapter sql", "hi", adapter=places["sql"])
    assert [out[1].strip(), out[4].strip(), out[7].strip()] == [*expected, expected[0]]
    assert typed("hi", adapter=places["sql"], base=True)[1].strip() == expected[1]
    assert typed("hi", adapter=None)[1].strip() == expected[1]


def test_what_is_mistyped_is_told(typed: Terminal) -> None:
    out = typed("/adapter mial", "/adapter", "/rest", "/help", "x " * 200, "hi")
    assert out[1] == "There is no adapter 'mial'. Did you mean 'mail'? Adapters: sql, mail. Now: sql.\n"
    assert out[2] == "Adapters: sql, mail. Now: sql.\n"
    assert out[3] == "'/rest' is no command. Did you mean '/reset'? A space before it sends it to the model.\n"
    assert out[4].startswith("Type a message.")
    assert "and the model reads 256, its answer included. /reset begins a new conversation." in out[5]
    assert out[6].strip()


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    typed: Terminal, rendered: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = chat.answer, []

    def interrupted(model: Any, tokenizer: Any, messages: Any, *, streamer: Any, **settings: Any) -> str:
        if stopped:
            return whole(model, tokenizer, messages, streamer=streamer, **settings)
        stopped.append(True)
        streamer.put(torch.tensor([[0]]))  # the prompt
        streamer.put(torch.tensor(tokenizer("My name is")["input_ids"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", interrupted)
    out = typed("Who are you?", "Go on.")
    # Before transformers 5.24, the last word waits for the next one.
    said = "My name is" if (new := Version(hf.__version__) >= Version("5.24")) else "My name"
    assert out[1] == f"{said if new else said + ' '} [stopped]\n\n"
    assert rendered == [
        [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Go on."},
        ]
    ]


def test_an_input_without_a_line_is_a_mistake(typed: Terminal) -> None:
    with pytest.raises(PaCAError, match="There is no prompt"):
        typed()
