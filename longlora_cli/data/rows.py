"""Rows of files and datasets: find out which format a row has, check it, make a text or a chat of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from longlora_cli.data.chat_rows import read_chat, read_tools
from longlora_cli.data.chat_template import Message
from longlora_cli.data.faults import did_you_mean, shown
from longlora_cli.data.row_values import RowFault, checked_text, kind_of_value

__all__ = [
    "FORMATS",
    "KEYS",
    "Format",
    "Row",
    "RowFault",
    "checked_text",
    "keys_of",
    "read_row",
    "unknown_keys",
]

# A key is a misspelt one, and not another, from this likeness on: `txet` for text, but not `one` for context.
_LIKENESS = 0.7
_LOOKED_AT = 60  # characters of a key
# A chat is rendered and labelled whole, with 50 bytes of memory for a byte of its text; a message, or an object of its
# tools, takes as much as 1 KiB of text.
_MOST_CHAT_BYTES = 10 << 20
_OBJECT_BYTES = 1 << 10


@dataclass(frozen=True)
class Exchange:
    """A question and what answers it.

    Args:
        asked: Messages up to the answer.
        answers: Texts that are all right; the first one is learnt.
        context: The part of the question that it is about, where the row keeps the two apart.
    """

    asked: list[Message]
    answers: list[str]
    context: str = ""


@dataclass(frozen=True)
class Row:
    """What a row holds.

    Args:
        content: A text or the messages of a chat.
        format: The format's name.
        tools: What the chat may call.
        exchanges: Gives what evaluation can ask: of a row with several questions each for itself; nothing of a text.
            Not made before it is needed, for each question has its context before it.
    """

    content: str | list[Message]
    format: str
    tools: list[dict[str, Any]] | None = None
    exchanges: Callable[[], list[Exchange]] = list


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Args:
        name: As `--format` calls it.
        needs: The keys that a row of it has; they make it known.
        takes: Keys that it may have.
        read: Makes the row.
    """

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[dict[str, Any]], Row]


def read_row(row: Any, name: str | None = None) -> Row:
    """The text or chat of one row.

    Args:
        row: A decoded JSON object; keys besides those of its format (ids, sources, ...) are left alone.
        name: Its format; None finds it by the keys. In tables every row has every key, and a null is what a row lacks.

    Raises:
        RowFault: The row is of no known format, of two, or a part of it is missing, mistyped or out of order.
    """
    if not isinstance(row, dict):
        raise RowFault(f"a row is a JSON object, not {kind_of_value(row)}")
    if reason := unknown_keys(row, name):
        raise RowFault(reason)
    form = _BY_NAME[name] if name else _found(row)
    if "tools" not in form.takes and row.get("tools"):
        raise RowFault(f"the row has tools, for which the format {form.name} has no place; use messages")
    if form.name != "text":
        _refuse_long_chat([row.get(key) for key in (*form.needs, *form.takes)])
    return form.read(row)


def _refuse_long_chat(values: list[Any]) -> None:
    """Raise where a chat takes more memory than there is for one; no text is copied that is longer than it may be."""
    waiting, total_bytes = values, 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            is_long = value.isascii() or len(value) > _MOST_CHAT_BYTES
            total_bytes += len(value) if is_long else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            total_bytes += _OBJECT_BYTES
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        if total_bytes > _MOST_CHAT_BYTES:
            raise RowFault(
                f"the chat has more than {_MOST_CHAT_BYTES >> 20} MiB of text, or than "
                f"{_MOST_CHAT_BYTES // _OBJECT_BYTES:,} messages, which is more than one chat may have",
                hint="Make it several rows, or a text.",
            )


def keys_of(name: str | None) -> frozenset[str]:
    """The keys that are read of a row of this format, or of any."""
    return frozenset((*_BY_NAME[name].needs, *_BY_NAME[name].takes)) if name else KEYS


def unknown_keys(keys: Iterable[str], name: str | None = None) -> str | None:
    """Why keys (or columns) can be no row's of this format, or of any; None where they can."""
    row = list(keys)
    known = [_BY_NAME[name]] if name else FORMATS
    fitting = [form for form in known if _NEEDS[form.name].issubset(row)]
    if fitting:
        return _misspelt_option(row, fitting)
    wanted = keys_of(name)
    for key in row:
        if key not in KEYS and (meant := difflib.get_close_matches(key[:_LOOKED_AT], wanted, 1, _LIKENESS)):
            return f"unknown key {shown(key)}; did you mean {meant[0]}?"
    if not row:
        return f"the row is empty; a row has {_KINDS}"
    has = ", ".join(shown(key).strip(chr(39)) for key in row[:8])
    if name:
        missing = " and ".join(repr(key) for key in known[0].needs if key not in row)
        return f"a row of the format {name} has {missing}; this one has {has}"
    # The format that most of its keys speak for, those that it may have too.
    half = max(FORMATS, key=lambda form: (_share(row, form.needs), sum(key in row for key in form.takes)))
    if not any(key in row for key in half.needs):
        return f"a row has {_KINDS}; this one has {has}"
    there = " and ".join(repr(key) for key in half.needs if key in row)
    return f"{there} without {' and '.join(repr(key) for key in half.needs if key not in row)}"


def _share(row: list[str], keys: tuple[str, ...]) -> float:
    return sum(key in row for key in keys) / len(keys)


