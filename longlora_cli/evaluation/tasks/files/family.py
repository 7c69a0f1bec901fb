"""What a family of file-based tasks is: how its files are known, and how a row becomes a sample."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.errors import DataError
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

PUBLISHED = "published"
OWN = "own"
"""Where a prompt comes from: the benchmark's authors, word for word, or this project. Else the user's file."""


@dataclass(frozen=True)
class Row:
    """A row of a benchmark's file, with what decides how it is asked.

    Args:
        family: The name of its family.
        task: Its task within the family, such as `hotpotqa`.
        fields: What the file has.
        place: `file:line`.
        file: Where it is.
        as_chat: The model reads chats; else prompts that a base model continues are taken where there are others.
        prompts: The user's templates by task; they go before the published ones.
        split: The split that is measured, where a file has several.
    """

    family: str
    task: str
    fields: Mapping[str, Any]
    place: str
    file: DataFile
    as_chat: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    split: str = "test"

    @property
    def name(self) -> str:
        """The task as results know it."""
        return f"{self.family}.{self.task}"

    @property
    def line(self) -> str:
        """The line of its place."""
        return self.place.rpartition(":")[2]

    def value(self, name: str) -> Any:
        """A field that must be there.

        Raises:
            RowFault: It is missing or null.
        """
        if self.fields.get(name) is None:
            raise RowFault(f"{name} is {'null' if name in self.fields else 'missing'}")
        return self.fields[name]

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """A field that is a text, and not a blank one unless `may_be_empty`."""
        value = self.value(name)
        if not isinstance(value, str):
            raise RowFault(f"{name} is {shown(value)}, where a text is needed")
        if not (may_be_empty or value.strip()):
            raise RowFault(f"{name} is empty")
        return value

    def texts(self, name: str, *, may_be_empty: bool = False) -> list[str]:
        """A field that is a list of texts or numbers, or one of them; as texts."""
        value = self.value(name)
        items = value if isinstance(value, list) else [value]
        if not items and not may_be_empty:
            raise RowFault(f"{name} is an empty list")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, str | int | float):
                raise RowFault(f"{name} holds {shown(item)}, where a text is needed")
        return [str(item) for item in items]

    def number(self, name: str) -> float:
        """A field that is a number."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowFault(f"{name} is {shown(value)}, where a number is needed")
        return value


@dataclass(frozen=True)
class Family:
    """A benchmark that is read from files.

    Args:
        name: As `--tasks` knows it.
        needs: Its files and fields, in words, for messages.
        task_of: The task that a file holds by its name; None where the name says nothing.
        samples: The samples of a row, mostly one.
        marks: A file whose first row has one of these fields belongs to it, whatever its name.
        tasks: All its tasks, where they are known beforehand.
        task_in_row: The task of a file whose name says nothing, from its first row's fields.
        columns: Scorers that judge a task's rows beside the one that counts.
        parts: Facts of rows by which results are also given, such as `difficulty`.
        categories: Tasks whose mean is given.
        many_files: A task may have several files, such as one a length.
        is_choice: Samples are judged by the likelihood of their choices, nothing is generated.
    """

    name: str
    needs: str
    task_of: Callable[[DataFile], str | None]
    samples: Callable[[Row], Iterable[Sample]]
    marks: frozenset[str] = frozenset()
    tasks: tuple[str, ...] = ()
    task_in_row: Callable[[Mapping[str, Any]], str | None] | None = None
    columns: Callable[[str], tuple[str, ...]] = lambda task: ()
    parts: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    many_files: bool = False
    is_choice: bool = False


@cache
def published_prompts(name: str) -> dict[str, str]:
    """Templates by task of a file beside this module; they are other projects' texts (`prompts/NOTICE.txt`)."""
    path = files("longlora_cli.evaluation.tasks.files").joinpath("prompts", f"{name}.json")
    templates: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["templates"]
    return templates


def read_prompts(path: Path) -> dict[str, str]:
    """Templates by task from a user's file, as LongBench's `dataset2prompt.json`.

    Raises:
        DataError: It cannot be read or is not an object of texts with fields in braces.
    """
    try:
        templates = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(templates, dict) or not templates:
        raise DataError(f"{path}: not an object of prompts by task")
    for task, template in templates.items():
        fault = "not a text" if not isinstance(template, str) else _template_fault(template)
        if fault:
            raise DataError(
                f"{path}: the prompt of {task} is {fault}",
                rule="A prompt has fields of its rows in single braces, such as {context}.",
            )
    return templates


def _template_fault(template: str) -> str | None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"no template: {error}"
    wrong = next((name for name in names if not name.isidentifier()), None)
    return None if wrong is None else f"no template: {{{wrong}}} is not the name of a field"


def fill(row: Row, template: str, values: Mapping[str, Any]) -> str:
    """A template with the values, or else the row's fields, in its braces.

    Raises:
        RowFault: A field that the template names is missing.
    """
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    found = {name: values[name] if name in values else row.value(name) for name in sorted(names)}
    return template.format(**found)


def prompt_of(row: Row, published: Mapping[str, str], values: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt of a row by the user's template of its task, else by the published one; and which of them it is."""
    if row.task in row.prompts:
        return fill(row, row.prompts[row.task], values), "--prompts"
    return fill(row, published[row.task], values), PUBLISHED


def one_turn(
    row: Row,
    prompt: str,
    outputs: Sequence[str],
    *,
    scorer: str,
    max_new_tokens: int,
    id: str,
    prompts: str = PUBLISHED,
    document: str = "",
    context: str | None = None,
    extra: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    **more: Any,
) -> Sample:
    """A sample of one prompt.

    Args:
        row: Where it comes from.
        prompt: What is asked; read as it is where there is no chat.
        outputs: The references.
        scorer: What judges it.
        max_new_tokens: Longest answer.
        id: Tells it from the task's others.
        prompts: Where its wording comes from; a fact of its row.
        document: The text that it is about: questions about one text are one cluster of an interval.
        context: The same as it stands in the prompt, where that differs.
        extra: What the scorer needs, besides the task.
        facts: What else its row tells.
        **more: As `Sample` takes it.
    """
    about = hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()[:12] if document else id
    return Sample(
        row.name,
        id,
        [{"role": "user", "content": prompt}],
        list(outputs),
        scorer,
        max_new_tokens,
        extra={"task": row.task, **(extra or {})},
        facts={
            "row": f"{row.file.name}:{row.line}",
            "document": about,
            "prompts": prompts,
            **(facts or {}),
        },
        as_is=True,
        context=document if context is None else context,
        **more,
    )
