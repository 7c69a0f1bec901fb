"""Which spans a question finds: keys, words, BM25, order, merging, and what is refused."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.beacon.retrieval import (
    Bm25Index,
    RetrievalSettings,
    Retriever,
    Span,
    best,
    key_spans,
    make_index,
    merged,
    words,
)
from longlora_cli.errors import SettingsError
from longlora_cli.models.tokenizer import load_tokenizer


@given(tokens=st.integers(0, 200), key_length=st.integers(1, 60))
def test_keys_cover_every_token_of_the_past_once_and_in_order(tokens: int, key_length: int) -> None:
    spans = key_spans(tokens, key_length)
    assert [t for span in spans for t in range(span.start, span.end)] == list(range(tokens))
    assert all(span.end - span.start == key_length for span in spans[:-1])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda p: Span(p[0], sum(p)))))
def test_merged_spans_hold_the_same_tokens_and_never_touch(spans: list[Span]) -> None:
    together = merged(spans)
    assert {t for s in together for t in range(s.start, s.end)} == {
        t for s in spans for t in range(s.start, s.end)
    }
    assert all(first.end < second.start for first, second in pairwise(together))


def test_the_best_come_first_and_of_equal_scores_the_earlier() -> None:
    assert best(np.array([1.0, 3.0, 2.0, 3.0]), 3) == [1, 3, 2]
    assert best(np.arange(200) % 2 + 1.0, 100) == list(range(1, 200, 2))


def test_a_key_that_shares_nothing_with_the_query_is_never_among_the_best() -> None:
    assert best(np.array([0.0, 0.5, 0.0]), 3) == [1]


def test_words_ignore_case_and_marks_and_pair_the_signs_of_texts_without_spaces() -> None:
    assert words("The Amber-Falcon's code: 48213!") == ["the", "amber", "falcon", "s", "code", "48213"]
    assert words("金庫の番号 x") == ["金庫", "庫の", "の番", "番号", "x"]
    assert words("金 é") == ["金", "é"]


def _bm25_by_hand(documents: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    # Robertson and Zaragoza 2009, equation 3.15, with ln(1 + (N - n + 0.5) / (n + 0.5)) as IDF and no (k1 + 1).
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            holding = sum(word in other for other in documents)
            if holding:
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                count = document.count(word)
                score += idf * count / (count + k1 * (1 - b + b * len(document) / average))
        scores.append(score)
    return scores


def test_bm25_equals_its_formula_written_out() -> None:
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(30)]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randint(0, 40))) for _ in range(25)]
    query = "w3 w7 w7 absent w29 W12"
    index = Bm25Index()
    index.update(texts)
    expected = _bm25_by_hand([text.split() for text in texts], query.lower().split(), 0.9, 0.4)
    np.testing.assert_allclose(index.scores(query), expected, rtol=1e-12)


@pytest.mark.parametrize("texts", [[""], ["", "!?"], ["one", ""]])
def test_bm25_scores_texts_without_words_as_zero(texts: list[str]) -> None:
    index = Bm25Index()
    index.update(texts)
    assert index.scores("two").tolist() == [0.0] * len(texts)


def test_bm25_forgets_the_texts_before() -> None:
    index = Bm25Index()
    index.update(["amber falcon", "river"])
    index.update(["river", "mill"])
    assert index.scores("falcon").tolist() == [0.0, 0.0]
    assert index.scores("mill").argmax() == 1


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> Any:
    return load_tokenizer(tiny_tokenizer_folder)


def _past(tokenizer: Any) -> list[int]:
    text = " The river ran past the mill." * 30
    fact = " The secret code of the amber falcon is 48213."
    return list(tokenizer(text + fact + text)["input_ids"])


def test_a_question_finds_the_span_with_its_answer(tokenizer: Any) -> None:
    past = _past(tokenizer)
    retriever = Retriever(tokenizer, RetrievalSettings("bm25", topk=1, key_length=40))
    (span,) = retriever.find(past, "What is the code of the Amber Falcon?")
    assert "amber falcon" in tokenizer.decode(past[span.start - 8 : span.end + 8])
    assert span.end - span.start == 40


def test_topk_sets_how_many_keys_are_found_and_neighbours_become_one_span(tokenizer: Any) -> None:
    past = _past(tokenizer)

    def found(topk: int) -> list[Span]:
        return Retriever(tokenizer, RetrievalSettings("bm25", topk, 20)).find(past, "river mill amber falcon")

    for topk in (1, 2, 5):
        assert sum(span.end - span.start for span in found(topk)) == 20 * topk
    everything = found(len(past))
    assert everything == [Span(0, len(past))]


def test_key_length_sets_how_long_the_keys_are(tokenizer: Any) -> None:
    past = _past(tokenizer)
    lengths = set()
    for key_length in (10, 30):
        (span,) = Retriever(tokenizer, RetrievalSettings("bm25", 1, key_length)).find(past, "falcon")
        lengths.add(span.end - span.start)
    assert lengths == {10, 30}


def test_a_past_that_grew_is_searched_as_if_it_had_been_given_whole(tokenizer: Any) -> None:
    past = _past(tokenizer)
    settings = RetrievalSettings("bm25", 2, 32)
    growing = Retriever(tokenizer, settings)
    for end in (5, 100, 101, len(past)):
        whole = Retriever(tokenizer, settings).find(past[:end], "amber falcon mill")
        assert growing.find(past[:end], "amber falcon mill") == whole


@pytest.mark.parametrize("key_length", [32, 31])
def test_another_past_is_searched_as_if_it_were_the_first(tokenizer: Any, key_length: int) -> None:
    settings = RetrievalSettings("bm25", 1, key_length)
    used = Retriever(tokenizer, settings)
    used.find(_past(tokenizer), "falcon")
    other = list(tokenizer(" The miller slept." * 20)["input_ids"])
    for past in (other, _past(tokenizer), _past(tokenizer)[:200], _past(tokenizer)[3:]):
        for query in ("falcon", "miller"):
            assert used.find(past, query) == Retriever(tokenizer, settings).find(past, query)


def test_full_keys_are_decoded_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    past = _past(tokenizer)[:100]
    retriever = Retriever(tokenizer, RetrievalSettings("bm25", 1, 32))
    retriever.find(past[:70], "mill")
    decoded: list[int] = []
    plain = retriever._decoded

    def noting(ids: list[int]) -> str:
        decoded.append(len(ids))
        return plain(ids)

    monkeypatch.setattr(retriever, "_decoded", noting)
    retriever.find(past, "mill")
    assert decoded == [32, 4]


@pytest.mark.parametrize("query", [None, "", "  \n"])
def test_no_query_is_refused_in_one_line(tokenizer: Any, query: str | None) -> None:
    with pytest.raises(SettingsError, match="no query") as caught:
        Retriever(tokenizer, RetrievalSettings("bm25")).find([1, 2], query)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


def test_nothing_to_search_is_refused_in_one_line(tokenizer: Any) -> None:
    with pytest.raises(SettingsError, match="no index") as caught:
        Retriever(tokenizer, RetrievalSettings("bm25")).find([], "falcon")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "words_of_it"),
    [
        (RetrievalSettings("bm25", topk=0), "--retrieval-topk 0"),
        (RetrievalSettings("bm25", key_length=0), "--retrieval-key-length 0"),
        (RetrievalSettings("bm52"), "--retrieval-method bm52"),
    ],
)
def test_settings_that_search_nothing_are_refused(settings: RetrievalSettings, words_of_it: str) -> None:
    with pytest.raises(SettingsError, match=words_of_it):
        settings.validate()


def test_no_index_is_made_for_the_method_none() -> None:
    with pytest.raises(SettingsError, match="--retrieval-method is none"):
        make_index(RetrievalSettings())
