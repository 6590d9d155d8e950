r"""Rows of preferences as rows of instruction data: a pair becomes two, which differ in their answer.

| a row | its pair, or its answer |
|---|---|
| `prompt`, `chosen`, `rejected` | texts, or lists of messages; or `instruction`, `input`, or `question` |
| `chosen`, `rejected` | whole conversations as lists of messages; what they have in common is the prompt |
| `chosen`, `rejected` | texts `\n\nHuman: ...\n\nAssistant: ...` (Anthropic-hh), or texts with a common beginning |
| `conversations` or `messages`, `chosen`, `rejected` | as LLaMA-Factory: the prompt's turns, and a message each |
| any row of instruction data, and `label` or `kto_tag` | its last answer is good (true) or bad (false) |

`system`, `tools` and the like may stand beside them, as in rows of instruction data.
"""

import re
from itertools import takewhile
from typing import Any, NamedTuple

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.converters import LIST_FIELDS
from paca_lightning.tasks.data.fields import Row, is_empty, kind
from paca_lightning.tasks.data.formats import detect
from paca_lightning.tasks.data.turns import ANSWERING

LABELS = ("kto_tag", "label")
_NAMES = ("chosen", "rejected")
_SIDES = (_NAMES, ("chosen_response", "rejected_response"))
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_QUESTIONS = ("prompt", "instruction", "question", "query")
_WRITTEN = {"true": True, "1": True, "false": False, "0": False}  # labels as tables and pandas write them


class Side(NamedTuple):
    """A row of instruction data that ends with an answer, its format, and what it is: chosen, rejected, good or bad."""

    name: str
    format: str
    row: Row

    @property
    def good(self) -> bool:
        """Whether it is to be preferred."""
        return self.name in ("chosen", "good")


def sides_of(row: Row) -> list[Side]:
    """Both sides of a pair, the chosen one first, or the one side of a row with a label.

    Raises:
        PaCAError: The row is neither, or lacks something.
    """
    names = next((names for names in _SIDES if any(not is_empty(row.get(name)) for name in names)), None)
    if names is not None:
        for name in names:
            if is_empty(row.get(name)):
                raise PaCAError(f"the field {name!r} is missing or empty: a pair needs both sides; remove the row")
        return _pair(row, names)
    tag = next((tag for tag in LABELS if not is_empty(row.get(tag))), None)
    if tag is None:
        has = ", ".join(map(repr, row)) or "no fields"
        raise PaCAError(
            f"the row has {has}, but neither 'chosen' and 'rejected' nor a 'label' (true or false) of its answer. For "
            "conversations without preferences use InstructionDataModule"
        )
    good = _WRITTEN.get(str(row[tag]).lower())
    if good is None:
        raise PaCAError(f"the field {tag!r} is {row[tag]!r}, expected true (a good answer) or false")
    rest = {name: value for name, value in row.items() if name != tag}
    return [Side("good" if good else "bad", _format(rest), rest)]


def _format(row: Row) -> str:
    try:
        return detect(row, "without its label")
    except PaCAError as error:
        raise PaCAError(str(error).rstrip(".")) from error


def _pair(row: Row, names: tuple[str, str]) -> list[Side]:
    rest = {name: value for name, value in row.items() if name not in names}
    values = [[row[name]] if isinstance(row[name], dict) else row[name] for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str | list):
            raise PaCAError(f"the field {name!r} is {kind(value)}, expected a text or messages")
    if type(values[0]) is not type(values[1]):
        raise PaCAError(f"the fields {names[0]!r} and {names[1]!r} are a text and messages; write both the same way")
    if values[0] == values[1]:
        raise PaCAError(f"the fields {names[0]!r} and {names[1]!r} are equal: nothing is preferred; remove the row")
    if isinstance(values[0], str) and not any(not is_empty(rest.get(name)) for name in (*_QUESTIONS, *LIST_FIELDS)):
        return _transcripts(rest, values) or _plain(rest, values)
    return [Side(name, *_instruction(rest, value)) for name, value in zip(_NAMES, values, strict=True)]


