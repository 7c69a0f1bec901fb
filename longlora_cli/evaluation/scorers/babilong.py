"""BABILong's rule: of the answer words that a task knows, exactly the right one must be said.

Source: booydar/babilong `babilong/metrics.py` at 7a6efee (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores, UnscorableError, field
from longlora_cli.evaluation.scorers.matching import printable_answer

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")
TASK_LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _ROOMS),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""The words that may be an answer, by task."""

_MOST_LETTERS_OF_A_PATH = 3  # qa19's "n,e" is one answer, qa8's "apple,milk" are two


def babilong(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: 1 when the first sentence names, of the task's words that the question does not name, the target alone.

    Several targets (`apple,milk` of qa8) must all be named. Words are looked for inside others (`no` in `nothing`), as
    published. Needs `question` and `task` (qa1 to qa20).
    """
    labels = TASK_LABELS[_task(extra)]
    question = field(extra, "question", str, "words that it names cannot be the answer").lower()
    said = prediction.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {label for label in labels if label in said and label not in question}
    return {"score": float(any(named == _targets(reference) for reference in references))}


def _task(extra: Extra) -> str:
    task = field(extra, "task", str, "qa1 to qa20; it decides which words may be an answer")
    match = re.search(r"(?:^|[._/])(qa[0-9]+)(?:$|[._])", task)
    if match is None or match[1] not in TASK_LABELS:
        raise UnscorableError(f"task {task!r} is none of qa1 to qa20")
    return match[1]


def _targets(reference: str) -> set[str]:
    target = reference.lower()
    return set(target.split(",")) if len(target) > _MOST_LETTERS_OF_A_PATH else {target}


def babilong_lm_eval(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: 1 when a target occurs anywhere in the answer, in any case: lm-evaluation-harness's looser rule."""
    said = printable_answer(prediction).lower()
    return {"score": float(any(reference.strip().lower() in said for reference in references))}
