"""Chats with tools as their template writes them: what is the template's own text, and what each message says.

As in `chat_template`, the chat is rendered twice, the second time with placeholders: here for contents, for the names
and texts in tool calls, and for whatever in the list of tools would read as a control token. An assistant's turn with
tool calls is all that the model has to write: from behind the prompt for an answer to the token that ends answers,
markup such as `<tool_call>` included.

Tools are never dropped: a template that does not show one, or a call of it, is refused.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from longlora_cli.data.encoding import SafeEncoder
from longlora_cli.data.faults import shown
from longlora_cli.errors import DataError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Render = Callable[[Messages, Tools | None, bool], str]
"""Messages, tools, and whether the prompt for an answer follows -> the template's text."""

_RULE = "What a model may call, and its calls, stand in what it reads; nothing of them is left out."
_HINT = "Choose with --model one whose chat template shows tools."


@dataclass(frozen=True)
class _Slot:
    """A text that goes into the template.

    Args:
        message: Its message; None for the list of tools.
        value: The text.
        what: Its name in messages; empty where the template need not show it.
    """

    message: int | None
    value: str
    what: str


@dataclass(frozen=True)
class _Part:
    """A piece of a rendering: the template's own text (`slot` is None), or what the template made of a slot."""

    text: str
    slot: _Slot | None


def has_tools(messages: Messages, tools: Tools | None) -> bool:
    """Whether a chat names, calls or answers for tools."""
    return bool(tools) or any("tool_calls" in m or m["role"] == "tool" for m in messages)


def tool_layout(
    messages: Messages, tools: Tools | None, *, prompt: bool, render: Render, encoder: SafeEncoder
) -> list[tuple[str, int | None]]:
    """The rendering of a chat with tools in parts.

    Args:
        messages: As `chat_rows.read_chat` gives them.
        tools: As `chat_rows.read_tools` gives them.
        prompt: End with the header of the assistant's next turn.
        render: The template.
        encoder: Knows the special tokens' names.

    Returns:
        (text, None) for the template's own text, in which special tokens go by their usual names, and (text, message)
        for what a message says, in which the template's special tokens go by their secret names already. Template text
        comes first, last and between messages. Texts of tools belong to the first message, which is never learnt.

    Raises:
        DataError: The template refuses the chat; shows a message, a tool or a call not at all, or changed; or it cannot
            be told where the turn of a call begins or ends. Also a control token's name where it cannot be made plain.
    """
    marks = _Marks(encoder)
    marked_tools = [marks.tool(tool) for tool in tools] if tools else None
    marked = [marks.message(message, number) for number, message in enumerate(messages)]
    _refuse_control_names([marked, marked_tools], encoder)
    rendered = render(messages, tools, prompt)
    skeleton = _cut(render(marked, marked_tools, prompt), marks.slots)
    _require_shown(marks.slots.values(), skeleton)
    _require_arguments(messages, rendered, lambda changed: render(changed, tools, prompt))
    parts = _as_written(rendered, skeleton, encoder)
    turns = _Turns.of(render, encoder)
    calling = {
        number: _turn(parts, number, turns, partial(render, messages[:number], tools, True))
        for number, message in enumerate(messages)
        if message.get("tool_calls")
    }
    return _merged(parts, calling, encoder)


def _merged(
    parts: list[_Part], calling: dict[int, _Turn], encoder: SafeEncoder
) -> list[tuple[str, int | None]]:
    """The layout of the parts, with one part for each turn of `calling` (by message)."""
    # What a call says may be repeated in other turns, where it is not learnt: it is the first message's there.
    owners = [0 if p.slot is None or p.slot.message in (None, *calling) else p.slot.message for p in parts]
    layout: list[tuple[str, int | None]] = [
        (part.text, None if part.slot is None else owner) for part, owner in zip(parts, owners, strict=True)
    ]
    for number, turn in sorted(calling.items(), reverse=True):  # from the end, so that indices stay right
        head, tail = layout[turn.first - 1][0], layout[turn.last + 1][0]
        inside = "".join(encoder.secret(t) if m is None else t for t, m in layout[turn.first : turn.last + 1])
        body = encoder.secret(head[turn.start :]) + inside + encoder.secret(tail[: turn.stop])
        layout[turn.first - 1 : turn.last + 2] = [
            (head[: turn.start], None),
            (body, number),
            (tail[turn.stop :], None),
        ]
    return layout


