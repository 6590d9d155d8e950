"""A chat template that loops or allocates without end is stopped, wherever it runs."""

import time

import pytest
from jinja2.exceptions import SecurityError

from paca_lightning import PaCAError
from paca_lightning.tasks.data.bounded_template import SHORT, UNTIMED, BoundedEnvironment, Limits, render_chat
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


def test_the_clock_is_read_after_much_work_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[float] = []

    def clock() -> float:
        reads.append(0.0)
        return 0.0

    monkeypatch.setattr(time, "thread_time", clock)
    environment = BoundedEnvironment()

    def counted(value: object, times: int) -> int:
        environment.limits = Limits()
        reads.clear()
        for _ in range(times):
            environment.measured(value)
        return len(reads)

    assert counted("short", 63) == 0
    assert counted("short", 640) == 10
    assert counted("x" * SHORT * 2, 64) == 2
    assert counted("x" * UNTIMED, 3) == 3
    assert counted(range(10), 3) == 3


@pytest.mark.parametrize("value", ["x" * UNTIMED, range(10)], ids=["a long text", "a value of unknown size"])
def test_work_that_may_take_long_is_stopped_at_once_when_the_time_is_over(value: object) -> None:
    environment = BoundedEnvironment()
    environment.limits = Limits()
    environment.limits.until = -1.0
    for work in (
        lambda: environment.measured(value),
        lambda: environment.bounded_filter("list", list)(value),
        lambda: [environment.measured("short") for _ in range(64)],
    ):
        with pytest.raises(SecurityError, match="runs without end"):
            work()


@pytest.mark.parametrize("operands", [(10**SHORT, 2), (["a"], 2), (2.5, 10**400)], ids=["power", "list", "float"])
def test_operators_on_other_than_small_numbers_read_the_clock(operands: tuple[object, object]) -> None:
    environment = BoundedEnvironment()
    environment.limits = Limits()
    environment.limits.until = -1.0
    with pytest.raises(SecurityError, match="runs without end"):
        environment.call_binop(None, "*", *operands)
    environment.call_binop(None, "*", 3, 2)
