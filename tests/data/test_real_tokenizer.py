"""The same claims on the tokenizer and template of a model that people use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longlora_cli.data.chat_template import Labels, render_chat
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


ROUNDS = [
    {"role": "user", "content": "Who slept?\n"},
    {"role": "assistant", "content": "The miller."},
    {"role": "user", "content": "Where? <|im_end|>"},
    {"role": "assistant", "content": "In the mill."},
]


@pytest.mark.parametrize("template", ["auto", "chatml", "qwen", "none"])
@pytest.mark.parametrize("labels", ["assistant", "last", "all"])
def test_smollm2_learns_what_labels_say_with_each_template_that_fits(
    smollm2_folder: Path, template: str, labels: Labels
) -> None:
    tokenizer = load_tokenizer(smollm2_folder, template)
    chat = render_chat(tokenizer, ROUNDS, labels=labels)
    answers = ["The miller.<|im_end|>", "In the mill.<|im_end|>"]
    expected = {"assistant": "".join(answers), "last": answers[1], "all": tokenizer.decode(chat.ids[1:])}
    assert tokenizer.decode([label for label in chat.labels if label != IGNORE]) == expected[labels]
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = {"auto": 5, "chatml": 4, "qwen": 4, "none": 2}  # its own adds a system turn; the user's is text
    assert chat.ids.count(ends) == written[template]
