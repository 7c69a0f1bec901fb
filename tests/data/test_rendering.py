"""Templates that change what they are given: default turns, reasoning put in or taken out, calls of tools."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from template_tokenizers import bare_tokenizer

from longlora_cli.data.chat_template import Labels, Message, render_chat
from longlora_cli.data.chunk import IGNORE
from longlora_cli.errors import DataError

# As Qwen3's: reasoning of earlier turns is dropped, the last answer always has a thought, maybe an empty one.
REASONING = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- set content = m.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# As Qwen2.5's: tools in the system turn, calls as JSON, what tools say in a user's turn.
TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif m.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"town": {"type": "string"}}}}


def with_template(text: str) -> Any:
    tokenizer = copy.deepcopy(bare_tokenizer("chatml"))
    tokenizer.chat_template = text
    return tokenizer


def learnt(tokenizer: Any, messages: list[Message], labels: Labels = "assistant", **more: Any) -> list[str]:
    """The texts of the learnt runs, after comparing the ids with transformers' own."""
    chat = render_chat(tokenizer, messages, labels=labels, **more)
    assert chat.ids == tokenizer.apply_chat_template(messages, return_dict=False, **more)
    places = np.flatnonzero(np.array(chat.labels) != IGNORE)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [tokenizer.decode([chat.ids[place] for place in run]) for run in runs]


def two_rounds(first: str, second: str) -> list[Message]:
    return [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": second},
    ]


def test_an_empty_thought_that_the_template_puts_in_is_learnt() -> None:
    # The prompt for an answer ends before it, so the model has to write it.
    expected = ["So.<|im_end|>", "<think>\n\n</think>\n\nThen.<|im_end|>"]
    assert learnt(with_template(REASONING), two_rounds("So.", "Then.")) == expected


def test_reasoning_is_learnt_where_the_template_keeps_it() -> None:
    messages = two_rounds("<think>\nhm\n</think>\n\nSo.", "<think>\nwell\n</think>\n\nThen.")
    expected = ["So.<|im_end|>", "<think>\nwell\n</think>\n\nThen.<|im_end|>"]
    assert learnt(with_template(REASONING), messages) == expected


def test_the_last_answer_alone_is_learnt_with_its_reasoning() -> None:
    messages = two_rounds("<think>\nhm\n</think>\n\nSo.", "<think>\nwell\n</think>\n\nThen.")
    assert learnt(with_template(REASONING), messages, "last") == [
        "<think>\nwell\n</think>\n\nThen.<|im_end|>"
    ]


@pytest.mark.parametrize("place", [1, 3])
def test_reasoning_with_a_control_token_in_it_is_refused(place: int) -> None:
    messages = two_rounds("<think>\nhm\n</think>\n\nSo.", "<think>\nwell\n</think>\n\nThen.")
    messages[place]["content"] = "<think>\na<|im_end|>b\n</think>\n\nSo."
    with pytest.raises(
        DataError, match=rf"changes message {place + 1} \(assistant\) so that it cannot be told"
    ):
        render_chat(with_template(REASONING), messages)


def test_control_tokens_in_answers_that_the_template_keeps_are_text() -> None:
    found = learnt_without_comparing(with_template(REASONING), two_rounds("a<|im_end|>b", "Then."))
    assert found == ["a<|im_end|>b<|im_end|>", "<think>\n\n</think>\n\nThen.<|im_end|>"]


def learnt_without_comparing(tokenizer: Any, messages: list[Message]) -> list[str]:
    chat = render_chat(tokenizer, messages)
    places = np.flatnonzero(np.array(chat.labels) != IGNORE)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [tokenizer.decode([chat.ids[place] for place in run]) for run in runs]


def test_a_template_whose_prompt_opens_the_thought_teaches_the_answer_alone() -> None:
    # As DeepSeek's R1: the prompt for an answer goes on with <think>, earlier turns have none.
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert learnt(with_template(text), two_rounds("<think>hm</think>So.", "Then.")) == [
        "So.<|im_end|>",
        "Then.<|im_end|>",
    ]


def test_a_default_system_turn_is_not_learnt() -> None:
    text = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert learnt(with_template(text), two_rounds("So.", "Be kind.")) == [
        "So.<|im_end|>",
        "Be kind.<|im_end|>",
    ]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool_chat(content: str | None, *calls: dict[str, Any]) -> list[Message]:
    return [
        {"role": "user", "content": "Weather in Ulm?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        {"role": "tool", "content": "rain <|im_end|>"},
        {"role": "assistant", "content": "It rains."},
    ]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_calls_of_tools_are_learnt_to_the_end_of_the_turn(content: str | None) -> None:
    found = learnt_without_comparing(with_template(TOOLS), tool_chat(content, call("weather", town="Ulm")))
    said = f"{content}\n" if content else ""
    assert found == [said + CALL + "<|im_end|>", "It rains.<|im_end|>"]


def test_several_calls_of_a_turn_are_learnt() -> None:
    calls = [call("weather", town="Ulm"), call("weather", town="Ulm")]
    found = learnt_without_comparing(with_template(TOOLS), tool_chat("Look:", *calls))
    assert found[0] == f"Look:\n{CALL}\n{CALL}<|im_end|>"


def test_placeholders_in_calls_are_text() -> None:
    found = learnt_without_comparing(
        with_template(TOOLS), tool_chat(None, call("weather", town="placeholder3x"))
    )
    assert found == [CALL.replace("Ulm", "placeholder3x") + "<|im_end|>", "It rains.<|im_end|>"]


def test_tools_are_rendered_and_not_learnt() -> None:
    messages = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Where?"}]
    assert learnt(with_template(TOOLS), messages, tools=[WEATHER]) == ["Where?<|im_end|>"]
