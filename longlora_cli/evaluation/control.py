"""`--control no-context`: every question asked again without what it is about.

What a model still answers then it knew or guessed (LongBench v2, arXiv:2412.15204, asks so too). The questions are the
same ones, collected while the whole ones are asked, and the bare ones come after them, so that no cache of a long text
is lost in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from longlora_cli.evaluation.generation import Question, Row

NO_CONTEXT = "no-context"
Summary = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What a task's questions gave, and the same questions without their context.

    Args:
        rows: Of the whole questions.
        bare: Of the questions without context.
        places: Which of `rows` each of `bare` belongs to.
        is_controlled: The control was asked for.
    """

    rows: list[Row]
    bare: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    is_controlled: bool = False

    @property
    def all(self) -> list[Row]:
        """All answers."""
        return [*self.rows, *self.bare]

    def controlled(
        self,
        summary: Summary,
        scored: Sequence[Row],
        score: Callable[[Sequence[Row]], tuple[Summary, list[Row]]],
    ) -> tuple[Summary, list[Row]]:
        """A task's summary with its `control`, and its rows with theirs; as they are where there is no control.

        Args:
            summary: Of the whole questions.
            scored: Their rows, in the order of `rows`.
            score: What judged them; it judges the bare ones too.

        Returns:
            `control` is `{"n", "left_out", "score", "ci95"}`, with `scores` in place of the last two for tasks with
            several of equal rank. Questions whose context cannot be told are left out; where all are, `n` is 0 and
            there is no score.
        """
        if not self.is_controlled:
            return summary, list(scored)
        control: Summary = {"n": len(self.bare), "left_out": len(self.rows) - len(self.bare)}
        told = [dict(row) for row in scored]
        if self.bare:
            found, bare = score(self.bare)
            names = ("score", "ci95") if "score" in found else ("scores",)
            control |= {name: found[name] for name in names}
            for place, row in zip(self.places, bare, strict=True):
                kept = {key: row[key] for key in ("prediction", "finish", "scores")}
                told[place]["control"] = kept
        return {**summary, "control": control}, told


def ask_twice(
    ask: Callable[[Iterable[T], Any, bool], Iterator[Row]],
    questions: Iterable[T],
    settings: Any,
    *,
    control: str,
    bare_of: Callable[[T], T | None],
) -> Asked:
    """Ask questions, and where a control is wanted then all of them without their context.

    Args:
        ask: Answers questions under settings; the last argument says that they are the whole ones.
        questions: Read once and lazily.
        settings: What else decides an answer; part of each row's key, with the control's name for bare questions.
        control: `none` or `no-context`.
        bare_of: A question without its context.
    """
    if control == "none":
        return Asked(list(ask(questions, settings, True)))
    places: list[int] = []
    bare: list[T] = []

    def watched() -> Iterator[T]:
        for place, question in enumerate(questions):
            if (without := bare_of(question)) is not None:
                places.append(place)
                bare.append(without)
            yield question

    rows = list(ask(watched(), settings, True))
    return Asked(rows, list(ask(bare, [settings, NO_CONTEXT], False)), places, is_controlled=True)


def bare_question(question: Question) -> Question | None:
    """The question without its context; None where that cannot be told."""
    if question.without_context is None:
        return None
    return replace(question, prompt=question.without_context, without_context=None)


def left_out(summaries: Mapping[str, Summary]) -> dict[str, str]:
    """Why tasks have no control, or not of all their questions, by task."""
    found = {}
    for task, summary in summaries.items():
        control = summary.get("control")
        if control is None:
            found[task] = "it asks nothing"
        elif control["left_out"]:
            total = control["n"] + control["left_out"]
            found[task] = f"{control['left_out']:,} of {total:,} questions: what is context is not told apart"
    return found
