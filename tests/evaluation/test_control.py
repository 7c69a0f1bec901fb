"""Questions without their context, and what is told of them."""

from __future__ import annotations

import benchmark_files as files
import pytest
import synthetic_parts as parts

from longlora_cli.data.haystack import Haystack
from longlora_cli.evaluation.control import ask_twice, bare_question, left_out
from longlora_cli.evaluation.file_plan import CutCounts, FilePlan
from longlora_cli.evaluation.generation import Answer, Question, predict, score_rows
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.metrics import load_metrics
from longlora_cli.evaluation.tasks import needle, passkey
from longlora_cli.evaluation.tasks.files.cutting import Limits
from longlora_cli.evaluation.tasks.files.opening import open_tasks
from longlora_cli.evaluation.tasks.prompts import question_of
from longlora_cli.evaluation.tasks.rows import read_questions
from longlora_cli.evaluation.tasks.sample import without
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.task_names import SYNTHETIC

# What these ask for stands in their question; the control tells whether it can be guessed there.
NAMED_IN_THE_QUESTION = {"sort", "code_debug"}
# A digit or a short word may stand anywhere.
SHORT_ANSWERS = {"count", "babi_long"}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return load_tokenizer(tiny_tokenizer_folder)


def content(messages) -> str:
    return "\n".join(message["content"] for message in messages)


@pytest.mark.parametrize("kind", ["embedded", "base"])
@pytest.mark.parametrize("task", SYNTHETIC)
def test_a_synthetic_question_without_its_context_has_no_answer_in_it(task, kind):
    for sample in parts.samples(task, kind, 4096):
        bare = content(sample.without_context)
        assert len(bare) < 0.45 * len(content(sample.messages))
        if task not in NAMED_IN_THE_QUESTION | SHORT_ANSWERS:
            assert not [output for output in sample.outputs if output in bare]


@pytest.mark.parametrize("task", sorted(set(SYNTHETIC) - {"mrcr"}))
def test_nothing_but_the_context_is_gone(task):
    for sample in parts.samples(task, "embedded", 4096):
        before, _, after = content(sample.messages).partition(sample.context)
        bare = content(sample.without_context)
        assert bare.startswith(before.strip()[:50])
        assert bare.endswith(after.strip())


def test_the_bare_prompt_begins_the_answer_as_the_whole_one_does():
    sample = parts.samples("niah_single_2", "embedded", 512)[0]
    tokenizer = parts.tokenizer("embedded")
    bare = tokenizer.decode(question_of(tokenizer, sample).without_context)
    assert bare.endswith(sample.answer_prefix.strip())


def test_of_a_chat_the_last_turn_stays():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")] + [
        {"role": "user", "content": "asked"}
    ]
    assert without(turns, "") == [turns[0], turns[3]]


@pytest.mark.parametrize(
    ("asked", "context"),
    [("a b a", "a"), ("question", ""), ("question", " "), ("question", "text"), ("text", "text")],
)
def test_what_is_context_is_not_guessed(asked, context):
    assert without([{"role": "user", "content": asked}], context) is None


def test_a_needle_without_its_text_is_the_question_alone(tokenizer, book_haystack):
    shared = {"length": 400, "depths": 2, "samples": 1, "seed": 0, "answer_tokens": 6}
    for question in needle.needle_questions(book_haystack, tokenizer, facts=3, **shared):
        text = tokenizer.decode(question.without_context)
        assert question.facts["question"] in text
        assert question.references[0] not in text
        assert len(question.without_context) < len(question.prompt) / 3


@pytest.mark.parametrize("chats", [True, False])
def test_a_passkey_without_its_text_is_the_question_alone(
    tiny_tokenizer_folder, tokenizer, book_haystack, chats
):
    own = load_tokenizer(tiny_tokenizer_folder, "auto" if chats else "none")
    shared = {"length": 300, "depths": 2, "samples": 1, "seed": 0, "answer_tokens": 6}
    for question in passkey.passkey_questions(book_haystack, own, **shared):
        text = own.decode(question.without_context)
        assert "What is the pass key?" in text
        assert question.references[0] not in text
        assert len(question.without_context) < 80


@pytest.fixture(scope="module")
def book_haystack():
    return Haystack(["The river ran past the mill. The miller slept. It was the best of times. " * 40])


FAMILIES = {
    "longbench": files.make_longbench,
    "longbench_v2": files.make_longbench_v2,
    "infinitebench": files.make_infinitebench,
    "babilong": files.make_babilong,
    "longmemeval": files.make_longmemeval,
    "qmsum": files.make_qmsum,
    "mrcr_files": files.make_mrcr,
}


def plan_of(family, folder, tokenizer, **limits):
    tasks = open_tasks([family], [folder], as_chat=True)
    most = Limits(**{"readable": 100_000, "max_prompt": None, "truncate": "middle", **limits})
    plan = FilePlan(tuple(tasks), tokenizer, most, None)
    plan.check()
    return plan


