"""Samplers are pure functions of logits and a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_cli.generation.sampling import greedy, make_sampler, probabilities

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert greedy(torch.tensor([0.0, 3.0, 1.0])) == 1
    assert greedy(torch.tensor([0.0, 3.0, 3.0])) == 1


def test_temperature_zero_is_greedy():
    assert make_sampler(temperature=0.0) is greedy


def test_temperature_divides_the_logits():
    expected = (LOGITS.double() / 0.7).softmax(-1)
    torch.testing.assert_close(probabilities(LOGITS, temperature=0.7), expected, rtol=1e-12, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12),
    st.floats(0.01, 1.0, exclude_max=True),
)
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_that_reaches_it(values, top_p):
    full = probabilities(torch.tensor(values), temperature=1.0)
    kept = probabilities(torch.tensor(values), temperature=1.0, top_p=top_p) > 0
    inside = full[kept]
    assert inside.sum() >= top_p - 1e-12  # it reaches top_p
    assert inside.sum() - inside.min() < top_p + 1e-12  # and would not without its least likely token
    if not kept.all():
        assert inside.min() >= full[~kept].max()


def test_top_p_probabilities_add_up_to_one_and_keep_their_ratios():
    full = probabilities(LOGITS, temperature=1.0)
    cut = probabilities(LOGITS, temperature=1.0, top_p=0.7)
    assert cut.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (cut[0] / cut[2]).item() == pytest.approx((full[0] / full[2]).item(), rel=1e-12)
    assert cut.count_nonzero() == 2


def test_one_seed_draws_the_same_tokens_and_another_does_not():
    def draws(seed):
        sampler = make_sampler(temperature=1.0, seed=seed)
        return [sampler(LOGITS) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_the_global_generator_is_not_moved():
    before = torch.get_rng_state()
    sampler = make_sampler(temperature=1.0, top_p=0.9, seed=1)
    sampler(LOGITS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(top_p):
    expected = probabilities(LOGITS, temperature=1.0, top_p=top_p)
    sampler, count = make_sampler(temperature=1.0, top_p=top_p, seed=5), 4000
    drawn = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(count)]), minlength=5) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((drawn - expected).abs() <= 4 * deviation).all()


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf")])
    sampler = make_sampler(temperature=1.0, seed=0)
    assert {sampler(logits) for _ in range(100)} == {1}
