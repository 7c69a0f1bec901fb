"""A chat template's text, cut into what is the template's and what is whose message.

Nothing is encoded here; `chat_template` makes tokens and labels of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longlora_cli.data.encoding import SafeEncoder
from longlora_cli.data.tool_turns import Tools, has_tools, tool_layout
from longlora_cli.errors import DataError
from longlora_cli.models.template_sandbox import FAILURES, apply_template

Message = dict[str, Any]
"""`role` and `content`; an assistant's message may have `tool_calls`, and then `tool_turns` cuts the chat."""


@dataclass(frozen=True)
class Part:
    """A piece of a rendering.

    Args:
        text: As it stands there.
        message: Whose it is; None: nobody's, the template's between turns.
        trusted: The template wrote it, so special tokens in it are meant.
    """

    text: str
    message: int | None
    trusted: bool


@dataclass(frozen=True)
class AnswerFrame:
    """What a template writes around answers.

    Args:
        header: The prompt for an answer (`<|im_start|>assistant\n`); empty when the question ends in it (`[/INST]`).
        gap: The spaces between that prompt and an answer, when there is no header of its own.
        end: The special token's name that ends an answer; empty when there is none.
        next_turn: Id of the BOS that opens the next turn and so ends no answer; None when BOS may end one.
    """

    header: str
    gap: str
    end: str
    next_turn: int | None


@dataclass(frozen=True)
class _Slot:
    """Where a message stands: template text (`lead`) that is part of the answer, then the content."""

    message: int
    lead: str


def require_template(tokenizer: Any) -> None:
    """Raise `DataError` when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template, so chats cannot be rendered",
            rule="Chats are rendered with the model's own template or a chosen one, never with a guessed one.",
            hint="Choose a template with --chat-template (none joins turns as plain text) or an instruct model with "
            "--model, or give texts instead of chats.",
        )


def render_text(
    tokenizer: Any,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """The template's text of a chat, made in a sandbox with limits.

    Raises:
        DataError: The template refuses the chat; its reason is told.
    """
    try:
        return apply_template(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    except FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses the chat: {reason}") from error


def answer_frame(tokenizer: Any, encoder: SafeEncoder) -> AnswerFrame:
    """Learn from a short chat what the template writes around an answer."""
    # Templates without an end token go straight on to the next turn, which BOS opens: that is not for the
    # assistant.
    next_turn = None if tokenizer.bos_token_id == tokenizer.eos_token_id else tokenizer.bos_token_id
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        bare = render_text(tokenizer, [question])
        prompt = render_text(tokenizer, [question], add_generation_prompt=True)
        whole = render_text(tokenizer, [question, answer])
    except DataError:
        return AnswerFrame("", "", "", next_turn)
    start = whole.rfind("answer")
    end = encoder.special_name_at_start(whole[start + len("answer") :].lstrip())
    header = prompt[len(bare) :] if prompt.startswith(bare) else ""
    gap = whole[len(prompt) : start] if whole.startswith(prompt) else ""
    return AnswerFrame(header, gap if not gap.strip() else "", end, next_turn)


def layout_chat(
    tokenizer: Any,
    messages: list[Message],
    encoder: SafeEncoder,
    frame: AnswerFrame,
    *,
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
) -> list[Part]:
    """Cut the rendering of `messages` into the template's text and the messages'; the last part is the template's.

    Raises:
        DataError: See `chat_template.render_chats`.
    """
    if has_tools(messages, tools):

        def render(chat: list[Message], called: Tools | None, prompt: bool) -> str:
            return render_text(tokenizer, chat, add_generation_prompt=prompt, tools=called)

        found_parts = tool_layout(
            messages, tools, prompt=add_generation_prompt, render=render, encoder=encoder
        )
        return list(_with_leads(found_parts, messages, frame))
    rendered = render_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    marked = [{**message, "content": _mark(number)} for number, message in enumerate(messages)]
    raw = render_text(tokenizer, marked, add_generation_prompt=add_generation_prompt)
    skeleton = _skeleton(raw, messages, frame)
    missing = set(range(len(messages))) - {slot.message for slot in skeleton if isinstance(slot, _Slot)}
    if missing:
        number = min(missing)
        raise DataError(f"the chat template leaves out message {number + 1} ({messages[number]['role']})")
    parts: list[Part] = []
    place = 0
    for index, piece in enumerate(skeleton):
        if isinstance(piece, _Slot):
            following = skeleton[index + 1]
            assert isinstance(following, str)  # text and slots alternate
            found = _found(rendered, place, piece, following, messages[piece.message], encoder)
        else:
            found = [Part(piece, None, True)] if rendered.startswith(piece, place) else []
        if not found:
            raise _changed(messages, skeleton[: index + 1])
        parts += found
        place += sum(len(part.text) for part in found)
    if place != len(rendered):
        raise _changed(messages, skeleton)
    return parts


def _mark(number: int) -> str:
    return f"placeholder{number}x"


def _skeleton(raw: str, messages: list[Message], frame: AnswerFrame) -> list[str | _Slot]:
    """A rendering with placeholders as template text and slots in turn, beginning and ending with text."""
    found = sorted(
        (start, number) for number in range(len(messages)) for start in _occurrences(raw, _mark(number))
    )
    skeleton: list[str | _Slot] = []
    place = 0
    for start, number in found:
        text, place = raw[place:start], start + len(_mark(number))
        lead = ""
        if messages[number]["role"] == "assistant":
            text, lead = _split_lead(text, frame)
        skeleton += [text, _Slot(number, lead)]
    return [*skeleton, raw[place:]]


def _with_leads(
    parts: list[tuple[str, int | None]], messages: list[Message], frame: AnswerFrame
) -> Iterator[Part]:
    """The parts of `tool_layout`; what stands between the prompt for an answer and its content becomes the answer's."""
    before = ""
    for text, message in parts:
        if message is None:
            before = text
            continue
        lead = ""
        if messages[message]["role"] == "assistant":
            before, lead = _split_lead(before, frame)
        yield Part(before, None, True)
        if lead:
            yield Part(lead, message, True)
        yield Part(text, message, False)
        before = ""
    yield Part(before, None, True)