@pytest.mark.parametrize("family", FAMILIES)
def test_benchmarks_that_keep_text_and_question_apart_have_a_control(family, tmp_path, tokenizer):
    plan = plan_of(family, FAMILIES[family](tmp_path / family), tokenizer)
    for task in plan.tasks:
        for question in plan.questions(task, CutCounts()):
            assert question.without_context, task.name
            assert 0 < len(question.without_context) < len(question.prompt), task.name


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("graphwalks", files.make_graphwalks),
        ("longchat", files.make_longchat),
        ("ruler_files", files.make_ruler),
    ],
)
def test_prompts_that_are_whole_in_their_rows_have_none(family, make, tmp_path, tokenizer):
    plan = plan_of(family, make(tmp_path / family), tokenizer)
    found = [q.without_context for task in plan.tasks for q in plan.questions(task, CutCounts())]
    assert set(found) == {None}


def test_a_prompt_that_was_cut_has_the_bare_question_of_the_whole_one(tmp_path, tokenizer):
    row = files.LONGBENCH["hotpotqa"] | {"context": files.LONG * 40}
    path = files.write_lines(tmp_path / "hotpotqa.jsonl", [row])
    whole = next(
        plan_of("longbench", path, tokenizer).questions(
            plan_of("longbench", path, tokenizer).tasks[0], CutCounts()
        )
    )
    plan = plan_of("longbench", path, tokenizer, max_prompt=400)
    cut = next(plan.questions(plan.tasks[0], CutCounts()))
    assert cut.facts["n_truncated"] > 0
    assert cut.without_context == whole.without_context


def test_rows_with_a_context_of_their_own_have_a_control_and_others_have_none(tmp_path, tokenizer):
    rows = [
        {"context": "The mill is blue.", "input": "Which colour?", "answers": ["blue"]},
        {"context": "The mill is old.", "questions": [{"input": "How old?", "answers": ["old"]}]},
        {"context": "The mill is new.", "input": "", "answers": ["new"]},
        {"input": "The mill is red. Which colour?", "outputs": ["red"]},
    ]
    path = files.write_lines(tmp_path / "rows.jsonl", rows)
    found = [question.without_context for question in read_questions(path, tokenizer)]
    texts = [ids and tokenizer.decode(ids) for ids in found]
    assert texts == [
        "<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHow old?<|im_end|>\n<|im_start|>assistant\n",
        None,
        None,
    ]


class Guesser:
    """Says blue, and remembers what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def answer(self, ids, max_new_tokens, stop=()):
        self.prompts.append(list(ids))
        return Answer([1], "blue", "eos")


QUESTIONS = [
    Question("generate", [1, 2, 3], ["blue"], {"row": "a"}, without_context=[3]),
    Question("generate", [1, 2, 4], ["red"], {"row": "b"}),
    Question("generate", [1, 2, 5], ["red"], {"row": "c"}, without_context=[5]),
]


def asked(answerer, journal, control="no-context", questions=QUESTIONS):
    def ask(some, settings, whole):
        return predict(answerer, some, max_new_tokens=4, settings=settings, journal=journal)

    return ask_twice(ask, questions, {"model": 1}, control=control, bare_of=bare_question)


def test_bare_questions_come_after_all_whole_ones():
    answerer = Guesser()
    asked(answerer, Journal())
    assert answerer.prompts == [[1, 2, 3], [1, 2, 4], [1, 2, 5], [3], [5]]


def test_without_a_control_nothing_is_asked_twice():
    answerer = Guesser()
    found = asked(answerer, Journal(), control="none")
    assert len(answerer.prompts) == 3
    assert found.controlled({"score": 1}, found.rows, None) == ({"score": 1}, found.rows)


def test_a_bare_answer_is_never_taken_for_a_whole_one():
    """Even where both have the same tokens."""
    journal, answerer = Journal(), Guesser()
    same = [Question("generate", [3], ["blue"], without_context=[3])]
    rows = asked(answerer, journal, questions=same)
    assert rows.rows[0]["key"] != rows.bare[0]["key"]
    assert len(answerer.prompts) == len(journal) == 2


def test_the_control_is_judged_as_the_task_is_and_its_answers_stand_in_their_rows():
    rows = asked(Guesser(), Journal())

    def score(some):
        return score_rows(some, load_metrics(["exact_match"]))

    summary, told = rows.controlled(*score(rows.rows), score)
    assert summary["scores"]["exact_match"]["score"] == pytest.approx(1 / 3)
    control = summary["control"]
    assert (control["n"], control["left_out"]) == (2, 1)
    assert control["scores"]["exact_match"]["score"] == 0.5
    assert [row.get("control", {}).get("scores") for row in told] == [
        {"exact_match": 1.0},
        None,
        {"exact_match": 0.0},
    ]


def test_a_task_without_any_context_has_no_control_score_and_is_named():
    rows = asked(Guesser(), Journal(), questions=QUESTIONS[1:2])
    summary, _ = rows.controlled({"score": 0.0}, rows.rows, None)
    assert summary["control"] == {"n": 0, "left_out": 1}
    found = left_out({"a": summary, "ppl": {}, "b": {"control": {"n": 3, "left_out": 0}}})
    assert found == {
        "a": "1 of 1 questions: what is context is not told apart",
        "ppl": "it asks nothing",
    }
