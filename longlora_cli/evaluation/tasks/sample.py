"""One question with its known answer, as text: what the generating layer hands to the predicting one.

Fields and their meaning are those of RULER's files (NVIDIA, `input`, `outputs`, `answer_prefix`, `length`;
arXiv:2404.06654), so that rows written from samples can be read by any harness that reads RULER's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longlora_cli.data.chat_template import Message


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
