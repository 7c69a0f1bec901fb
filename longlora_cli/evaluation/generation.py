"""Evaluation by generation: questions in, answers out, scores after. The layers share only rows.

A `Question` is made with a tokenizer alone, `predict` needs something that answers, and scoring needs
neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from longlora_cli.errors import DataError
from longlora_cli.evaluation.batching import Batching, groups
from longlora_cli.evaluation.journal import Journal, hash_ids, key_of
from longlora_cli.evaluation.sharding import text_of
from longlora_cli.evaluation.statistics import mean_clustered
from longlora_cli.generation.requests import Request
from longlora_cli.generation.stopping import cut_at

Advance = Callable[[int], None]
Row = dict[str, Any]
FIRST_TOKENS = 4
"""So many tokens of a prompt are kept in its row: enough to see a second BOS."""

_COSTS = ("seconds", "prompt_tokens", "reused_tokens", "new_tokens")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        ids: New token ids, without the end token.
        text: The same as text; what follows a stop string may be in it.
        finish: `eos` when the model ended it, `stop` when one of its strings was met, `length` when it was cut at the
            limit.
        reused_tokens: Tokens of the prompt that were not read again, because a cache held them.
        kv_bytes: Keys and values held afterwards.
    """

    ids: list[int]
    text: str
    finish: Literal["eos", "stop", "length"]
    reused_tokens: int = 0
    kv_bytes: int = 0


class Answerer(Protocol):
    """Anything that continues token ids; a model with its KV cache, or a fake."""

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> Answer:
        """The likeliest continuation of `ids`, at most `max_new_tokens` long; it may end once one of `stop` is met."""
        ...


@runtime_checkable
class Together(Answerer, Protocol):
    """An answerer that continues several prompts at a time, where it is told to by its `batching`."""

    batching: Batching | None

    def answer_together(self, requests: Sequence[Request]) -> list[Answer]:
        """What `answer` says to each, in their order."""
        ...


@dataclass(frozen=True)
class FollowUp:
    """What is asked after an answer; what is said then is the one that counts.

    Args:
        ids_of: The second prompt, from the text of the first answer.
        max_new_tokens: Longest second answer.
        wording: Its words, as JSON: a part of the question's key.
    """

    ids_of: Callable[[str], list[int]]
    max_new_tokens: int
    wording: Any


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known.

    Args:
        task: The task it belongs to.
        prompt: Token ids up to where the answer begins, the chat template included.
        references: Right answers, at least one.
        facts: What is known of it (length, depth, sample, line); copied into its row. Questions about one text may
            say so by an equal `document`: their scores are not independent.
        sample_hash: Of its text and references, see `hash_sample`: the same for every model that is asked it.
        max_new_tokens: Longest answer; None: as long as `predict` is told.
        stop: The answer ends before the first of these strings.
        scorer: Name of the scorer that judges the answer; None: the caller knows.
        extra: What the scorer needs besides; copied into its row.
        without_context: The prompt without what it asks about; None where the two cannot be told apart.
        follow_up: What is asked afterwards; None: the first answer counts.
    """

    task: str
    prompt: Sequence[int]
    references: list[str]
    facts: Row = field(default_factory=dict)
    sample_hash: str = ""
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    scorer: str | None = None
    extra: Row = field(default_factory=dict)
    without_context: Sequence[int] | None = None
    follow_up: FollowUp | None = None


@runtime_checkable
class QuestionAnswerer(Protocol):
    """An answerer that wants to know what is asked, not the ids alone; `predict` prefers it."""

    def answer_question(self, question: Question, max_new_tokens: int) -> Answer:
        """The likeliest continuation of the question's prompt."""
        ...


def hash_sample(content: Any, references: Sequence[str]) -> str:
    """SHA-256 of a question as text (JSON of its messages, or a plain text) and its references, in hex.

    Neither the tokenizer nor the chat template is in it: rows of two models with equal hashes are answers to the same
    question.
    """
    return key_of("sample", content, list(references))


