"""How much of what an evaluation asks stands in training data: an estimate from runs of 13 words.

A model that was trained on the texts it is asked about may remember them. Runs are compared as `prepare` does
(`data.overlap`). Of large evaluations the beginning of each task is looked at: its texts are kept in memory, and the
training data are read past them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.overlap import RUN_WORDS, OverlapCheck
from longlora_cli.errors import DataError, IncompatibleError
from longlora_cli.evaluation.audits import Audit, audit
from longlora_cli.evaluation.file_plan import CutCounts
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.tasks import rows
from longlora_cli.models.tokenizer import tokenizer_sha256
from longlora_cli.storage import is_artifact
from longlora_cli.task_names import SYNTHETIC, is_from_files

# About 2 M words, for which the check needs 60 MB.
_MOST_CHARACTERS = 12_000_000
# Licences and idioms are shared by texts that have nothing else in common.
_MOST_SHARE = 0.01


@dataclass(frozen=True)
class TrainData:
    """Training data that can be read.

    Args:
        size: About how much there is, in the unit of `texts`' progress.
        texts: Its texts; progress is told as they pass.
    """

    size: int
    texts: Callable[[Callable[[int], None]], Iterator[str]]


def open_train_data(paths: Sequence[Path], tokenizer: Any, *, split: str = "train") -> list[TrainData]:
    """Look at training data without reading it.

    Args:
        paths: Folders made by `longlora prepare`, or what it reads: files and folders of texts and rows.
        tokenizer: Of the model; prepared data are tokens.
        split: Of saved datasets.

    Raises:
        DataError: A path is missing or of an unknown kind.
        IncompatibleError: Prepared data of another tokenizer.
    """
    return [_prepared(p, tokenizer) if is_artifact(p, "dataset") else _raw(p, split) for p in paths]


def _prepared(folder: Path, tokenizer: Any) -> TrainData:
    dataset = ChunkDataset.open(folder)
    if dataset.manifests[0].meta["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
        raise IncompatibleError(
            f"--train-data {folder} was prepared with another tokenizer than this model's",
            hint="Give the texts that it was made from.",
        )

    def texts(advance: Callable[[int], None]) -> Iterator[str]:
        for number in range(len(dataset)):
            chunk = dataset[number]
            start = 0
            for length in chunk.document_lengths.tolist():
                yield _decoded(tokenizer, chunk.input_ids[start : start + length].tolist())
                start += length
            advance(1)

    return TrainData(len(dataset), texts)


def _raw(path: Path, split: str) -> TrainData:
    sources = find_sources([str(path)], split=split)

    def texts(advance: Callable[[int], None]) -> Iterator[str]:
        for document in read_documents(sources, seed=0):
            yield from _texts_of(document)
            advance(document.size_bytes)

    return TrainData(sum(source.size_bytes for source in sources), texts)


def _texts_of(document: Document) -> Iterator[str]:
    content = document.content
    yield from [content] if isinstance(content, str) else (message["content"] for message in content)


def overlap_audit(plan: EvalPlan, data: Sequence[TrainData], advance: Callable[[int], None]) -> Audit:
    """For each task the share of the different runs of 13 words of what it asks that training data hold.

    Args:
        plan: What is asked; prompts are looked at as the model reads them.
        data: From `open_train_data`.
        advance: Called with sizes of the training data.

    Raises:
        DataError: Nothing that is asked has 13 words; a fault in the training data.
    """
    tasks = asked_tasks(plan)
    most = _MOST_CHARACTERS // len(tasks)
    owners: list[str] = []

    def asked() -> Iterator[str]:
        for task in tasks:
            for text in _beginning(texts_of(plan, task), most):
                owners.append(task)
                yield text

    try:
        check = OverlapCheck(asked())
    except DataError as error:
        raise DataError(f"--train-data: nothing that is asked has {RUN_WORDS} words") from error
    for part in data:
        check.mark(part.texts(advance))
    shares = {task: shared / of for task, (shared, of) in check.marked(owners).items() if of}
    bad = [f"{task} {100 * share:.1f} %" for task, share in shares.items() if share >= _MOST_SHARE]
    looked = f"runs of {RUN_WORDS} words in the first {most:,} characters of each task"
    note = f"training data hold much of {', '.join(bad)}; {looked}" if bad else looked
    return audit("Share of what is asked that training data hold", shares, not bad, note)


def asked_tasks(plan: EvalPlan) -> list[str]:
    """All tasks, benchmarks taken apart."""
    opened = [task.name for task in plan.files.tasks] if plan.files is not None else []
    return opened + [task for task in plan.tasks if not is_from_files(task)]


def texts_of(plan: EvalPlan, task: str) -> Iterator[str]:
    """What a task asks, as text."""
    if task == "ppl":
        ids: Iterator[Sequence[int]] = (text.content.tolist() for text in plan.texts)
    elif plan.files is not None and (opened := [t for t in plan.files.tasks if t.name == task]):
        ids = (found.ids for found in plan.files.fitted(opened[0], CutCounts()))
    elif task == rows.TASK:
        ids = (question.prompt for question in plan.rows)
    elif task in SYNTHETIC:
        ids = (question.prompt for question in plan.sample_questions(task))
    else:
        ids = (question.prompt for question in plan.grid_questions(task))
    return (_decoded(plan.tokenizer, list(one)) for one in ids)


def _beginning(texts: Iterator[str], most: int) -> Iterator[str]:
    left = most
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
