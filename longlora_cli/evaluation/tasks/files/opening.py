"""File-based tasks by the names that were asked for: their files found, every row checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longlora_cli.data.faults import Faults, did_you_mean
from longlora_cli.data.row_values import RowFault
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.tasks.files.family import Family, Row, read_prompts
from longlora_cli.evaluation.tasks.files.reading import DataFile, find_files
from longlora_cli.evaluation.tasks.files.registry import FAMILIES
from longlora_cli.evaluation.tasks.sample import Sample

PROMPTS_FILE = "dataset2prompt.json"
"""LongBench's own file of prompts; where it lies in the data's folder, it is used."""

_SPLIT_NAMES = ("validation", "test", "train")


@dataclass(frozen=True)
class FileTask:
    """One task of a benchmark, as files with rows.

    Args:
        family: Its benchmark.
        task: Its name there.
        files: Where its rows are.
        as_chat: The model reads chats.
        prompts: The user's templates by task.
        split: The split that is measured.
        max_samples: At most this many are asked.
    """

    family: Family
    task: str
    files: tuple[DataFile, ...]
    as_chat: bool
    prompts: Mapping[str, str]
    split: str
    max_samples: int | None = None

    @property
    def name(self) -> str:
        """As results know it: `longbench.hotpotqa`."""
        return f"{self.family.name}.{self.task}"

    def samples(self) -> Iterator[Sample]:
        """Its samples in the order of the files; rows are read again each time, since some benchmarks have gigabytes.

        Raises:
            DataError: Rows cannot be used; up to 20 faults of a file are told with `file:line`.
        """
        given = 0
        for file in self.files:
            faults = Faults(file.label)
            has_rows = False
            for line, fields in file.rows(faults):
                has_rows = True
                for sample in self._samples_of(file, line, fields, faults):
                    given += 1
                    yield sample
                    if given == self.max_samples:
                        faults.raise_if_any()
                        return
            if not has_rows and not len(faults):
                faults.add(0, "the file holds no rows", hint=f"{self.family.name} reads {self.family.needs}.")
            faults.raise_if_any()

    def _samples_of(self, file: DataFile, line: int, fields: Mapping, faults: Faults) -> list[Sample]:
        place = f"{file.label}:{line}"
        row = Row(self.family.name, self.task, fields, place, file, self.as_chat, self.prompts, self.split)
        try:
            return list(self.family.samples(row))
        except RowFault as fault:
            faults.add(line, str(fault), hint=f"{self.family.name} reads {self.family.needs}.")
            return []


def open_tasks(
    names: Sequence[str],
    paths: Sequence[Path],
    *,
    as_chat: bool,
    prompts: Path | None = None,
    split: str = "test",
    max_samples: int | None = None,
) -> list[FileTask]:
    """The tasks of these names, as far as the paths hold their files.

    Args:
        names: Families, such as `longbench`, or one task of a family, such as `longbench.hotpotqa`.
        paths: Files, folders and zip archives.
        as_chat: The model reads chats.
        prompts: A file of templates by task; else `dataset2prompt.json` in the folders is taken where there is one.
        split: The split that is measured, where rows say theirs.
        max_samples: At most this many of each task.

    Raises:
        DataError: A path that does not exist, or one in which no task finds its files; two files of one task.
        SettingsError: A task that its family does not have.
    """
    listing = {path: find_files(path) for path in dict.fromkeys(paths)}
    templates = _templates(prompts, paths)
    used: set[Path] = set()
    tasks: dict[str, FileTask] = {}
    for name in names:
        family_name, _, wanted = name.partition(".")
        family = FAMILIES[family_name]
        _refuse_unknown(family, wanted)
        found = _files_by_task(family, wanted, listing, used)
        if not found:
            raise DataError(
                f"{', '.join(map(str, listing))}: no file of {name} is there",
                rule=f"{family.name} reads {family.needs}.",
            )
        for task in _ordered(family, found):
            opened = FileTask(family, task, tuple(found[task]), as_chat, templates, split, max_samples)
            tasks.setdefault(opened.name, opened)
    for path in listing:
        if path not in used:
            raise DataError(f"{path}: no task of --tasks {','.join(names)} has a file there")
    if prompts is not None and not any(task.task in templates for task in tasks.values()):
        raise DataError(
            f"{prompts}: no prompt of {', '.join(tasks)} is there", rule="Prompts are named as tasks are."
        )
    return list(tasks.values())


def _refuse_unknown(family: Family, wanted: str) -> None:
    if wanted and family.tasks and wanted not in family.tasks:
        raise SettingsError(
            f"--tasks {family.name}.{wanted}: unknown task{did_you_mean(wanted, family.tasks)}",
            rule=f"Tasks of {family.name}: {', '.join(family.tasks)}.",
        )


def _files_by_task(
    family: Family, wanted: str, listing: Mapping[Path, list[DataFile]], used: set[Path]
) -> dict[str, list[DataFile]]:
    found: dict[str, list[DataFile]] = {}
    for path, files in listing.items():
        for file in files:
            task = _task_of(family, file)
            if task is None or (wanted and task != wanted):
                continue
            used.add(path)
            known = found.setdefault(task, [])
            if known and not family.many_files:
                raise DataError(
                    f"two files of {family.name}.{task}: {known[0].label} and {file.label}",
                    hint="Name the one to read with --data.",
                )
            known.append(file)
    return found


def _task_of(family: Family, file: DataFile) -> str | None:
    """The task of a file by its name, else by its fields; None where it is not of this family."""
    task = family.task_of(file)
    if task is not None:
        return task
    if not file.is_named and not family.marks:
        return None
    row = file.first_row()
    if not file.is_named and not family.marks & set(row):
        return None
    if family.task_in_row is not None and (task := family.task_in_row(row)) is not None:
        return task
    if not family.tasks:  # any name is a task's
        return file.parts[-2] if file.stem in _SPLIT_NAMES and len(file.parts) > 1 else file.stem
    if not file.is_named:
        return None
    raise DataError(
        f"{file.label}: its name is no task of {family.name}", rule=f"{family.name} reads {family.needs}."
    )


def _ordered(family: Family, found: Mapping[str, list[DataFile]]) -> list[str]:
    return [task for task in family.tasks if task in found] or sorted(found, key=_by_number)


def _by_number(task: str) -> tuple[int, str]:
    """`5_topics` before `10_topics`."""
    digits = task.split("_")[0]
    return (int(digits) if digits.isdecimal() else 0, task)


def _templates(prompts: Path | None, paths: Sequence[Path]) -> dict[str, str]:
    if prompts is not None:
        return read_prompts(prompts)
    for path in paths:
        folder = path if path.is_dir() else path.parent
        candidates = sorted(folder.rglob(PROMPTS_FILE)) if path.is_dir() else [folder / PROMPTS_FILE]
        for candidate in candidates:
            if candidate.is_file():
                return read_prompts(candidate)
    return {}
