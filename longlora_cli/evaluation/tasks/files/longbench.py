"""LongBench v1 and LongBench-E (THUDM, MIT): one .jsonl a task, published prompts, scorers and lengths of answers.

Source: THUDM/LongBench at 2e00731. The data is not here; users bring the folder or `data.zip`.
"""

from __future__ import annotations

from collections.abc import Iterator

from longlora_cli.evaluation.scorers.longbench import TASK_RULES, bucket_of
from longlora_cli.evaluation.tasks.files.family import Family, Row, one_turn, prompt_of, published_prompts
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

CATEGORIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
MAX_NEW_TOKENS = {
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"), 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
}
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Tasks that continue a text even for a model that chats."""

E_TASKS = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa"),
    *("samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
_NEEDS = "rows with context, input, answers, length and all_classes"


def _samples(row: Row) -> Iterator[Sample]:
    context = row.text("context")
    words = row.number("length")
    values = {"context": context, "input": row.text("input", may_be_empty=True)}
    prompt, source = prompt_of(row, published_prompts("longbench"), values)
    classes = row.texts("all_classes") if TASK_RULES[row.task] == "classification" else None
    yield one_turn(
        row,
        prompt,
        row.texts("answers"),
        scorer="longbench@2e00731",
        max_new_tokens=MAX_NEW_TOKENS[row.task],
        id=str(row.fields.get("_id") or row.line),
        prompts=source,
        document=context,
        extra={"length": words, "all_classes": classes},
        facts={"bucket": bucket_of(words)},
        as_chat=row.task not in PLAIN,
        stop=("\n",) if row.task == "samsum" else (),
    )


def _columns(task: str) -> tuple[str, ...]:
    return ("longbench@rouge_score",) if TASK_RULES[task] == "rouge" else ()


def _task_of(file: DataFile) -> str | None:
    return file.stem if file.stem in TASK_RULES else None


def _e_task_of(file: DataFile) -> str | None:
    task = file.stem.removesuffix("_e")
    return task if file.stem.endswith("_e") and task in E_TASKS else None


LONGBENCH = Family(
    "longbench",
    f"TASK.jsonl, such as hotpotqa.jsonl, or data.zip; {_NEEDS}",
    _task_of,
    _samples,
    tasks=tuple(TASK_RULES),
    task_in_row=lambda fields: fields["dataset"] if fields.get("dataset") in TASK_RULES else None,
    columns=_columns,
    categories=CATEGORIES,
)
LONGBENCH_E = Family(
    "longbench_e",
    f"TASK_e.jsonl, such as hotpotqa_e.jsonl, or data.zip; {_NEEDS}",
    _e_task_of,
    _samples,
    tasks=E_TASKS,
    task_in_row=lambda fields: fields["dataset"] if fields.get("dataset") in E_TASKS else None,
    columns=_columns,
    parts=("bucket",),
    categories={name: tuple(t for t in tasks if t in E_TASKS) for name, tasks in CATEGORIES.items()},
)
