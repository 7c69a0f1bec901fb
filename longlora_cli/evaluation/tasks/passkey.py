"""Passkey: one five-digit key in a long text, at every depth. Needs a tokenizer only.

Source: Mohtashami and Jaggi 2023, Landmark Attention (arXiv:2305.16300); the sentences here are our own. The
samples of one length that differ only by depth share their text and come deepest first, so that a cache of
what was read keeps everything before the next key.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

from longlora_cli.data.chat_template import encode_prompt
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.haystack import Haystack, Sentence
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.generation import Question, Row, hash_sample

TASK = "passkey"
NOISE = (
    "The meadow is wide. The clouds are slow. The road is long. The stones are grey. "
    "We walk on and nothing happens."
)
"""Filler without meaning, for `--haystack noise`: does a key stand out? It does not ask for reading."""

_SENTENCE = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key?"
_BASE_PROMPT = "{text}\n\nQuestion: What is the pass key?\nAnswer: The pass key is"
_BARE_PROMPT = _BASE_PROMPT.format(text="").lstrip()
# Sentences are measured alone; in the text a joint can cost a token more or less.
_SLACK_TOKENS = 4
_MISSES = 64


def depth_shares(depths: int) -> list[float]:
    """Evenly spaced depths from 0 to 1; a single depth is the middle."""
    return [0.5] if depths == 1 else [number / (depths - 1) for number in range(depths)]


def passkey_questions(
    haystack: Haystack,
    tokenizer: Any,
    *,
    length: int,
    depths: int,
    samples: int,
    seed: int,
    answer_tokens: int,
    first_sample: int = 0,
) -> Iterator[Question]:
    """Questions whose prompt and answer together have at most `length` tokens, close to it.

    Args:
        haystack: Where the text comes from; each sample begins at a random sentence.
        tokenizer: Counts the tokens. With a chat template the prompt is a chat, else a text to continue.
        length: Most tokens of prompt and answer.
        depths: How many depths; the key stands before the sentence nearest to each.
        samples: Texts per length; each has all depths.
        seed: With length and sample number, decides everything random.
        answer_tokens: Kept free for the answer.
        first_sample: Number of the first sample.

    Yields:
        Questions with the facts `length`, `depth` (nominal), `actual_depth` (share of the filler's tokens
        before the key) and `sample`; `first_word` where the prompt is a text to continue, of which only the
        first word is the answer.

    Raises:
        SettingsError: `length` does not hold the question.
    """
    bare_ids = _encode(tokenizer, "")
    for sample in range(first_sample, first_sample + samples):
        rng = random.Random(f"passkey:{seed}:{length}:{sample}")
        bare = len(_encode(tokenizer, _text([], 0, "88888")))
        budget = length - answer_tokens - bare - _SLACK_TOKENS
        if budget < 1:
            raise SettingsError(
                f"--lengths {length}: a passkey sample needs at least {length - budget + 1} tokens",
                rule=f"{bare} for the question, {answer_tokens} for the answer, and some text.",
            )
        filler, counts = _fill(haystack, tokenizer, rng, budget)
        for depth in reversed(depth_shares(depths)):
            key = _new_key(rng, filler)
            prompt, actual, text = _place(tokenizer, filler, counts, depth, key, length - answer_tokens)
            facts: Row = {"length": length, "depth": depth, "actual_depth": actual, "sample": sample}
            if not tokenizer.chat_template:
                facts["first_word"] = True
            yield Question(TASK, prompt, [key], facts, hash_sample(text, [key]), without_context=bare_ids)


def _fill(
    haystack: Haystack, tokenizer: Any, rng: random.Random, budget: int
) -> tuple[list[Sentence], list[int]]:
    """Sentences in their order, up to `budget` tokens; one too long for what is left is passed over."""
    stream = haystack.sentences(rng)
    filler: list[Sentence] = []
    counts: list[int] = []
    left, misses = budget, 0
    while left > _SLACK_TOKENS and misses < _MISSES:
        batch = list(islice(stream, 8 + left // 24))
        for sentence, tokens in zip(batch, haystack.token_counts(tokenizer, batch), strict=True):
            if tokens <= left:
                filler.append(sentence)
                counts.append(tokens)
                left -= tokens
            else:
                misses += 1
    return filler, counts


def _new_key(rng: random.Random, filler: Sequence[Sentence]) -> str:
    while True:
        key = str(rng.randint(10_000, 99_999))
        if not any(key in sentence.text for sentence in filler):
            return key


def _place(
    tokenizer: Any, filler: list[Sentence], counts: list[int], depth: float, key: str, limit: int
) -> tuple[list[int], float, str]:
    """The prompt with the key at the sentence nearest to `depth`, the depth it got, and its text."""
    while True:
        ends = list(accumulate(counts, initial=0))
        gap = min(range(len(ends)), key=lambda place: abs(ends[place] - depth * ends[-1]))
        text = _text(filler, gap, key)
        prompt = _encode(tokenizer, text)
        if len(prompt) <= limit or not filler:
            return prompt, ends[gap] / max(ends[-1], 1), text
        filler, counts = filler[:-1], counts[:-1]  # joints cost more than the slack: rare


def _text(filler: Sequence[Sentence], gap: int, key: str) -> str:
    before = "".join(sentence.text + sentence.joint for sentence in filler[:gap])
    after = "".join(sentence.text + sentence.joint for sentence in filler[gap:])
    return f"{before}{_SENTENCE.format(key=key)} {after}".rstrip()


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template:
        return encode_prompt(
            tokenizer, [{"role": "user", "content": f"{text}\n\n{_QUESTION}" if text else _QUESTION}]
        )
    encoder = safe_encoder(tokenizer)
    return [
        *encoder.begin,
        *encoder.encode_batch([_BASE_PROMPT.format(text=text) if text else _BARE_PROMPT])[0].tolist(),
    ]
