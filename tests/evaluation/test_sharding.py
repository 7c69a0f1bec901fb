"""Shares of an evaluation: disjoint, together everything, and questions about one text in one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.journal import open_journal
from longlora_cli.evaluation.sharding import Shard, text_of


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 6))
def test_shares_are_disjoint_and_together_all_in_order(texts: list[int], count: int) -> None:
    items = list(enumerate(texts))
    shares = [list(Shard(n, count).of(items, lambda item: item[1])) for n in range(1, count + 1)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 6))
def test_questions_about_one_text_are_in_one_share(sizes: list[int], count: int) -> None:
    items = [text for text, size in enumerate(sizes) for _ in range(size)]
    for number in range(1, count + 1):
        share = list(Shard(number, count).of(items, lambda text: text))
        assert all(share.count(text) == sizes[text] for text in share)


def test_items_that_share_no_text_go_round() -> None:
    assert list(Shard(2, 3).of(range(8))) == [1, 4, 7]


def test_a_text_is_a_sample_of_a_length_or_a_line_of_a_file() -> None:
    assert text_of({"length": 8, "sample": 1, "depth": 0.5}) == text_of(
        {"length": 8, "sample": 1, "depth": 1.0}
    )
    assert text_of({"length": 8, "sample": 1}) != text_of({"length": 16, "sample": 1})
    assert text_of({"document": "a:3", "row": "a:3.2"}) == text_of({"document": "a:3", "row": "a:3.1"})
    assert text_of({"row": "a:3"}) is None


def test_the_whole_finds_what_shares_have_kept_and_takes_their_journals_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        with open_journal(out, Shard(number, 2)) as journal:
            journal.add({"key": str(number), "said": number})
    with open_journal(out) as journal:
        assert [journal.get(key) for key in "12"] == [{"key": "1", "said": 1}, {"key": "2", "said": 2}]
    assert not list(tmp_path.iterdir())


def test_the_whole_is_refused_while_a_share_is_being_answered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        open_journal(out, Shard(1, 2)),
        pytest.raises(SettingsError, match="in use by another"),
        open_journal(out),
    ):
        pass
    with open_journal(out, Shard(1, 2)), open_journal(out, Shard(2, 2)):
        pass  # shares do not stand in each other's way
