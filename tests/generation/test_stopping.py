"""A string that ends an answer ends it when it appears, and leaves the text that cutting the whole answer leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from longlora_cli.generation.sampling import make_sampler
from longlora_cli.generation.session import Session
from longlora_cli.generation.stopping import cut_at, is_decided


@given(text=st.text("ab\n ", max_size=12), stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@example(text="aab", stop=["aab", "a\n", "ab"])
def test_what_is_decided_stays_so_whatever_follows(text: str, stop: list[str]) -> None:
    whole = cut_at(text, stop)
    for end in range(len(text) + 1):
        if is_decided(text[:end], stop):
            assert cut_at(text[:end], stop) == whole
    if whole != text:
        assert is_decided(text + "z", stop)


def test_an_earlier_string_may_still_be_completed() -> None:
    assert not is_decided("xab", ["b", "xabc"])
    assert is_decided("xabd", ["b", "xabc"])
    assert is_decided("xabc", ["b", "xabc"])
    assert cut_at("xabcd", ["b", "xabc"]) == ""


def ask(session, ids, **options):
    # Drawn, since a tiny model that takes the likeliest token repeats one for ever.
    draw = make_sampler(temperature=2.0, seed=len(ids))
    return session.answer(ids, max_new_tokens=40, stop_ids=(), sampler=draw, **options)


@pytest.mark.parametrize("count", range(20, 40))
def test_a_stop_string_keeps_the_text_and_spares_the_tokens_after_it(tiny, count):
    ids = torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    free = ask(Session(tiny), ids)
    text = free.text.strip()
    stops = (text[len(text) // 2 : len(text) // 2 + 3], "never said")
    stopped = ask(Session(tiny), ids, stop=stops)
    assert stopped.finish == "stop"
    assert cut_at(stopped.text, stops) == cut_at(free.text, stops) != free.text
    assert stopped.ids == free.ids[: len(stopped.ids)]
    assert len(stopped.ids) < len(free.ids)


def test_a_string_that_never_comes_changes_nothing(tiny):
    ids = list(range(3, 20))
    free, asked = ask(Session(tiny), ids), ask(Session(tiny), ids, stop=("never said",))
    assert (asked.ids, asked.finish) == (free.ids, "length")
