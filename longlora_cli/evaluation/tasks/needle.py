"""Needles: several facts in one long text, asked one by one. Needs a tokenizer only.

The chats are those that `longlora prepare --synthetic` makes for training (`data/synthetic.py`), from another
random stream. One fact is asked for in each of `depths` equal parts of the text; the others distract. All
questions of one sample share their text, so that a model reads it once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from longlora_cli.data.chat_template import encode_prompt, encode_prompts, require_template
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.synthetic import RetrievalChat, make_retrieval_chat
from longlora_cli.data.wordings import Wording
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.generation import Question, hash_sample

TASK = "needle"
_TRIES = 4
_CLOSE = 0.98
# Questions are compared by their own tokens; where one joins the text it can cost one more or less.
_SEAM_TOKENS = 2


def needle_questions(
    haystack: Haystack,
    tokenizer: Any,
    *,
    length: int,
    depths: int,
    samples: int,
    facts: int,
    seed: int,
    answer_tokens: int,
    wording: Wording = "train",
    first_sample: int = 0,
) -> Iterator[Question]:
    """Questions whose prompt and answer together have at most `length` tokens, close to it.

    Args:
        haystack: Where the text comes from.
        tokenizer: Counts the tokens; needs a chat template.
        length: Most tokens of prompt and answer.
        depths: Equal parts of the text; a fact stands at a random place in each and is asked for.
        samples: Texts per length; each has all depths.
        facts: Facts in one text, at least `depths`.
        seed: With length and sample number, decides everything random.
        answer_tokens: Kept free for the answer.
        wording: Forms of the sentences: those that training data has, or others.
        first_sample: Number of the first sample.

    Yields:
        Questions with the facts `length`, `depth` (middle of the part), `actual_depth` (share of the filler's
        tokens before the fact) and `sample`.

    Raises:
        SettingsError: `length` does not hold the facts, or there are fewer facts than depths.
        DataError: The tokenizer has no chat template.
    """
    require_template(tokenizer)
    if facts < depths:
        raise SettingsError(f"--needle-facts {facts} is below --depths {depths}: one fact is asked per depth")
    for sample in range(first_sample, first_sample + samples):
        rng = random.Random(f"needle:{seed}:{length}:{sample}")
        places = [(part + rng.random()) / depths for part in range(depths)]
        places += [rng.random() for _ in range(facts - depths)]

        def make(budget: int, places: list[float] = places, sample: int = sample) -> RetrievalChat:
            return make_retrieval_chat(
                haystack,
                tokenizer,
                length=budget,
                facts=facts,
                questions=depths,
                seed=seed,
                index=length * 100_000 + sample,  # lengths share nothing
                depths=places,
                wording=wording,
            )

        yield from _fit(tokenizer, make, length, answer_tokens, depths, sample)


def _fit(
    tokenizer: Any, make: Any, length: int, answer_tokens: int, depths: int, sample: int
) -> list[Question]:
    """Questions of the longest chat whose every single question and answer fit.

    `make` counts all questions and answers of a chat, but each is asked alone: the text may be longer by the others.
    """
    budget = room = length - answer_tokens - _SEAM_TOKENS
    best: RetrievalChat | None = None
    best_tokens = 0
    for _ in range(_TRIES):
        chat = _make_or_refuse(make, budget, length)
        # Reading a text into tokens is slow (0.1 s for 32K), so only the longest prompt is measured.
        tokens = len(encode_prompt(tokenizer, [_longest_turn(tokenizer, chat)]))
        if best_tokens < tokens <= room:
            best, best_tokens = chat, tokens
        if room * _CLOSE <= tokens <= room:
            break
        budget += room - tokens
    if best is None:
        raise _too_short(length)
    turns = _first_turns(best)
    prompts = encode_prompts(tokenizer, [[turn] for turn in turns])
    return [
        Question(
            TASK,
            prompts[part],
            [best.facts[number].answer],
            {
                "length": length,
                "depth": (part + 0.5) / depths,
                "actual_depth": best.facts[number].depth,
                "sample": sample,
                "question": best.facts[number].question,
            },
            hash_sample(turns[part]["content"], [best.facts[number].answer]),
            without_context=encode_prompt(tokenizer, [_user(best.facts[number].question)]),
        )
        for part, number in enumerate(best.asked)
    ]


def _make_or_refuse(make: Any, budget: int, length: int) -> RetrievalChat:
    try:
        chat: RetrievalChat = make(budget)
    except DataError as error:
        raise _too_short(length, error.message) from error
    return chat


def _too_short(length: int, reason: str | None = None) -> SettingsError:
    return SettingsError(
        f"--lengths {length} is too short for a needle sample",
        rule=reason,
        hint="Use longer --lengths, fewer --needle-facts or fewer --depths.",
    )


def _first_turns(chat: RetrievalChat) -> list[dict[str, str]]:
    """The text with each asked question as the only turn."""
    first = chat.messages[0]["content"]
    context = first.removesuffix(chat.facts[chat.asked[0]].question)
    return [_user(context + chat.facts[number].question) for number in chat.asked]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _longest_turn(tokenizer: Any, chat: RetrievalChat) -> dict[str, str]:
    questions = [chat.facts[number].question for number in chat.asked]
    sizes = [len(ids) for ids in safe_encoder(tokenizer).encode_batch(questions)]
    return _first_turns(chat)[sizes.index(max(sizes))]
