"""Scores of benchmarks from files: columns, parts, buckets, categories, intervals; choices weighed by likelihood."""

from __future__ import annotations

import benchmark_files as files
import pytest
import torch

from longlora_cli.config import EvalConfig
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.evaluation.answerer import SessionAnswerer
from longlora_cli.evaluation.file_plan import CutCounts, plan_files
from longlora_cli.evaluation.file_scores import score_benchmark, score_file_task
from longlora_cli.evaluation.generation import Question
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.likelihood import choice_ids, weigh
from longlora_cli.evaluation.measure_files import measure_file_task
from longlora_cli.evaluation.scorers import UnscorableError, find_scorer
from longlora_cli.evaluation.statistics import wilson_clustered
from longlora_cli.evaluation.tasks.files.registry import FAMILIES
from longlora_cli.generation import prefill as prefill_module
from longlora_cli.generation.session import Session
from longlora_cli.models.tokenizer import load_tokenizer

CHOICES = ["stone", "a ripe apple", "wind", "sea"]


def row(prediction, references, scorer, task, document="d", **facts):
    return {
        "prediction": prediction,
        "references": references,
        "scorer": scorer,
        "extra": {"task": task, **facts.pop("extra", {})},
        "document": document,
        "finish": "eos",
        "prompts": "published",
        **facts,
    }


def scored(family, task, rows, counts=None):
    return score_file_task(FAMILIES[family], task, rows, counts or CutCounts(len(rows)))[0]


def test_infinitebench_has_both_published_rules_side_by_side():
    # The later rule takes function names anywhere; the first one wants a letter after a phrase.
    rows = [
        row("get_x", ["get_x", "B"], "infinitebench@2024-06", "code_debug", document="a"),
        row("B.", ["get_x", "B"], "infinitebench@2024-06", "code_debug", document="b"),
    ]
    summary = scored("infinitebench", "code_debug", rows)
    assert summary["scorer"] == "infinitebench@2024-06"
    assert summary["score"] == 0.5
    assert summary["columns"] == {"infinitebench@2024-08": 1.0}
    whole = score_benchmark(FAMILIES["infinitebench"], {"code_debug": summary})
    assert whole["columns"] == {"infinitebench@2024-08": 1.0}


def test_longbench_e_is_split_by_words_at_4000_and_8000():
    lengths = [(100, "x"), (3999, "x"), (4000, "no"), (7999, "x"), (8000, "no")]
    rows = [
        row(
            said,
            ["x"],
            "longbench@2e00731",
            "hotpotqa",
            document=str(words),
            bucket="0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+",
        )
        for words, said in lengths
    ]
    parts = scored("longbench_e", "hotpotqa", rows)["parts"]["bucket"]
    assert {bucket: (part["n"], part["score"]) for bucket, part in parts.items()} == {
        "0-4k": (2, 1.0),
        "4-8k": (2, 0.5),
        "8k+": (1, 0.0),
    }


