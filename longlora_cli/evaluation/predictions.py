"""Finished predictions from a file, ours or another project's, ready to be scored.

Known shapes: ours (`prediction`, `references`), LongBench (`pred`, `answers`, `all_classes`, `length`), LongBench v2
(`response`, `answer`), InfiniteBench (`prediction`, `ground_truth`), RULER (`pred`, `outputs`), lm-evaluation-harness's
samples (`doc`, `filtered_resps`), and BABILong's csv (`target`, `output`, `question`).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.opening import COMPRESSIONS, InputFile
from longlora_cli.data.row_values import RowFault
from longlora_cli.errors import DataError

# In order: where a row has several, the first one counts. A response is the whole text whose letter `pred` is.
_PREDICTIONS = ("prediction", "response", "pred", "filtered_resps", "resps", "output")
_REFERENCES = (
    *("references", "reference", "answers", "outputs", "ground_truth", "label", "gold"),
    *("answer_nodes", "answer", "target"),
)

NumberedFields = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Prediction:
    """A finished answer.

    Args:
        line: Its line, from 1.
        prediction: What was said.
        references: What should have been said.
        extra: All fields of its row.
    """

    line: int
    prediction: str
    references: list[Any]
    extra: dict[str, Any]


def read_predictions(
    path: Path, *, tasks: Sequence[str] = (), may_lack_references: bool = False, raw_references: bool = False
) -> list[Prediction]:
    """Read and check a .jsonl or .csv file, compressed or not.

    A line may hold several JSON objects; some published files do.

    Args:
        path: The file.
        tasks: Where a row has no `task`, the one of these that the file's name holds is its task.
        may_lack_references: An empty list of references is allowed.
        raw_references: References may be numbers and lists and stay as they are; else numbers become texts.

    Raises:
        DataError: The file cannot be read or holds no row, a field is missing or of a wrong kind, or no prediction has
            text; up to 20 faults are told with `file:line`.
    """
    faults = Faults(str(path))
    named = task_in_name(path.name, tasks)
    found: list[Prediction] = []
    is_csv = _plain_suffix(path) == ".csv"
    for line, fields in (_csv_rows if is_csv else _json_rows)(path, faults):
        try:
            references = _references(fields, raw=raw_references)
            if not references and not may_lack_references:
                raise RowFault("the list of references is empty")
            extra = fields if named is None or fields.get("task") is not None else {**fields, "task": named}
            found.append(Prediction(line, _prediction(fields), references, extra))
        except RowFault as fault:
            faults.add(line, str(fault))
        if faults.is_full:
            break
    if not found and not len(faults):
        faults.add(1, "the file holds no predictions")
    faults.raise_if_any()
    if not any(row.prediction.strip() for row in found):
        many = f"all {len(found)} predictions are" if len(found) > 1 else "the only prediction is"
        raise DataError(f"{path}:{found[0].line}: {many} empty", rule="There is nothing to score.")
    return found


def task_in_name(name: str, tasks: Sequence[str]) -> str | None:
    """The longest of the tasks that a file name holds as whole words (`preds_code_run.jsonl` -> `code_run`)."""
    for task in sorted(tasks, key=len, reverse=True):
        if re.search(rf"(?:^|[._-]){re.escape(task)}(?:$|[._-])", name):
            return task
    return None


def _plain_suffix(path: Path) -> str:
    name = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def _lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    number = 0
    with InputFile(path) as file:
        while True:
            number += 1
            try:
                if not (line := file.read_line()):
                    return
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except RowFault as fault:
                faults.add(number, str(fault))
                return
            except UnicodeDecodeError as error:
                faults.add(number, f"not UTF-8: {error.reason}")
                return


def _json_rows(path: Path, faults: Faults) -> Iterator[NumberedFields]:
    decoder = json.JSONDecoder()
    for number, text in _lines(path, faults):
        rest = text.strip()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except json.JSONDecodeError as error:
                faults.add(number, f"not JSON: {error.msg}")
                break
            except RecursionError:
                faults.add(number, "not JSON that can be read: nested too deeply")
                break
            if not isinstance(value, dict):
                faults.add(number, f"a row is an object, this is {shown(value)}")
                break
            yield number, _with_document(value)
            rest = rest[end:].lstrip()


def _with_document(row: dict[str, Any]) -> dict[str, Any]:
    """A row of lm-evaluation-harness with its document's fields beside its own, and one of ours with its `extra`."""
    document, extra = row.get("doc"), row.get("extra")
    if isinstance(extra, dict):
        row = {**extra, **row}
    return {**row, **document} if isinstance(document, dict) else row


def _csv_rows(path: Path, faults: Faults) -> Iterator[NumberedFields]:
    content = "".join(text for _, text in _lines(path, faults))
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {str(key): value for key, value in row.items()}
    except csv.Error as error:
        faults.add(reader.line_num, f"not CSV: {error}")


def _first_of(fields: Mapping[str, Any], names: Sequence[str], what: str) -> tuple[str, Any]:
    for name in names:
        if fields.get(name) is not None:
            return name, fields[name]
    null = next((name for name in names if name in fields), None)
    told = f"{null} is null" if null else f"{what} is missing"
    raise RowFault(f"{told}; a row needs {names[0]} (or {', '.join(names[1:])})")


def _prediction(fields: Mapping[str, Any]) -> str:
    name, value = _first_of(fields, _PREDICTIONS, "prediction")
    while name.endswith("resps") and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise RowFault(f"{name} is {shown(value)}, where a text is needed")
    return value


def _references(fields: Mapping[str, Any], *, raw: bool) -> list[Any]:
    name, value = _first_of(fields, _REFERENCES, "references")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(
            item, (str, int, float, list) if raw else (str, int, float)
        ):
            raise RowFault(f"{name} holds {shown(item)}, where a text is needed")
    return items if raw else [str(item) for item in items]
