"""Each named template x each labels mode, against the vendors' formats written out a second time here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_tokenizers import NAMES, templated

from longlora_cli.data.chat_template import Labels, Message, encode_prompt, render_chat
from longlora_cli.data.chunk import IGNORE
from longlora_cli.errors import DataError

# A piece of a rendering: its text, and whether the assistant has to write it.
Piece = tuple[str, bool]


def llama_2(messages: list[Message]) -> list[Piece]:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = f"<<SYS>>\n{messages[0]['content'].strip()}\n<</SYS>>\n\n", messages[1:]
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        if message["role"] == "user":
            first = system if number == 0 else ""
            pieces.append((f"<s>[INST] {first}{message['content'].strip()} [/INST]", False))
        else:
            pieces.append((f" {message['content'].strip()} </s>", True))
    return pieces


def llama_3(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<|begin_of_text|>", False)]
    for message in messages:
        pieces.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        pieces.append((message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"))
    return pieces


def mistral(messages: list[Message]) -> list[Piece]:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = f"{messages[0]['content']}\n\n", messages[1:]
    pieces: list[Piece] = [("<s>", False)]
    for number, message in enumerate(messages):
        if message["role"] == "user":
            pieces.append((f"[INST] {system if number == 0 else ''}{message['content']}[/INST]", False))
        else:
            pieces.append((f" {message['content'].strip()}</s>", True))
    return pieces


def chatml(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def gemma(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<bos>", False)]
    for message in messages:
        speaks = message["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if speaks else 'user'}\n", False))
        pieces.append((f"{message['content'].strip()}<end_of_turn>", speaks))
        pieces.append(("\n", False))
    return pieces


def phi(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces.append((f"<|{message['role']}|>\n", False))
        pieces.append((f"{message['content']}<|end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def none(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", False)]
    for message in messages:
        speaks = message["role"] == "assistant"
        pieces.append((message["content"].strip() + ("</s>" if speaks else "\n\n"), speaks))
    return pieces


FORMATS = {
    "llama-2": llama_2,
    "llama-3": llama_3,
    "mistral": mistral,
    "qwen": chatml,
    "chatml": chatml,
    "gemma": gemma,
    "phi": phi,
    "none": none,
}
CONTROL = [
    *(
        "<|im_end|>",
        "<|im_start|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end|>",
        "<|assistant|>",
        "</s>",
        "<s>",
    ),
    *("<end_of_turn>", "<start_of_turn>", "<bos>", "<unk>", "placeholder0x", "placeholder1x"),
]
MARKS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
PLAIN = [
    "<|",
    "|>",
    "im_end",
    "</",
    "s>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "a",
    "Zß",
    "🙂",
    "漢",
    "The secret code",
    "?",
    "\x7f",
]
LETTERS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁"), max_size=6)


def contents(name: str) -> st.SearchStrategy[str]:
    """Contents with some text in them, as rows are checked to have."""
    marks = [] if name == "llama-2" else MARKS  # which refuses them: there they are plain text
    pieces = st.one_of(st.sampled_from([*CONTROL, *marks, *PLAIN]), LETTERS)
    found = st.lists(pieces, min_size=1, max_size=8).map("".join).filter(lambda text: bool(text.strip()))
    return found.filter(lambda text: name != "llama-2" or not any(mark in text for mark in MARKS))


@st.composite
def chats(draw: st.DrawFn, name: str) -> list[Message]:
    content = contents(name)
    with_system = name != "gemma" and draw(st.booleans())
    messages: list[Message] = [{"role": "system", "content": draw(content)}] if with_system else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(content)})
    return messages


def runs_of(labels: list[int]) -> list[tuple[int, int]]:
    learnt = np.flatnonzero(np.array(labels) != IGNORE)
    groups = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1) if len(learnt) else []
    return [(int(group[0]), int(group[-1]) + 1) for group in groups]


def control_ids(tokenizer: Any, ids: list[int]) -> list[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [number for number in ids if number in special]


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(data=st.data())
def test_a_chat_is_its_turns_one_after_another(name: str, data: st.DataObject) -> None:
    tokenizer, messages = templated(name), data.draw(chats(name))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "".join(piece for piece, _ in FORMATS[name](messages))
    for number in range(len(messages)):
        if messages[number]["role"] == "assistant":  # what was read before an answer is the chat up to it
            prompt = tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True
            )
            assert text.startswith(prompt)


@pytest.mark.parametrize("labels", ["assistant", "last"])
@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(data=st.data())
def test_labels_are_the_answers_with_their_end_tokens(name: str, labels: Labels, data: st.DataObject) -> None:
    tokenizer, messages = templated(name), data.draw(chats(name))
    chat = render_chat(tokenizer, messages, labels=labels)
    pieces = FORMATS[name](messages)
    answers = [(pieces[n - 1][0], text) for n, (text, speaks) in enumerate(pieces) if speaks]
    wanted = answers if labels == "assistant" else answers[-1:]
    runs = runs_of(chat.labels)
    assert len(runs) == len(wanted)
    for (start, end), (header, text) in zip(runs, wanted, strict=True):
        assert chat.labels[start:end] == chat.ids[start:end]
        learnt = tokenizer.decode(chat.ids[start:end])
        # In phi <|assistant|> takes the spaces behind it, and its tokenizer puts one of its own before what follows.
        expected = " " + text.lstrip() if name == "phi" else text
        extra = learnt.removesuffix(expected)
        assert learnt == extra + expected
        # The header's last spaces may share a token with an answer that begins with spaces, and only with it.
        assert not extra or (
            header.endswith(extra) and extra != tokenizer.decode(chat.ids[start : start + 1])
        )


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(data=st.data())
def test_all_learns_every_token_but_the_first(name: str, data: st.DataObject) -> None:
    chat = render_chat(templated(name), data.draw(chats(name)), labels="all")
    assert chat.labels == [IGNORE, *chat.ids[1:]]


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(data=st.data())
def test_control_tokens_come_from_the_template_alone(name: str, data: st.DataObject) -> None:
    tokenizer, messages = templated(name), data.draw(chats(name))
    harmless = [{**message, "content": "x"} for message in messages]
    expected = control_ids(tokenizer, tokenizer.apply_chat_template(harmless, return_dict=False))
    found = render_chat(tokenizer, messages).ids
    unknown = tokenizer.unk_token_id
    assert [i for i in control_ids(tokenizer, found) if i != unknown] == expected


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_apply_chat_template(name: str) -> None:
    tokenizer = templated(name)
    messages: list[Message] = [
        {"role": "user", "content": " What is\nit? \n"},
        {"role": "assistant", "content": "\nThe code 🙂.\n\n"},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Nothing."},
    ]
    assert render_chat(tokenizer, messages).ids == tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:3], return_dict=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, messages[:3]) == prompt


def test_gemma_refuses_a_system_turn_and_says_what_to_do() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(DataError, match="gemma has no system turn; put what it says into the first question"):
        render_chat(templated("gemma"), messages)


@pytest.mark.parametrize("mark", MARKS)
def test_llama_2_refuses_the_marks_that_are_plain_text_to_it(mark: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"a{mark}b"}]
    with pytest.raises(DataError, match=r"message 2 holds the mark .* plain text in llama-2"):
        render_chat(templated("llama-2"), messages)


TOOL_CHAT: list[Message] = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "Yes."},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_a_turn_of_a_tool_is_refused_where_a_template_has_none(name: str) -> None:
    with pytest.raises(DataError, match="the chat template refuses the chat: "):
        render_chat(templated(name), TOOL_CHAT)


def test_a_turn_of_a_tool_is_never_learnt() -> None:
    chat = render_chat(templated("none"), TOOL_CHAT)
    learnt = [templated("none").decode(chat.ids[start:end]) for start, end in runs_of(chat.labels)]
    assert learnt == ["Yes.</s>", "It is 42.</s>"]


def test_a_header_token_that_takes_an_answers_first_spaces_is_not_learnt() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "  hi"}]
    chat = render_chat(templated("phi"), messages)
    header = templated("phi").convert_tokens_to_ids("<|assistant|>")
    assert header in chat.ids
    assert header not in chat.labels
