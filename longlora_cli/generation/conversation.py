"""A conversation as token ids: what the model said is what it is fed.

Ids of earlier turns are kept, never made again from text. A new turn adds the ids of what the chat template
writes after the last answer, as long as the template's text shows that it only added. When it rewrites the
past (drops old reasoning, writes the time into the system message), the whole conversation is encoded anew
and the session's common prefix limits the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longlora_cli.data.chat_template import Message, encode_prompt, render_chat, render_text, require_template
from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.encoding import safe_encoder

_STAND_IN = "stand-in of an earlier turn"


@dataclass(frozen=True)
class Attachment:
    """A text to read with the next question.

    Args:
        name: Shown to the model before the text.
        text: All of it.
        tokens: Its length alone, without header and question.
    """

    name: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Prompt:
    """A question, ready to be answered.

    Args:
        question: What the user typed.
        attachments: The texts that go before it.
        ids: The whole conversation up to where the answer begins.
        text: The template's rendering of it.
    """

    question: str
    attachments: tuple[Attachment, ...]
    ids: list[int]
    text: str

    @property
    def content(self) -> str:
        """The user's message: each text under its name, then the question."""
        return "".join(f"File: {a.name}\n\n{a.text}\n\n" for a in self.attachments) + self.question


@dataclass(frozen=True)
class _Turn:
    prompt: Prompt
    answer: str
    answer_ids: list[int]


class Conversation:
    """Turns of one user and the model.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        system: System message.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        require_template(tokenizer)
        self._tokenizer = tokenizer
        self.system = system
        self.pending: list[Attachment] = []
        self._turns: list[_Turn] = []

    @property
    def turns(self) -> int:
        """Questions answered."""
        return len(self._turns)

    def attach(self, name: str, text: str) -> Attachment:
        """Put a text before the next question; its tokens are counted now."""
        tokens = len(safe_encoder(self._tokenizer).encode_batch([text])[0])
        self.pending.append(Attachment(name, text, tokens))
        return self.pending[-1]

    def ask(self, question: str) -> Prompt:
        """The prompt of a question with the pending texts. The conversation is not changed before `keep`.

        Raises:
            DataError: The template refuses the conversation.
        """
        draft = Prompt(question, tuple(self.pending), [], "")
        messages: list[Message] = [*self.messages(), {"role": "user", "content": draft.content}]
        text = self._render(messages)
        added = self._continuation(messages, text)
        if added is None:
            ids = encode_prompt(self._tokenizer, messages)
        else:
            ids = [*self._turns[-1].prompt.ids, *self._turns[-1].answer_ids, *added]
        return Prompt(question, draft.attachments, ids, text)

    def keep(self, prompt: Prompt, answer: str, answer_ids: list[int]) -> None:
        """Add a question and its answer, whole or interrupted; the prompt's texts are no longer pending."""
        self._turns.append(_Turn(prompt, answer, list(answer_ids)))
        self.pending = self.pending[len(prompt.attachments) :]

    def undo(self) -> Prompt | None:
        """Take the last question and answer back; its texts are pending again. None when there is none."""
        if not self._turns:
            return None
        prompt = self._turns.pop().prompt
        self.pending = [*prompt.attachments, *self.pending]
        return prompt

    def messages(self) -> list[Message]:
        """The conversation as chat messages."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self._turns:
            found.append({"role": "user", "content": turn.prompt.content})
            found.append({"role": "assistant", "content": turn.answer})
        return found

    def _continuation(self, messages: list[Message], text: str) -> list[int] | None:
        """Ids that follow those of the last prompt and answer; None when the past is not what it was.

        They come from a short stand-in of the conversation, so that a long past is not encoded again (0.5 s
        for 161,000 tokens), and start at the special token that ends the answer: no other token reaches
        across it.
        """
        if not self._turns:
            return None
        stand_in: list[Message] = [{**m, "content": _STAND_IN} for m in messages[:-1]] + messages[-1:]
        following = self._render(stand_in).rpartition(_STAND_IN)[2]
        last = self._turns[-1]
        # Templates may write an answer without the spaces around it; the ids keep them.
        written = {last.answer, last.answer.strip(), last.answer.lstrip(), last.answer.rstrip()}
        if not any(text == last.prompt.text + answer + following for answer in written):
            return None
        chat = render_chat(self._tokenizer, stand_in, add_generation_prompt=True)
        end = max((place for place, label in enumerate(chat.labels) if label != IGNORE), default=None)
        encoder = safe_encoder(self._tokenizer)
        if end is None or encoder.special_at_start(following) != chat.ids[end]:
            return None
        return chat.ids[end:]

    def _render(self, messages: list[Message]) -> str:
        return render_text(self._tokenizer, messages, add_generation_prompt=True)
