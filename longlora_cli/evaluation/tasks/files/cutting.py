"""Prompts that are longer than a model reads: cut in the middle or at the left, refused or passed over; always told.

The middle rule is LongBench's (THUDM/LongBench `pred.py` at 2e00731): the filled prompt is encoded, its first and last
half of the limit are decoded each for itself and joined, and the chat template comes after that. Text of the seam may
be encoded to a few tokens more or less, so the length is measured again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from longlora_cli.data.encoding import safe_encoder
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.tasks.prompts import hash_of, prompt_ids
from longlora_cli.evaluation.tasks.sample import Sample

Truncate = Literal["middle", "left", "error", "skip"]
FEWEST_TOKENS = 16
"""A prompt of less is no question any more."""

_TRIES = 8


@dataclass(frozen=True)
class Limits:
    """How much is read.

    Args:
        readable: Most tokens of prompt and answer, template included; where `max_prompt` says nothing.
        max_prompt: Most tokens of the filled prompt without its template, as LongBench counts them (31,500 for 32K).
        truncate: What becomes of longer ones.
    """

    readable: int
    max_prompt: int | None
    truncate: Truncate


@dataclass(frozen=True)
class Fitted:
    """A sample that fits.

    Args:
        sample: Perhaps with less text.
        ids: Its prompt.
        lost_tokens: How many the whole prompt has more.
        sample_hash: Of the whole sample, whatever was cut: the same for every model.
        bare: The same question without its context; None where that cannot be told from it.
    """

    sample: Sample
    ids: list[int]
    lost_tokens: int
    sample_hash: str
    bare: Fitted | None = None


def fit(tokenizer: Any, sample: Sample, limits: Limits) -> Fitted | None:
    """The sample within the limits; None where it is too long and such ones are skipped.

    Raises:
        DataError: It is too long and `truncate` is `error`, or it is a chat of several turns, which cannot be cut.
        SettingsError: The answer leaves no room for a question.
    """
    whole = prompt_ids(tokenizer, sample)
    several = len(sample.messages) > 1
    frame = 0 if several else _frame_tokens(tokenizer, sample)
    room = prompt_room(limits, sample, frame)
    if room < FEWEST_TOKENS:
        raise SettingsError(
            f"{sample.task}: the answer may have {sample.max_new_tokens:,} tokens, the model reads "
            f"{limits.readable:,}: no room is left for the question",
            hint="Use --max-new-tokens to allow shorter answers.",
        )
    if len(whole) <= room:
        return Fitted(sample, whole, 0, hash_of(sample))
    if limits.truncate == "skip":
        return None
    if several or limits.truncate == "error":
        raise _too_long(sample, limits, len(whole), room)
    budget = room - frame
    for _ in range(_TRIES):
        cut = _cut(tokenizer, sample, budget, limits.truncate)
        ids = prompt_ids(tokenizer, cut)
        if len(ids) <= room:
            return Fitted(cut, ids, len(whole) - len(ids), hash_of(sample))
        budget -= len(ids) - room
    raise DataError(f"{sample.facts.get('row', sample.id)}: its text could not be cut to {room:,} tokens")


def prompt_room(limits: Limits, sample: Sample, frame_tokens: int) -> int:
    """Most tokens that its prompt may have, template included."""
    if limits.max_prompt is not None:
        return limits.max_prompt + frame_tokens
    return limits.readable - sample.max_new_tokens


def needed_tokens(tokenizer: Any, sample: Sample, limits: Limits) -> int:
    """Most tokens that a prompt of such samples and its answer may have together."""
    return prompt_room(limits, sample, _frame_tokens(tokenizer, sample)) + sample.max_new_tokens


def _too_long(sample: Sample, limits: Limits, tokens: int, room: int) -> DataError:
    place = f"{sample.facts.get('row', sample.id)} ({sample.task})"
    if limits.truncate == "error":
        return DataError(
            f"{place}: its prompt has {tokens:,} tokens, {room:,} are read",
            hint="Use --truncate middle to cut such ones, or skip to leave them out.",
        )
    return DataError(
        f"{place}: a chat of several turns has {tokens:,} tokens, {room:,} are read",
        rule="Only prompts of one turn can be cut.",
        hint="Use --truncate skip to leave such ones out.",
    )


def _frame_tokens(tokenizer: Any, sample: Sample) -> int:
    """Tokens of the template and the answer's beginning around the text of one turn."""
    one = replace(
        sample, messages=[{**sample.messages[-1], "content": "a"}]
    )  # empty turns are refused by some
    return len(prompt_ids(tokenizer, one)) - len(_text_ids(tokenizer, one))


def _text_ids(tokenizer: Any, sample: Sample) -> list[int]:
    encoder = safe_encoder(tokenizer)
    return [*encoder.begin, *encoder.encode_batch([sample.messages[0]["content"]])[0].tolist()]


def _cut(tokenizer: Any, sample: Sample, budget: int, how: str) -> Sample:
    ids = _text_ids(tokenizer, sample)
    half = max(budget // 2, 1)
    pieces = [ids[:half], ids[-half:]] if how == "middle" else [ids[-max(budget, 1) :]]
    texts = [
        tokenizer.decode(piece, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for piece in pieces
    ]
    return _with_text(sample, "".join(texts))


def _with_text(sample: Sample, text: str) -> Sample:
    return replace(sample, messages=[{**sample.messages[0], "content": text}])
