"""Chats of rows: `messages` with roles and tools, and ShareGPT's `conversations`, as one kind of messages.

Tool calls may be written as OpenAI's API does (`function` with `name` and `arguments`) or flat; arguments and the list
of tools as objects or as the JSON text of them, which tables have because their columns need one type. Templates get
objects, as transformers' documentation of tool use asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longlora_cli.data.chat_template import Message
from longlora_cli.data.faults import did_you_mean, shown
from longlora_cli.data.row_values import RowFault, checked_text, checked_tree, kind_of_value
from longlora_cli.data.strict_json import parse_json

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_OF_CALL = ("id", "type", "function", "index")
_OF_FUNCTION = ("name", "arguments")


def read_chat(turns: Any, key: str) -> list[Message]:
    """The messages of a chat, checked.

    Args:
        turns: A list of objects with `role` and `content`, or `from` and `value`; the assistant's may have
            `tool_calls`, a tool's `tool_call_id` and `name`.
        key: How the row calls it.

    Returns:
        Messages with the roles system (first only), then user and assistant in turn, the assistant last. After a
        message with `tool_calls` one or more by tool come, and then the assistant again.

    Raises:
        RowFault: A part is missing, mistyped, misspelt or out of order.
    """
    if not isinstance(turns, list):
        raise RowFault(f"{key} is {kind_of_value(turns)}, a list of messages is needed")
    if not turns:
        raise RowFault(f"{key} is empty")
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    _check_order(messages)
    return messages


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a chat may call, each `{"type": "function", "function": {"name": ..., ...}}`.

    Args:
        value: A list of such objects, or of the functions alone, or the JSON text of a list; null and empty are none.

    Raises:
        RowFault: Something else, or a tool without a name.
    """
    value = _from_json(value, "tools")
    if value is None or value in ([], ""):
        return None
    if not isinstance(value, list):
        raise RowFault(f"tools is {kind_of_value(value)}, a list of tools is needed")
    return [_tool(tool, f"tool {number}") for number, tool in enumerate(value, start=1)]


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row without the nulls inside of its tools and tool calls.

    Tables give every object all keys that any of them has, with null for those that it lacks.
    """
    tidy = dict(row)
    if isinstance(tidy.get("tools"), list):
        tidy["tools"] = _pruned(tidy["tools"])
    for key in ("messages", "conversations"):
        if isinstance(tidy.get(key), list):
            tidy[key] = [
                {**turn, "tool_calls": _pruned(turn["tool_calls"])}
                if isinstance(turn, dict) and turn.get("tool_calls")
                else turn
                for turn in tidy[key]
            ]
    return tidy


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(f"message {number} is {kind_of_value(turn)}, an object is needed")
    role_key, content_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    role = _role(turn, role_key, content_key, number)
    message = {"role": _ROLES[role]}
    more = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}.get(message["role"], ())
    for key, value in turn.items():
        # A null key is what datasets writes for a key that only other rows have.
        if key not in (role_key, content_key, *more) and value is not None:
            if key in ("tool_calls", "tool_call_id"):
                by = "the assistant" if key == "tool_calls" else "a tool"
                raise RowFault(f"message {number} by {message['role']} has {key!r}, which only {by} has")
            hint = did_you_mean(key, (role_key, content_key, *more))
            raise RowFault(f"message {number} has the unknown key {shown(key)}{hint}")
    calls = turn.get("tool_calls")
    content = turn.get(content_key)
    name = f"{content_key} of message {number}"
    if role == "function_call":
        calls = _from_json(checked_text(content, name), name)
        calls, content = calls if isinstance(calls, list) else [calls], None
    if content_key not in turn and not calls:
        raise RowFault(f"message {number} has no {content_key!r}")
    if calls:
        content = "" if content is None else content
    may_be_empty = bool(calls) or message["role"] == "tool"
    message["content"] = checked_text(content, name, may_be_empty=may_be_empty)
    if calls:
        return {**message, "tool_calls": _calls(calls, number)}
    given = {key: turn[key] for key in more if turn.get(key) is not None and key != "tool_calls"}
    return message | {key: checked_text(value, f"{key} of message {number}") for key, value in given.items()}


def _role(turn: dict[str, Any], role_key: str, content_key: str, number: int) -> str:
    if role_key not in turn:
        for key in turn:
            if hint := did_you_mean(key, (role_key,)) if key != content_key else "":
                raise RowFault(f"message {number} has the unknown key {shown(key)}{hint}")
        raise RowFault(f"message {number} has no {role_key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        hint = did_you_mean(role, _ROLES) if isinstance(role, str) else ""
        raise RowFault(f"message {number} has the unknown {role_key} {shown(role)}{hint}")
    return role


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    name = f"tool_calls of message {number}"
    if not isinstance(calls, list):
        raise RowFault(f"{name} is {kind_of_value(calls)}, a list is needed")
    return [
        _call(call, f"tool call {place} of message {number}") for place, call in enumerate(calls, start=1)
    ]


def _call(call: Any, name: str) -> dict[str, Any]:
    function = _function(call, name)
    arguments = _from_json(function["arguments"], f"arguments of {name}")
    if not isinstance(arguments, dict):
        raise RowFault(f"arguments of {name} is {kind_of_value(arguments)}, an object is needed")
    if call.get("type") not in (None, "function"):
        raise RowFault(f"type of {name} is {shown(call['type'])}, only 'function' is known")
    made = {
        "type": "function",
        "function": {
            "name": checked_text(function["name"], f"name of {name}"),
            "arguments": checked_tree(arguments, f"arguments of {name}"),
        },
    }
    return made if call.get("id") is None else made | {"id": checked_text(call["id"], f"id of {name}")}


def _function(call: Any, name: str) -> dict[str, Any]:
    """The object with `name` and `arguments`: the call itself, or its `function`."""
    if not isinstance(call, dict):
        raise RowFault(f"{name} is {kind_of_value(call)}, an object is needed")
    function = call.get("function")
    if function is None:
        function = call
    elif not isinstance(function, dict):
        raise RowFault(f"function of {name} is {kind_of_value(function)}, an object is needed")
    for part in (call, function):
        known = _OF_FUNCTION if part is not call else (*_OF_CALL, *_OF_FUNCTION)
        for key, value in part.items():
            if key not in known and value is not None:
                raise RowFault(f"{name} has the unknown key {shown(key)}{did_you_mean(key, known)}")
    for key in _OF_FUNCTION:
        if key not in function:
            raise RowFault(f"{name} has no {key!r}")
    return function


def _tool(tool: Any, name: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RowFault(f"{name} is {kind_of_value(tool)}, an object is needed")
    whole = tool if "function" in tool else {"type": "function", "function": tool}
    function = whole["function"]
    if not isinstance(function, dict):
        raise RowFault(f"function of {name} is {kind_of_value(function)}, an object is needed")
    if "name" not in function:
        hint = next((h for key in function if (h := did_you_mean(key, ("name",)))), "")
        raise RowFault(f"{name} has no 'name'{hint}")
    checked_text(function["name"], f"name of {name}")
    checked: dict[str, Any] = checked_tree(whole, name)
    return checked


def _from_json(value: Any, name: str) -> Any:
    """`value`, decoded where it is the JSON text of an object or a list."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value)
    except RowFault as fault:
        raise RowFault(f"{name}: {fault}") from fault


def _check_order(messages: list[Message]) -> None:
    """Raise `RowFault` at the first message that is out of turn."""
    calls: list[str | None] = []  # not answered yet, by id where they have one
    waits_for: tuple[str, ...] = ("user",)
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number == 1:
            continue
        if role not in waits_for:
            raise RowFault(f"message {number} is by {role}, {' or '.join(waits_for)} must speak here")
        if role == "tool":
            _take(calls, message.get("tool_call_id"), number)
            waits_for = ("tool", "assistant") if calls else ("assistant",)
        elif role == "assistant":
            calls = [call.get("id") for call in message.get("tool_calls", ())]
            waits_for = ("tool",) if calls else ("user",)
        else:
            waits_for = ("assistant",)
    if messages[-1]["role"] != "assistant":
        raise RowFault("the chat does not end with the assistant, so its last turn teaches nothing")


def _take(calls: list[str | None], answered: str | None, number: int) -> None:
    """Take the call that a tool's message answers out of those that wait."""
    if answered is None or all(call is None for call in calls):
        calls.pop(0)
    elif answered in calls:
        calls.remove(answered)
    else:
        raise RowFault(f"message {number} answers the tool call {shown(answered)}, which was not made")
