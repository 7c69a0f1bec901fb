"""Chats to token ids and labels, by the tokenizer's chat template.

The template is rendered twice: with the messages, and with a placeholder instead of each content. The second
rendering shows which text is the template's; the content must then stand between those texts in the first.
The whole rendering is encoded once, so that ids equal those of `apply_chat_template`, and offsets say which
tokens are whose. Special tokens are recognised in the template's text only (`encoding.SafeEncoder`).

An answer is what follows the prompt for it, up to the token that ends its turn: what a template itself writes there (an
empty thought, a call of a tool) is the assistant's too, because at inference the model has to write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longlora_cli.data.chat_encoding import encode_layouts, text_of
from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.counting import token_counter
from longlora_cli.data.encoding import SafeEncoder, safe_encoder
from longlora_cli.data.rendering import (
    AnswerFrame,
    Message,
    Part,
    answer_frame,
    layout_chat,
    render_text,
    require_template,
)
from longlora_cli.data.tool_turns import Tools

__all__ = [
    "Labels",
    "Message",
    "RenderedChat",
    "count_prompt",
    "count_tokens",
    "encode_prompt",
    "encode_prompts",
    "end_token_id",
    "render_chat",
    "render_chats",
    "render_text",
    "require_template",
]

Labels = Literal["assistant", "last", "all"]
_CHARACTERS_TOGETHER = 4_000_000


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the model reads it.

    Args:
        ids: Token ids.
        labels: The same ids where they are learnt, `IGNORE` elsewhere. Not shifted.
    """

    ids: list[int]
    labels: list[int]


def render_chat(
    tokenizer: Any,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    labels: Labels = "assistant",
    tools: Tools | None = None,
) -> RenderedChat:
    """Render one chat; see `render_chats`."""
    ids, learnt = render_chats(
        tokenizer, [messages], add_generation_prompt=add_generation_prompt, labels=labels, tools=[tools]
    )[0]
    return RenderedChat(ids.tolist(), learnt.tolist())


def encode_prompt(
    tokenizer: Any, messages: list[Message], *, tools: Tools | None = None, answer_prefix: str = ""
) -> list[int]:
    """Token ids of a chat up to where the assistant's next turn begins, and of how that turn begins.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: The chat.
        tools: What its template is told of, as JSON schemas.
        answer_prefix: First words of the assistant's turn; control tokens' names in them stay plain text.

    Raises:
        DataError: See `render_chats`.
    """
    encoder = safe_encoder(tokenizer)
    return encoder.encode_batch([_prompt_text(tokenizer, messages, tools, answer_prefix)])[0].tolist()


