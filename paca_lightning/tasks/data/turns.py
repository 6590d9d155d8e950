"""Messages of `chat` and `sharegpt` rows: roles, contents, tool calls, reasoning, and marks of what is trained."""

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Message
from paca_lightning.tasks.data.fields import Fields, Row, checked_json, kind, parsed_json

MASKS = ("weight", "train", "training", "loss", "loss_weight")
"""Fields of a message that say whether it is trained: true or false, 1 or 0."""
_PART_MASKS = ("train_detail", "training_detail")
_MARKS = frozenset((*MASKS, *_PART_MASKS))
"""Fields of a message that say which of its characters are trained, as axolotl names them."""
REASONING = ("reasoning_content", "reasoning", "thinking")

_CHAT_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    **_CHAT_ROLES,
}
ANSWERING = frozenset(name for name, role in _SHAREGPT_ROLES.items() if role == "assistant")
"""Names of roles that answer."""
_OF_THE_CALL = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
_OF_THE_CALL -= {"tools", "documents"}
_CALL_ROLES = ("function_call", "tool_call")


class Turns:
    """Converts a list of messages, and collects what it finds in them.

    Args:
        turns: The messages of a row.
        field: The field that holds them, for messages.
        sharegpt: Whether they have `from` or `value` instead of `role` or `content`.

    Attributes:
        messages: The messages as the chat template takes them.
        masks: Whether marked turns are trained, by their number from 0 in `messages`.
        unread: Names of fields that nothing uses.
    """

    def __init__(self, turns: object, field: str, *, sharegpt: bool = False) -> None:
        if not isinstance(turns, list):
            raise PaCAError(f"the field '{field}' is {kind(turns)}, expected a list of messages")
        self.messages: list[Message] = []
        self.masks: dict[int, bool] = {}
        self.unread: list[str] = []
        for i, turn in enumerate(turns):
            if not isinstance(turn, dict):
                raise PaCAError(f"the field '{field}[{i}]' is {kind(turn)}, expected an object")
            fields = Fields(turn, f"{field}[{i}].")
            if sharegpt:
                role = "role" if "role" in turn and "from" not in turn else "from"
                text = "content" if "content" in turn and "value" not in turn else "value"
                self._add(fields, role, text, _SHAREGPT_ROLES)
            else:
                self._add(fields, "role", "content", _CHAT_ROLES)
            self.unread += [f"{field}[].{name}" for name in fields.unread()]

    def _add(self, fields: Fields, role_field: str, content_field: str, roles: dict[str, str]) -> None:
        named = fields.text(role_field)
        if named not in roles:
            known = ", ".join(roles)
            raise PaCAError(f"the field '{fields.where}{role_field}' is {named!r}, expected one of {known}")
        message: Message = {"role": roles[named]}
        if (mask := _mask(fields)) is not None:
            self.masks[len(self.messages)] = mask
        if named in _CALL_ROLES:
            calls = parsed_json(fields.text(content_field), f"{fields.where}{content_field}")
            message |= {"content": "", "tool_calls": tool_calls(calls, f"{fields.where}{content_field}")}
        elif message["role"] == "assistant":
            message |= _assistant(fields, content_field)
        else:
            message["content"] = content(fields, content_field)
            if message["role"] == "tool":
                names = {name: fields.optional_text(name) for name in ("name", "tool_call_id")}
                message |= {name: value for name, value in names.items() if value is not None}
        self.messages.append(message)


def content(fields: Fields, name: str) -> str:
    """The text of a message, whose content is a string or a list of text parts."""
    parts = fields.values.get(name)
    if not isinstance(parts, list):
        return fields.text(name)
    fields.take(name)
    texts = []
    for i, part in enumerate(parts):
        place = f"{fields.where}{name}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            found = repr(part.get("type")) if isinstance(part, dict) else kind(part)
            raise PaCAError(f"the field '{place}' is {found}, expected a part of the type 'text'")
        texts.append(Fields(part, f"{place}.").text("text"))
    return "".join(texts)


def tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them: `{"type": "function", "function": {"name", "arguments"}}` each.

    Args:
        value: One call or a list of them; a call may also be the function itself, and its arguments the JSON of them.
        name: The field that holds them, for messages.

    Raises:
        PaCAError: A call has no name, or is not an object.
    """
    calls = checked_json(value if isinstance(value, list) else [value], name)
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PaCAError(f"the field '{name}' holds {call!r}, expected tool calls with a name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed_json(arguments, f"{name}.arguments") if arguments.strip() else {}
        ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({"type": "function", **ids, "function": {"name": function["name"], "arguments": arguments or {}}})
    return result


def _assistant(fields: Fields, content_field: str) -> Message:
    """Content, tool calls and reasoning of an assistant's message; the content may be empty beside tool calls."""
    message: Message = {}
    for name in ("tool_calls", "function_call"):
        if calls := fields.parsed(name):
            message["tool_calls"] = tool_calls(calls, f"{fields.where}{name}")
    if message and content_field not in fields:
        fields.take(content_field)
        message["content"] = ""
    else:
        message["content"] = content(fields, content_field)
    if (reasoning := fields.optional_text(*REASONING)) is not None:
        message["reasoning_content"] = reasoning
    return message


def _mask(fields: Fields) -> bool | None:
    """Whether a message is marked as trained; None without a mark."""
    if _MARKS.isdisjoint(fields.values):
        return None
    for name in _PART_MASKS:
        if name in fields:
            raise PaCAError(
                f"the field '{fields.where}{name}' trains parts of a message, but a message is trained as a whole or "
                "not at all. Mark whole messages with 'train', or write the row as 'segments'"
            )
    marks = {name: value for name in MASKS if (value := fields.take(name)) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise PaCAError(f"the field '{fields.where}{name}' is {value!r}, expected 0 or 1 (false or true)")
    if len({bool(value) for value in marks.values()}) > 1:
        raise PaCAError(f"the fields {', '.join(map(repr, marks))} of '{fields.where[:-1]}' contradict each other")
    return bool(next(iter(marks.values()))) if marks else None


def system_messages(fields: Fields) -> list[Message]:
    """The system message of a row with a field for it."""
    text = fields.optional_text("system", "system_prompt", "system_message")
    return [] if text is None else [{"role": "system", "content": text}]


def template_arguments(fields: Fields) -> dict[str, Any]:
    """What a row passes to the chat template: tools, documents, and settings such as `enable_thinking`.

    Raises:
        PaCAError: A field is of another type.
    """
    arguments: dict[str, Any] = {}
    for name in ("tools", "documents"):
        if (value := fields.parsed(name)) is not None:
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                raise PaCAError(f"the field '{name}' is {kind(value)}, expected a list of objects")
            arguments[name] = checked_json(value, name)
    if "tools" in arguments:
        arguments["tools"] = [_tool(tool) for tool in arguments["tools"]]
    for name in ("enable_thinking", "reasoning_effort"):
        if (value := fields.take(name)) is not None:
            arguments[name] = checked_json(value, name)
    extra = fields.parsed("chat_template_kwargs")
    if extra is not None and not isinstance(extra, dict):
        raise PaCAError(f"the field 'chat_template_kwargs' is {kind(extra)}, expected an object")
    if extra and (taken := sorted(_OF_THE_CALL & extra.keys())):
        raise PaCAError(
            f"the field 'chat_template_kwargs' sets {', '.join(map(repr, taken))}, which belongs to the call of the "
            "template, not to a row. Set `chat_template` of the data module for another template"
        )
    return arguments | checked_json(extra, "chat_template_kwargs") if extra else arguments


def _tool(tool: Row) -> Row:
    """A tool's schema as chat templates take it."""
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
