from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.evaluation.windows import Reading, blocks, curve_windows, plan_windows, position_buckets

VECTORS = json.loads((Path(__file__).parent / "perplexity_vectors.json").read_text(encoding="utf-8"))[
    "groups"
]
[WINDOWS] = [group for group in VECTORS if group["metric"] == "perplexity.windows"]


def toy_mean(tokens: int, window: int, stride: int, *, bos: bool = False) -> float:
    """Mean loss of a model that pays 1 + 1/(c+1) nats for a token with c tokens of context, BOS among them."""
    costs = [
        1 + 1 / (token - w.start + bos + 1)
        for w in Reading(window, stride, bos=0 if bos else None).windows(tokens)
        for token in range(w.first, w.stop)
    ]
    assert len(costs) == tokens - (not bos)
    return sum(costs) / len(costs)


@pytest.mark.parametrize("case", WINDOWS["cases"], ids=lambda case: f"{case['N']}-{case['stride']}")
def test_windows_and_exact_mean_are_the_known_ones(case):
    windows = plan_windows(case["N"], case["window"], case["stride"])
    # The vectors write 0 for the first target of the first window and count one label less there.
    found = [[w.start, w.stop, w.first if w.start else 0, w.stop - w.first] for w in windows]
    known = case["windows_begin_end_firstTarget_scored"]
    if "…" in known:
        cut = known.index("…")
        found = [*found[:cut], "…", *found[cut + 1 - len(known) :]]
    assert found == known
    assert sum(w.stop - w.first for w in windows) == case["tokens_scored_exact"]
    assert abs(toy_mean(case["N"], case["window"], case["stride"]) - case["mean_nll_exact"]) < 1e-9


@pytest.mark.parametrize("case", WINDOWS["full_context"], ids=lambda case: str(case["N"]))
def test_a_window_of_the_whole_text_has_the_full_context_mean(case):
    assert abs(toy_mean(case["N"], case["N"], 1) - case["mean_nll_full_context"]) < 1e-9


@pytest.mark.parametrize("case", WINDOWS["bos_per_window"], ids=str)
def test_with_bos_in_each_window_all_tokens_are_scored_to_the_known_mean(case):
    found = toy_mean(case["N"], case["window_including_bos"], case["stride"], bos=True)
    assert abs(found - case["mean_nll"]) < 1e-9
    assert case["tokens_scored"] == case["N"]


def test_known_windows_and_means_of_the_exact_bookkeeping():
    found = [(w.start, w.stop, w.first) for w in plan_windows(10, 4, 2)]
    assert found == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert [w.start for w in plan_windows(10, 4, 1)] == list(range(7))
    for (tokens, window, stride), mean in {
        (10, 4, 2): 1.3148148148,
        (10, 4, 1): 1.287037037,
        (100, 32, 8): 1.0552525677,
        (1000, 128, 64): 1.0138898831,
        (1000, 1000, 500): 1.0064919628,
    }.items():
        assert abs(toy_mean(tokens, window, stride) - mean) < 1e-9


@given(st.integers(1, 300), st.integers(2, 64), st.sampled_from([0, 1]), st.data())
def test_each_token_is_scored_exactly_once_with_context(tokens, window, first, data):
    stride = data.draw(st.integers(1, window))
    windows = plan_windows(tokens, window, stride, first=first)
    scored = [token for w in windows for token in range(w.first, w.stop)]
    assert scored == list(range(first, tokens))
    for w in windows:
        assert w.tokens <= window
        assert w.start + first <= w.first < w.stop
        if w.start:
            assert w.first - w.start >= min(window - stride, window - 1)


@given(st.integers(2, 300), st.integers(2, 64), st.sampled_from([0, 1]), st.data())
def test_the_curve_takes_full_windows_that_score_no_token_twice(tokens, window, first, data):
    stride = data.draw(st.integers(1, window))
    chosen = curve_windows(plan_windows(tokens, window, stride, first=first), window, first=first)
    scored = [token for w in chosen for token in range(w.start + first, w.stop)]
    assert len(scored) == len(set(scored)) == len(chosen) * (window - first)
    assert bool(chosen) == (tokens >= window)


@given(st.integers(2, 300), st.integers(2, 64), st.integers(1, 400))
def test_runs_of_windows_are_all_windows_in_order_and_read_no_more_than_asked(tokens, window, most):
    windows = plan_windows(tokens, window, window // 2)
    runs = list(blocks(windows, most))
    assert [w for run in runs for w in run] == windows
    assert all(len(run) == 1 or sum(w.tokens for w in run) <= most for run in runs)


@given(st.integers(3, 64), st.booleans(), st.data())
def test_short_windows_score_what_the_first_one_leaves_each_once_with_half_the_context(window, bos, data):
    short = data.draw(st.integers(2, window - 1))
    reading = Reading(window, window, bos=0 if bos else None, short=short)
    for one in reading.curve(reading.windows(5 * window)):
        found = reading.short_windows(one)
        scored = [token for w in found for token in range(w.first, w.stop)]
        assert scored == list(range(one.start + short - bos, one.stop))
        for w in found:
            assert w.tokens + bos <= short
            assert w.first - w.start + bos >= short // 2


def test_buckets_double_up_to_the_window_and_leave_no_gap():
    assert position_buckets(1000) == [(0, 128), (128, 256), (256, 512), (512, 1000)]
    assert position_buckets(128) == [(0, 128)]
    assert position_buckets(64) == [(0, 64)]
