"""Which samples a report holds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_inputs import generation_rows

from longlora_cli.evaluation.report.samples import data_block, outcome, pick


def rows_of(scores, text="an answer"):
    return [
        {"prediction": text, "references": ["a"], "scores": {"score": score}, "number": number}
        for number, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, "right"),
        ({"a": 1.0, "b": 0.0}, "partly"),
        ({"a": 0.5}, "partly"),
        ({"a": 0.0, "b": 0.0}, "wrong"),
    ],
)
def test_right_is_right_by_every_score_and_wrong_by_every_score(scores, expected):
    assert outcome(scores) == expected


def test_all_samples_are_kept_while_they_fit_and_wrong_ones_come_first():
    picked = pick({"a": rows_of([1, 0, 1, 0.5]), "b": rows_of([1])})
    assert [(row["task"], row["facts"]["number"]) for row in picked.rows] == [
        ("a", 1), ("a", 3), ("a", 0), ("a", 2), ("b", 0),
    ]  # fmt: skip
    assert (picked.kept, picked.total, picked.left_out) == ({"a": 4, "b": 1}, {"a": 4, "b": 1}, 0)


def test_of_too_many_a_fifth_is_right_and_all_come_evenly_from_first_to_last():
    picked = pick({"a": rows_of([0, 0, 0, 1] * 100)}, most=50)
    numbers = {
        kind: [row["facts"]["number"] for row in picked.rows if row["outcome"] == kind]
        for kind in ("wrong", "right")
    }
    assert (len(numbers["wrong"]), len(numbers["right"]), picked.left_out) == (40, 10, 350)
    for found in numbers.values():
        assert found == sorted(found)
        assert (min(found) < 10, max(found) > 360) == (True, True)


@pytest.mark.parametrize(("right", "expected"), [(2, (48, 2)), (398, (2, 48)), (0, (50, 0))])
def test_places_that_one_kind_does_not_need_are_the_others(right, expected):
    picked = pick({"a": rows_of([1] * right + [0] * (400 - right))}, most=50)
    kinds = [row["outcome"] for row in picked.rows]
    assert (kinds.count("wrong"), kinds.count("right")) == expected


def test_a_small_task_keeps_all_its_samples_beside_a_large_one():
    picked = pick({"large": rows_of([0] * 1000), "small": rows_of([0] * 10)}, most=100)
    assert picked.kept == {"large": 90, "small": 10}


def test_long_samples_are_fewer_and_both_kinds_stay():
    picked = pick({"a": rows_of([0, 1] * 500, "x" * 3000)}, most_bytes=300_000)
    assert 80_000 < len(data_block(picked).encode()) < 310_000
    kinds = [row["outcome"] for row in picked.rows]
    assert 50 < len(kinds) < 100
    assert kinds.count("right") == len(kinds) // 5


def test_rows_without_scores_are_no_samples():
    picked = pick({"ppl": [{"text": "book.txt", "nll": 2.0}], "none": []})
    assert (picked.rows, picked.total) == ([], {})


def test_long_texts_are_cut_and_say_how_much_is_missing():
    row = generation_rows(1)[0] | {"prediction": "p" * 4100, "references": ["r" * 1001] + ["s"] * 30}
    shown = pick({"generate": [row]}).rows[0]
    assert (len(shown["prediction"]), shown["prediction_left_out"]) == (4000, 100)
    assert ([len(text) for text in shown["references"][:2]], len(shown["references"])) == ([1000, 1], 20)
    assert shown["references_cut"]


@given(st.text(st.characters(exclude_categories=[])))
def test_whatever_a_model_says_comes_back_from_the_block_and_cannot_end_it(said):
    block = data_block(pick({"a": [{"prediction": said, "references": [said], "scores": {"s": 0.0}}]}))
    opening, _, rest = block.partition(">")
    content, _, closing = rest.rpartition("<")
    assert (opening, closing) == ('<script type="application/json" id="sample-data"', "/script>")
    assert not set(content) & set("<>&\u2028\u2029")
    kept = json.loads(content)[0]["prediction"]
    assert len(kept) == min(len(said), 4000)
    assert all(a in (b, "\ufffd") for a, b in zip(kept, said, strict=True))
    block.encode()
