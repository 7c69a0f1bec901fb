"""Samples as token ids: the chat template with the answer's beginning, or a plain text to continue.

Text of a sample can never become a control token: both ways go through the encode functions of `data`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longlora_cli.data.chat_template import count_prompt, encode_prompt
from longlora_cli.data.counting import token_counter
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.evaluation.generation import FollowUp, Question, hash_sample
from longlora_cli.evaluation.tasks.sample import Sample


def plain_text(sample: Sample) -> str:
    """The sample as a text to continue: its turns, then the answer's beginning.

    A single turn stands as it is; of several each has its speaker's name in front.
    """
    turns = [message["content"] for message in sample.messages]
    if len(turns) > 1:
        named = [f"{message['role'].capitalize()}: {message['content']}" for message in sample.messages]
        return "\n".join([*named, "Assistant:"]) + _opened(" ", sample)
    return turns[0] + (sample.answer_prefix.rstrip() or ("" if sample.as_is else "\n"))


def prompt_ids(tokenizer: Any, sample: Sample) -> list[int]:
    """Token ids of the sample's prompt, as the model reads them.

    A blank at the answer's end is left out: the first generated token brings it, since tokens begin with a blank and do
    not end with one. At the beginning of a turn, after a line break, there is none either.

    Raises:
        DataError: The template refuses the chat.
    """
    if _is_chat(tokenizer, sample):
        prefix = _opened("", sample)
        return encode_prompt(tokenizer, sample.messages, answer_prefix=prefix)
    encoder = safe_encoder(tokenizer)
    return [*encoder.begin, *encoder.encode_batch([plain_text(sample)])[0].tolist()]


def prompt_tokens(tokenizer: Any, sample: Sample) -> int:
    """How many `prompt_ids` there are; sentences that were met before are not encoded again."""
    if _is_chat(tokenizer, sample):
        return count_prompt(tokenizer, sample.messages, answer_prefix=_opened("", sample))
    counter = token_counter(tokenizer)
    return len(safe_encoder(tokenizer).begin) + counter.count(plain_text(sample))


def hash_of(sample: Sample) -> str:
    """The hash by which the answers of two models to one sample are paired."""
    return hash_sample([sample.messages, sample.answer_prefix], sample.outputs)


def bare_of(sample: Sample) -> Sample | None:
    """The sample without its context; None where that cannot be told from the question."""
    messages = sample.without_context
    return None if messages is None else replace(sample, messages=messages, context="")


def follow_up_of(tokenizer: Any, sample: Sample) -> FollowUp | None:
    """What is asked after the sample's first answer; None where that one is judged."""
    then = sample.then
    if then is None:
        return None

    def ids_of(said: str) -> list[int]:
        content = then.before + said.strip() + then.after
        return prompt_ids(tokenizer, replace(sample, messages=[{"role": "user", "content": content}]))

    return FollowUp(ids_of, then.max_new_tokens, [then.before, then.after])


def question_of(tokenizer: Any, sample: Sample) -> Question:
    """The sample as a question."""
    bare = bare_of(sample)
    return Question(
        sample.task,
        prompt_ids(tokenizer, sample),
        sample.outputs,
        {"id": sample.id, **sample.facts},
        hash_of(sample),
        max_new_tokens=sample.max_new_tokens,
        stop=sample.stop,
        scorer=sample.scorer,
        extra=sample.extra,
        without_context=None if bare is None else prompt_ids(tokenizer, bare),
        follow_up=follow_up_of(tokenizer, sample),
    )


def _is_chat(tokenizer: Any, sample: Sample) -> bool:
    return bool(tokenizer.chat_template) and sample.as_chat


def _opened(before: str, sample: Sample) -> str:
    prefix = sample.answer_prefix.strip()
    return before + prefix if prefix else ""
