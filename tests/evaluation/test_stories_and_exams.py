"""SQuALITY, L-Eval, and LongBench v2 in two steps."""

from __future__ import annotations

import benchmark_files as files
import pytest

from longlora_cli.config import EvalConfig
from longlora_cli.errors import DataError
from longlora_cli.evaluation.file_plan import CutCounts, plan_files
from longlora_cli.evaluation.generation import Answer, predict
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.scorers import UnscorableError, find_scorer
from longlora_cli.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


def plan_of(name, path, tokenizer, **settings):
    return plan_files(EvalConfig(out="o", tasks=[name], data=[path], **settings), tokenizer, 100_000)


def questions_of(plan):
    return [question for task in plan.tasks for question in plan.questions(task, CutCounts())]


class Records:
    """Says what it is given, one after the other, and keeps what it was asked."""

    def __init__(self, tokenizer, *said):
        self._tokenizer, self._said, self.asked = tokenizer, list(said), []

    def answer(self, ids, max_new_tokens, stop=()):
        self.asked.append((self._tokenizer.decode(ids), max_new_tokens))
        said = self._said[len(self.asked) - 1]
        return Answer([1] * len(said), said, "eos")


def test_longbench_v2_in_two_steps_thinks_about_the_text_and_answers_without_it(tokenizer, tmp_path):
    plan = plan_of("longbench_v2_cot", files.make_longbench_v2(tmp_path), tokenizer)
    question = questions_of(plan)[0]
    model = Records(tokenizer, " Bread is not $Q$. ", "The correct answer is (B)")
    (row,) = predict(model, [question], max_new_tokens=1)
    (first, thought_tokens), (second, answer_tokens) = model.asked
    assert (thought_tokens, answer_tokens) == (1024, 128)
    assert files.LONG.strip() in first
    assert "(B) wine, $C_A$\n" in first, "a mark inside a text is no mark"
    assert "think step by step:" in first
    assert files.LONG.strip() not in second
    assert "The text is too long and omitted here." in second
    assert "this question: What costs $Q$?\n" in second
    assert "step by step: Bread is not $Q$.\n\nBased on the above, what is the single, most likely" in second
    assert (row["prediction"], row["finish"]) == ("The correct answer is (B)", "eos")
    assert (row["reasoning"], row["reasoning_tokens"]) == (" Bread is not $Q$. ", 19)
    assert row["new_tokens"] == 19 + 25
    assert find_scorer(row["scorer"]).score(row["prediction"], row["references"])["score"] == 1.0


def test_the_one_step_question_and_the_two_step_one_have_keys_of_their_own(tokenizer, tmp_path):
    folder = files.make_longbench_v2(tmp_path)
    thinking = questions_of(plan_of("longbench_v2_cot", folder, tokenizer))[0]
    shorter = questions_of(plan_of("longbench_v2_cot", folder, tokenizer, max_new_tokens=5))[0]
    journal = Journal()
    model = Records(tokenizer, "a", "b", "c", "d")
    for question in (thinking, shorter, thinking):
        list(predict(model, [question], max_new_tokens=1, journal=journal))
    assert [most for _, most in model.asked] == [1024, 128, 5, 5], "the third is known"


def test_two_steps_cannot_be_asked_by_one_prompt_of_the_user(tokenizer, tmp_path):
    (tmp_path / "p.json").write_text('{"all": "{question}"}')
    with pytest.raises(DataError, match="the two steps need two"):
        plan_of(
            "longbench_v2_cot",
            files.make_longbench_v2(tmp_path / "d"),
            tokenizer,
            prompts=tmp_path / "p.json",
        )


def test_squality_asks_the_questions_of_the_split_with_all_their_summaries(tokenizer, tmp_path):
    folder = files.make_squality(tmp_path)
    tested = questions_of(plan_of("squality", folder, tokenizer))
    assert [len(question.references) for question in tested] == [2, 2]
    assert [question.facts["about"] for question in tested] == ["plot", "detail"]
    assert [question.facts["id"] for question in tested] == ["61:1", "61:2"]
    assert len({question.facts["document"] for question in tested}) == 1, "one story, one cluster"
    assert {question.facts["prompts"] for question in tested} == {"own"}
    for split in ("dev", "val"):
        validated = questions_of(plan_of("squality", folder, tokenizer, split=split))
        assert [question.references for question in validated] == [["For costs."], ["So."]]
    with pytest.raises(DataError, match=r"nothing to ask for squality\.all"):
        plan_of("squality", folder, tokenizer, split="train")