def predict(
    answerer: Answerer,
    questions: Iterable[Question],
    *,
    max_new_tokens: int,
    settings: Any = None,
    journal: Journal | None = None,
    advance: Advance | None = None,
) -> Iterator[Row]:
    """Answer questions in their order; those that the journal holds are not asked again.

    Consecutive questions should share long prefixes: an answerer with a cache reads a shared prefix once. One that
    answers several together (`Together`) is given consecutive questions of similar length, and rows come in the
    questions' order all the same.

    Args:
        answerer: What answers.
        questions: Read lazily.
        max_new_tokens: Longest answer to questions that do not say it themselves.
        settings: JSON of whatever else decides an answer (model, numbers, positions); part of each row's key.
        journal: Where finished rows are kept; that of a share has only the share's questions asked.
        advance: Called with 1 after each question.

    Yields:
        Rows: `key`, `task`, the question's facts, `sample_hash`, `first_tokens` of the prompt, `references`,
        `prediction`, `finish`, `prompt_tokens`, `reused_tokens`, `new_tokens`, `kv_bytes`, `seconds`; `scorer` and
        `extra` where the question has them. `finish` is `stop` where one of its strings was met. A question with a
        follow-up has the first answer as `reasoning`, of `reasoning_tokens`, which `new_tokens` count too.
    """
    kept = journal if journal is not None else Journal()
    mine = kept.share(questions, lambda one: text_of(one.facts))
    asked = (_asked(question, max_new_tokens, settings) for question in mine)
    batching = answerer.batching if isinstance(answerer, Together) else None
    for group in groups(asked, lambda one: None if one.key in kept else one.request, batching):
        # Equal questions share a key: they are asked once, but each has its own place.
        new = list({one.key: one for one in group if one.key not in kept}.values())
        for row in _answered(answerer, new):
            kept.add(row)
        for one in group:
            found = kept.get(one.key)
            assert found is not None
            if advance is not None:
                advance(1)
            yield found | one.question.facts | told_of(one.question)


@dataclass(frozen=True)
class _Asked:
    """A question with its key in the journal and what is asked of the model."""

    question: Question
    key: str
    request: Request


def question_key(question: Question, max_new_tokens: int, settings: Any) -> str:
    """The key of its row in a journal; arguments as of `predict`."""
    return _asked(question, max_new_tokens, settings).key


def _asked(question: Question, max_new_tokens: int, settings: Any) -> _Asked:
    longest = max_new_tokens if question.max_new_tokens is None else question.max_new_tokens
    parts: list[Any] = [question.task, hash_ids(question.prompt), question.references, longest, settings]
    if question.stop:
        parts.append(question.stop)
    if (then := question.follow_up) is not None:
        parts.append(["then", then.wording, then.max_new_tokens])
    return _Asked(question, key_of(*parts), Request(question.prompt, longest, question.stop))


def _answered(answerer: Answerer, asked: Sequence[_Asked]) -> list[Row]:
    """The rows of questions that are answered together; each has an equal part of the seconds."""
    started = time.perf_counter()
    answers = _first_answers(answerer, asked)
    followed = [
        (place, Request(then.ids_of(answers[place].text), then.max_new_tokens))
        for place, one in enumerate(asked)
        if (then := one.question.follow_up) is not None
    ]
    places = [place for place, _ in followed]
    last = dict(zip(places, _answers(answerer, [request for _, request in followed]), strict=True))
    seconds = round((time.perf_counter() - started) / max(len(asked), 1), 4)
    return [
        _row(one, answers[place], last.get(place)) | {"seconds": seconds} | _judged_by(one.question)
        for place, one in enumerate(asked)
    ]


def _first_answers(answerer: Answerer, asked: Sequence[_Asked]) -> list[Answer]:
    if len(asked) == 1 and isinstance(answerer, QuestionAnswerer):
        return [answerer.answer_question(asked[0].question, asked[0].request.max_new_tokens)]
    return _answers(answerer, [one.request for one in asked])


def _answers(answerer: Answerer, requests: Sequence[Request]) -> list[Answer]:
    if len(requests) > 1:
        assert isinstance(answerer, Together)
        return answerer.answer_together(requests)
    return [answerer.answer(one.ids, one.max_new_tokens, one.stop) for one in requests]


