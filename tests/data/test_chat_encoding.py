"""Chats encoded piece by piece against whole ones, by every template's kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from template_tokenizers import NAMES, templated
from tokenizer_kinds import TEXTS

from longlora_cli.data import chat_encoding, rows, tokenizing
from longlora_cli.data.chat_template import RenderedChat, render_chat, render_chats
from longlora_cli.data.document import Document
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.rows import RowFault, read_row
from longlora_cli.errors import DataError

_kept: dict[str, Any] = {}


def tokenizer_of(name: str) -> Any:
    if name not in _kept:
        _kept[name] = templated(name)
    return _kept[name]


def in_pieces(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[RenderedChat, int]:
    """The chat with every exact place cut, and in how many pieces it was encoded."""
    encoder = safe_encoder(tokenizer)
    pieces: list[tuple[str, bool]] = []
    real = encoder.encode_with_offsets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_encoding, "_PIECE_CHARACTERS", 1)
        patch.setattr(chat_encoding, "_BATCH_BYTES", 50)
        patch.setattr(encoder, "encode_with_offsets", lambda some: (pieces.extend(some), real(some))[1])
        return render_chat(tokenizer, messages), len(pieces)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS, answer=TEXTS)
@example(text="a b  c\n\nd </s> e", answer=" <s> the [INST] code  ")
def test_ids_and_labels_of_a_chat_do_not_depend_on_its_pieces(name: str, text: str, answer: str) -> None:
    tokenizer = tokenizer_of(name)
    messages = [
        {"role": "user", "content": f"What is {text} then?"},
        {"role": "assistant", "content": f"It is {answer} surely."},
        {"role": "user", "content": f"And {answer} now?"},
        {"role": "assistant", "content": f"Still {text} there."},
    ]
    try:
        whole = render_chat(tokenizer, messages)
    except DataError:  # a control token's name that is plain text for this tokenizer
        return
    assert in_pieces(tokenizer, messages)[0] == whole


@pytest.mark.parametrize("name", NAMES)
def test_long_chats_are_cut_by_all_that_prefix_a_text_only_once(name: str) -> None:
    tokenizer = tokenizer_of(name)
    messages = [
        {"role": "user", "content": "One two. " * 40},
        {"role": "assistant", "content": "Three four."},
    ]
    _, pieces = in_pieces(tokenizer, messages)
    assert pieces > 40 or (pieces == 1 and safe_encoder(tokenizer).seams.prefixes_again)


def test_what_cannot_be_cut_is_refused_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_encoding, "_MOST_PIECE_BYTES", 1000)
    monkeypatch.setattr(chat_encoding, "_PIECE_CHARACTERS", 100)
    tokenizer = tokenizer_of("chatml")

    def chat(content: str) -> Document:
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
        return Document(f"a.jsonl:{len(content)}", messages)

    fits = [chat("falcon " * 900), chat("x" * 800)]
    assert len(list(tokenizing.tokenize(fits, tokenizer, labels="assistant"))) == 2
    with pytest.raises(
        DataError, match=r"^a\.jsonl:2000: 2,\d{3} characters of the chat have no place where"
    ):
        list(tokenizing.tokenize([*fits, chat("x" * 2000)], tokenizer, labels="assistant"))


def test_pieces_are_encoded_together_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_encoding, "_PIECE_CHARACTERS", 40)
    monkeypatch.setattr(chat_encoding, "_BATCH_BYTES", 400)
    tokenizer = tokenizer_of("chatml")
    encoder = safe_encoder(tokenizer)
    sizes: list[int] = []
    real = encoder.encode_with_offsets
    monkeypatch.setattr(
        encoder,
        "encode_with_offsets",
        lambda some: (sizes.append(sum(len(text.encode()) for text, _ in some)), real(some))[1],
    )
    emoji = [{"role": "user", "content": "🙂 a " * 500}, {"role": "assistant", "content": "Yes."}]
    short = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    render_chats(tokenizer, [emoji, short, short])
    assert max(sizes) <= 400
    assert min(sizes[:-1]) > 200


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "x" * 600},
                    {"role": "assistant", "content": "é" * 250},
                ]
            },
            None,
        ),
        ({"context": "🙂" * 300, "input": "?", "answers": ["x"]}, "longbench"),
        ({"prompt": "x", "completion": "y" * 1100}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}] * 11}, None),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "x" * 1100}]}, None),
    ],
)
def test_a_chat_with_more_text_than_one_may_have_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], format: str | None
) -> None:
    monkeypatch.setattr(rows, "_MOST_CHAT_BYTES", 1000)
    monkeypatch.setattr(rows, "_OBJECT_BYTES", 100)
    with pytest.raises(RowFault, match=r"the chat has more than .* MiB of text, or than 10 messages"):
        read_row(row, format)


def test_a_chat_with_as_much_text_as_one_may_have_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_CHAT_BYTES", 1000)
    monkeypatch.setattr(rows, "_OBJECT_BYTES", 100)
    content = [{"role": "user", "content": "é" * 390}, {"role": "assistant", "content": "x"}]
    assert read_row({"messages": content}).content == content
    assert read_row({"text": "x" * 2000}).content == "x" * 2000
