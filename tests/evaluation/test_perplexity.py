from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longlora_cli.data.chunk import Chunk
from longlora_cli.errors import IncompatibleError
from longlora_cli.evaluation.perplexity import (
    TextLosses,
    evaluate_chunks,
    score_text,
    summarize,
    window_losses,
)
from longlora_cli.evaluation.windows import curve_windows, plan_windows


@pytest.fixture
def double(tiny_loaded):
    """The tiny model in float64, put back to float32 afterwards."""
    tiny_loaded.model.double()
    yield tiny_loaded
    tiny_loaded.model.float()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 500, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def naive(loaded, ids, window, stride):
    """Token by token: one forward per token over exactly the context that its window gives it."""
    found = {}
    for w in plan_windows(len(ids), window, stride):
        for token in range(w.first, w.stop):
            logits = loaded.causal_lm(torch.tensor([ids[w.start : token]])).logits[0, -1]
            found[token] = -float(logits.double().log_softmax(-1)[ids[token]])
    return [found[token] for token in range(1, len(ids))]


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (48, 48), (40, 7), (150, 75), (400, 200)])
def test_losses_equal_a_token_by_token_loop(tiny_loaded, ids, window, stride):
    found = score_text(tiny_loaded, ids, window=window, stride=stride, chunk=4096)
    expected = naive(tiny_loaded, ids, window, stride)
    np.testing.assert_allclose(found.nll, expected, rtol=2e-5)
    assert len(found.nll) == len(ids) - 1
    assert found.windows[:, 1].sum() == len(ids) - 1
    assert found.windows[:, 0].sum() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 32, 63])
def test_a_window_read_in_pieces_has_the_same_losses_in_float64(double, ids, chunk):
    row = torch.tensor([ids[:64]])
    whole = window_losses(double, row, [1], chunk=4096)
    pieces = window_losses(double, row, [1], chunk=chunk)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=0)
    assert whole[0, 0] == 0


def test_windows_that_share_a_forward_have_the_losses_of_windows_alone(double, ids):
    rows = torch.tensor([ids[:30], ids[30:60], ids[60:90]])
    together = window_losses(double, rows, [1, 10, 29], chunk=4096)
    for row, first in enumerate([1, 10, 29]):
        alone = window_losses(double, rows[row : row + 1], [first], chunk=4096)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=0)
        assert together[row, :first].eq(0).all()
        assert together[row, first:].gt(0).all()


@pytest.fixture
def forwards(tiny_loaded, monkeypatch):
    """Of each forward: its number of tokens, and whether the model was in training mode."""
    seen = []
    hidden = type(tiny_loaded).hidden

    def watched(self, ids, **options):
        seen.append((ids.numel(), self.model.training))
        return hidden(self, ids, **options)

    monkeypatch.setattr(type(tiny_loaded), "hidden", watched)
    return seen


def test_one_forward_never_reads_more_than_a_chunk(tiny_loaded, ids, forwards):
    score_text(tiny_loaded, ids, window=100, stride=50, chunk=40)
    assert max(tokens for tokens, _ in forwards) <= 40
    forwards.clear()
    score_text(tiny_loaded, ids, window=20, stride=10, chunk=64)
    assert 40 < max(tokens for tokens, _ in forwards) <= 64


def test_the_curve_holds_the_losses_of_whole_disjoint_windows(tiny_loaded, ids):
    found = score_text(tiny_loaded, ids, window=32, stride=16, chunk=4096)
    chosen = curve_windows(plan_windows(len(ids), 32, 16), 32)
    assert found.curve.shape == (len(chosen), 31) == (4, 31)
    for row, w in zip(found.curve, chosen, strict=True):
        alone = window_losses(tiny_loaded, torch.tensor([ids[w.start : w.stop]]), [1], chunk=4096)
        np.testing.assert_allclose(row, alone[0, 1:], rtol=1e-5)


def as_losses(nll, curve=None, window=4):
    nll = np.array(nll, dtype=np.float32)
    curve = np.zeros((0, window - 1)) if curve is None else curve
    return TextLosses(nll, np.array([[nll.sum(), len(nll)]]), np.array(curve, dtype=np.float32))


def test_micro_macro_and_bits_per_byte_are_their_formulas():
    found = summarize([as_losses([2.0] * 100), as_losses([3.0] * 900)], [400, 3600], window=4)
    assert found["perplexity"] == pytest.approx(18.1741453694)
    assert found["perplexity_macro"] == pytest.approx(12.1824939607)
    assert found["bits_per_byte"] == pytest.approx(2900 / math.log(2) / 4000)
    assert (found["n"], found["texts"], found["windows"]) == (1000, 2, 2)


