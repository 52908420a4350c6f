"""What a row of a data set says as a chat: messages of a role and a content, as chat interfaces store them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raylora.data.task import BadRow, require_text
from raylora.errors import suggest

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


def read_chat(row: Mapping[str, Any]) -> list[Message]:
    """Return a row's messages, from ``messages`` or from ``prompt`` and ``completion`` with an optional ``system``.

    Raises:
        BadRow: they are missing, empty, of an unknown role, or do not end with an answer.
    """
    if row.get("messages") is not None:
        return _ending_in_an_answer(_messages(row["messages"], "messages"))
    if row.get("prompt") is None or row.get("completion") is None:
        there = ", ".join(map(str, row)) or "nothing"
        raise BadRow(f"neither 'messages' nor 'prompt' and 'completion'; it has: {there}")
    chat: list[Message] = []
    if row.get("system") is not None:
        chat.append({"role": "system", "content": require_text(row, "system")})
    chat += _side(row, "prompt", "user")
    return _ending_in_an_answer([*chat, *_side(row, "completion", "assistant")])


def read_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Return what a row asks: its messages up to a user's turn, without the answer if it has one.

    Raises:
        BadRow: they are missing, empty, of an unknown role, or nobody asks anything.
    """
    if row.get("messages") is not None:
        chat = _messages(row["messages"], "messages")
    else:
        if row.get("prompt") is None:
            raise BadRow(f"neither 'messages' nor 'prompt'; it has: {', '.join(map(str, row)) or 'nothing'}")
        system = [] if row.get("system") is None else [{"role": "system", "content": require_text(row, "system")}]
        chat = [*system, *_side(row, "prompt", "user")]
    if chat[-1]["role"] == "assistant":
        chat = chat[:-1]
    if not chat or chat[-1]["role"] != "user":
        raise BadRow("nobody asks anything: the last message must be a user's")
    return chat


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):  # csv files and some data sets hold lists as JSON
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise BadRow(f"{column!r} is text, not a list of messages") from None
    if not isinstance(value, Sequence) or not value:
        raise BadRow(f"{column!r} is not a list of messages" if value else f"{column!r} is empty")
    return [_message(one, f"{column}[{number}]") for number, one in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"{where} is a {type(value).__name__}, not a role and a content")
    role, content, name = value.get("role"), value.get("content"), value.get("name")
    if role not in ROLES:
        known = f"known are {', '.join(ROLES)}"
        hint = suggest(role, ROLES) if isinstance(role, str) else ""
        raise BadRow(f"{where} has the role {role!r}; {known}" + (f"; {hint}" if hint else ""))
    if isinstance(content, list):  # as some interfaces store it, in parts
        content = "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise BadRow(f"{where} has no text: its content is a {type(content).__name__}")
    if not content.strip():
        raise BadRow(f"{where}, the {role}'s, is empty")
    return {"role": role, "content": content, **({"name": str(name)} if name else {})}


def _side(row: Mapping[str, Any], column: str, role: str) -> list[Message]:
    """Return what a column says: a text of one role, or messages."""
    if isinstance(row[column], str):
        return [{"role": role, "content": require_text(row, column)}]
    return _messages(row[column], column)


def _ending_in_an_answer(chat: list[Message]) -> list[Message]:
    if chat[-1]["role"] != "assistant":
        raise BadRow(f"it ends with the {chat[-1]['role']}'s turn: there is no answer to learn")
    if len(chat) == 1:
        raise BadRow("it holds an answer, and nothing that it answers")
    return chat