def _split_lead(text: str, frame: AnswerFrame) -> tuple[str, str]:
    """What stands before an answer's content: the template's up to the prompt for it, and the answer's beginning."""
    if frame.header:
        header = text.rfind(frame.header)
        lead = len(text) if header < 0 else header + len(frame.header)
    else:
        lead = len(text) - len(frame.gap) * text.endswith(frame.gap)
    return text[:lead], text[lead:]


def _occurrences(text: str, mark: str) -> list[int]:
    places = []
    start = text.find(mark)
    while start >= 0:
        places.append(start)
        start = text.find(mark, start + len(mark))
    return places


def _found(
    rendered: str, place: int, slot: _Slot, following: str, message: Message, encoder: SafeEncoder
) -> list[Part]:
    """A message as the template wrote it at `place`, before its own text `following`; empty when it is not there.

    As given, or stripped; a template that changes it otherwise (drops an old turn's reasoning) is followed as
    long as neither the content nor what became of it holds a special token's name, which could feign the
    template's text, and a special token follows, so that its end is sure.
    """
    content, lead = message["content"], slot.lead
    for text in (content, content.strip(), content.lstrip(), content.rstrip()):
        if rendered.startswith(lead + text + following, place):
            own = [Part(lead, slot.message, True)] if lead else []
            return [*own, Part(text, slot.message, False)]
    if following and encoder.special_at_start(following.lstrip()) is None:
        return []
    end = rendered.find(following, place) if following else len(rendered)
    text = rendered[place:end] if end >= 0 else None
    if text is None or encoder.secret(content) != content:
        return []
    return [Part(text, slot.message, False)] if encoder.secret(text) == text else []


def _changed(messages: list[Message], skeleton: list[str | _Slot]) -> DataError:
    number = next((p.message for p in reversed(skeleton) if isinstance(p, _Slot)), 0)
    return DataError(
        f"the chat template changes message {number + 1} ({messages[number]['role']}) "
        "so that it cannot be told from the template's own text"
    )