def encode_prompts(tokenizer: Any, chats: Sequence[list[Message]]) -> list[list[int]]:
    """`encode_prompt` of each chat, a core a chat: eleven questions about 262,144 tokens take 0.45 s of one core each.

    Raises:
        DataError: See `render_chats`.
    """
    encoder = safe_encoder(tokenizer)
    texts = [_prompt_text(tokenizer, messages, None, "") for messages in chats]
    longest = max(map(len, texts), default=0)
    # An encoding in the library takes more than a hundred bytes a token until its ids are taken.
    together = max(1, _CHARACTERS_TOGETHER // max(1, longest))
    return [
        ids.tolist()
        for start in range(0, len(texts), together)
        for ids in encoder.encode_batch(texts[start : start + together])
    ]


def count_prompt(tokenizer: Any, messages: list[Message], *, answer_prefix: str = "") -> int:
    """Tokens of `encode_prompt`; sentences are encoded once, however many prompts hold them."""
    return token_counter(tokenizer).count(_prompt_text(tokenizer, messages, None, answer_prefix))


def _prompt_text(tokenizer: Any, messages: list[Message], tools: Tools | None, answer_prefix: str) -> str:
    encoder = safe_encoder(tokenizer)
    require_template(tokenizer)
    frame = answer_frame(tokenizer, encoder)
    parts = layout_chat(tokenizer, messages, encoder, frame, add_generation_prompt=True, tools=tools)
    return text_of(parts, encoder) + answer_prefix


def render_chats(
    tokenizer: Any,
    chats: list[list[Message]],
    *,
    add_generation_prompt: bool = False,
    labels: Labels = "assistant",
    tools: Sequence[Tools | None] | None = None,
) -> list[tuple[Int32, Int32]]:
    """Render chats with the tokenizer's template, encoded by all cores at once.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: Messages with `role` and `content`; an assistant's may have `tool_calls`.
        add_generation_prompt: End with the header of the assistant's next turn.
        labels: What is learnt: `assistant`: its answers, each with the token that the template puts after it to end
            the turn; `last`: the last of them only; `all`: every token but the first.
        tools: For each chat the tools that its template is told of, as JSON schemas.

    Returns:
        For each chat its ids and labels (`RenderedChat`), int32 `[tokens]`.

    Raises:
        DataError: The tokenizer has no template; the template refuses a chat, leaves out a message or a tool, or
            changes a content so that it cannot be told from the template's own text; or tools or their calls hold a
            control token's name where it cannot be made plain.
    """
    encoder = safe_encoder(tokenizer)
    require_template(tokenizer)
    frame = answer_frame(tokenizer, encoder)
    known = tools or [None] * len(chats)
    layouts = [
        layout_chat(
            tokenizer, messages, encoder, frame, add_generation_prompt=add_generation_prompt, tools=own
        )
        for messages, own in zip(chats, known, strict=True)
    ]
    encoded = encode_layouts(encoder, layouts)
    rendered = []
    for messages, parts, (ids, spans) in zip(chats, layouts, encoded, strict=True):
        if labels == "all":
            learnt = np.ones(len(ids), dtype=bool)
        else:
            answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            wanted = frozenset(answers if labels == "assistant" else answers[-1:])
            learnt = _learnt(wanted, parts, ids, spans, encoder, frame)
        learnt[:1] = False  # nothing comes before the first token, so nothing predicts it
        rendered.append((ids, np.where(learnt, ids, np.int32(IGNORE))))
    return rendered


def end_token_id(tokenizer: Any) -> int | None:
    """The id of the token with which the template ends an answer; None without a template or such a token."""
    if not tokenizer.chat_template:
        return None
    encoder = safe_encoder(tokenizer)
    frame = answer_frame(tokenizer, encoder)
    token = encoder.special_at_start(frame.end) if frame.end else None
    return None if token == frame.next_turn else token


def count_tokens(tokenizer: Any, messages: list[Message]) -> int:
    """Tokens of a rendered chat; its sentences are encoded once, however many chats hold them."""
    encoder = safe_encoder(tokenizer)
    require_template(tokenizer)
    parts = layout_chat(tokenizer, messages, encoder, answer_frame(tokenizer, encoder))
    return token_counter(tokenizer).count(text_of(parts, encoder))


def _learnt(
    wanted: frozenset[int],
    parts: list[Part],
    ids: Int32,
    spans: Int32,
    encoder: SafeEncoder,
    frame: AnswerFrame,
) -> npt.NDArray[np.bool_]:
    """Which tokens the messages `wanted` teach; `spans` as `EncodedChat` has them."""
    special = np.isin(ids, list(encoder.special_ids))
    learnt, foreign = np.zeros((2, len(ids)), dtype=bool)
    place = 0
    for index, part in enumerate(parts):
        end = place + len(encoder.secret(part.text) if part.trusted else part.text)
        if part.message is None:
            place = end
            continue
        covered = (spans[:, 1] > place) & (spans[:, 0] < end)
        if part.message in wanted:
            # A token may cover both the template's text and the content; the model writes that token. Not so a
            # special token of the prompt that takes the spaces behind it (Phi-3's <|assistant|>).
            learnt |= covered & ~(special & (spans[:, 0] < place))
            following = parts[index + 1]
            if following.message is None:
                learnt |= _ending(ids, spans[:, 1] > end, following.text, encoder, frame)
        else:
            foreign |= covered
        place = end
    return learnt & ~foreign


def _ending(
    ids: Int32, behind: npt.NDArray[np.bool_], following: str, encoder: SafeEncoder, frame: AnswerFrame
) -> npt.NDArray[np.bool_]:
    """The end token, if the template puts one after the answer, and the spaces before it.

    Args:
        ids: Token ids `[tokens]`.
        behind: Which of them reach beyond the answer's end `[tokens]`.
        following: The template's text after the answer.
    """
    found = np.zeros(len(ids), dtype=bool)
    end_token = encoder.special_at_start(following.lstrip())
    if end_token is not None and end_token != frame.next_turn:
        first = int(np.argmax(behind))
        found[first : first + int(np.argmax(ids[first:] == end_token)) + 1] = True
    return found
