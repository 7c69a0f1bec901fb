from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longlora_cli.data.chunk import Chunk
from longlora_cli.errors import IncompatibleError
from longlora_cli.evaluation.perplexity import evaluate_chunks, join, score_text, window_losses
from longlora_cli.evaluation.windows import Reading, blocks, curve_windows, plan_windows


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
def cost(loaded, context, token):
    """Loss in float64 of one token after exactly these tokens, by a forward of its own."""
    logits = loaded.causal_lm(torch.tensor([context])).logits[0, -1]
    return -float(logits.double().log_softmax(-1)[token])


def naive(loaded, ids, reading):
    """Token by token over exactly the context that its window gives it."""
    before = [] if reading.bos is None else [reading.bos]
    return [
        cost(loaded, before + ids[w.start : token], ids[token])
        for w in reading.windows(len(ids))
        for token in range(w.first, w.stop)
    ]


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (48, 48), (40, 7), (150, 75), (400, 200)])
@pytest.mark.parametrize("bos", [None, 0])
def test_losses_equal_a_token_by_token_loop_in_float64(double, ids, window, stride, bos):
    reading = Reading(window, stride, bos=bos)
    found = score_text(double, ids, reading)
    expected = naive(double, ids, reading)
    np.testing.assert_allclose(found.nll, expected, rtol=1e-6)  # kept in float32
    scored = len(ids) - (bos is None)
    assert len(found.nll) == scored
    assert found.windows[:, 1].sum() == scored
    assert found.windows[:, 0].sum() == pytest.approx(sum(expected), rel=1e-12)


def naive_short(loaded, ids, start, reading):
    """A window of the curve again, each token by itself after its short context."""
    before = [] if reading.bos is None else [reading.bos]
    own = ids[start : start + reading.text_tokens]
    size, step = reading.short - len(before), min(reading.short // 2, reading.short - 1)
    costs = []
    for token in range(reading.first, len(own)):
        # The first of the windows every half short context that reaches the token.
        begin = next(b for b in range(0, len(own), step) if b + size > token)
        costs.append(cost(loaded, before + own[begin:token], own[token]))
    return costs


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("short", [2, 11, 16, 39])
def test_short_context_losses_are_of_the_same_tokens_in_the_same_places(double, ids, bos, short):
    reading = Reading(40, 20, bos=bos, short=short)
    found = score_text(double, ids, reading)
    starts = [w.start for w in reading.curve(reading.windows(len(ids)))]
    assert len(starts) == 3
    assert found.short.shape == found.curve.shape == (3, 39)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found.short[row], naive_short(double, ids, start, reading), rtol=1e-6)
        own = ids[start : start + reading.text_tokens]
        full = [
            cost(double, ([] if bos is None else [bos]) + own[:token], own[token])
            for token in range(reading.first, len(own))
        ]
        np.testing.assert_allclose(found.curve[row], full, rtol=1e-6)
    assert (found.short[:, : short - 1] == found.curve[:, : short - 1]).all()
    assert (found.short[:, short - 1 :] != found.curve[:, short - 1 :]).mean() > 0.9


def test_a_text_below_the_window_has_its_short_context_over_the_whole(double, ids):
    reading = Reading(400, 200, short=32, whole=True)
    found = score_text(double, ids, reading)
    assert found.short.shape == (1, len(ids) - 1)
    assert found.curve.shape == (0, 399)
    np.testing.assert_array_equal(found.short[0, :31], found.nll[:31])
    again = score_text(double, ids, Reading(32, 16))
    np.testing.assert_allclose(found.short[0], again.nll, rtol=1e-6)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize(("most_tokens", "number"), [(1, 7), (100, 4), (10_000, 1)])
def test_a_text_scored_in_runs_of_windows_has_the_losses_of_the_whole(double, ids, bos, most_tokens, number):
    reading = Reading(40, 20, bos=bos, short=16)
    whole = score_text(double, ids, reading)
    runs = list(blocks(reading.windows(len(ids)), most_tokens))
    assert len(runs) == number
    joined = join([score_text(double, ids, reading, windows=run) for run in runs])
    for name in ("nll", "windows", "curve", "short"):
        np.testing.assert_allclose(getattr(joined, name), getattr(whole, name), rtol=1e-6)


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
    score_text(tiny_loaded, ids, Reading(100, 50, chunk=40))
    assert max(tokens for tokens, _ in forwards) <= 40
    forwards.clear()
    score_text(tiny_loaded, ids, Reading(20, 10, chunk=64))
    assert 40 < max(tokens for tokens, _ in forwards) <= 64


def test_the_curve_holds_the_losses_of_whole_disjoint_windows(tiny_loaded, ids):
    found = score_text(tiny_loaded, ids, Reading(32, 16, chunk=4096))
    chosen = curve_windows(plan_windows(len(ids), 32, 16), 32)
    assert found.curve.shape == (len(chosen), 31) == (4, 31)
    for row, w in zip(found.curve, chosen, strict=True):
        alone = window_losses(tiny_loaded, torch.tensor([ids[w.start : w.stop]]), [1], chunk=4096)
        np.testing.assert_allclose(row, alone[0, 1:], rtol=1e-5)


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
        score_text(tiny_loaded, ids, Reading(32, 16, chunk=64))


def test_dynamic_positions_are_read_in_one_piece(tiny_loaded, ids, forwards):
    parameters = {**tiny_loaded.rope.parameters, "rope_type": "dynamic", "factor": 2.0}
    dynamic = replace(tiny_loaded, rope=replace(tiny_loaded.rope, parameters=parameters))
    window_losses(dynamic, torch.tensor([ids[:64]]), [1], chunk=16)
    assert forwards == [(63, False)]
