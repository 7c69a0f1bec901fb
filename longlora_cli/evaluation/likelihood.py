"""Multiple choice: which of some continuations a model holds likeliest. The shared prompt is read once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from longlora_cli.data.encoding import safe_encoder
from longlora_cli.evaluation.generation import Advance, Question, Row, told_of
from longlora_cli.evaluation.journal import Journal, hash_ids, key_of
from longlora_cli.evaluation.sharding import text_of
from longlora_cli.evaluation.tasks.files.multiple_choice import LETTERS


class Weigher(Protocol):
    """Anything that says how likely continuations are; a model with its KV cache, or a fake."""

    def log_likelihoods(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Natural logarithm of the probability of each continuation after `ids`."""
        ...


def choice_ids(tokenizer: Any, question: Question, text: str) -> tuple[list[int], list[list[int]]]:
    """The ids that all of prompt and choice share, and what each choice has after them.

    A choice follows the prompt behind a blank. Both are encoded together, since tokens may reach over the seam; what
    they share is the prompt then, or a token less of it.

    Args:
        tokenizer: Of the model.
        question: With its `choices` in `extra`.
        text: The prompt as text, of which the question's ids were made.
    """
    encoder = safe_encoder(tokenizer)
    texts = [f"{text} {choice}" for choice in question.extra["choices"]]
    wholes = [[*encoder.begin, *ids.tolist()] for ids in encoder.encode_batch(texts)]
    shared = min(_common(question.prompt, whole) for whole in wholes)
    return list(question.prompt[:shared]), [whole[shared:] for whole in wholes]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    number = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        number += 1
    return number


def weigh_key(question: Question, settings: Any) -> str:
    """The key of its row in a journal."""
    return key_of("weigh", question.task, hash_ids(question.prompt), question.extra["choices"], settings)


def weigh(
    weigher: Weigher,
    questions: Iterable[tuple[Question, str]],
    tokenizer: Any,
    *,
    settings: Any = None,
    journal: Journal | None = None,
    advance: Advance | None = None,
) -> Iterator[Row]:
    """Weigh the choices of questions in their order; those that the journal holds are not weighed again.

    Args:
        weigher: What weighs.
        questions: Each with its prompt as text.
        tokenizer: Of the model.
        settings: As of `generation.predict`.
        journal: Where finished rows are kept.
        advance: Called with 1 after each question.

    Yields:
        Rows as of `generation.predict`: `prediction` is the letter of the likeliest choice, `extra` has the one that is
        likeliest by character as `normalized`, and `log_likelihoods` has them all. `new_tokens` are those of choices.
    """
    kept = journal if journal is not None else Journal()
    for question, text in kept.share(questions, lambda one: text_of(one[0].facts)):
        key = weigh_key(question, settings)
        row = kept.get(key)
        if row is None:
            row = {"key": key, "task": question.task, **_weighed(weigher, question, text, tokenizer)}
            kept.add(row)
        if advance is not None:
            advance(1)
        yield row | question.facts | told_of(question)


def _weighed(weigher: Weigher, question: Question, text: str, tokenizer: Any) -> Row:
    started = time.perf_counter()
    prompt, continuations = choice_ids(tokenizer, question, text)
    found = weigher.log_likelihoods(prompt, continuations)
    choices = question.extra["choices"]
    by_character = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
    return {
        **question.facts,
        "references": question.references,
        "prediction": _likeliest(found),
        "finish": "choice",
        "prompt_tokens": len(prompt),
        "reused_tokens": 0,
        "new_tokens": sum(map(len, continuations)),
        "seconds": round(time.perf_counter() - started, 4),
        "scorer": question.scorer,
        "extra": {**question.extra, "normalized": _likeliest(by_character)},
        "log_likelihoods": found,
    }


def _likeliest(values: Sequence[float]) -> str:
    return LETTERS[max(range(len(values)), key=lambda place: (values[place], -place))]
