"""Summaries of tasks and groups, and the scorers that only synthetic tasks have."""

from __future__ import annotations

import random

import pytest

from longlora_cli.errors import DataError
from longlora_cli.evaluation.generation import Answer, Question, predict
from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.evaluation.scorers.synthetic import edit_similarity
from longlora_cli.evaluation.task_scores import score_group, score_groups, score_task
from longlora_cli.generation.stopping import cut_at
from longlora_cli.task_names import GROUPS, expand, unknown_task


def row(prediction="right", *, length=512, depth=None, scorer="synthetic.answer", references=("right",)):
    found = {"prediction": prediction, "references": list(references), "length": length, "finish": "eos"}
    return found | {"scorer": scorer} | ({} if depth is None else {"depth": depth})


def test_scores_come_by_length_and_by_depth():
    rows = [row(length=n, depth=d) for n in (512, 1024) for d in (0.0, 1.0)] + [
        row("no", length=1024, depth=1.0)
    ]
    summary, scored = score_task(rows)
    assert summary["n"] == 5
    assert summary["score"] == 0.8
    assert [(part["length"], part["score"], part["n"]) for part in summary["lengths"]] == [
        (512, 1.0, 2),
        (1024, pytest.approx(2 / 3), 3),
    ]
    assert [(cell["length"], cell["depth"], cell["score"]) for cell in summary["cells"]] == [
        (512, 0.0, 1.0),
        (512, 1.0, 1.0),
        (1024, 0.0, 1.0),
        (1024, 1.0, 0.5),
    ]
    assert summary["lengths"][0]["ci95"] == [
        pytest.approx(0.3424, abs=1e-4),
        1.0,
    ]  # Wilson's: two of two is little
    assert scored[-1]["scores"] == {"score": 0.0, "f1": 0.0, "contains": 0.0}
    assert summary["scorer"] == "synthetic.answer@1"


def test_without_depths_there_are_no_cells():
    assert "cells" not in score_task([row()])[0]


def test_per_cent_scorers_become_shares():
    summary, _ = score_task(
        [row("a b", references=("a", "z"), scorer="ruler.all"), row("", scorer="ruler.all")]
    )
    assert summary["score"] == 0.25
    assert summary["scorer"].startswith("ruler.all@")


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError):
        score_task([])


def part(length, score, n=10):
    return {"length": length, "score": score, "n": n, "ci95": [score - 0.06, score + 0.06]}


def test_a_group_is_the_mean_of_its_tasks_and_its_weights_are_rulers():
    # Llama-3.1-8B's row of RULER's README: 88.3, 85.4 (wAvg inc), 91.3 (wAvg dec).
    row = [0.955, 0.938, 0.916, 0.874, 0.847, 0.770]
    lengths = [4096 * 2**number for number in range(6)]
    tasks = {
        name: {"lengths": [part(n, score + shift) for n, score in zip(lengths, row, strict=True)]}
        for name, shift in (("a", 0.01), ("b", -0.01), ("c", 0.0))
    }
    group = score_group(tasks)
    assert round(100 * group["score"], 1) == 88.3
    assert round(100 * group["wavg_inc"], 1) == 85.4
    assert round(100 * group["wavg_dec"], 1) == 91.3
    assert [found["score"] for found in group["lengths"]] == pytest.approx(row)
    half = 0.06 / 3**0.5  # three tasks know their mean better than one
    assert group["lengths"][0]["ci95"] == pytest.approx([0.955 - half, min(1, 0.955 + half)])


def controlled(score, left_out=0, ci95=(0.0, 0.0)):
    control = {"n": 4, "left_out": left_out}
    if score is not None:
        control |= {"score": score, "ci95": None if ci95 is None else [score + ci95[0], score + ci95[1]]}
    return {"lengths": [part(512, 0.5)], "control": control}


def test_a_groups_control_is_the_mean_of_its_tasks_controls():
    tasks = {"a": controlled(0.2, ci95=(-0.06, 0.03)), "b": controlled(0.4, left_out=1, ci95=(-0.08, 0.04))}
    control = score_group(tasks)["control"]
    assert (control["n"], control["left_out"]) == (8, 1)
    assert control["score"] == pytest.approx(0.3)
    assert control["ci95"] == pytest.approx([0.3 - 0.05, 0.3 + 0.025])  # halves of 0.06, 0.08 and 0.03, 0.04
    unsure = score_group({**tasks, "b": controlled(0.4, ci95=None)})["control"]
    assert (unsure["score"], unsure["ci95"]) == (pytest.approx(0.3), None)