def test_buckets_hold_the_tokens_that_had_that_much_context():
    curve = (
        np.tile(np.arange(1, 300, dtype=np.float32), (2, 1)) / 100
    )  # a token with c of context costs c/100
    found = summarize([as_losses([1.0], curve, window=300)], [1], window=300)
    means = {(b["from"], b["to"]): (b["n"], b["nll"]) for b in found["by_position"]}
    assert means[0, 128] == (254, pytest.approx(np.arange(1, 128).mean() / 100))
    assert means[128, 256] == (256, pytest.approx(np.arange(128, 256).mean() / 100))
    assert means[256, 300] == (88, pytest.approx(np.arange(256, 300).mean() / 100))
    assert (found["curve_windows"], found["curve_source"]) == (2, "full windows")


def test_texts_shorter_than_the_window_stand_in_for_windows():
    found = summarize([as_losses([1.0] * 10), as_losses([2.0] * 200)], [10, 10], window=256)
    assert found["curve_source"] == "whole texts"
    assert [(b["from"], b["n"]) for b in found["by_position"]] == [(0, 137), (128, 73)]


def make_chunk(lengths, masked, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 500, sum(lengths)).astype(np.int32)
    labels = ids.copy()
    labels[masked] = -100
    for array in (ids, labels):
        array.setflags(write=False)  # as those of a mapped file
    return Chunk(ids, labels, np.array(lengths, dtype=np.int32))


@torch.no_grad()
def naive_chunk(loaded, chunk):
    total, count, start = 0.0, 0, 0
    for length in chunk.document_lengths:
        ids = torch.tensor(chunk.input_ids[start : start + length].astype(np.int64))
        logits = loaded.causal_lm(ids[None]).logits[0].double().log_softmax(-1)
        for place in range(1, length):
            if chunk.labels[start + place] != -100:
                total -= float(logits[place - 1, ids[place]])
                count += 1
        start += length
    return total, count


def test_chunks_are_scored_document_by_document_without_masked_labels(tiny_loaded):
    chunks = [make_chunk([20, 1, 33], [3, 4, 40]), make_chunk([50], [0], seed=1)]
    found = evaluate_chunks(tiny_loaded, chunks)
    expected = [naive_chunk(tiny_loaded, chunk) for chunk in chunks]
    assert found.count == sum(count for _, count in expected)
    assert found.total == pytest.approx(sum(total for total, _ in expected), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.total / found.count))
    first = evaluate_chunks(tiny_loaded, chunks, max_samples=1)
    assert (first.chunks, first.count) == (1, expected[0][1])
    assert (first + evaluate_chunks(tiny_loaded, chunks[1:])).total == pytest.approx(found.total)


def test_chunks_are_evaluated_in_eval_mode_and_the_training_mode_is_put_back(tiny_loaded, forwards):
    tiny_loaded.model.train()
    try:
        evaluate_chunks(tiny_loaded, [make_chunk([30], [])], tile_tokens=8)
        assert forwards == [(30, False)]
        assert tiny_loaded.model.training
        assert all(p.grad is None for p in tiny_loaded.model.parameters())
    finally:
        tiny_loaded.model.eval()


def test_nothing_scored_is_nan_and_not_a_perplexity_of_1(tiny_loaded):
    found = evaluate_chunks(tiny_loaded, [make_chunk([5], list(range(5)))])
    assert found.count == 0
    assert math.isnan(found.nll)
    assert math.isnan(found.perplexity)


def test_a_model_that_changes_its_logits_is_refused(tiny_loaded, ids, monkeypatch):
    monkeypatch.setattr(tiny_loaded.causal_lm.config, "logits_scaling", 2.0, raising=False)
    with pytest.raises(IncompatibleError, match="more than one matrix product"):
        score_text(tiny_loaded, ids, window=32, stride=16, chunk=64)


def test_dynamic_positions_are_read_in_one_piece(tiny_loaded, ids, forwards):
    parameters = {**tiny_loaded.rope.parameters, "rope_type": "dynamic", "factor": 2.0}
    dynamic = replace(tiny_loaded, rope=replace(tiny_loaded.rope, parameters=parameters))
    window_losses(dynamic, torch.tensor([ids[:64]]), [1], chunk=16)
    assert forwards == [(63, False)]
