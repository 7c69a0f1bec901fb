"""`longlora prepare --synthetic`: which synthetic chats are asked for, and the chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longlora_cli.config import PrepareConfig
from longlora_cli.console import Advance
from longlora_cli.data.documents import Document
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.synthetic import TASKS, make_training_chat
from longlora_cli.errors import SettingsError

_ALL = "all"


def synthetic_counts(requests: list[str]) -> dict[str, int]:
    """Chats of each task that is asked for by `TASK=COUNT`; `all=COUNT` shares a count evenly among all tasks.

    Raises:
        SettingsError: A request is of another form, or names no task.
    """
    counts = dict.fromkeys(TASKS, 0)
    for request in requests:
        task, _, number = request.partition("=")
        if task not in (*TASKS, _ALL) or not number.isdecimal() or not int(number):
            raise SettingsError(
                f"--synthetic {request!r} cannot be read",
                rule=f"Tasks: {', '.join(TASKS)}; {_ALL} shares a count evenly among them.",
                hint="Write TASK=COUNT, such as --synthetic needle=2000 or --synthetic needle=1000,count=500.",
            )
        for name, share in _shares(int(number)).items() if task == _ALL else [(task, int(number))]:
            counts[name] += share
    return {task: count for task, count in counts.items() if count}


def _shares(count: int) -> dict[str, int]:
    each, rest = divmod(count, len(TASKS))
    return {task: each + (number < rest) for number, task in enumerate(TASKS)}


def synthetic_chats(
    counts: dict[str, int], haystack: Haystack, tokenizer: Any, config: PrepareConfig, advance: Advance
) -> Iterator[Document]:
    """The chats, task after task, each told to `advance`."""
    for task, count in counts.items():
        for index in range(count):
            chat = make_training_chat(
                haystack,
                tokenizer,
                longest=config.synthetic_length or config.max_length,
                facts=config.synthetic_facts,
                questions=config.synthetic_questions,
                seed=config.seed,
                index=index,
                task=task,
            )
            advance(1)
            yield Document(f"{task}:{index}", chat.messages)