def test_a_benchmark_is_the_mean_of_its_tasks_and_categories_are_too():
    def summary(score, n):
        rows = [
            row(
                "x" if number < score * n else "no",
                ["x"],
                "longbench@2e00731",
                "hotpotqa",
                document=str(number),
            )
            for number in range(n)
        ]
        return scored("longbench", "hotpotqa", rows)

    summaries = {"hotpotqa": summary(1.0, 2), "musique": summary(0.5, 10), "lcc": summary(0.0, 4)}
    whole = score_benchmark(FAMILIES["longbench"], summaries)
    assert whole["score"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert whole["categories"] == {"multi-document QA": 0.75, "code": 0.0}
    assert whole["category_score"] == pytest.approx(0.375)
    assert whole["n"] == 16


def test_v2_is_split_by_difficulty_and_length():
    rows = [
        row(
            f"The correct answer is ({said})",
            ["A"],
            "longbench2@2e00731",
            "all",
            document=str(number),
            difficulty=difficulty,
            length_class=length,
            domain="x",
        )
        for number, (said, difficulty, length) in enumerate(
            [("A", "easy", "short"), ("B", "easy", "long"), ("A", "hard", "long")]
        )
    ]
    rows.append({**rows[0], "prediction": "No idea", "document": "4"})
    summary = scored("longbench_v2", "all", rows)
    assert {k: v["score"] for k, v in summary["parts"]["difficulty"].items()} == {"easy": 1 / 3, "hard": 1.0}
    assert {k: v["score"] for k, v in summary["parts"]["length_class"].items()} == {"long": 0.5, "short": 0.5}
    assert summary["columns"] == {"longbench2@compensated": (1 + 0 + 1 + 0.25) / 4}


def test_questions_about_one_text_are_one_cluster_of_the_interval():
    values = {"a": ["x", "x", "x"], "b": ["no", "no"], "c": ["x", "no"]}
    rows = [
        row(said, ["x"], "longbench@2e00731", "hotpotqa", document=document)
        for document, said_in in values.items()
        for said in said_in
    ]
    summary = scored("longbench", "hotpotqa", rows)
    assert summary["clusters"] == 3
    assert summary["ci95"] == list(wilson_clustered([3.0, 0.0, 1.0], [3, 2, 2]))


def test_lengths_of_ruler_and_babilong_are_means_over_tasks():
    def summary(task, scores):
        rows = [
            row("x" if right else "no", ["x"], "ruler.part", task, document=str(length), length=length)
            for length, right in scores
        ]
        return scored("ruler_files", task, rows)

    whole = score_benchmark(
        FAMILIES["ruler_files"],
        {"qa_1": summary("qa_1", [(4096, 1), (8192, 0)]), "qa_2": summary("qa_2", [(4096, 1), (8192, 1)])},
    )
    assert whole["lengths"] == [
        {"length": 4096, "n": 2, "score": 1.0},
        {"length": 8192, "n": 2, "score": 0.5},
    ]


def test_qmsum_gives_the_best_and_the_mean_over_references():
    scores = find_scorer("qmsum").score("the mill is old", ["the mill is old", "a river"])
    assert scores["rougeL"] == 1.0
    assert scores["rougeL_mean"] == 0.5
    assert scores["rouge1_mean"] == 0.5


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("line 12: <24169>", "24169", 1.0),
        ("<24169> of line 12", "24169", 0.0),
        ("none", "24169", 0.0),
        ("it is 0007.", "7", 1.0),
    ],
)
def test_longchat_lines_counts_the_last_number(said, expected, score):
    assert find_scorer("longchat.lines").score(said, [expected])["score"] == score


def test_longchat_lines_refuses_a_reference_that_is_no_number():
    with pytest.raises(UnscorableError):
        find_scorer("longchat.lines").score("3", ["three"])


def naive_log_likelihood(loaded, ids, continuation):
    """One forward pass over everything, nothing cached."""
    whole = torch.tensor([[*ids, *continuation]])
    with torch.no_grad():
        logits = loaded.causal_lm(whole).logits[0].double().log_softmax(-1)
    places = range(len(ids) - 1, len(ids) + len(continuation) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, continuation, strict=True))


def test_likelihoods_are_those_of_a_full_forward_pass(tiny_loaded):
    ids = list(range(5, 45))
    continuations = [[7], [7, 8, 9], [50, 3, 3, 60, 12]]
    session = Session(tiny_loaded, prefill_chunk=16)
    found = session.log_likelihoods(ids, continuations)
    expected = [naive_log_likelihood(tiny_loaded, ids, continuation) for continuation in continuations]
    assert found == pytest.approx(expected, rel=1e-5)
    assert session.ids == ids  # the cache holds the prompt and nothing of the choices
    assert session.log_likelihoods([*ids, 3], continuations) == pytest.approx(
        [naive_log_likelihood(tiny_loaded, [*ids, 3], c) for c in continuations], rel=1e-5
    )