def test_a_group_without_all_controls_has_no_mean_of_them():
    tasks = {"a": controlled(0.2), "b": controlled(None, left_out=4)}
    assert score_group(tasks)["control"] == {"n": 8, "left_out": 4}
    assert "control" not in score_group({**tasks, "b": {"lengths": [part(512, 0.5)]}})


def test_only_groups_that_were_asked_for_are_scored():
    tasks = {name: {"lengths": [part(512, 0.5)]} for name in GROUPS["ruler"]}
    assert list(score_groups(["vt", "ruler"], tasks)) == ["ruler"]


def test_groups_are_taken_apart_each_task_once():
    assert expand(["vt", "niah", "niah_single_1", "ppl"])[:2] == ["vt", "niah_single_1"]
    assert len(expand(["niah", "ruler"])) == 11
    assert unknown_task(["ruler", "ppl"]) is None
    assert unknown_task(["rular"]) == "--tasks rular: unknown task; did you mean ruler?"
    assert "known are ppl," in unknown_task(["zzzz"])


@pytest.mark.parametrize(
    ("scorer", "prediction", "reference", "score"),
    [
        ("number", "The number is 1,234.", "1234", 1),
        ("number", "12 or 34", "34", 0),
        ("number", "none", "34", 0),
        ("order", "b, a, c", "a, b, c", pytest.approx(2 / 3)),
        ("order", "First A, then b; last C.", "a, b, c", 1),
        ("order", "c", "a, b, c", 0),
        ("contained", "It was The History of Marmalade!", "the history of marmalade", 1),
        ("contained", "the history of marmalades", "the history of marmalade", 0),
        ("answer", "\nLonut.\nBecause", "Lonut", 1),
        ("answer", "It is Lonut", "Lonut", 0),
        ("copy", "one  two\nthree", "one two three", 1),
        ("copy", "abcd", "abce", 0.75),
    ],
)
def test_known_scores_of_the_synthetic_rules(scorer, prediction, reference, score):
    assert find_scorer(f"synthetic.{scorer}").score(prediction, [reference], {})["score"] == score


def test_edit_similarity_is_that_of_the_plain_table():
    def plain(first, second):
        row = [0] * (len(second) + 1)
        for a in first:
            row, above = [0], row
            for place, b in enumerate(second):
                row.append(above[place] + 1 if a == b else max(row[-1], above[place + 1]))
        return 2 * row[-1] / (len(first) + len(second)) if first or second else 1.0

    rng = random.Random(0)
    for _ in range(200):
        first, second = ("".join(rng.choices("abcé", k=rng.randint(0, 40))) for _ in range(2))
        assert edit_similarity(first, second) == plain(first, second)


class Says:
    def __init__(self):
        self.asked = []

    def answer(self, ids, max_new_tokens, stop=()):
        self.asked.append(max_new_tokens)
        return Answer([1, 2], "\nyes\nno", "length")


def test_a_question_brings_its_own_limit_stop_scorer_and_extra():
    questions = [
        Question("t", [1], ["yes"], {"length": 8}, "", 7, ("\n",), "synthetic.answer", {"task": "x"}),
        Question("t", [2], ["yes"]),
    ]
    answerer = Says()
    own, plain = predict(answerer, questions, max_new_tokens=3)
    assert answerer.asked == [7, 3]
    assert (own["prediction"], own["finish"], own["scorer"], own["extra"]) == (
        "\nyes",
        "stop",
        "synthetic.answer",
        {"task": "x"},
    )
    assert (plain["prediction"], plain["finish"]) == ("\nyes\nno", "length")
    assert not {"scorer", "extra"} & set(plain)


def test_the_first_stop_string_after_the_first_word_ends_an_answer():
    assert cut_at(" a b", (".",)) == " a b"
    assert cut_at("\n\na\nb.", (".", "\n")) == "\n\na"
    assert cut_at("", ("\n",)) == ""
