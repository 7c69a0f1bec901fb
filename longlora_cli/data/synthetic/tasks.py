"""Synthetic training chats: thirteen tasks, one way to make a chat.

Sample `index` of a task is a function of the seed, its number, the haystack, the tokenizer and the numbers asked for:
neither of what was made before it nor of which process makes it.
"""

from __future__ import annotations

import random
from typing import Any

from longlora_cli.data.haystack import Haystack
from longlora_cli.data.synthetic.common_words import common_words
from longlora_cli.data.synthetic.count import count
from longlora_cli.data.synthetic.events import ordered_events
from longlora_cli.data.synthetic.hops import multi_hop
from longlora_cli.data.synthetic.key_value import key_value
from longlora_cli.data.synthetic.multi_key import multi_key
from longlora_cli.data.synthetic.multi_query import multi_query
from longlora_cli.data.synthetic.multi_value import multi_value
from longlora_cli.data.synthetic.needle import needle
from longlora_cli.data.synthetic.passage import repeat_paragraph
from longlora_cli.data.synthetic.placing import SyntheticChat, bare_tokens, place
from longlora_cli.data.synthetic.register import register
from longlora_cli.data.synthetic.sheet import Request, Sheet, Task
from longlora_cli.data.synthetic.topic import topic
from longlora_cli.data.synthetic.variables import variables

TASKS: dict[str, Task] = {
    "needle": needle,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variables": variables,
    "key-value": key_value,
    "topic": topic,
    "multi-hop": multi_hop,
    "ordered-events": ordered_events,
    "count": count,
    "repeat-paragraph": repeat_paragraph,
    "common-words": common_words,
    "register": register,
}
"""The tasks by the names that settings use."""

# Training lengths run from this share of the longest one up to it, each as likely as any other. Spread evenly by their
# logarithm, chats longer than three quarters of the longest held 29 % of the tokens; now they hold 44 %, and a seventh
# of the chats is still shorter than a quarter. The far distances between question and fact are what a base lacks.
_SHORTEST_SHARE = 1 / 8


def make_training_chat(
    haystack: Haystack,
    tokenizer: Any,
    *,
    longest: int,
    facts: int,
    questions: int,
    seed: int,
    index: int,
    task: str = "needle",
) -> SyntheticChat:
    """Make one chat of a random length, uniform from an eighth of `longest` up to it, template and answers included.

    Where an eighth does not hold the lines, lengths begin at what they need.

    Args:
        haystack: Where the text comes from: consecutive sentences from a random one on.
        tokenizer: Counts the tokens; its chat template renders the chat.
        longest: Longest chat in tokens.
        facts: Lines to hide.
        questions: How many questions to ask, at most `facts`; fewer where the task's lines allow fewer.
        seed: With `index` and `task`, decides everything random.
        index: Number of the sample among those of its task.
        task: A key of `TASKS`.

    Raises:
        DataError: Lines, questions and answers alone are longer than `longest`; or the tokenizer has no template;
            or the text holds nearly everything that could be invented.
        ValueError: More questions than facts.
    """
    if questions > facts:
        raise ValueError(f"{questions} questions, {facts} facts")
    # Needles came first: their key says no task, so that data made before are made again byte for byte.
    key = f"train:{seed}:{index}" if task == "needle" else f"train:{task}:{seed}:{index}"

    def sheet_for(context: str) -> Sheet:
        return TASKS[task](Request(facts, questions, key, context, haystack))

    # A twentieth more than the lines need: what the context holds already is drawn again.
    needed = bare_tokens(tokenizer, sheet_for("")) * 21 // 20
    shortest = min(longest, max(int(longest * _SHORTEST_SHARE), needed))
    share = random.Random(f"{key}:length").random()
    length = round(shortest + (longest - shortest) * share)
    window = random.Random(f"{key}:window")
    return place(haystack, tokenizer, length=length, window=window, sheet_for=sheet_for)
