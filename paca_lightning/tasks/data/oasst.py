"""Paths through OpenAssistant (OASST1) message trees.

A node is `{"message_id", "text", "role": "prompter" | "assistant", "rank": int | null, "deleted": bool, "replies":
[node]}`; a tree is given by its first prompt. Rank 0 is the reply that annotators preferred. Schema:
https://projects.laion.ai/Open-Assistant/docs/data/schemas
"""

from collections.abc import Iterator
from typing import Any

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.fields import kind

Node = dict[str, Any]

FIELDS = frozenset({"message_id", "parent_id", "message_tree_id", "text", "role", "rank", "deleted", "replies"})
"""Fields of a node that decide which paths are taken, or are the conversation itself."""

_ROLES = {"prompter": "user", "assistant": "assistant"}


def role(node: Node) -> str:
    """The chat role of a node.

    Raises:
        PaCAError: The node's role is neither prompter nor assistant.
    """
    found = node.get("role")
    if not isinstance(found, str) or found not in _ROLES:
        raise PaCAError(f"the field 'role' of {_name(node)} is {found!r}, expected 'prompter' or 'assistant'")
    return _ROLES[found]


def best_path(prompt: Node) -> Iterator[list[Node]]:
    """Yield the path that follows the best-ranked reply at every message."""
    path = [prompt]
    while replies := _replies(path[-1]):
        path.append(replies[0])
    yield path


def all_paths(prompt: Node) -> Iterator[list[Node]]:
    """Yield every path from the first prompt to a last assistant message, the best-ranked first."""
    stack = [[prompt]]
    while stack:
        path = stack.pop()
        if replies := _replies(path[-1]):
            stack.extend([*path, reply] for reply in reversed(replies))
        else:
            yield path


def assemble(rows: list[tuple[int, Node]]) -> Node:
    """Build a tree from its messages, given as (row number, message), and return its first prompt.

    Raises:
        PaCAError: A parent is not among the messages, two have one id, or there is not exactly one first prompt.
    """
    nodes: dict[Any, Node] = {}
    for number, message in rows:
        found = identity(message, "message_id")
        if found in nodes:
            raise PaCAError(f"the field 'message_id' of row {number} is {found!r}, as that of an earlier row")
        nodes[found] = {**message, "replies": []}
    roots = []
    for number, message in rows:
        node, parent = nodes[message.get("message_id")], identity(message, "parent_id")
        if parent is None:
            roots.append(node)
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            raise PaCAError(
                f"the field 'parent_id' of row {number} is {parent!r}, which is not among the messages of the tree "
                f"{message.get('message_tree_id')!r}; keep the rows of a tree together"
            )
    if len(roots) != 1:
        raise PaCAError(f"the tree has {len(roots)} messages without a 'parent_id', expected one")
    return roots[0]


def identity(message: Node, field: str) -> str | int | None:
    """The field of a message that identifies it, its parent or its tree.

    Raises:
        PaCAError: It is neither a text nor a number.
    """
    found = message.get(field)
    if found is not None and not isinstance(found, str | int):
        raise PaCAError(f"the field '{field}' is {kind(found)}, expected a text or a number")
    return found


def _replies(node: Node) -> list[Node]:
    """A node's replies, best rank first, without deleted messages and unanswered prompts."""
    replies = [reply for reply in _listed_replies(node) if not reply.get("deleted")]
    return sorted((reply for reply in replies if role(reply) == "assistant" or _replies(reply)), key=_rank)


def _listed_replies(node: Node) -> list[Node]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise PaCAError(f"the field 'replies' of {_name(node)} is not a list of messages")
    return replies


def _rank(node: Node) -> float:
    rank = node.get("rank")
    if rank is None:
        return float("inf")
    if not isinstance(rank, int | float):
        raise PaCAError(f"the field 'rank' of {_name(node)} is {rank!r}, expected a number or null")
    return rank


def _name(node: Node) -> str:
    return f"message {node['message_id']!r}" if "message_id" in node else "a message"
