from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.data.overlap import RUN_WORDS, OverlapCheck
from longlora_cli.errors import DataError

RUN = "the old mill by the river stood still until the spring flood came"
assert len(RUN.split()) == RUN_WORDS


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not() -> None:
    check = OverlapCheck(["Before it. " + RUN + " and went."])
    assert check.shared(["Some say " + RUN + " late."]) == (1, 4)
    assert check.shared(["Some say " + RUN.removesuffix("came") + "rose late."])[0] == 0


def test_case_and_punctuation_do_not_hide_an_overlap() -> None:
    assert OverlapCheck([RUN]).shared([RUN.upper().replace(" ", ", — ")]) == (1, 1)


def test_a_run_over_the_seam_of_two_texts_is_none() -> None:
    words = RUN.split()
    halves = [" ".join(words[:6]), " ".join(words[6:])]
    assert OverlapCheck([RUN]).shared(halves)[0] == 0
    assert OverlapCheck([*halves, "x " * RUN_WORDS]).shared([RUN])[0] == 0


def test_east_asian_characters_are_words() -> None:
    text = "老磨坊靠着河边一直静静地立着"
    assert OverlapCheck([text]).shared(["他说" + text[:RUN_WORDS]])[0] == 1
    assert OverlapCheck([text]).shared(["他说" + text[: RUN_WORDS - 1]])[0] == 0


def test_evaluation_data_without_thirteen_words_are_refused() -> None:
    with pytest.raises(DataError, match="13 words"):
        OverlapCheck(["too short", ""])


texts = st.lists(st.lists(st.sampled_from("abc"), max_size=60).map(" ".join), min_size=1, max_size=4)


@given(texts, texts)
def test_the_count_is_that_of_comparing_every_run_with_every_other(held: list[str], asked: list[str]) -> None:
    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)]

    known = {run for text in held for run in runs(text)}
    if not known:
        return
    wanted = [run for text in asked for run in runs(text)]
    assert OverlapCheck(held).shared(asked) == (sum(run in known for run in wanted), len(wanted))


def test_a_text_longer_than_one_piece_loses_no_run_at_the_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlora_cli.data.overlap._WINDOWS_AT_ONCE", 5)
    for before in range(12):
        assert OverlapCheck([RUN]).shared(["x " * before + RUN + " y" * 7])[0] == 1
