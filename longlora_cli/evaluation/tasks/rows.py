"""Questions from a user's file: rows with an input and what the answer should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_cli.data.chat_template import Message, encode_prompt
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.faults import Faults
from longlora_cli.data.readers.json_rows import json_lines
from longlora_cli.data.rows import RowFault, read_row, unknown_keys
from longlora_cli.data.tool_turns import Tools, has_tools
from longlora_cli.errors import DataError
from longlora_cli.evaluation.generation import Question, hash_sample
from longlora_cli.evaluation.tasks.sample import without

TASK = "generate"


@dataclass(frozen=True)
class Row:
    """One question of a file.

    Args:
        place: Its line; with the question's number where the line has several, `3.2`.
        messages: Up to the answer.
        references: Answers that are all right.
        tools: What the chat may call.
        context: The part of the question that it is about, where the file keeps the two apart.
    """

    place: str
    messages: list[Message]
    references: list[str]
    tools: Tools | None = None
    context: str = ""


def read_rows(path: Path, *, max_samples: int | None = None) -> list[Row]:
    """Read and check a .jsonl file, compressed or not, as strictly as `prepare` does.

    A row is of any format that `data.rows` knows but a text: `input` and `outputs`, `prompt` and `completion`,
    LongBench's, Alpaca's, several `questions` about a `context` (each is asked for itself), or a chat, whose last turn
    is the assistant's and is the reference.

    Args:
        path: The file.
        max_samples: Only this many questions are used; the rows after them are not looked at.

    Raises:
        DataError: There is no such file, it is empty, or rows cannot be used; up to 20 faults are told with
            `file:line`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    faults = Faults(str(path))
    rows: list[Row] = []
    if max_samples != 0:
        for line, value, _ in json_lines(path, faults):
            try:
                rows += _questions_of(line, value)
            except RowFault as fault:
                faults.add(line, str(fault), hint=fault.hint)
            if faults.is_full or (max_samples is not None and len(rows) >= max_samples):
                break
    if not rows and not len(faults):
        faults.add(1, "the file is empty")
    faults.raise_if_any()
    return rows[:max_samples]


def _questions_of(line: int, value: Any) -> list[Row]:
    if isinstance(value, RowFault):
        raise value
    # A text beside a chat is no second meaning here: only the chat has an answer.
    chat = {key: part for key, part in value.items() if key != "text"} if isinstance(value, dict) else value
    row = read_row(chat if isinstance(chat, dict) and not unknown_keys(chat) else value)
    if isinstance(row.content, str):
        raise RowFault("a row with only a text has no answer to compare with; give input and outputs")
    exchanges = row.exchanges()
    if not exchanges:
        raise RowFault("the last turn calls a tool, so there is no answer to compare with")
    several = len(exchanges) > 1
    return [
        Row(f"{line}.{number}" if several else str(line), one.asked, one.answers, row.tools, one.context)
        for number, one in enumerate(exchanges, start=1)
    ]


def row_questions(rows: list[Row], tokenizer: Any, *, name: str) -> Iterator[Question]:
    """Questions with the facts `row` (`name:line`) and, where a line asks several, `document`; in the file's order.

    With a chat template the prompt is a chat; without one, the texts of the turns, each followed by a
    newline.

    Args:
        rows: From `read_rows`.
        tokenizer: Encodes the prompts.
        name: The file's name.

    Raises:
        DataError: The template refuses a chat or cannot show its tools.
    """
    for row in rows:
        prompt = _prompt(row, row.messages, tokenizer, name)
        bare = without(row.messages, row.context) if row.context else None
        facts = {"row": f"{name}:{row.place}"}
        line, dot, _ = row.place.partition(".")
        if dot:  # several questions about one text
            facts["document"] = f"{name}:{line}"
        sample_hash = hash_sample([row.messages, row.tools], row.references)
        bare_ids = None if bare is None else _prompt(row, bare, tokenizer, name)
        yield Question(TASK, prompt, row.references, facts, sample_hash, without_context=bare_ids)


def _prompt(row: Row, messages: list[Message], tokenizer: Any, name: str) -> list[int]:
    if tokenizer.chat_template:
        try:
            return encode_prompt(tokenizer, messages, tools=row.tools)
        except DataError as error:
            place = f"{name}:{row.place}: {error.message}"
            raise DataError(place, rule=error.rule, hint=error.hint) from error
    if has_tools(messages, row.tools):
        raise DataError(f"{name}:{row.place}: without a chat template tools cannot be shown")
    encoder = safe_encoder(tokenizer)
    text = "".join(message["content"] + "\n" for message in messages)
    return [*encoder.begin, *encoder.encode_batch([text])[0].tolist()]


def read_questions(path: Path, tokenizer: Any, *, max_samples: int | None = None) -> list[Question]:
    """`read_rows` and `row_questions` in one; for evaluation inside training."""
    return list(row_questions(read_rows(path, max_samples=max_samples), tokenizer, name=path.name))
