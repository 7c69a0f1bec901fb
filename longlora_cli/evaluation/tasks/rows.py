"""Questions from a user's file: rows with an input and what the answer should be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora_cli.data.chat_template import Message, encode_prompt
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.faults import Faults
from longlora_cli.data.rows import RowFault, checked_text, read_row
from longlora_cli.errors import DataError
from longlora_cli.evaluation.generation import Question

TASK = "generate"
Row = tuple[int, list[Message], list[str]]


def read_rows(path: Path, *, max_samples: int | None = None) -> list[Row]:
    """Read and check a .jsonl file: line number, messages up to the answer, references.

    A row has `input` and `outputs` (one text or several that are all right), `prompt` and `completion`, or
    `messages` (or `conversations`), whose last turn is the assistant's and is the reference.

    Args:
        path: The file.
        max_samples: Only this many rows are used; the others are not looked at.

    Raises:
        DataError: There is no such file, it is empty, or rows cannot be used; up to 20 faults are told with
            `file:line`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    faults = Faults(str(path))
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if faults.is_full or (max_samples is not None and len(rows) == max_samples):
                break
            try:
                if parsed := _read_line(line):
                    rows.append((number, *parsed))
            except RowFault as fault:
                faults.add(number, str(fault))
    if not rows and not len(faults):
        faults.add(1, "the file is empty")
    faults.raise_if_any()
    return rows


def _read_line(line: bytes) -> tuple[list[Message], list[str]] | None:
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise RowFault(f"byte {error.start} of the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RowFault(f"not JSON: {error}") from error
    if row is None:
        return None
    content = read_row(row)
    if isinstance(content, str):
        raise RowFault("a row with only a text has no answer to compare with; give input and outputs")
    return content[:-1], _references(row, content)


def _references(row: dict[str, Any], messages: list[Message]) -> list[str]:
    is_chat = row.get("messages") is not None or row.get("conversations") is not None
    is_pair = "prompt" in row and "completion" in row
    if not is_chat and not is_pair and isinstance(row["outputs"], list):
        return [checked_text(output, "outputs") for output in row["outputs"]]
    return [messages[-1]["content"]]


def row_questions(rows: list[Row], tokenizer: Any, *, name: str) -> Iterator[Question]:
    """Questions with the fact `row` (`name:line`), in the order of the file.

    With a chat template the prompt is a chat; without one, the texts of the turns, each followed by a
    newline.

    Args:
        rows: From `read_rows`.
        tokenizer: Encodes the prompts.
        name: The file's name.
    """
    for line, messages, references in rows:
        if tokenizer.chat_template:
            prompt = encode_prompt(tokenizer, messages)
        else:
            encoder = safe_encoder(tokenizer)
            text = "".join(message["content"] + "\n" for message in messages)
            prompt = [*encoder.begin, *encoder.encode_batch([text])[0].tolist()]
        yield Question(TASK, prompt, references, {"row": f"{name}:{line}"})


def read_questions(path: Path, tokenizer: Any, *, max_samples: int | None = None) -> list[Question]:
    """`read_rows` and `row_questions` in one; for evaluation inside training."""
    return list(row_questions(read_rows(path, max_samples=max_samples), tokenizer, name=path.name))