def _row(one: _Asked, first: Answer, last: Answer | None) -> Row:
    question, answer = one.question, last or first
    text = cut_at(answer.text, one.request.stop)
    row = {
        "key": one.key,
        "task": question.task,
        **question.facts,
        "references": question.references,
        "prediction": text,
        "finish": answer.finish if text == answer.text else "stop",
        "prompt_tokens": len(question.prompt),
        "reused_tokens": first.reused_tokens,
        "new_tokens": len(answer.ids),
        "kv_bytes": answer.kv_bytes,
    }
    if last is not None:
        row |= {"reasoning": first.text, "reasoning_tokens": len(first.ids)}
        row["new_tokens"] += len(first.ids)
    return row


def told_of(question: Question) -> Row:
    """What a row says of its question that its answer does not depend on."""
    return {"sample_hash": question.sample_hash, "first_tokens": list(question.prompt[:FIRST_TOKENS])}


def _judged_by(question: Question) -> Row:
    named: Row = {} if question.scorer is None else {"scorer": question.scorer}
    return named | ({"extra": question.extra} if question.extra else {})


def speed(rows: Sequence[Row]) -> Row:
    """What answering cost, over rows of `predict`.

    `tokens_per_second` counts prompt tokens in full even where a cache spared reading them: it is the rate
        that a
    user sees. `reused_tokens` says how many were spared, `kv_bytes` what the longest answer held.
    """
    sums = {name: sum(row[name] for row in rows) for name in _COSTS}
    tokens = sums["prompt_tokens"] + sums["new_tokens"]
    sums["kv_bytes"] = max((row.get("kv_bytes", 0) for row in rows), default=0)
    return {**sums, "tokens_per_second": tokens / sums["seconds"] if sums["seconds"] > 0 else None}


def score_rows(rows: Sequence[Row], metrics: Sequence[Any]) -> tuple[Row, list[Row]]:
    """Score predictions with `evaluate` metrics.

    Args:
        rows: From `predict`; at least one.
        metrics: From `metrics.load_metrics`.

    Returns:
        The summary `{"n", "scores": {key: {"n", "score", "ci95", "clusters", "scorer"}}, "scorers": [...], "cut"}`,
        where `cut` is the share of answers that ended at the limit, and the rows with their `scores`. Rows of one
        `document` are a cluster; a row without is one of its own.

    Raises:
        DataError: No rows. A fault inside a scorer is raised as it is.
    """
    if not rows:
        raise DataError("there is nothing to score")
    predictions, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    summary: Row = {}
    texts = [row.get("document", index) for index, row in enumerate(rows)]
    scored = [{**row, "scores": {}} for row in rows]
    for metric in metrics:
        found = metric.compute(predictions=predictions, references=references, per_sample=True)
        for key, values in found["per_sample"].items():
            average = mean_clustered(values, texts, binary=metric.scorer.binary)
            summary[key] = average | {"scorer": metric.scorer.version}
            for row, value in zip(scored, values, strict=True):
                row["scores"][key] = value
    cut = sum(row["finish"] == "length" for row in rows) / len(rows)
    versions = [metric.scorer.version for metric in metrics]
    return {"n": len(rows), "scores": summary, "scorers": versions, "cut": cut}, scored


def evaluate_generation(
    answerer: Answerer,
    questions: Iterable[Question],
    metrics: Sequence[Any],
    *,
    max_new_tokens: int,
    advance: Advance | None = None,
) -> Row:
    """Answer and score; for evaluation inside training.

    Args:
        answerer: What answers.
        questions: From `tasks.rows.read_questions`.
        metrics: From `metrics.load_metrics`.
        max_new_tokens: Longest answer.
        advance: Called with 1 after each question.

    Returns:
        `{"n", "scores": {key: {"n", "score", "ci95", "clusters"}}, "scorers", "cut"}`; see `score_rows`.
    """
    rows = list(predict(answerer, questions, max_new_tokens=max_new_tokens, advance=advance))
    return score_rows(rows, metrics)[0]
