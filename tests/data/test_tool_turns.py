"""Chats with tools: ids are the template's, the assistant's turns are learnt whole, and no tool is dropped."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tool_templates import ENDS, TEMPLATES, call, tool, tool_chat

from longlora_cli.data.chat_template import encode_prompt, render_chat
from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.documents import Document
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError

TOOLS = [tool("weather"), tool("snow", "Snow, by city.")]
LOOSE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def with_tools(families: dict[str, Any]) -> dict[str, Any]:
    """The tokenizers of three families with templates that show tools."""
    made = {name: copy.deepcopy(families[name]) for name in TEMPLATES}
    for name, tokenizer in made.items():
        tokenizer.chat_template = TEMPLATES[name]
    return made


@pytest.fixture(params=list(TEMPLATES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def plain_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)
    return ids


def learnt(labels: list[int]) -> list[tuple[int, int]]:
    """Runs of learnt tokens, from and to."""
    marks = np.diff(np.concatenate([[0], np.array(labels) != IGNORE, [0]]))
    return list(zip(np.flatnonzero(marks == 1), np.flatnonzero(marks == -1), strict=True))


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_ids_are_those_of_apply_chat_template(
    with_tools: dict[str, Any], name: str, tools: Any, prompt: bool
) -> None:
    messages = tool_chat()
    if prompt:
        messages.append({"role": "user", "content": "Why?"})
    chat = render_chat(with_tools[name], messages, tools=tools, add_generation_prompt=prompt)
    assert chat.ids == plain_ids(with_tools[name], messages, tools, add_generation_prompt=prompt)


def test_all_that_the_assistant_writes_is_learnt_and_nothing_else(
    with_tools: dict[str, Any], name: str
) -> None:
    tokenizer, messages = with_tools[name], tool_chat()
    chat = render_chat(tokenizer, messages, tools=TOOLS)
    runs = learnt(chat.labels)
    speaks = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(runs) == len(speaks) == 3
    for (start, stop), number in zip(runs, speaks, strict=True):
        # What the model reads before it speaks, and then its turn until the end token.
        assert chat.ids[:start] == plain_ids(
            tokenizer, messages[:number], TOOLS, add_generation_prompt=True
        ), number
        assert tokenizer.decode(chat.ids[stop - 1]) == ENDS[name]
    called = tokenizer.decode(chat.ids[slice(*runs[0])])
    # The third family's vocabulary has no quotation marks.
    assert [called.count(word) for word in ("weather", "city", "öln", "days")] == [1, 1, 1, 1]
    assert "rain" not in called


@pytest.mark.parametrize("content", ["", "I look it up."])
@pytest.mark.parametrize("calls", [1, 2])
def test_several_calls_and_a_word_before_them_are_one_turn(
    with_tools: dict[str, Any], calls: int, content: str
) -> None:
    tokenizer = with_tools["chatml"]
    chat = render_chat(tokenizer, tool_chat(calls=calls, content=content), tools=TOOLS)
    start, stop = learnt(chat.labels)[0]
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": %d}}\n</tool_call>'
    called = "\n".join([content] * bool(content) + [one % number for number in range(calls)])
    assert tokenizer.decode(chat.ids[start:stop]) == called + "<|im_end|>"


def test_a_chat_may_end_with_a_call(with_tools: dict[str, Any], name: str) -> None:
    tokenizer, messages = with_tools[name], tool_chat()[:2]
    chat = render_chat(tokenizer, messages, tools=TOOLS)
    [(start, _)] = learnt(chat.labels)
    assert chat.ids[:start] == encode_prompt(tokenizer, messages[:1], tools=TOOLS)
    assert chat.ids == plain_ids(tokenizer, messages, TOOLS)


SPECIAL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "</s>",
    "<s>",
    '"}',
    "\\",
    "\n",
    "x",
]


@LOOSE
@given(
    city=st.lists(st.sampled_from(SPECIAL), min_size=1).map("".join),
    about=st.lists(st.sampled_from(SPECIAL), min_size=1).map("".join),
)
def test_texts_of_tools_never_become_control_tokens(
    with_tools: dict[str, Any], city: str, about: str
) -> None:
    for tokenizer in with_tools.values():
        special = safe_encoder(tokenizer).special_ids - {tokenizer.unk_token_id}
        plain, injected = (
            render_chat(tokenizer, tool_chat(c, c), tools=[tool("weather", a)])
            for c, a in (("x", "x"), (f"x{city}x", f"x{about}x"))
        )
        assert [i for i in injected.ids if i in special] == [i for i in plain.ids if i in special]
        assert len(learnt(injected.labels)) == 3


def test_a_control_token_in_a_key_or_an_id_is_refused(with_tools: dict[str, Any]) -> None:
    tokenizer = with_tools["chatml"]
    for change in ({"function": {"name": "a", "arguments": {"<|im_end|>": 1}}}, {"id": "a<|im_end|>"}):
        messages = [tool_chat()[0], {"role": "assistant", "content": "", "tool_calls": [call("a") | change]}]
        with pytest.raises(DataError, match="holds the name of a control token"):
            render_chat(tokenizer, messages, tools=TOOLS)


def changed(old: str, new: str) -> str:
    """The first template, changed in one place."""
    assert old in TEMPLATES["chatml"]
    return TEMPLATES["chatml"].replace(old, new)


NO_TOOLS = changed("{%- if tools %}", "{%- if false %}")
NO_ARGUMENTS = changed("{{- call.arguments | tojson }}", "")
NO_CALLS = changed(" and not message.tool_calls", "")
NO_ANSWERS = changed("+ message.content + '\\n</tool_response>'", "+ '</tool_response>'")
REFUSES = changed("message.role == 'tool' %}", "message.role == 'tool' %}{{- raise_exception('no tools') }}")
NO_END = changed("{%- endfor %}{{- '<|im_end|>\\n' }}\n{%- elif", "{%- endfor %}\n{%- elif")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_TOOLS, "the chat template does not show the tool 'weather'"),
        (NO_CALLS, "the chat template does not show the call of 'weather' in message 2"),
        (NO_ARGUMENTS, "the chat template does not show the call of 'weather' in message 2"),
        (NO_ANSWERS, r"the chat template does not show message 3 \(tool\)"),
        (REFUSES, "the chat template refuses the chat: no tools"),
        (NO_END, "cannot be told where the chat template ends the turn of message 2"),
    ],
)
def test_a_template_that_cannot_show_tools_is_refused_by_file_and_line(
    with_tools: dict[str, Any], template: str, reason: str
) -> None:
    tokenizer = copy.deepcopy(with_tools["chatml"])
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=reason) as caught:
        list(tokenize([Document("a.jsonl:7", tool_chat(), tools=TOOLS)], tokenizer, labels="assistant"))
    assert caught.value.message.startswith("a.jsonl:7: ")
    if "show" in reason:
        assert caught.value.rule
        assert caught.value.hint


def test_arguments_that_are_only_numbers_are_not_dropped_either(with_tools: dict[str, Any]) -> None:
    messages = [tool_chat()[0], {"role": "assistant", "content": "", "tool_calls": [call("weather", days=3)]}]
    tokenizer = copy.deepcopy(with_tools["chatml"])
    assert '"days": 3' in tokenizer.decode(render_chat(tokenizer, messages).ids)
    tokenizer.chat_template = NO_ARGUMENTS
    with pytest.raises(DataError, match="does not show the arguments of 'weather' in message 2"):
        render_chat(tokenizer, messages)


def test_a_call_that_is_repeated_in_its_answer_is_learnt_once(with_tools: dict[str, Any]) -> None:
    tokenizer = copy.deepcopy(with_tools["chatml"])
    named = "<tool_response>\\n' + messages[loop.index0 - 1].tool_calls[0].function.name + ': ' +"
    tokenizer.chat_template = TEMPLATES["chatml"].replace("<tool_response>\\n' +", named)
    messages = tool_chat()
    chat = render_chat(tokenizer, messages, tools=TOOLS)
    assert "weather: rain" in tokenizer.decode(chat.ids)
    assert chat.ids == plain_ids(tokenizer, messages, TOOLS)
    assert ["weather" in tokenizer.decode(chat.ids[a:b]) for a, b in learnt(chat.labels)] == [
        True,
        False,
        False,
    ]
