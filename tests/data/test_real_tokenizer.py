"""The same claims on the tokenizer and template of a model that people use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longlora_cli.data.chat_template import render_chat
from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.tokenizing import encode_long
from longlora_cli.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Any:
    return load_tokenizer(smollm2_folder)


def test_smollm2_chats_are_those_of_apply_chat_template_with_the_answers_learnt(smollm2: Any) -> None:
    messages = [
        {"role": "user", "content": "Who slept?\n"},
        {"role": "assistant", "content": "The miller."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In the mill.\n"},
    ]
    chat = render_chat(smollm2, messages)
    assert chat.ids == smollm2.apply_chat_template(messages, return_dict=False)
    learnt = smollm2.decode([label for label in chat.labels if label != IGNORE])
    assert learnt == "The miller.<|im_end|>In the mill.\n<|im_end|>"


def test_smollm2_pieces_of_a_long_text_encode_to_the_whole_texts_ids(smollm2: Any) -> None:
    paragraphs = ["“Well,” said she.", "It was 1,498 — or later?", "  indented\nlines", "No stop"]
    text = "".join(paragraphs[n % 4] + "\n" * (2 + n % 3) for n in range(20_000))
    assert len(text) > 300_000
    whole = smollm2(text, add_special_tokens=False)["input_ids"]
    assert encode_long(safe_encoder(smollm2), [text])[0].tolist() == whole
