"""Command lines made of functions: names and switches as people type them."""

from typing import Any, Literal

import pytest

from paca_lightning import PaCAError
from paca_lightning.tools.function_cli import full_names, run_function

CALLS: list[dict[str, Any]] = []


def tool(
    prompts: str | list[str] | None = None,
    max_length: int = 0,
    max_batch: int = 0,
    compile: bool = False,
    keep: bool = True,
    checkpointing: bool | Literal["selective"] = False,
    dtype: str = "auto",
) -> None:
    """Do something.

    Args:
        prompts: What to say.
        max_length: How long.
        max_batch: How many.
        compile: Whether to compile.
        keep: Whether to keep.
        checkpointing: What to recompute.
        dtype: Of the weights.
    """
    CALLS.append(dict(locals()))


def called(*arguments: str) -> dict[str, Any]:
    """The arguments of the function that differ from its defaults."""
    defaults = {"prompts": None, "max_length": 0, "max_batch": 0, "compile": False, "keep": True}
    defaults |= {"checkpointing": False, "dtype": "auto"}
    run_function(tool, arguments, prog="tool", example="tool --max-length 8")
    return {name: value for name, value in CALLS.pop().items() if value != defaults[name]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--max-length", "8"], {"max_length": 8}),
        (["--max_length=8"], {"max_length": 8}),
        (["--compile"], {"compile": True}),
        (["--compile", "--max-length", "8"], {"compile": True, "max_length": 8}),
        (["--compile", "true"], {"compile": True}),
        (["--compile=false", "--keep=false"], {"keep": False}),
        (["--keep", "false"], {"keep": False}),
        (["--checkpointing"], {"checkpointing": True}),
        (["--checkpointing", "selective"], {"checkpointing": "selective"}),
        (["--dtype=bf-16"], {"dtype": "bf-16"}),
        (["--comp", "--max-l", "8"], {"compile": True, "max_length": 8}),
        (["--prompt=Who are you?"], {"prompts": "Who are you?"}),
        (["--prompts", '["one", "two"]'], {"prompts": ["one", "two"]}),
        (["--prompts", "one", "two, three", "--max-batch", "4"], {"prompts": ["one", "two, three"], "max_batch": 4}),
        (["--prompts+", "one", "--prompts+", "two"], {"prompts": ["one", "two"]}),
    ],
)
def test_options_are_taken_as_people_type_them(arguments: list[str], expected: dict[str, Any]) -> None:
    assert called(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max", "8"], "ambiguous option: --max could match"),
        (["--compile", "maybe"], 'Parser key "compile"'),
        (["--max-length", "long"], 'Parser key "max_length"'),
        (["--lenght", "8"], "--lenght"),
    ],
)
def test_mistakes_name_the_option_and_the_help(arguments: list[str], complaint: str) -> None:
    with pytest.raises(PaCAError) as error:
        called(*arguments)
    assert complaint in str(error.value)
    assert str(error.value).endswith("\ntool --help lists the options.")


def test_help_shows_the_docstring_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        called("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for text in ("Do something.", "How long.", "--compile [{true,false}]", "example: tool --max-length 8"):
        assert text in printed


def test_only_names_that_one_parameter_has_are_completed() -> None:
    typed = ["--max-len", "8", "--max", "--m=--max-len", "--unknown-option=-", "-x", "value"]
    expected = ["--max_length", "8", "--max", "--m=--max-len", "--unknown_option=-", "-x", "value"]
    assert full_names(tool, typed) == expected