def test_a_folder_with_meetings_and_stories_gives_each_its_own(tokenizer, tmp_path):
    files.make_squality(tmp_path / "stories")
    files.make_qmsum(tmp_path / "meetings")
    assert len(questions_of(plan_of("squality", tmp_path, tokenizer))) == 2
    assert len(questions_of(plan_of("qmsum", tmp_path, tokenizer))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "no list with a question"),
        (
            {"questions": [{"question_text": "Why?", "responses": []}]},
            "responses with response_text are needed",
        ),
        ({"questions": [{"responses": [{"response_text": "x"}]}]}, "question_text and responses"),
        ({"document": " "}, "document is empty"),
    ],
)
def test_a_story_that_cannot_be_asked_is_told_with_its_line(tokenizer, tmp_path, change, message):
    row = {"document": "x", "questions": []} | change
    path = files.write_lines(tmp_path / "test.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        plan_of("squality", path, tokenizer)
    assert "test.jsonl:1" in caught.value.message


def test_squality_takes_the_best_rouge_and_gives_the_mean_beside_it():
    found = find_scorer("squality").score("the mill", ["the mill", "a river there"])
    assert (found["rougeL"], found["rougeL_mean"]) == (1.0, 0.5)
    plain = find_scorer("squality").score("mills", ["milling"])["rouge1"]
    stemmed = find_scorer("squality@rouge_score-0.1.2-stemmer").score("mills", ["milling"])["rouge1"]
    assert (plain, stemmed) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "said", "wanted", "score"),
    [
        ("exam", "B", "B", 1.0),
        ("exam", "The answer is B, not C.", "B", 1.0),
        ("exam", "A\nB", "B", 0.0),
        ("exam", "I do not know.", "B", 0.0),
        ("exam", "A and C", "AC", 1.0),
        ("exam", "C, A", "AC", 1.0),
        ("exam", "A", "AC", 0.25),
        ("exam", "", "AC", 0.0),
        ("exam", "Apples and Bears", "AB", 0.0),
        ("exam", "So 50 * 25 = 1,250 dollars.", "1250", 1.0),
        ("exam", "1250 at first, then 3", "1250", 0.0),
        ("exam", "no number", "1250", 0.0),
        ("exam", "It was the role of art in society.", "The role of art in society", 1.0),
        ("f1", "New York New York", "New York", 0.6666666666666666),
        ("rouge", "the mill", "the mill", 1.0),
        ("rouge", "mills", "milling", 0.0),
    ],
)
def test_l_eval_is_judged_as_its_row_says(kind, said, wanted, score):
    found = find_scorer("leval").score(said, [wanted], {"evaluation": kind})
    assert found == {"score": pytest.approx(score, abs=1e-12)}


def test_l_evals_rows_that_no_rule_can_judge_are_refused(tokenizer, tmp_path):
    row = {"input": "x", "instructions": ["a"], "outputs": ["b"], "evaluation": "LLM"}
    refused = {
        "evaluation is 'LLM'; only exam, f1, rouge are judged by a rule": row,
        "1 instructions and 2 outputs are not": row | {"evaluation": "f1", "outputs": ["b", "c"]},
    }
    for message, one in refused.items():
        with pytest.raises(DataError, match=message):
            plan_of("leval", files.write_lines(tmp_path / "t.jsonl", [one]), tokenizer)
    with pytest.raises(UnscorableError, match="none of exam, f1, rouge"):
        find_scorer("leval").score("a", ["b"])


def test_l_evals_tasks_are_its_files_and_questions_about_one_text_are_a_cluster(tokenizer, tmp_path):
    plan = plan_of("leval", files.make_leval(tmp_path), tokenizer)
    assert [task.name for task in plan.tasks] == [
        *("leval.coursera", "leval.gsm100", "leval.narrative_qa", "leval.news_summ"),
    ]
    asked = questions_of(plan)
    assert [question.extra["evaluation"] for question in asked] == ["exam", "exam", "exam", "f1", "rouge"]
    assert len({question.facts["document"] for question in asked[:2]}) == 1
