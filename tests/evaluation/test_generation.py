from __future__ import annotations

import pytest

from longlora_cli.errors import DataError
from longlora_cli.evaluation.generation import Question, evaluate_generation, predict, score_rows
from longlora_cli.evaluation.grid import score_grid, score_retrieval
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.metrics import METRICS, load_metrics
from longlora_cli.evaluation.statistics import wilson

GRID = [
    Question("passkey", [length, place, sample], [f"{length}{place}{sample}"], facts)
    for length in (512, 1024)
    for place, depth in enumerate((0.0, 0.5, 1.0))
    for sample in (0, 1)
    for facts in ({"length": length, "depth": depth, "sample": sample},)
]
ROWS = [Question("generate", [n], [f"answer {n}", "other"], {"row": f"f:{n}"}) for n in range(4)]


def rows_of(answerer, questions):
    return list(predict(answerer, questions, max_new_tokens=8))


@pytest.mark.parametrize("kind", ["oracle", "null", "parrot"])
def test_a_grid_gives_known_answerers_their_known_scores(kind, answerers):
    decode = {tuple(q.prompt): f"all of it {q.references[0]} and more" for q in GRID}
    answerer = answerers(kind, GRID, lambda ids: decode[tuple(ids)])
    summary, scored = score_grid(rows_of(answerer, GRID))
    score, contains, cut = {"oracle": (1, 1, 0), "null": (0, 0, 0), "parrot": (0, 1, 1)}[kind]
    assert (summary["score"], summary["contains"], summary["cut"]) == (score, contains, cut)
    assert (summary["n"], summary["samples"]) == (12, 4)
    assert [(c["length"], c["depth"], c["n"]) for c in summary["cells"]] == [
        (length, depth, 2) for length in (512, 1024) for depth in (0.0, 0.5, 1.0)
    ]
    assert [length["n"] for length in summary["lengths"]] == [6, 6]
    assert all(cell["score"] == score and len(cell["ci95"]) == 2 for cell in summary["cells"])
    assert all(row["scores"]["score"] == score for row in scored)


@pytest.mark.parametrize(("kind", "score"), [("oracle", 1.0), ("null", 0.0), ("parrot", None)])
def test_rows_give_known_answerers_their_known_scores(kind, score, answerers):
    answerer = answerers(kind, ROWS, lambda ids: f"well, it is answer {ids[0]} of course")
    found = evaluate_generation(answerer, ROWS, load_metrics(list(METRICS)), max_new_tokens=8)
    assert found["n"] == 4
    assert {key: s["n"] for key, s in found["scores"].items()} == dict.fromkeys(found["scores"], 4)
    if score is not None:
        # ROUGE-2 of a text of two words and itself is 1 as well.
        assert {s["score"] for s in found["scores"].values()} == {score}
    else:
        assert found["scores"]["accuracy"]["score"] == 1.0
        assert found["scores"]["exact_match"]["score"] == 0.0
        assert 0 < found["scores"]["f1"]["score"] < 1
        assert found["cut"] == 1.0


def test_finished_rows_are_not_asked_again(tmp_path, answerers):
    answerer = answerers("oracle", GRID, None)
    journal = Journal(tmp_path / "journal.jsonl")
    first = list(predict(answerer, GRID[:5], max_new_tokens=8, settings="m", journal=journal))
    again = list(
        predict(answerer, GRID, max_new_tokens=8, settings="m", journal=Journal(tmp_path / "journal.jsonl"))
    )
    assert answerer.asked == len(GRID)
    assert again[:5] == first


@pytest.mark.parametrize("change", [{"settings": "other model"}, {"max_new_tokens": 9}])
def test_other_settings_never_take_a_finished_row(change, answerers):
    answerer, journal = answerers("oracle", GRID, None), Journal()
    settings = {"max_new_tokens": 8, "settings": "m"}
    list(predict(answerer, GRID[:1], journal=journal, **settings))
    list(predict(answerer, GRID[:1], journal=journal, **{**settings, **change}))
    assert answerer.asked == 2


def test_equal_questions_keep_their_own_places(answerers):
    twins = [Question("generate", [1], ["a"], {"row": name}) for name in ("f:1", "f:2")]
    answerer = answerers("oracle", twins, None)
    assert [row["row"] for row in rows_of(answerer, twins)] == ["f:1", "f:2"]
    assert answerer.asked == 1


def test_rows_about_one_document_have_an_interval_that_counts_documents(answerers):
    asked = [
        Question("generate", [n], ["a b"], {"row": f"f:{n}", "document": f"f:{n // 5}"}, f"hash {n}")
        for n in range(20)
    ]
    decode = {n: "a b" if n < 10 else "x" for n in range(20)}
    rows = rows_of(answerers("parrot", asked, lambda ids: decode[ids[0]]), asked)
    assert [row["sample_hash"] for row in rows] == [f"hash {n}" for n in range(20)]
    summary = score_rows(rows, load_metrics(["accuracy", "f1"]))[0]["scores"]
    assert (summary["accuracy"]["n"], summary["accuracy"]["clusters"]) == (20, 4)
    assert summary["accuracy"]["ci95"] == list(wilson(2, 4))  # 4 texts, all or nothing
    alone = [{k: v for k, v in row.items() if k != "document"} for row in rows]
    assert score_rows(alone, load_metrics(["accuracy"]))[0]["scores"]["accuracy"]["ci95"] == list(
        wilson(10, 20)
    )


def test_a_grid_counts_texts_for_a_length_and_questions_for_a_cell(answerers):
    right = {question.references[0] for question in GRID if question.facts["sample"] == 0}
    answers = {tuple(q.prompt): q.references[0] if q.references[0] in right else "" for q in GRID}
    summary, _ = score_grid(rows_of(answerers("parrot", GRID, lambda ids: answers[tuple(ids)]), GRID))
    assert [cell["ci95"] for cell in summary["cells"]] == [list(wilson(1, 2))] * 6
    assert [length["ci95"] for length in summary["lengths"]] == [list(wilson(1, 2))] * 2  # 6 answers, 2 texts
    assert summary["ci95"] == list(wilson(2, 4))
    assert summary["effective_length"]["ruler"]["not_excluded"] == [512, 1024]
    assert "effective_length" not in score_grid(rows_of(answerers("oracle", GRID, None), GRID[:6]))[0]


def test_a_text_to_continue_is_judged_by_its_first_word():
    row = {"prediction": " 12345. Remember it.", "references": ["12345"], "first_word": True}
    assert score_retrieval(row) == {"score": 1.0, "contains": 1.0}
    assert score_retrieval({**row, "first_word": False}) == {"score": 0.0, "contains": 1.0}
    assert score_retrieval({**row, "prediction": "..."}) == {"score": 0.0, "contains": 0.0}


def test_nothing_to_score_and_a_broken_scorer_are_errors(answerers, monkeypatch):
    with pytest.raises(DataError, match="nothing to score"):
        score_rows([], load_metrics(["f1"]))
    metric = load_metrics(["accuracy"])
    broken = [Question("generate", [1], [" "])]
    with pytest.raises(ValueError, match="empty reference"):
        evaluate_generation(answerers("null", broken, None), broken, metric, max_new_tokens=1)