def _instruction(rest: Row, value: Any) -> tuple[str, Row]:
    """A side as a row of instruction data."""
    if isinstance(value, list) and not _begins_with_answer(value):
        _check_prompt(rest, value)
        rest = {name: given for name, given in rest.items() if name not in ("prompt", *LIST_FIELDS)}
        return _turns_format(value), rest | {"messages": value}
    field = next((name for name in LIST_FIELDS if not is_empty(rest.get(name))), None)
    if field is not None:
        turns = rest[field]
        if not isinstance(turns, list):
            raise PaCAError(f"the field {field!r} is {kind(turns)}, expected a list of messages")
        sharegpt = _turns_format(turns) == "sharegpt"
        if isinstance(value, str):
            value = [{"from": "gpt", "value": value} if sharegpt else {"role": "assistant", "content": value}]
        return _turns_format(turns), rest | {field: turns + value}
    if "prompt" in rest:
        prompt = rest["prompt"]
        if isinstance(prompt, str) and (turns := _transcript(prompt)):
            prompt = turns
        if isinstance(prompt, list) and isinstance(value, str):
            value = [{"role": "assistant", "content": value.strip() if prompt is not rest["prompt"] else value}]
        if isinstance(prompt, str) and isinstance(value, list):
            prompt = [{"role": "user", "content": prompt}]
        return "prompt_completion", rest | {"prompt": prompt, "completion": value}
    question = next((name for name in _QUESTIONS if not is_empty(rest.get(name))), None)
    if question is None:
        raise PaCAError("the answers have no prompt: add 'prompt', or the turns before them")
    if isinstance(value, list):
        raise PaCAError(f"beside {question!r}, the answers must be texts; write the prompt as 'messages'")
    if question == "instruction":
        return "alpaca", rest | {"output": value}
    return "question_answer", rest | {"answer" if question == "question" else "response": value}


def _check_prompt(rest: Row, turns: list[Any]) -> None:
    """Check that a whole conversation has the prompt that stands beside it, too."""
    prompt = rest.get("prompt")
    texts = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)]
    if isinstance(prompt, str) and prompt and prompt not in texts:
        raise PaCAError("no turn of the conversation is the 'prompt' beside it: the prompts differ")
    if isinstance(prompt, list) and turns[: len(prompt)] != prompt:
        raise PaCAError("the conversation does not begin with the 'prompt' beside it: the prompts differ")


def _begins_with_answer(turns: list[Any]) -> bool:
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    return first.get("role", first.get("from")) in ANSWERING


def _turns_format(turns: list[Any]) -> str:
    return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "chat"


def _transcript(text: str) -> list[Row]:
    """The turns of an Anthropic-hh text, without an open last one; none if it is no such text."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[mark], "content": content.strip()} for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def _transcripts(rest: Row, values: list[Any]) -> list[Side]:
    turns = [_transcript(value) for value in values]
    if not all(turns):
        return []
    return [Side(name, "chat", rest | {"messages": side}) for name, side in zip(_NAMES, turns, strict=True)]


def _plain(rest: Row, values: list[Any]) -> list[Side]:
    """Texts without turns: what they have in common is the prompt, up to the last white space."""
    common = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*values, strict=False)))
    end = max(common.rfind(space) for space in " \n\t") + 1
    if not common[:end].strip() or not all(value[end:].strip() for value in values):
        raise PaCAError(
            "the answers have no prompt: add 'prompt', or begin both texts with it (a common beginning, or turns "
            "'Human:' and 'Assistant:')"
        )
    segments = [[{"text": value[:end], "label": False}, {"text": value[end:], "label": True}] for value in values]
    return [Side(n, "segments", rest | {"segments": s}) for n, s in zip(_NAMES, segments, strict=True)]