def _misspelt_option(row: list[str], forms: list[Format]) -> str | None:
    """A key that is meant to be one which a format may have."""
    others = [key[:_LOOKED_AT] for key in row if key not in KEYS]
    if not others:  # comparing takes as long as all the rest of a short row
        return None
    for option in {key for form in forms for key in form.takes if key not in row}:
        if like := difflib.get_close_matches(option, others, 1, _LIKENESS):
            return f"unknown key {shown(like[0])}; did you mean {option}?"
    return None


def _found(row: dict[str, Any]) -> Format:
    """The format whose values are there, else whose keys are."""
    there = [form for form in FORMATS if _NEEDS[form.name] <= row.keys()]
    full = [form for form in there if all(row[key] is not None for key in form.needs)]
    if len(full) > 1:
        names = [form.name for form in full]
        raise RowFault(
            f"the row has the keys of {len(full)} formats: {' and '.join(names)}",
            hint=f"Say which one prepare shall read, --format {' or --format '.join(names)}, or leave keys out.",
        )
    some = [form for form in there if any(row[key] is not None for key in form.needs)]
    return (full + some + there)[0]


def _text(row: dict[str, Any]) -> Row:
    return Row(checked_text(row["text"], "text"), "text")


def _messages(row: dict[str, Any]) -> Row:
    return _chat(row, "messages", "messages")


def _sharegpt(row: dict[str, Any]) -> Row:
    return _chat(row, "conversations", "sharegpt")


def _chat(row: dict[str, Any], key: str, name: str) -> Row:
    messages, tools = read_chat(row[key], key), read_tools(row.get("tools"))
    last = messages[-1]

    def exchanges() -> list[Exchange]:
        return [] if last.get("tool_calls") else [Exchange(messages[:-1], [last["content"]])]

    return Row(messages, name, tools, exchanges)


def _completion(row: dict[str, Any]) -> Row:
    answer = [checked_text(row["completion"], "completion")]
    return _single(checked_text(row["prompt"], "prompt"), answer, "prompt")


def _outputs(row: dict[str, Any]) -> Row:
    return _single(checked_text(row["input"], "input"), _answers(row["outputs"], "outputs"), "outputs")


def _alpaca(row: dict[str, Any]) -> Row:
    question = checked_text(row["instruction"], "instruction")
    if row.get("input") is not None:
        question = _joined(question, checked_text(row["input"], "input", may_be_empty=True))
    return _single(question, [checked_text(row["output"], "output")], "alpaca")


def _longbench(row: dict[str, Any]) -> Row:
    context = checked_text(row["context"], "context")
    asked = checked_text(row["input"], "input", may_be_empty=True)
    return _single(_joined(context, asked), _answers(row["answers"], "answers"), "longbench", context)


def _questions(row: dict[str, Any]) -> Row:
    """A context and its questions in one chat: the context is read once, in the first turn."""
    context, questions = checked_text(row["context"], "context"), row["questions"]
    if not isinstance(questions, list):
        raise RowFault(f"questions is {kind_of_value(questions)}, a list of questions is needed")
    if not questions:
        raise RowFault("questions is empty")
    pairs = [_question(question, f"question {number}") for number, question in enumerate(questions, start=1)]
    messages: list[Message] = []
    for asked, answers in pairs:
        messages += _turns(asked if messages else _joined(context, asked), answers)

    def exchanges() -> list[Exchange]:
        return [Exchange([_user(_joined(context, asked))], answers, context) for asked, answers in pairs]

    return Row(messages, "questions", exchanges=exchanges)


def _question(question: Any, name: str) -> tuple[str, list[str]]:
    keys = ("input", "answers")
    if not isinstance(question, dict):
        raise RowFault(f"{name} is {kind_of_value(question)}, an object is needed")
    for key in question:
        if key not in keys and (hint := did_you_mean(key, [k for k in keys if k not in question])):
            raise RowFault(f"{name} has the unknown key {shown(key)}{hint}")
    for key in keys:
        if key not in question:
            raise RowFault(f"{name} has no {key!r}")
    asked = checked_text(question["input"], f"input of {name}")
    return asked, _answers(question["answers"], f"answers of {name}")


def _answers(value: Any, name: str) -> list[str]:
    """One answer, or several that are all right."""
    if not isinstance(value, list):
        return [checked_text(value, name)]
    if not value:
        raise RowFault(f"{name} is empty")
    return [checked_text(answer, name) for answer in value]


def _single(question: str, answers: list[str], name: str, context: str = "") -> Row:
    messages = _turns(question, answers)
    return Row(messages, name, exchanges=lambda: [Exchange(messages[:1], answers, context)])


def _turns(question: str, answers: list[str]) -> list[Message]:
    return [_user(question), {"role": "assistant", "content": answers[0]}]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _joined(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if second and not second.isspace() else first


FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), ("tools",), _messages),
    Format("sharegpt", ("conversations",), ("tools",), _sharegpt),
    Format("prompt", ("prompt", "completion"), (), _completion),
    Format("outputs", ("input", "outputs"), (), _outputs),
    Format("alpaca", ("instruction", "output"), ("input",), _alpaca),
    Format("longbench", ("context", "input", "answers"), (), _longbench),
    Format("questions", ("context", "questions"), (), _questions),
    Format("text", ("text",), (), _text),
)
"""All formats of rows; adding one means adding a line here and a name to `--format`."""

_BY_NAME = {form.name: form for form in FORMATS}
_NEEDS = {form.name: frozenset(form.needs) for form in FORMATS}
KEYS: frozenset[str] = frozenset(key for form in FORMATS for key in (*form.needs, *form.takes))
"""Keys of a row that are read; others (ids, sources, ...) are left alone."""
_KINDS = ", ".join(" + ".join(form.needs) for form in FORMATS)