class _Marks:
    """Placeholders for texts.

    Args:
        encoder: Knows the special tokens' names.
    """

    def __init__(self, encoder: SafeEncoder) -> None:
        self.slots: dict[str, _Slot] = {}
        self._encoder = encoder
        # Drawn anew, so that texts without a placeholder cannot hold one.
        self._nonce = secrets.token_hex(8)

    def message(self, message: dict[str, Any], number: int) -> dict[str, Any]:
        """The message with a placeholder for each text that it says."""
        marked = dict(message)
        if message["content"]:  # templates may write an empty one otherwise
            what = f"message {number + 1} ({message['role']})"
            marked["content"] = self._mark(_Slot(number, message["content"], what))
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(call, number) for call in message["tool_calls"]]
        return marked

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        """The tool with a placeholder for its name and for each text that holds a control token's name."""
        function = tool["function"]
        name = self._mark(_Slot(None, function["name"], f"the tool {shown(function['name'])}"))
        unsafe: dict[str, Any] = _mapped(tool, self._mark_unsafe)
        return unsafe | {"function": unsafe["function"] | {"name": name}}

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        what = f"the call of {shown(function['name'])} in message {number + 1}"
        name = self._mark(_Slot(number, function["name"], what))

        def mark(text: str) -> str:
            return self._mark(_Slot(number, text, what)) if text else text

        return call | {"function": {"name": name, "arguments": _mapped(function["arguments"], mark)}}

    def _mark_unsafe(self, text: str) -> str:
        return text if self._encoder.secret(text) == text else self._mark(_Slot(None, text, ""))

    def _mark(self, slot: _Slot) -> str:
        mark = f"slot{self._nonce}n{len(self.slots)}x"
        self.slots[mark] = slot
        return mark


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A tree with each text of it changed, but no key."""
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value:
            yield from _strings(part)
        if isinstance(value, dict):
            yield from _strings(list(value.values()))


def _refuse_control_names(marked: Any, encoder: SafeEncoder) -> None:
    """Texts without a placeholder are taken for the template's own, so none may be a control token's name."""
    for text in _strings(marked):
        if encoder.secret(text) != text:
            raise DataError(
                f"{shown(text)}, a key or an id of a tool or of a call, holds the name of a control token",
                rule="What users write never becomes a control token.",
            )


def _cut(skeleton: str, slots: dict[str, _Slot]) -> list[_Part]:
    """A rendering with placeholders, cut at them: template text first, last and between slots."""
    found = re.split(f"({'|'.join(slots)})", skeleton)
    return [_Part("" if n % 2 else text, slots[text] if n % 2 else None) for n, text in enumerate(found)]


def _require_shown(slots: Iterable[_Slot], skeleton: list[_Part]) -> None:
    there = {id(part.slot) for part in skeleton}
    lost = next((slot.what for slot in slots if slot.what and id(slot) not in there), None)
    if lost:
        raise DataError(f"the chat template does not show {lost}", rule=_RULE, hint=_HINT)


def _require_arguments(messages: Messages, rendered: str, render: Callable[[Messages], str]) -> None:
    """Numbers have no placeholder: where a call has nothing else, the template must write something else without."""
    for number, message in enumerate(messages):
        for place, call in enumerate(message.get("tool_calls", ())):
            function = call["function"]
            if not function["arguments"] or any(_strings(list(function["arguments"].values()))):
                continue
            calls = list(message["tool_calls"])
            calls[place] = call | {"function": function | {"arguments": {}}}
            if (
                render([*messages[:number], message | {"tool_calls": calls}, *messages[number + 1 :]])
                == rendered
            ):
                name = shown(function["name"])
                raise DataError(
                    f"the chat template does not show the arguments of {name} in message {number + 1}",
                    rule=_RULE,
                    hint=_HINT,
                )


def _as_written(rendered: str, skeleton: list[_Part], encoder: SafeEncoder) -> list[_Part]:
    """The parts of a skeleton with the texts that stand in the rendering."""
    parts: list[_Part] = []
    place = 0
    for index, part in enumerate(skeleton):
        text = part.text
        if part.slot is not None:
            text = _value(rendered, place, part.slot.value, skeleton[index + 1].text, encoder)
        if not rendered.startswith(text, place) or (
            index == len(skeleton) - 1 and place + len(text) != len(rendered)
        ):
            what = next((p.slot.what for p in reversed(skeleton[: index + 1]) if p.slot), "") or "the tools"
            raise DataError(
                f"the chat template changes {what} so that it cannot be told from the template's own text"
            )
        parts.append(_Part(text, part.slot))
        place += len(text)
    return parts


def _value(rendered: str, place: int, value: str, following: str, encoder: SafeEncoder) -> str:
    """A slot's value as the template wrote it at `place`, before its own text `following`.

    As given, stripped, or as a text in JSON or Python; changed otherwise only where no special token's name is in it.
    """
    written = [value, value.strip(), value.lstrip(), value.rstrip(), repr(value)[1:-1]]
    written += [json.dumps(value, ensure_ascii=only_ascii)[1:-1] for only_ascii in (False, True)]
    for text in written:
        if rendered.startswith(text + following, place):
            return text
    end = rendered.find(following, place) if following else len(rendered)
    text = rendered[place:end] if end >= 0 else ""
    return text if encoder.secret(value) == value and encoder.secret(text) == text else value


@dataclass(frozen=True)
class _Turns:
    """How the template begins and ends an answer.

    Args:
        prompt: What it writes to ask for an answer; empty where it writes nothing of its own.
        end_token: The name of the special token that it puts after an answer.
    """

    prompt: str
    end_token: str | None

    @classmethod
    def of(cls, render: Render, encoder: SafeEncoder) -> _Turns:
        """Of a question and its answer."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        plain, asked = render([question], None, False), render([question], None, True)
        _, _, behind = render([question, answer], None, False).rpartition("answer")
        prompt = asked[len(plain) :] if asked.startswith(plain) else ""
        return cls(prompt, encoder.special_name_at_start(behind.lstrip()))


@dataclass(frozen=True)
class _Turn:
    """A turn with tool calls: its first and last slot, and its start and stop in the template text around them."""

    first: int
    last: int
    start: int
    stop: int


def _turn(parts: list[_Part], number: int, turns: _Turns, before: Callable[[], str]) -> _Turn:
    first = next(n for n, part in enumerate(parts) if part.slot and part.slot.message == number)
    head = parts[first - 1].text
    start = head.rfind(turns.prompt) + len(turns.prompt) if turns.prompt in head and turns.prompt else -1
    if start < 0:
        asked, read = before(), "".join(part.text for part in parts[:first])
        start = len(head) - len(read) + len(asked) if read.startswith(asked) else -1
    last = first
    stop = -1
    while turns.end_token and last < len(parts) and (slot := parts[last].slot) and slot.message == number:
        stop = parts[last + 1].text.find(turns.end_token)
        if stop >= 0:
            break
        last += 2
    if start < 0 or stop < 0:
        end = "begins" if start < 0 else "ends"
        raise DataError(
            f"it cannot be told where the chat template {end} the turn of message {number + 1}, a tool call"
        )
    return _Turn(first, last, start, stop)
