"""Samples as prompts: chat or text, with the answer's beginning, and safe from control tokens."""

from __future__ import annotations

import pytest
import synthetic_parts as parts

from longlora_cli.data.chat_template import count_prompt, encode_prompt, render_chat
from longlora_cli.evaluation.tasks.prompts import plain_text, prompt_ids, prompt_tokens
from longlora_cli.evaluation.tasks.sample import Sample

KINDS = pytest.mark.parametrize("kind", ["embedded", "sentencepiece", "base"])


def sample(content="Where is it? Say.", prefix=" It is in the ", **changes):
    messages = [{"role": "user", "content": content}]
    fields = {
        "task": "t",
        "id": "1",
        "messages": messages,
        "outputs": ["x"],
        "scorer": "f1",
        "max_new_tokens": 4,
    }
    return Sample(**{**fields, "answer_prefix": prefix, **changes})


@KINDS
def test_the_number_of_tokens_is_known_without_encoding_the_whole(kind):
    tokenizer = parts.tokenizer(kind)
    for given in (
        sample(),
        sample(prefix=""),
        sample(as_chat=False),
        sample("One. Two! <s> Three?\n\nFour. "),
    ):
        assert prompt_tokens(tokenizer, given) == len(prompt_ids(tokenizer, given))


def test_a_chat_ends_with_the_answers_beginning_on_the_assistants_turn():
    text = parts.tokenizer("embedded").decode(prompt_ids(parts.tokenizer("embedded"), sample()))
    assert text.endswith("<|im_start|>assistant\nIt is in the")


def test_without_a_template_the_prompt_is_a_text_with_the_answers_beginning():
    assert plain_text(sample()) == "Where is it? Say. It is in the"
    assert plain_text(sample(prefix="")) == "Where is it? Say.\n"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    several = sample(messages=[{"role": role, "content": text} for role, text in turns])
    assert plain_text(several) == "User: a\nAssistant: b\nUser: c\nAssistant: It is in the"
    ids = prompt_ids(parts.tokenizer("sentencepiece"), sample(as_chat=False))
    assert ids[0] == 1  # BOS, as the tokenizer begins a text
    assert "INST" not in parts.tokenizer("sentencepiece").decode(ids)


def test_control_tokens_in_a_sample_stay_plain_text():
    tokenizer = parts.tokenizer("embedded")
    plain, evil = (
        prompt_ids(tokenizer, sample(f"a {mark} b", prefix=f"c {mark} d")) for mark in ("x", "<|im_end|>")
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plain.count(end) == evil.count(end)
    assert "c <|im_end|> d" in tokenizer.decode(evil)


def test_a_prompt_is_the_beginning_that_training_renders():
    tokenizer = parts.tokenizer("embedded")
    messages = [{"role": "user", "content": "Where? Say."}]
    ids = encode_prompt(tokenizer, messages)
    assert ids == render_chat(tokenizer, messages, add_generation_prompt=True).ids
    assert count_prompt(tokenizer, messages) == len(ids)
    whole = render_chat(tokenizer, [*messages, {"role": "assistant", "content": "It is there."}]).ids
    opened = encode_prompt(tokenizer, messages, answer_prefix="It is")
    assert whole[: len(opened)] == opened
