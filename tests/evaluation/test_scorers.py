from __future__ import annotations

import pytest

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.scorers import (
    SCORERS,
    accuracy,
    check_metrics,
    exact_match,
    f1,
    holds_answer,
    rouge,
    same_answer,
    word_f1,
)

# Values of LongBench's qa_f1_score at 2e00731.
QA_F1 = [
    ("The Eiffel Tower", "Eiffel Tower", 1.0),
    ("an apple and a pear", "Apple, pear", 0.8),
    ("the", "a", 0.0),
    ("New York New York", "New York", 0.6666666667),
    ("No, it is not", "no", 0.4),
    ("naïve café", "naive cafe", 0.0),
    ("1,024 tokens", "1024 tokens", 1.0),
    ("  spaced\t out \n text ", "spaced out text", 1.0),
    ("John Ronald Reuel Tolkien wrote it", "J. R. R. Tolkien", 0.2),
    ("U.S.A.", "USA", 1.0),
    ("“curly quotes” stay", "curly quotes stay", 0.3333333333),
]
# F-measures of rouge_score 0.1.2 without stemmer: rouge1, rouge2, rougeL, rougeLsum.
ROUGE = [
    ("The cat sat on the mat.", "The cat sat on the mat.", (1.0, 1.0, 1.0, 1.0)),
    ("the cat the cat the cat", "the cat", (0.5, 0.3333333333, 0.5, 0.5)),
    (
        "First sentence here. Second one follows.",
        "Second one follows. First sentence here.",
        (1.0, 0.8, 0.5, 0.5),
    ),
    (
        "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5",
        "w1 w2 w3 w4 w5",
        (0.5333333333, 0.1538461538, 0.5333333333, 0.5333333333),
    ),
    (
        "First sentence here.\nSecond one follows.",
        "Second one follows.\nFirst sentence here.",
        (1.0, 0.8, 0.5, 1.0),
    ),
    ("", "testing one two", (0.0, 0.0, 0.0, 0.0)),
    ("HELLO World", "hello world", (1.0, 1.0, 1.0, 1.0)),
    (
        "one two three four five six seven eight",
        "eight seven six five four three two one",
        (1.0, 0.0, 0.125, 0.125),
    ),
]


@pytest.mark.parametrize(("prediction", "reference", "value"), QA_F1)
def test_f1_gives_longbenchs_known_answers(prediction, reference, value):
    assert word_f1(prediction, reference) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(("prediction", "reference", "values"), ROUGE)
def test_rouge_gives_the_known_answers_of_rouge_score(prediction, reference, values):
    found = rouge(prediction, [reference])
    assert list(found.values()) == pytest.approx(list(values), abs=1e-9)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_the_best_reference_counts():
    assert f1("the red house", ["blue house", "a red house", "red"]) == {"f1": 1.0}
    assert f1("nothing", ["some", "thing"]) == {"f1": 0.0}
    assert rouge("testing two", ["nothing", "testing one two"])["rougeL"] == pytest.approx(0.8)
    assert exact_match("The Paris!", ["London", "paris"]) == {"exact_match": 1.0}
    assert exact_match("Paris, France", ["Paris"]) == {"exact_match": 0.0}


def test_accuracy_is_any_reference_contained():
    assert accuracy("Paris, France", ["Paris", "City of Light"]) == {"accuracy": 1.0}
    assert accuracy("ABCDE FGHIJ", ["abcde"]) == {"accuracy": 1.0}
    assert accuracy("Rome", ["Paris"]) == {"accuracy": 0.0}


def test_same_answer_tolerates_blanks_case_and_one_period_only():
    for said in ("Lisbon", " lisbon. ", "LISBON", "Lisbon.\n", "lisbon ."):
        assert same_answer(said, "Lisbon") == 1.0
    for said in ("It is Lisbon", "Lisbon!", "Lisbon..", ""):
        assert same_answer(said, "Lisbon") == 0.0


def test_a_fault_in_a_scorer_is_an_error_and_never_a_score_of_0():
    with pytest.raises(ValueError, match="empty reference"):
        holds_answer("anything", " ")
    for scorer in SCORERS.values():
        with pytest.raises((TypeError, AttributeError)):
            scorer.score(None, ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCORERS)
def test_a_text_equals_itself_and_more_references_never_lower_a_score(name):
    score = SCORERS[name].score
    assert set(score("a cat sat", ["a cat sat"]).values()) == {1.0}
    one, two = score("a cat", ["a dog"]), score("a cat", ["a dog", "cats"])
    assert all(two[key] >= one[key] for key in one)
    assert tuple(one) == SCORERS[name].keys


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(SettingsError, match=r"exact_mach: unknown metric; did you mean exact_match\?"):
        check_metrics(["f1", "exact_mach"])
    with pytest.raises(SettingsError, match="--metrics is empty"):
        check_metrics([])
