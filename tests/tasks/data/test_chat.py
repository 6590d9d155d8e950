"""Which tokens of a conversation are trained, with templates of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.tokenizer import DEFAULT_CHAT_TEMPLATE
from tests.tasks.rows import GOOD, PLAIN, chat, write_rows
from tests.tiny import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello é🙂!"},
    {"role": "user", "content": "Name?"},
    {"role": "assistant", "content": "Ada"},
]

LLAMA_2 = (  # a leading space before each answer, the system text inside the first user turn, no generation prompt
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n' if loop.first and system else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

QWEN_3 = (  # earlier answers lose their reasoning, so that no rendering of a part is a prefix of the whole
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained_texts(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]] = TALK, **options: Any) -> list[str]:
    encoder = ChatEncoder(tokenizer, **({"max_length": 1000} | options))
    (encoded,) = encoder.encode([encoder.spans(Conversation(talk))])
    edges = np.flatnonzero(np.diff(encoded.trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in edges]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["Hello é🙂!<|im_end|>", "Ada<|im_end|>"]),
        (DEFAULT_CHAT_TEMPLATE, ["Hello é🙂!<|im_end|>", "Ada<|im_end|>"]),
        (LLAMA_2, [" Hello é🙂! <|im_end|>", " Ada <|im_end|>"]),
        (QWEN_3, ["Hello é🙂!<|im_end|>", "<think>\n\n</think>\n\nAda<|im_end|>"]),
        (PLAIN, ["Hello é🙂!\n", " Ada\n"]),  # the space is in the same token
    ],
    ids=["chatml", "default", "llama-2", "qwen-3", "plain"],
)
def test_the_assistants_turns_are_trained_with_their_end_and_nothing_else(
    template: str | None, expected: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    assert trained_texts(tokenizer) == expected


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    assert trained_texts(tokenizer) == ["Hello é🙂!</s>", "Ada</s>"]


def test_loss_on_all_trains_everything_that_something_comes_before() -> None:
    tokenizer = tiny_tokenizer()
    encoder = ChatEncoder(tokenizer, max_length=1000, loss_on="all")
    (encoded,) = encoder.encode([encoder.spans(Conversation(TALK))])
    assert not encoded.trained[0]
    assert encoded.trained[1:].all()
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_hides_the_answers_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] | length }}{% for m in messages %}x{% endfor %}"
    with pytest.raises(PaCAError, match=r"leaves no trace of turn 3.*loss_on: all"):
        trained_texts(tokenizer)


def test_a_template_that_fails_names_the_row(module: Any, tmp_path: Path) -> None:
    with_system = chat("Be kind.", "a", "b", roles=("system", "user", "assistant"))
    path = write_rows(tmp_path / "train.jsonl", [GOOD, with_system])
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + PLAIN
    with pytest.raises(PaCAError, match=r"train.jsonl, row 2: the chat template fails.*no system role here"):
        module(path, chat_template=template).prepare_data()
    with pytest.raises(PaCAError, match=r"row 1: the chat template fails.*TemplateSyntaxError"):
        module(path, chat_template="{% for %}").prepare_data()
    with pytest.raises(PaCAError, match="is neither a Jinja template nor a readable file"):
        module(path, chat_template="missing.jinja").prepare_data()


def test_a_tokenizer_without_a_template_gets_the_default(module: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    data = module(tokenizer=str(tmp_path / "bare"))
    data.setup("fit")
    assert data.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE

    (tmp_path / "own.jinja").write_text(PLAIN)
    data = module(tokenizer=str(tmp_path / "bare"), chat_template=str(tmp_path / "own.jinja"))
    data.setup("fit")
    assert data.tokenizer.chat_template == PLAIN
