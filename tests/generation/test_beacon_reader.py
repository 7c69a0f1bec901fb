"""Answers from a past that beacons compress: what `BeaconSession` says, whatever was asked before."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch

from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.evaluation.answerer import SessionAnswerer
from longlora_cli.evaluation.perplexity import score_text, window_losses
from longlora_cli.evaluation.windows import Reading
from longlora_cli.generation.past import Past
from longlora_cli.generation.session import Session

FOUR = BeaconSettings(window=32, ratios=(4,), sink=1)
PLANS = {
    "x4": FOUR,
    "x8, no sink": replace(FOUR, ratios=(8,), sink=0),
    "appended": replace(FOUR, position="append"),
    "overlapping": replace(FOUR, position="append", stride=16),
    "in parallel": replace(FOUR, parallel=3),
    "in turn": replace(FOUR, ratios=(0, 2, 8), ratio_mix="sequence"),
    "drawn for windows": replace(FOUR, ratios=(2, 4, 8), ratio_mix="step-random"),
    "drawn for texts": replace(FOUR, ratios=(2, 4, 8), ratio_mix="instance-random"),
}


def random_ids(count, seed=0):
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def beacons(make_loaded):
    return make_loaded("beacons")


def session(loaded, settings=FOUR, **options):
    return Session(loaded, past=Past(beacon=settings), **options)


def ask(one, ids, new=8, **options):
    return one.answer(ids, max_new_tokens=new, stop_ids=(), **options)


@pytest.mark.parametrize("name", PLANS)
def test_a_greedy_answer_is_the_beacon_sessions_own(beacons, name):
    ids, settings = random_ids(150), PLANS[name]
    plain = BeaconSession(beacons, settings, generator=Random(0))
    logits, expected = plain.feed(ids), []
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = plain.step(expected[-1])
    assert ask(session(beacons, settings), ids, new=20).ids == expected


@pytest.mark.parametrize("kind", ["tied", "beacons"])  # also of a model without beacons
def test_with_ratio_0_answers_and_likelihoods_are_those_of_a_plain_session(make_loaded, kind):
    loaded, ids = make_loaded(kind), random_ids(200)
    whole = replace(FOUR, ratios=(0,))
    assert ask(session(loaded, whole), ids, new=40).ids == ask(Session(loaded), ids, new=40).ids
    ends = [random_ids(3, seed=n) for n in (1, 2)]
    found = session(loaded, whole).log_likelihoods(ids, ends)
    assert found == pytest.approx(Session(loaded).log_likelihoods(ids, ends), abs=1e-4)


def test_beacons_change_what_is_said_next(beacons):
    """Else the tests above would compare a plain model with itself."""
    rows = torch.tensor([random_ids(150)])
    losses = [
        window_losses(beacons, rows, [1], chunk=4096, past=past)
        for past in (Past(), Past(beacon=FOUR), Past(beacon=PLANS["x8, no sink"]))
    ]
    assert torch.equal(losses[0][:, :4], losses[1][:, :4])  # before the first beacon
    assert not torch.allclose(losses[0], losses[1], atol=1e-3)
    assert not torch.allclose(losses[1], losses[2], atol=1e-3)


@pytest.mark.parametrize("name", PLANS)
def test_reuse_changes_no_answer(beacons, name):
    one, settings = session(beacons, PLANS[name]), PLANS[name]
    first = random_ids(150)
    prompts = [first, first + random_ids(9, seed=1), first[:147], first[:70] + random_ids(40, seed=2), first]
    for prompt in prompts:
        assert ask(one, prompt).ids == ask(session(beacons, settings), prompt).ids


def test_reuse_goes_back_within_the_open_window_or_to_where_a_window_begins(beacons):
    one, first = session(beacons), random_ids(150)  # the last window has 22 tokens
    ask(one, first, new=4)
    assert ask(one, first + random_ids(5, seed=1), new=4).reused_tokens == 150
    assert ask(one, first[:140] + random_ids(5, seed=2), new=4).reused_tokens == 140
    assert ask(one, first[:100] + random_ids(5, seed=3), new=4).reused_tokens == 96


def test_questions_about_one_text_read_it_once(beacons):
    text, read = random_ids(170), []
    answerer = SessionAnswerer(beacons, prefill_chunk=4096, past=Past(beacon=FOUR))
    for number in range(4):
        read.append(answerer.answer(text + random_ids(6, seed=number), 4).reused_tokens)
    assert read == [0, 170, 170, 170]


def test_the_second_turn_runs_its_new_tokens_and_the_last_answer_token(beacons, monkeypatch):
    one, first = session(beacons), random_ids(100)
    answer, ran = ask(one, first), []
    own = BeaconSession.hidden_states
    monkeypatch.setattr(
        BeaconSession, "hidden_states", lambda self, ids: ran.append(len(ids)) or own(self, ids)
    )
    ask(one, first + answer.ids + random_ids(10, seed=1), new=1)
    assert ran == [10 + 1]


def test_a_likelihood_does_not_depend_on_the_ones_before_it(beacons):
    prompt, long, short = random_ids(93), random_ids(9, seed=1), random_ids(2, seed=2)
    together = session(beacons).log_likelihoods(prompt, [long, short, long])
    alone = [session(beacons).log_likelihoods(prompt, [one])[0] for one in (long, short)]
    assert together == pytest.approx([*alone, alone[0]], abs=1e-5)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("tokens", [5, 31, 32, 33, 150, 256])
def test_bytes_are_known_before_they_are_held(beacons, name, tokens):
    one = session(beacons, PLANS[name])
    answer = ask(one, random_ids(tokens), new=4)
    assert answer.kv_bytes == one.kv_bytes == one.kv_bytes_for(tokens + 4 - 1)


def test_a_long_text_takes_a_share_of_the_bytes(beacons):
    plain, one = Session(beacons), session(beacons, PLANS["x8, no sink"])
    assert one.kv_bytes_per_token == plain.kv_bytes_per_token / 8


def test_more_tokens_fit_the_same_positions_and_not_one_more(beacons):
    one = session(beacons)
    limit = beacons.context_length
    assert one.context_length > 3 * limit
    longest = one.context_length - 4
    ids = random_ids(longest)
    assert len(ask(one, ids, new=4).ids) == 4
    with pytest.raises(SettingsError, match="are needed"):
        ask(one, ids, new=5)


def test_ctrl_c_while_reading_keeps_the_windows_that_were_read(beacons):
    left = [3]

    def advance(tokens):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    one, ids = session(beacons), random_ids(150)
    stopped = ask(one, ids, advance=advance)
    assert (stopped.finish, stopped.ids, one.ids) == ("interrupted", [], ids[:96])
    resumed = ask(one, ids)
    assert (resumed.reused_tokens, resumed.ids) == (96, ask(session(beacons), ids).ids)


def test_ctrl_c_inside_a_decode_step_leaves_a_memory_that_is_used_rightly(beacons):
    one, ids, calls = session(beacons), random_ids(93), [0]

    def strike(*args):
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt

    hook = beacons.causal_lm.model.layers[1].register_forward_pre_hook(strike)
    stopped = ask(one, ids)
    hook.remove()
    assert stopped.finish == "interrupted"
    again = ids + stopped.ids + random_ids(5, seed=2)
    assert ask(one, again).ids == ask(session(beacons), again).ids


def test_an_adapted_ratio_is_that_of_the_text_and_not_of_an_earlier_one(beacons):
    adapting = replace(FOUR, ratios=(0, 2, 8), ratio_mix="adapt-16")
    one, text = session(beacons, adapting), random_ids(1800)
    short, medium, long = (ask(one, text[:count], new=2, allow_beyond=True) for count in (500, 1500, 1800))
    for count, answer in ((500, short), (1500, medium), (1800, long)):
        cold = ask(session(beacons, adapting), text[:count], new=2, allow_beyond=True)
        assert (answer.ids, answer.kv_bytes) == (cold.ids, cold.kv_bytes)
    assert (medium.reused_tokens, long.reused_tokens) == (0, 1500)  # x0 to x2, then the same
    assert medium.kv_bytes < 2 * short.kv_bytes


def test_losses_are_those_of_reading_token_by_token(beacons):
    ids = random_ids(150)
    one, losses = BeaconSession(beacons, FOUR), []
    for token, following in pairwise(ids):
        losses.append(-float(one.step(token).log_softmax(-1)[following]))
    found = window_losses(beacons, torch.tensor([ids]), [1], chunk=4096, past=Past(beacon=FOUR))
    torch.testing.assert_close(found[0, 1:], torch.tensor(losses), rtol=1e-4, atol=1e-4)


def test_a_text_is_scored_once_a_token_with_beacons(beacons):
    ids = random_ids(500)
    reading = Reading(200, 100, past=Past(beacon=FOUR))
    found = score_text(beacons, ids, reading)
    assert len(found.nll) == 499
    alone = window_losses(beacons, torch.tensor([ids[100:300]]), [1], chunk=64, past=Past(beacon=FOUR))
    torch.testing.assert_close(torch.tensor(found.nll[199:299]), alone[0, 100:], rtol=1e-4, atol=1e-4)


def test_a_model_without_beacons_is_refused(tiny):
    with pytest.raises(IncompatibleError, match="no beacons"):
        session(tiny)
