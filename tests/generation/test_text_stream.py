"""Pieces of text are whole characters, and joined they are the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_cli.generation.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer_folder: Path):
    """Byte-level BPE, and one that marks spaces and falls back to bytes, as Llama 2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    backend = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bytewise = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    return {"byte-level": AutoTokenizer.from_pretrained(tiny_tokenizer_folder), "byte fallback": bytewise}


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


KINDS = ["byte-level", "byte fallback"]
TEXTS = st.text(alphabet=st.sampled_from("ab \n😀é中👍🏽"), max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_pieces_joined_are_the_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_no_piece_holds_a_broken_character(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not any("\ufffd" in piece for piece in pieces_of(tokenizer, ids))


def test_a_character_is_shown_with_its_last_byte(tokenizers):
    ids = tokenizers["byte-level"].encode("😀", add_special_tokens=False)
    assert pieces_of(tokenizers["byte-level"], ids) == ["", "", "", "😀", ""]


def test_an_unfinished_character_is_shown_at_the_end(tokenizers):
    ids = tokenizers["byte-level"].encode("a😀", add_special_tokens=False)[:-1]
    assert "".join(pieces_of(tokenizers["byte-level"], ids)) == "a\ufffd"


def test_special_tokens_are_left_out(tokenizers):
    tokenizer = tokenizers["byte-level"]
    ids = [*tokenizer.encode("a", add_special_tokens=False), tokenizer.eos_token_id]
    assert "".join(pieces_of(tokenizer, ids)) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_never_become_a_character_are_not_collected(tokenizers, kind):
    """Each step decodes a few tokens, also when a model writes nothing but continuation bytes."""
    tokenizer = tokenizers[kind]
    byte = "<0x98>" if kind == "byte fallback" else "ĺ"  # how byte-level BPE writes 0x98
    decoded = []
    stream = TextStream(tokenizer)
    plain = stream._decode
    stream._decode = lambda ids: decoded.append(len(ids)) or plain(ids)
    token = tokenizer.convert_tokens_to_ids(byte)
    text = "".join(stream.push(token) for _ in range(500))
    assert max(decoded) <= 16
    assert set(text) == {"\ufffd"}
