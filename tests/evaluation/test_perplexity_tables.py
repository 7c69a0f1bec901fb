"""Each table against its formula, on losses written by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from longlora_cli.evaluation.perplexity import TextLosses
from longlora_cli.evaluation.perplexity_tables import per_text_units, summarize
from longlora_cli.evaluation.statistics import bootstrap_ratio
from longlora_cli.evaluation.texts import TextSize

VECTORS = json.loads((Path(__file__).parent / "perplexity_vectors.json").read_text(encoding="utf-8"))[
    "groups"
]
[AGGREGATION] = [g["aggregation"] for g in VECTORS if g["metric"] == "perplexity.windows"]


def as_losses(nll, curve=None, window=4, short=None):
    nll = np.array(nll, dtype=np.float32)
    curve = np.zeros((0, window - 1)) if curve is None else curve
    short = None if short is None else np.array(short, dtype=np.float32)
    return TextLosses(nll, np.array([[nll.sum(), len(nll)]]), np.array(curve, dtype=np.float32), short)


def sizes(*pairs):
    return [TextSize(*pair) for pair in pairs]


def test_micro_macro_and_mean_of_perplexities_are_the_known_ones():
    texts = [
        as_losses([mean] * tokens)
        for mean, tokens in zip(AGGREGATION["doc_mean_nll"], AGGREGATION["doc_tokens"], strict=True)
    ]
    found = summarize(texts, sizes((400, 80), (3600, 720)), window=4)
    assert found["perplexity"] == pytest.approx(AGGREGATION["token_micro_ppl"], abs=1e-9)
    macro = AGGREGATION["document_macro_ppl (FlagEmbedding Long_LLM)"]
    assert found["perplexity_macro"] == pytest.approx(macro, abs=1e-9)
    mean = AGGREGATION["mean_of_ppls (HF evaluate perplexity)"]
    assert found["perplexity_mean_of_texts"] == pytest.approx(mean, abs=1e-9)
    assert (found["n"], found["texts"], found["windows"]) == (1000, 2, 2)


def test_what_is_per_byte_and_word_is_the_sum_of_losses_over_bytes_and_words():
    found = summarize(
        [as_losses([2.0] * 100), as_losses([3.0] * 900)], sizes((400, 80), (3600, 720)), window=4
    )
    assert found["bits_per_byte"] == pytest.approx(2900 / math.log(2) / 4000)
    assert found["byte_perplexity"] == pytest.approx(math.exp(2900 / 4000))
    assert found["word_perplexity"] == pytest.approx(math.exp(2900 / 800))
    assert (found["bytes"], found["words"]) == (4000, 800)


def test_a_perplexity_per_word_above_all_numbers_is_none_and_not_a_crash():
    assert per_text_units(5000.0, sizes((4000, 1)))["word_perplexity"] is None


def test_buckets_hold_the_tokens_that_had_that_much_context():
    curve = np.tile(np.arange(1, 300, dtype=np.float32), (2, 1)) / 100  # c of context costs c/100
    found = summarize([as_losses([1.0], curve, window=300)], sizes((1, 1)), window=300)
    means = {(b["from"], b["to"]): (b["n"], b["nll"]) for b in found["by_position"]}
    assert means[0, 128] == (254, pytest.approx(np.arange(1, 128).mean() / 100))
    assert means[128, 256] == (256, pytest.approx(np.arange(128, 256).mean() / 100))
    assert means[256, 300] == (88, pytest.approx(np.arange(256, 300).mean() / 100))
    assert (found["curve_windows"], found["curve_source"]) == (2, "full windows")
    assert "gain" not in found
    assert not any("short_nll" in bucket or "gain" in bucket for bucket in found["by_position"])


def test_texts_shorter_than_the_window_stand_in_for_windows():
    found = summarize([as_losses([1.0] * 10), as_losses([2.0] * 200)], sizes((10, 2), (10, 2)), window=256)
    assert found["curve_source"] == "whole texts"
    assert [(b["from"], b["n"]) for b in found["by_position"]] == [(0, 137), (128, 73)]


def planted(gains, window=300, short=100):
    """A row a gain: with 100 tokens of context and more, the short context costs `gain` nats more."""
    rng = np.random.default_rng(0)
    full = rng.uniform(1, 3, (len(gains), window - 1)).astype(np.float32)
    other = full.copy()
    other[:, short - 1 :] += np.array(gains, dtype=np.float32)[:, None]
    return full, other


def test_a_planted_gain_is_found_in_its_buckets_and_in_all():
    full, other = planted([0.5, 0.5, 0.5])
    found = summarize([as_losses([1.0], full, window=300, short=other)], sizes((1, 1)), window=300, short=100)
    first, *late = found["by_position"]
    assert first["gain"] == pytest.approx(
        0.5 * 28 / 127, abs=1e-6
    )  # of contexts 1 to 127, 28 are 100 and more
    assert [b["gain"] for b in late] == pytest.approx([0.5, 0.5], abs=1e-6)
    for bucket, columns in zip(found["by_position"], [(0, 127), (127, 255), (255, 299)], strict=True):
        mean = other[:, slice(*columns)].mean(dtype=np.float64)
        assert bucket["short_nll"] == pytest.approx(mean)
        assert bucket["short_perplexity"] == pytest.approx(math.exp(mean))
        assert bucket["gain"] == pytest.approx(bucket["short_nll"] - bucket["nll"], abs=1e-6)
    gain = found["gain"]
    assert gain["gain"] == pytest.approx(0.5 * 200 / 299, abs=1e-6)
    assert (gain["n"], gain["windows"]) == (3 * 299, 3)
    assert gain["beyond"]["gain"] == pytest.approx(0.5, abs=1e-6)
    assert gain["beyond"]["n"] == 3 * 200


def test_the_gains_interval_draws_whole_windows_with_both_losses_of_a_token():
    gains = [0.1, 0.2, 0.9, 0.4]
    full, other = planted(gains)
    found = summarize([as_losses([1.0], full, window=300, short=other)], sizes((1, 1)), window=300, short=100)
    expected = bootstrap_ratio([200 * gain for gain in gains], [200] * 4)
    assert found["gain"]["beyond"]["gain_ci95"] == pytest.approx(expected, abs=1e-5)
    # The losses themselves differ by far more than the gains: unpaired, the interval would be wider.
    assert found["by_position"][-1]["gain_ci95"] == pytest.approx(expected, abs=1e-5)


def test_a_single_window_has_a_gain_without_an_interval():
    full, other = planted([0.5])
    found = summarize([as_losses([1.0], full, window=300, short=other)], sizes((1, 1)), window=300, short=100)
    assert found["gain"]["gain_ci95"] is None
    assert found["by_position"][0]["gain_ci95"] is None


def test_whole_texts_have_their_gain_too():
    nll, short = [2.0] * 50, [[2.0] * 9 + [2.5] * 41]
    texts = [as_losses(nll, window=64, short=short), as_losses([1.0] * 5, window=64, short=[[1.0] * 5])]
    found = summarize(texts, sizes((1, 1), (1, 1)), window=64, short=10)
    assert found["curve_source"] == "whole texts"
    assert found["gain"]["beyond"] == {
        "gain": pytest.approx(0.5),
        "gain_ci95": [pytest.approx(0.5)] * 2,
        "n": 41,
        "windows": 1,
    }
    assert found["gain"]["gain"] == pytest.approx(41 * 0.5 / 55)


def test_words_are_counted_as_lm_eval_counts_them(tiny_model_folder, tmp_path):
    from longlora_cli.evaluation.texts import read_texts
    from longlora_cli.models.tokenizer import load_tokenizer

    text = "The river ran  past the\nmill. \n"
    (tmp_path / "a.txt").write_text(text)
    [found] = read_texts([tmp_path / "a.txt"], load_tokenizer(tiny_model_folder), split="test")
    assert (found.size.words, found.size.bytes) == (len(re.split(r"\s+", text)), len(text.encode()))
