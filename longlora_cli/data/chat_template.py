"""Chats to token ids and labels, by the tokenizer's own template.

The template is rendered twice: with the messages, and with a placeholder instead of each content. The second
rendering shows which text is the template's; the content must then stand between those texts in the first.
The whole rendering is encoded once, so that ids equal those of `apply_chat_template`, and offsets say which
tokens are whose. Special tokens are recognised in the template's text only (`encoding.SafeEncoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.counting import token_counter
from longlora_cli.data.encoding import SafeEncoder, safe_encoder
from longlora_cli.data.tool_turns import Tools, has_tools, tool_layout
from longlora_cli.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the model reads it.

    Args:
        ids: Token ids.
        labels: The same ids where the assistant speaks (its contents, each with the end-of-turn token that
            the template puts after it), `IGNORE` elsewhere. Not shifted.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _Part:
    """A piece of a rendering: the template's own text (`message` is None) or a message's content."""

    text: str
    message: int | None


def render_chat(
    tokenizer: Any,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
) -> RenderedChat:
    """Render one chat; see `render_chats`."""
    [(ids, labels)] = render_chats(
        tokenizer, [messages], add_generation_prompt=add_generation_prompt, tools=[tools]
    )
    return RenderedChat(ids.tolist(), labels.tolist())


def encode_prompt(tokenizer: Any, messages: list[Message], *, tools: Tools | None = None) -> list[int]:
    """Token ids of a chat up to where the assistant's next turn begins.

    Raises:
        DataError: See `render_chats`.
    """
    return render_chat(tokenizer, messages, add_generation_prompt=True, tools=tools).ids


def render_chats(
    tokenizer: Any,
    chats: list[list[Message]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Tools | None] | None = None,
) -> list[tuple[Int32, Int32]]:
    """Render chats with the tokenizer's template, encoded by all cores at once.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: Messages with `role` and `content`.
        add_generation_prompt: End with the header of the assistant's next turn.
        tools: What each chat may call; None where none calls anything.

    Returns:
        For each chat its ids and labels (`RenderedChat`), int32 `[tokens]`.

    Raises:
        DataError: The tokenizer has no template; the template refuses a chat, leaves out a message or a tool, or
            changes a content so that it cannot be told from the template's own text.
    """
    encoder = safe_encoder(tokenizer)
    layouts = [
        _layout(tokenizer, messages, add_generation_prompt, encoder, called)
        for messages, called in zip(chats, tools or [None] * len(chats), strict=True)
    ]
    encodings = encoder.encode_with_offsets([_text(parts, encoder) for parts in layouts])
    # Templates without an end token go straight on to the next turn, which BOS opens: that is not for the
    # assistant.
    next_turn = None if tokenizer.bos_token_id == tokenizer.eos_token_id else tokenizer.bos_token_id
    gap = _answer_gap(tokenizer)
    rendered = []
    for messages, parts, encoding in zip(chats, layouts, encodings, strict=True):
        ids = encoder.ids(encoding)
        rendered.append((ids, _labels(messages, parts, ids, encoding.offsets, encoder, gap, next_turn)))
    return rendered


def count_tokens(tokenizer: Any, messages: list[Message]) -> int:
    """Tokens of a rendered chat; its sentences are encoded once, however many chats hold them."""
    encoder = safe_encoder(tokenizer)
    return token_counter(tokenizer).count(_text(_layout(tokenizer, messages, False, encoder), encoder))


def require_template(tokenizer: Any) -> None:
    """Raise `DataError` when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template, so chats cannot be rendered",
            rule="Chats are rendered with the model's own template, never with a guessed one.",
            hint="Choose an instruct or chat model with --model, or give texts instead of chats.",
        )


def _text(parts: list[_Part], encoder: SafeEncoder) -> str:
    """What is encoded: contents as they are, the template's special tokens by their secret names."""
    return "".join(encoder.secret(p.text) if p.message is None else p.text for p in parts)


def _render(
    tokenizer: Any, messages: list[Message], add_generation_prompt: bool, tools: Tools | None = None
) -> str:
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses the chat: {reason}") from error
    return text


