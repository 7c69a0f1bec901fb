from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longlora_cli.data.encoding import SafeEncoder, safe_encoder


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_gets_the_plain_tokenizers_ids(families: dict[str, Any], text: str) -> None:
    for tokenizer in families.values():
        [ids] = safe_encoder(tokenizer).encode_batch([text])
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_trusted_text_gets_its_special_tokens(tokenizer: Any) -> None:
    encoder = safe_encoder(tokenizer)
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    text = "hello ".join(names)
    [ids] = encoder.encode_batch([encoder.secret(text)])
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.special_ids == {tokenizer.convert_tokens_to_ids(name) for name in names}


def test_the_tokenizer_itself_is_not_changed(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    SafeEncoder(tokenizer).encode_batch(["</s> <|im_end|>"])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_model_that_remembers_no_words_is_encoded_too() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    [ids] = SafeEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).encode_batch(["a b a"])
    assert ids.tolist() == [1, 2, 1]


def vocabulary_with_merges(*, ignore_merges: bool) -> Any:
    """A BPE model that can put `<s>` together from its characters."""
    vocab = {"<s>": 0, "<": 1, "s": 2, ">": 3, "<s": 4, "a": 5}
    merges = [("<", "s"), ("<s", ">")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_cannot_put_a_special_token_together(ignore_merges: bool) -> None:
    tokenizer = vocabulary_with_merges(ignore_merges=ignore_merges)
    # The backend's own switch for plain special tokens leaves this way open:
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert tokenizer.backend_tokenizer.encode("<s>").ids == [0]
    [ids] = SafeEncoder(tokenizer).encode_batch(["<s> a"])
    assert ids.tolist() == [4, 3, 5]


def test_a_wordlist_cannot_look_a_special_token_up() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", unk_token="[UNK]")
    [ids] = SafeEncoder(fast).encode_batch(["a [SEP] b"])
    assert ids.tolist() == [2, 0, 0]


def test_secret_names_differ_between_encoders(chatml: Any) -> None:
    assert SafeEncoder(chatml).secret("<|im_end|>") != SafeEncoder(chatml).secret("<|im_end|>")


def test_tokens_added_later_are_known(families: dict[str, Any]) -> None:
    import copy

    tokenizer = copy.deepcopy(families["chatml"])
    before = safe_encoder(tokenizer)
    assert safe_encoder(tokenizer) is before
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    added = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert added in safe_encoder(tokenizer).special_ids
    assert json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"][-1]["content"] == "<|tool|>"
