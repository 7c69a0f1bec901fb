"""Going back: a session that forgot tokens is one that never read them."""

from __future__ import annotations

from random import Random

import pytest
import torch
from test_beacon_session import EXACT, IDS, PLANS, prepared

from longlora_cli.beacon.rewind import rewind, rewinds_to
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import SettingsError

OTHER = [int(i) for i in torch.randint(3, 64, (11,), generator=torch.Generator().manual_seed(6))]
MIXED = BeaconSettings(window=8, ratios=(0, 2, 4), ratio_mix="step-random", sink=1)


def assert_equal_memory(one: BeaconSession, other: BeaconSession) -> None:
    for mine, its in zip(one.memory.rows[0], other.memory.rows[0], strict=True):
        if mine is None or its is None:
            assert mine is its
        else:
            torch.testing.assert_close(mine, its, **EXACT)


@pytest.mark.parametrize("name", [*PLANS, "drawn ratios"])
def test_a_session_gone_back_is_one_that_never_read_more(name: str) -> None:
    settings = PLANS.get(name, MIXED)
    _, whole = prepared(settings)
    blank = whole.fork()
    whole.feed(IDS)
    for asked in range(len(IDS) + 1):
        kept = rewinds_to(whole, asked)
        assert kept <= asked
        back, fresh = whole.fork(), blank.fork()
        rewind(back, kept)
        if kept:
            fresh.feed(IDS[:kept])
        assert (back.ids, back.cursors, back.stats()) == (fresh.ids, fresh.cursors, fresh.stats())
        assert_equal_memory(back, fresh)
        torch.testing.assert_close(back.feed(OTHER), fresh.feed(OTHER), **EXACT)
    assert whole.ids == IDS  # forks went back, it did not


def test_the_open_window_is_left_at_any_token_and_a_closed_one_at_its_beginning() -> None:
    _, session = prepared(PLANS["interleaved"])
    session.feed(IDS)  # 37 tokens: four windows of 8 and 5 tokens
    assert [rewinds_to(session, n) for n in (0, 7, 8, 31, 32, 33, 36, 37, 99)] == [
        0, 0, 8, 24, 32, 33, 36, 37, 37,
    ]  # fmt: skip


def test_with_a_stride_below_the_window_the_closed_past_is_forgotten_as_a_whole() -> None:
    _, session = prepared(PLANS["overlapping"])
    session.feed(IDS)
    closed = session.cursors[0].windows * 4 + 4  # what had been fed when the open window began
    assert [rewinds_to(session, n) for n in (closed - 1, closed, 37)] == [0, closed, 37]


def test_going_back_frees_the_memory_of_what_is_forgotten() -> None:
    _, session = prepared(PLANS["interleaved"])
    session.feed(IDS)
    rewind(session, 8)
    held = sum(tensor.untyped_storage().nbytes() for tensor in session.memory.held if tensor is not None)
    assert held == session.memory.kv_bytes == session.memory.length() * 3 * 2 * 2 * 8 * 8


def test_a_place_that_cannot_be_gone_back_to_is_refused() -> None:
    _, session = prepared(PLANS["interleaved"])
    session.feed(IDS)
    with pytest.raises(SettingsError, match="cannot go back to 9"):
        rewind(session, 9)


def test_a_batch_does_not_go_back() -> None:
    settings = PLANS["interleaved"]
    _, session = prepared(settings)
    batch = BeaconSession(session.loaded, settings, generator=Random(0))
    batch.feed([IDS[:9], IDS[:12]])
    with pytest.raises(SettingsError):
        rewind(batch, 8)