def _layout(
    tokenizer: Any,
    messages: list[Message],
    add_generation_prompt: bool,
    encoder: SafeEncoder,
    tools: Tools | None = None,
) -> list[_Part]:
    """Split the rendering of `messages` into the template's text and the contents."""
    require_template(tokenizer)
    if has_tools(messages, tools):

        def render(chat: list[Message], called: Tools | None, prompt: bool) -> str:
            return _render(tokenizer, chat, prompt, called)

        parts_of_tools = tool_layout(
            messages, tools, prompt=add_generation_prompt, render=render, encoder=encoder
        )
        return [_Part(text, message) for text, message in parts_of_tools]
    rendered = _render(tokenizer, messages, add_generation_prompt)
    skeleton = _skeleton(tokenizer, messages, add_generation_prompt)
    missing = set(range(len(messages))) - {part.message for part in skeleton}
    if missing:
        number = min(missing)
        raise DataError(f"the chat template leaves out message {number + 1} ({messages[number]['role']})")
    parts: list[_Part] = []
    place = 0
    for index, part in enumerate(skeleton):
        if part.message is None:
            text = part.text
        else:
            following = "".join(p.text for p in skeleton[index + 1 : index + 2])
            text = _content(rendered, place, messages[part.message]["content"], following, encoder)
        if not rendered.startswith(text, place):
            raise _changed(messages, skeleton, index)
        parts.append(_Part(text, part.message))
        place += len(text)
    if place != len(rendered):
        raise _changed(messages, skeleton, len(skeleton) - 1)
    return parts


def _changed(messages: list[Message], skeleton: list[_Part], index: int) -> DataError:
    number = next((p.message for p in reversed(skeleton[: index + 1]) if p.message is not None), 0)
    return DataError(
        f"the chat template changes message {number + 1} ({messages[number]['role']}) "
        "so that it cannot be told from the template's own text"
    )


def _skeleton(tokenizer: Any, messages: list[Message], add_generation_prompt: bool) -> list[_Part]:
    """The rendering with placeholders for the contents, cut at them."""
    marks = [f"placeholder{number}x" for number in range(len(messages))]
    rendered = _render(
        tokenizer,
        [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)],
        add_generation_prompt,
    )
    parts: list[_Part] = []
    place = 0
    found = sorted(
        (start, number) for number, mark in enumerate(marks) for start in _occurrences(rendered, mark)
    )
    for start, number in found:
        parts += [_Part(rendered[place:start], None), _Part("", number)]
        place = start + len(marks[number])
    return [*parts, _Part(rendered[place:], None)]


def _occurrences(text: str, mark: str) -> list[int]:
    places = []
    start = text.find(mark)
    while start >= 0:
        places.append(start)
        start = text.find(mark, start + len(mark))
    return places


def _content(rendered: str, place: int, content: str, following: str, encoder: SafeEncoder) -> str:
    """The content as the template wrote it at `place`, before its own text `following`.

    As given, or stripped; a template that changes it otherwise (drops an old turn's reasoning) is followed as
    long as neither the content nor what became of it holds a special token's name, which could feign the
    template's text.
    """
    for text in (content, content.strip(), content.lstrip(), content.rstrip()):
        if rendered.startswith(text + following, place):
            return text
    end = rendered.find(following, place) if following else len(rendered)
    text = rendered[place:end] if end >= 0 else ""
    if encoder.secret(content) == content and encoder.secret(text) == text:
        return text
    return content


def _answer_gap(tokenizer: Any) -> str:
    """The spaces that the template puts between the prompt for an answer and the answer.

    `[/INST] answer` is prompted for by `[/INST]`, so that the model has to write the space too.
    """
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        prompt = _render(tokenizer, [question], True)
        whole = _render(tokenizer, [question, answer], False)
    except DataError:
        return ""
    start = whole.rfind("answer")
    gap = whole[len(prompt) : start] if whole.startswith(prompt) else ""
    return gap if not gap.strip() else ""


def _labels(
    messages: list[Message],
    parts: list[_Part],
    ids: Int32,
    offsets: list[tuple[int, int]],
    encoder: SafeEncoder,
    gap: str,
    next_turn: int | None,
) -> Int32:
    """Labels of one encoded chat; the offsets count characters with special tokens by their secret names."""
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    learnt = np.zeros(len(ids), dtype=bool)
    place = 0
    for index, part in enumerate(parts):
        end = place + len(part.text if part.message is not None else encoder.secret(part.text))
        if part.message is not None and messages[part.message]["role"] == "assistant":
            # A token may cover both the template's text and the content; the model writes that token.
            start = place - len(gap) * parts[index - 1].text.endswith(gap)
            learnt |= (spans[:, 1] > start) & (spans[:, 0] < end)
            before_end = np.flatnonzero(spans[:, 0] < end)
            stop = int(before_end[-1]) + 1 if len(before_end) else 0
            learnt[stop : _after_end_token(ids, stop, parts[index + 1].text, encoder, next_turn)] = True
        place = end
    if len(learnt):
        learnt[0] = False  # nothing comes before the first token, so nothing predicts it
    return np.where(learnt, ids, IGNORE).astype(np.int32)


def _after_end_token(
    ids: Int32, stop: int, following: str, encoder: SafeEncoder, next_turn: int | None
) -> int:
    """Where the turn ends: after the end token, if the template puts one there (after spaces, maybe)."""
    end_token = encoder.special_at_start(following.lstrip())
    if end_token is None or end_token == next_turn:
        return stop
    return stop + int(np.flatnonzero(ids[stop:] == end_token)[0]) + 1
