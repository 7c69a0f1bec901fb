from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.evaluation.windows import curve_windows, plan_windows, position_buckets


def toy_mean(tokens: int, window: int, stride: int) -> float:
    """Mean loss of a model that pays 1 + 1/(c+1) nats for a token with c tokens of context."""
    costs = [
        1 + 1 / (token - w.start + 1)
        for w in plan_windows(tokens, window, stride)
        for token in range(w.first, w.stop)
    ]
    assert len(costs) == tokens - 1
    return sum(costs) / len(costs)


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


@given(st.integers(1, 300), st.integers(2, 64), st.data())
def test_each_token_but_the_first_is_scored_exactly_once_with_context(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    windows = plan_windows(tokens, window, stride)
    scored = [token for w in windows for token in range(w.first, w.stop)]
    assert scored == list(range(1, tokens))
    for w in windows:
        assert w.tokens <= window
        assert w.start < w.first < w.stop
        if w.start:
            assert w.first - w.start >= min(window - stride, window - 1)


@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_the_curve_takes_full_windows_that_score_no_token_twice(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    chosen = curve_windows(plan_windows(tokens, window, stride), window)
    scored = [token for w in chosen for token in range(w.start + 1, w.stop)]
    assert len(scored) == len(set(scored)) == len(chosen) * (window - 1)
    assert bool(chosen) == (tokens >= window)


def test_buckets_double_up_to_the_window_and_leave_no_gap():
    assert position_buckets(1000) == [(0, 128), (128, 256), (256, 512), (512, 1000)]
    assert position_buckets(128) == [(0, 128)]
    assert position_buckets(64) == [(0, 64)]
