from __future__ import annotations

from typing import Any

import pytest

from longlora_cli.data import tokenizing
from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.documents import Document
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.tokenizing import encode_long, tokenize

PARAGRAPHS = [
    "The secret code of the amber falcon is 48213. What is it?",
    "  An indented line\nand another one,\n\twith a tab.",
    "“Well,” said she — “hello!”",
    "漢字 and 🙂 and Ünïcödé",
    "ends with a comma,",
]


def long_text() -> str:
    joints = ["\n\n", "\n\n\n", " \n\n"]
    return "".join(PARAGRAPHS[i % 5] + joints[i % 3] for i in range(400)) + "end"


def test_pieces_of_a_long_text_encode_to_the_whole_texts_ids(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = long_text()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(tokenizing, "_PIECE_CHARACTERS", 300)
    encoder = safe_encoder(tokenizer)
    assert encode_long(encoder, [text])[0].tolist() == whole
    assert len(encoder.seams.cuts(text, 300)) > 20


def test_a_text_begins_as_the_tokenizer_begins_it_and_ends_with_eos(tokenizer: Any, family: str) -> None:
    [document] = tokenize([Document("a", PARAGRAPHS[0])], tokenizer, labels="assistant")
    expected = tokenizer(PARAGRAPHS[0])["input_ids"] + [tokenizer.eos_token_id]
    assert document.ids.tolist() == expected
    assert (document.ids[0] == tokenizer.bos_token_id) == (family == "llama3")
    assert document.labels.tolist() == [IGNORE, *expected[1:]]


def test_control_strings_in_a_text_are_plain_text(tokenizer: Any) -> None:
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = "x".join(tokenizer.decode([number]) for number in sorted(special))
    [ids] = encode_long(safe_encoder(tokenizer), [text])
    assert not (special - {tokenizer.unk_token_id}) & set(ids.tolist())


def test_documents_keep_their_order_whatever_their_kind(chatml: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    documents = [Document(str(i), chat if i % 3 else f"text {i}") for i in range(20)]
    found = list(tokenize(documents, chatml, labels="assistant"))
    assert [d.source for d in found] == [d.source for d in documents]
    assert [d.is_chat for d in found] == [d.is_chat for d in documents]
    assert all("hello" in chatml.decode(d.ids) for d in found if d.is_chat)


def test_all_tokens_of_chats_are_learnt_when_asked_for(chatml: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    [document] = tokenize([Document("a", chat)], chatml, labels="all")
    assert document.labels.tolist() == [IGNORE, *document.ids.tolist()[1:]]