def test_the_shared_prompt_is_read_once(tiny_loaded, monkeypatch):
    read = []
    run = prefill_module._run

    def counted(loaded, ids, cache, past):
        read.append(ids.shape[1])
        return run(loaded, ids, cache, past)

    monkeypatch.setattr(prefill_module, "_run", counted)
    Session(tiny_loaded, prefill_chunk=512).log_likelihoods(list(range(5, 105)), [[7, 8], [9, 10, 11], [12]])
    assert read == [100, 1, 1, 1]


def choices_plan(tokenizer, path, name):
    return plan_files(EvalConfig(out="o", tasks=[name], data=[path]), tokenizer, 512)


@pytest.mark.parametrize("name", ["multiple_choice", "multiple_choice_cloze"])
def test_choices_are_weighed_by_the_model_as_a_plain_loop_weighs_them(tiny_loaded, tmp_path, name):
    tokenizer = tiny_loaded.tokenizer
    plan = choices_plan(tokenizer, files.make_choices(tmp_path), name)
    result = measure_file_task(
        plan.tasks[0], SessionAnswerer(tiny_loaded, prefill_chunk=64), plan, Journal(), "identity"
    )
    for sample, found in zip(plan.tasks[0].samples(), result.rows, strict=True):
        text = sample.messages[0]["content"]
        choices = sample.extra["choices"]
        assert choices == (["A", "B", "C", "D"] if name == "multiple_choice" else CHOICES)
        prompt = tokenizer(text)["input_ids"]
        for choice, value in zip(choices, found["log_likelihoods"], strict=True):
            whole = tokenizer(f"{text} {choice}")["input_ids"]
            assert whole[: len(prompt)] == prompt
            expected = naive_log_likelihood(tiny_loaded, prompt, whole[len(prompt) :])
            assert value == pytest.approx(expected, rel=1e-5)
        values = found["log_likelihoods"]
        assert found["prediction"] == "ABCD"[values.index(max(values))]
        by_character = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        assert found["extra"]["normalized"] == "ABCD"[by_character.index(max(by_character))]


def test_length_decides_only_the_normalized_score():
    class Fixed:
        def log_likelihoods(self, ids, continuations):
            return [-4.0, -6.0, -5.0, -5.0]

    question = Question(
        "multiple_choice_cloze.all",
        [1],
        ["B"],
        {"id": "1"},
        scorer="multiple_choice@1",
        extra={"choices": CHOICES},
    )

    rows = list(weigh(Fixed(), [(question, "Question")], load_tokenizer("builtin")))
    assert rows[0]["prediction"] == "A"
    assert rows[0]["extra"]["normalized"] == "B"  # -6/12 is above -4/5
    scores = find_scorer("multiple_choice").score("A", ["B"], rows[0]["extra"])
    assert scores == {"score": 0.0, "normalized": 1.0}


def test_a_token_over_the_seam_is_weighed_with_the_choice():
    tokenizer = load_tokenizer("builtin")
    encoder = safe_encoder(tokenizer)
    # A prompt that ends in a blank: the blank joins the next word's token.
    text = "The answer is "
    ids = [*encoder.begin, *encoder.encode_batch([text])[0].tolist()]
    question = Question("x", ids, ["A"], extra={"choices": ["river", "mill"]})
    shared, continuations = choice_ids(tokenizer, question, text)
    for choice, continuation in zip(["river", "mill"], continuations, strict=True):
        whole = [*encoder.begin, *encoder.encode_batch([f"{text} {choice}"])[0].tolist()]
        assert [*shared, *continuation] == whole
        assert continuation


def test_weighed_rows_are_kept_in_the_journal(tiny_loaded, tmp_path):
    plan = choices_plan(tiny_loaded.tokenizer, files.make_choices(tmp_path / "data"), "multiple_choice")
    journal = Journal(tmp_path / "journal.jsonl")
    first = measure_file_task(
        plan.tasks[0], SessionAnswerer(tiny_loaded, prefill_chunk=64), plan, journal, "i"
    )

    class Dead:
        def log_likelihoods(self, ids, continuations):
            raise AssertionError("weighed again")

    again = measure_file_task(plan.tasks[0], Dead(), plan, Journal(tmp_path / "journal.jsonl"), "i")
    assert again.rows == first.rows
