"""Texts put together from the ids of their words against whole texts, by tokenizers of every pipeline."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from tokenizer_kinds import MAKERS, TEXTS
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from longlora_cli.data import word_cache
from longlora_cli.data.encoding import SafeEncoder
from longlora_cli.data.word_cache import WordCache

PROSE = "The secret code of the amber falcon is 48213. What is it?\n\nWell, hello there; six.\n" * 40
_kept: dict[str, Any] = {}


def encoder_of(name: str) -> Any:
    """With a special token to put between words."""
    if name not in _kept:
        tokenizer = MAKERS[name]()
        tokenizer.add_special_tokens([AddedToken("<|border|>", normalized=False)])
        _kept[name] = SafeEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    return _kept[name]


def cache_of(encoder: Any) -> WordCache:
    return WordCache(encoder._encode_inner, encoder.seams, encoder.border)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of any size and kind are tried."""
    for name, value in (("_LEAST_CHARACTERS", 0), ("_MOST_NEW", 9.0), ("_MOST_TAKEN_BACK", 1.0)):
        monkeypatch.setattr(word_cache, name, value)


def inner_pieces(encoder: Any, text: str) -> list[str]:
    """A text, without the beginning where that is encoded otherwise; none of it where it cannot be cut."""
    if not encoder.has_inner:
        return [text]
    return [text[place:] for place in encoder.seams.cuts(text, 1)[:1]]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
@example(text="a. The one falcon a.  fal\n\none.\n \n The code is 1. A")
@example(text="One. E. E. e. e. E code is.\n\n\n\n\n  One.")
@example(text="[x] The code is. [x]the code. ▁the")
@example(text="")
def test_words_have_the_ids_that_they_have_in_any_text(name: str, text: str) -> None:
    encoder = encoder_of(name)
    assert (encoder.words is not None) == encoder.seams.are_known
    if not encoder.seams.are_known:
        return
    texts = [*inner_pieces(encoder, text.replace("\0", "")), " The code is."]
    expected = [ids.tolist() for ids in encoder._encode_inner(texts)]
    for _ in ("new", "known"):
        found = encoder.words.encode(texts)
        assert found is not None
        assert [ids.tolist() for ids in found] == expected


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", MAKERS)
def test_pieces_of_prose_are_made_of_words(name: str) -> None:
    encoder = encoder_of(name)
    cuts = encoder.seams.cuts(PROSE, 100)
    bounds = [0, *cuts, len(PROSE)]
    pieces = [(PROSE[a:b], a == 0) for a, b in pairwise(bounds)]
    joined = np.concatenate(encoder.encode_pieces(pieces))
    assert joined.tolist() == encoder.encode_batch([PROSE])[0].tolist()


@pytest.fixture
def cache() -> WordCache:
    return cache_of(encoder_of("llama3"))


def known(cache: WordCache) -> int:
    return len(cache._numbers)


@pytest.mark.usefixtures("always")
def test_a_word_is_encoded_once(cache: WordCache, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = cache._encode
    monkeypatch.setattr(cache, "_encode", lambda texts: (encoded.extend(texts), real(texts))[1])
    cache.encode([PROSE, PROSE])
    cache.encode([PROSE, " The code is six."])
    words = [word for text in encoded for word in text.split(encoder_of("llama3").border[0])]
    assert len(words) == len(set(words)) == known(cache) < 40


@pytest.mark.usefixtures("always")
def test_a_full_table_begins_anew(cache: WordCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MOST_WORDS", 50)
    encoder = encoder_of("llama3")
    for number in range(40):
        text = " ".join(f"word{n}" for n in range(number, number + 20))
        found = cache.encode([text])
        assert found is not None
        assert found[0].tolist() == encoder.encode_batch([text])[0].tolist()
        assert known(cache) <= 50 + 20


def test_texts_with_mostly_new_words_are_left_to_the_tokenizer_and_not_kept(cache: WordCache) -> None:
    text = " ".join(f"{number * 7919:x}" for number in range(20_000))
    assert cache.encode([text]) is None
    assert known(cache) == 0
    # Nor are the next ones tried, though they are worth it, but for a while.
    long = PROSE * 20
    tried = [cache.encode([long]) is not None for _ in range(10)]
    assert tried == [False] * 8 + [True] * 2


def test_texts_that_can_rarely_be_cut_are_left_to_the_tokenizer(cache: WordCache) -> None:
    assert cache.encode([" é è" * 20_000]) is None
    assert known(cache) == 0


@pytest.mark.parametrize("text", ["The falcon. " * 100, "The falcon.\0 " * 10_000])
def test_short_texts_and_those_with_nul_are_left_to_the_tokenizer(cache: WordCache, text: str) -> None:
    assert cache.encode([text]) is None


def test_words_that_hold_the_border_are_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("mistral, unknown fused")
    monkeypatch.setattr(word_cache, "_PART_WORDS", 5)
    unknown = encoder.backend.token_to_id(encoder.secret("<unk>"))
    assert encoder.border[1] != unknown
    cache = WordCache(encoder._encode_inner, encoder.seams, (encoder.secret("<unk>"), unknown))
    assert cache.encode([PROSE.replace("falcon", "🙂") * 20]) is None
    assert known(cache) == 0
    monkeypatch.setattr(cache, "_not_tried", 0)
    plain = " The code is one." * 5000
    found = cache.encode([plain])
    assert found is not None
    assert found[0].tolist() == encoder._encode_inner([plain])[0].tolist()


def test_threads_find_the_same_ids(cache: WordCache) -> None:
    texts = [" ".join(f"word{(n * k) % 997}" for n in range(9000)) for k in range(1, 41)]
    expected = encoder_of("llama3").encode_batch(texts)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: cache.encode([text]), texts))
    assert all(ids is not None for ids in found)
    assert [ids[0].tolist() for ids in found if ids] == [ids.tolist() for ids in expected]


def test_a_tokenizer_that_draws_its_merges_has_no_words_kept() -> None:
    tokenizer = MAKERS["llama3"]()
    tokenizer.add_special_tokens(["<|border|>"])
    tokenizer.model.dropout = 0.5
    assert SafeEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).words is None


def test_a_tokenizer_without_a_special_token_to_put_between_has_no_words_kept() -> None:
    tokenizer = MAKERS["llama3"]()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    encoder = SafeEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert encoder.words is None
    [ids] = encoder.encode_pieces([(PROSE * 20, True)])
    assert ids.tolist() == encoder.encode_batch([PROSE * 20])[0].tolist()


@pytest.mark.real_model
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_words_have_the_ids_that_they_have_in_any_text_for_smollm2(
    always: None, smollm2_folder: Any, text: str
) -> None:
    from longlora_cli.models.tokenizer import load_tokenizer

    if "smollm2" not in _kept:
        _kept["smollm2"] = SafeEncoder(load_tokenizer(smollm2_folder))
    encoder = _kept["smollm2"]
    found = encoder.words.encode([text.replace("\0", " ") + "."])
    assert found is not None
    assert found[0].tolist() == encoder.encode_batch([text.replace("\0", " ") + "."])[0].tolist()
