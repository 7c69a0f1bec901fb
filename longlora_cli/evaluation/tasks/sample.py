"""One question with its known answer, as text: what the generating layer hands to the predicting one.

Fields and their meaning are those of RULER's files (NVIDIA, `input`, `outputs`, `answer_prefix`, `length`;
arXiv:2404.06654), so that rows written from samples can be read by any harness that reads RULER's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longlora_cli.data.chat_template import Message


@dataclass(frozen=True)
class Then:
    """A second prompt, around what was said to the first; its answer is the one that is judged.

    Args:
        before: Its text up to what was said.
        after: Its text behind that.
        max_new_tokens: Longest answer.
    """

    before: str
    after: str
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """A question that any model can be asked.

    Args:
        task: The task it belongs to, such as `niah_multikey_1` or `longbench.hotpotqa`.
        id: Tells it from the task's others.
        messages: Up to the answer; a plain prompt is one user turn.
        outputs: The references, at least one unless the scorer can do without.
        scorer: Name of the scorer that judges the answer, a version after `@`.
        max_new_tokens: Longest answer.
        answer_prefix: How the answer begins: the start of the assistant's turn, or of the continuation where there is
            no chat.
        as_chat: False where the task is a text to continue even for a model with a chat template.
        stop: The answer ends before the first of these strings.
        extra: What the scorer needs besides (`question`, `all_classes`, `options`).
        facts: What is known of it (`length`, `depth`, `sample`); copied into its row.
        as_is: Where there is no chat, a single turn is read just as it stands, with no line break put behind it.
        context: The part of a single turn that the question is about; empty where that is not known.
        then: What is asked afterwards; None: the first answer is judged.
    """

    task: str
    id: str
    messages: list[Message]
    outputs: list[str]
    scorer: str
    max_new_tokens: int
    answer_prefix: str = ""
    as_chat: bool = True
    stop: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    as_is: bool = False
    context: str = ""
    then: Then | None = None

    @property
    def without_context(self) -> list[Message] | None:
        """Its messages without what the question is about; None where that cannot be told (`without`)."""
        return without(self.messages, self.context)


def without(messages: list[Message], context: str) -> list[Message] | None:
    """A question without its context: of a chat the last turn alone, of a single turn all but the context.

    Nothing else changes, so that a model that knows or guesses the answer is asked for it in the same words.

    Args:
        messages: Up to the answer.
        context: A part of the only turn.

    Returns:
        The messages; None where the context stands in the turn not once, or nothing stands beside it.
    """
    if len(messages) > 1:
        return [*(m for m in messages[:-1] if m["role"] == "system"), messages[-1]]
    content = messages[0]["content"]
    if not context.strip() or content.count(context) != 1:
        return None
    before, _, after = content.partition(context)
    rest = before + after if before.strip() and after.strip() else (before + after).strip()
    return [{**messages[0], "content": rest}] if rest else None
