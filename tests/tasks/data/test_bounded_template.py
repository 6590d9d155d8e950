"""A chat template that loops or allocates without end is stopped, wherever it runs."""

import time

import pytest
from jinja2.exceptions import SecurityError

from paca_lightning import PaCAError
from paca_lightning.tasks.data.bounded_template import SHORT, BoundedEnvironment, Limits, render_chat
from paca_lightning.tasks.data.template import ChatTemplate
from paca_lightning.tasks.generation import answer
from tests.tasks.data import templates
from tests.tiny import tiny_llama, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "What is PaCA?"}, {"role": "assistant", "content": "A method."}]
TEMPLATES = {name: value for name, value in vars(templates).items() if name.isupper() and isinstance(value, str)}
HOSTILE = {
    "a range too long": "{% for i in range(1000000000) %}x{% endfor %}",
    "a range of a float": "{% for i in range(1e9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a repeated text": "{{ 'a' * 10000000000 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "doubled texts": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "added texts": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a filter that pads": "{{ 'a' | center(10000000000) }}",
    "a method that pads": "{{ 'a'.ljust(10000000000) }}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "a wide field of a method": "{{ '{:10000000000}'.format(1) }}",
    "lists of lists": "{% set a = [1] * 99999 %}{{ [a] * 99999 }}",
    "a filter in a loop": (
        "{% set big = 'a' * 9999999 %}{% for i in range(99999) %}{% set x = big | replace('a', 'b') %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_stopped(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE[name]
    with pytest.raises(PaCAError, match=r"the chat template fails on turns of the roles user, assistant: "):
        ChatTemplate(tokenizer).render(MESSAGES)


def test_generation_has_the_same_limits() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE["nested loops"]
    with pytest.raises(PaCAError, match=r"The chat template refuses these messages: "):
        answer(tiny_llama(), tokenizer, MESSAGES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ordinary_templates_render_as_without_limits(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    for prompt in (False, True):
        try:
            expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            with pytest.raises(type(error)):
                render_chat(tokenizer, MESSAGES, tokenize=False, add_generation_prompt=prompt)
        else:
            assert render_chat(tokenizer, MESSAGES, tokenize=False, add_generation_prompt=prompt) == expected


def test_the_limit_is_of_one_conversation() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for i in range(99999) %}{% endfor %}done"
    for _ in range(4):
        assert render_chat(tokenizer, MESSAGES, tokenize=False) == "done"


def test_the_clock_is_read_for_long_texts_and_at_times_for_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[float] = []

    def clock() -> float:
        reads.append(0.0)
        return 0.0

    monkeypatch.setattr(time, "thread_time", clock)
    environment = BoundedEnvironment()
    environment.limits = Limits()
    reads.clear()
    for _ in range(640):
        environment.measured("short")
    assert len(reads) == 10
    environment.limits.until = -1.0
    with pytest.raises(SecurityError, match="runs without end"):
        environment.measured("x" * SHORT)
    with pytest.raises(SecurityError, match="runs without end"):
        list(map(environment.measured, ["short"] * 64))
