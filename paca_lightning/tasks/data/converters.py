"""Rows of each format to conversations. A converter takes a row and yields its conversations."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data import oasst
from paca_lightning.tasks.data.conversation import Conversation, Message, text_document
from paca_lightning.tasks.data.fields import Fields, Row, checked_text, kind, parsed_json
from paca_lightning.tasks.data.turns import Turns, system_messages, template_arguments

TreePaths = Literal["best", "all"]
Converter = Callable[[Any], Iterator[Conversation]]
"""Takes a row; of `oasst_messages`, (number, row) pairs of a tree."""

LIST_FIELDS = ("messages", "conversations", "conversation")
"""Fields that may hold the turns of a conversation."""
QUESTION_ANSWER = (("question", "answer"), ("query", "response"), ("question", "response"))
"""Pairs of fields that hold a question and its answer."""
ROW_MARKS = ("weight", "train", "training", "loss_weight")
"""Fields of a row that are 0 or false if it is not to be trained."""
GUANACO_MARK = re.compile(r"### (Human|Assistant):")

_GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}


def converter(format: str, text_column: str, tree_paths: TreePaths) -> Converter:
    """The converter of a format.

    Args:
        format: One of `formats.Format`.
        text_column: The field that holds the text of `guanaco` and `text` rows.
        tree_paths: "best" takes the best-ranked reply at every message of a tree, "all" takes every path.
    """
    converters: dict[str, Converter] = {
        "chat": partial(_from_turns, sharegpt=False),
        "sharegpt": partial(_from_turns, sharegpt=True),
        "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt,
        "question_answer": _from_question,
        "text": partial(_from_text, field=text_column),
        "segments": _from_segments,
        "guanaco": partial(_from_guanaco, field=text_column),
        "oasst": partial(_from_tree, paths=tree_paths),
        "oasst_messages": partial(_from_messages, paths=tree_paths),
    }
    return converters[format]


def _from_turns(row: Row, sharegpt: bool) -> Iterator[Conversation]:
    fields = Fields(row)
    name = next((name for name in LIST_FIELDS if name in row), "messages")
    if name not in row:
        raise PaCAError(f"the field 'messages' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    written = fields.take(name)
    if isinstance(written, str) and written.lstrip().startswith("["):  # JSON in JSON, as from a table
        written = parsed_json(written, name)
    turns = Turns(row[name] if written is None else written, name, sharegpt=sharegpt)
    yield _conversation(fields, turns.messages, turns.masks, turns.unread)


def _conversation(
    fields: Fields, messages: list[Message], masks: dict[int, bool] | None = None, unread: list[str] | None = None
) -> Conversation:
    """A conversation with the system message and the template arguments of its row."""
    for name in ROW_MARKS:
        if isinstance(mark := fields.values.get(name), bool | int | float) and not mark:
            raise PaCAError(f"the field '{name}' is {mark!r}: the whole row is marked as not trained; remove it")
    system = system_messages(fields)
    if system and messages and messages[0]["role"] == "system":
        if system != messages[:1]:
            raise PaCAError("the row has a system text of its own and a system message, which differ; keep one")
        system = []
    arguments = template_arguments(fields)
    masks = {number + len(system): mask for number, mask in (masks or {}).items()}
    return Conversation([*system, *messages], arguments, masks, (*fields.unread(), *dict.fromkeys(unread or ())))


def _from_alpaca(row: Row) -> Iterator[Conversation]:
    fields = Fields(row)
    as_dolly = "output" not in row and "response" in row
    user = fields.text("instruction")
    addition = fields.optional_text(*(("input", "context") if as_dolly else ("input",)))
    if addition is not None:
        user = f"{user}\n\n{addition}"
    answer = fields.text("response" if as_dolly else "output")
    messages = [*_history(fields), {"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    yield _conversation(fields, messages)


def _history(fields: Fields) -> list[Message]:
    """Earlier turns: a list of [question, answer] pairs."""
    messages: list[Message] = []
    pairs = fields.parsed("history") or []
    if not isinstance(pairs, list):
        raise PaCAError(f"the field 'history' is {kind(pairs)}, expected a list of [question, answer] pairs")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise PaCAError(f"the field 'history[{i}]' is {pair!r}, expected a [question, answer] pair")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": checked_text(text, f"history[{i}]")})
    return messages


def _from_prompt(row: Row) -> Iterator[Conversation]:
    fields = Fields(row)
    if not isinstance(row.get("prompt"), list):
        messages = [{"role": "user", "content": fields.text("prompt")}]
        yield _conversation(fields, [*messages, {"role": "assistant", "content": fields.text("completion")}])
        return
    prompt = Turns(fields.take("prompt"), "prompt")
    completion = Turns(fields.take("completion"), "completion")
    count = len(prompt.messages)
    masks = {i: False for i, message in enumerate(prompt.messages) if message["role"] == "assistant"}
    masks |= {number + count: mask for number, mask in completion.masks.items()}
    yield _conversation(fields, prompt.messages + completion.messages, masks, prompt.unread + completion.unread)


def _from_question(row: Row) -> Iterator[Conversation]:
    fields = Fields(row)
    question, answer = next((names for names in QUESTION_ANSWER if set(names) <= row.keys()), QUESTION_ANSWER[0])
    user = fields.text(question)
    if (article := fields.optional_text("article")) is not None:
        user = f"{article}\n===\n{user}"
    elif (context := fields.optional_text("context")) is not None:
        user = f"Context: {context}\nQuestion: {user}"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": fields.text(answer)}]
    yield _conversation(fields, messages)


def _from_segments(row: Row) -> Iterator[Conversation]:
    fields = Fields(row)
    segments = fields.take("segments")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise PaCAError(f"the field 'segments' is {kind(segments)}, expected a list of objects with text and label")
    text, spans, unread = "", [], fields.unread()
    for i, segment in enumerate(segments):
        part = Fields(segment, f"segments[{i}].")
        start, trained = len(text), part.take("label")
        text += part.text("text")
        if not isinstance(trained, bool):
            raise PaCAError(f"the field 'segments[{i}].label' is {trained!r}, expected true or false")
        if trained:
            spans.append((start, len(text)))
        unread += [f"segments[].{name}" for name in part.unread()]
    if not spans:
        raise PaCAError("no segment is trained ('label': true): nothing to learn from; remove the row")
    yield Conversation([{"role": "text", "content": text, "spans": spans}], unread=tuple(dict.fromkeys(unread)))


def _from_text(row: Row, field: str) -> Iterator[Conversation]:
    fields = Fields(row)
    text = fields.text(field)
    if not text.strip():
        raise PaCAError(f"the field '{field}' is empty; remove the row")
    yield text_document(text, tuple(fields.unread()))


def _from_guanaco(row: Row, field: str) -> Iterator[Conversation]:
    fields = Fields(row)
    before, *parts = GUANACO_MARK.split(fields.text(field))
    if before.strip() or not parts:
        raise PaCAError(f"the field '{field}' does not start with '### Human:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    yield _conversation(fields, [{"role": _GUANACO_ROLES[mark], "content": text.strip()} for mark, text in turns])


def _from_tree(row: Row, paths: TreePaths) -> Iterator[Conversation]:
    if "prompt" not in row and {"text", "role"} <= row.keys():  # the tree's first message itself
        yield from _from_paths(row, paths)
        return
    fields = Fields(row)
    prompt, _ = fields.take("prompt"), fields.take("message_tree_id")
    if not isinstance(prompt, dict):
        raise PaCAError(f"the field 'prompt' is {kind(prompt)}, expected the tree's first message")
    yield from _from_paths(prompt, paths, tuple(fields.unread()))


def _from_messages(rows: list[tuple[int, Row]], paths: TreePaths) -> Iterator[Conversation]:
    yield from _from_paths(oasst.assemble(rows), paths)


def _from_paths(prompt: Row, paths: TreePaths, unread: tuple[str, ...] = ()) -> Iterator[Conversation]:
    for path in oasst.best_path(prompt) if paths == "best" else oasst.all_paths(prompt):
        messages, left = [], dict.fromkeys(unread)
        for node in path:
            fields = Fields(node, "prompt...")
            messages.append({"role": oasst.role(node), "content": fields.text("text")})
            left |= dict.fromkeys(name for name in fields.unread() if name not in oasst.FIELDS)
        yield Conversation(messages, unread=tuple(left))
