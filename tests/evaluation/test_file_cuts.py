"""Prompts that are too long: where they are cut, and that it is told."""

from __future__ import annotations

import json

import benchmark_files as files
import pytest

from longlora_cli.config import EvalConfig
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.file_plan import CutCounts, plan_files
from longlora_cli.evaluation.file_scores import score_file_task
from longlora_cli.evaluation.generation import Answer, predict
from longlora_cli.evaluation.tasks.prompts import prompt_ids
from longlora_cli.models.tokenizer import load_tokenizer

WORDS = " ".join(f"word{number}" for number in range(300))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def plain_tokenizer(tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def long_row(tmp_path):
    rows = [
        files.LONGBENCH["hotpotqa"] | {"context": WORDS},
        files.LONGBENCH["hotpotqa"] | {"context": "Short."},
    ]
    return files.write_lines(tmp_path / "hotpotqa.jsonl", rows)


def plan_of(path, tokenizer, readable, **settings):
    config = EvalConfig(out="o", tasks=["longbench"], data=[path], **settings)
    return plan_files(config, tokenizer, readable)


def asked(plan):
    counts = CutCounts()
    return list(plan.questions(plan.tasks[0], counts)), counts


def as_longbench_cuts(tokenizer, prompt, limit):
    """The rule of LongBench's pred.py, written from its description."""
    encoder = safe_encoder(tokenizer)
    ids = [*encoder.begin, *encoder.encode_batch([prompt])[0].tolist()]
    if len(ids) <= limit:
        return prompt
    half = int(limit / 2)
    return tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
        ids[-half:], skip_special_tokens=True
    )


@pytest.mark.parametrize("limit", [60, 61, 200, 333])
@pytest.mark.parametrize("template", [True, False])
def test_the_middle_is_cut_as_longbench_cuts_it(template, limit, tokenizer, plain_tokenizer, long_row):
    mine = tokenizer if template else plain_tokenizer
    plan = plan_of(long_row, mine, 100_000, max_prompt=limit)
    whole = next(plan.tasks[0].samples()).messages[0]["content"]
    found = next(plan.fitted(plan.tasks[0], CutCounts()))
    assert found.sample.messages[0]["content"] == as_longbench_cuts(mine, whole, limit)
    assert found.ids == prompt_ids(mine, found.sample)
    assert found.ids != prompt_ids(mine, next(plan.tasks[0].samples()))


@pytest.mark.parametrize("truncate", ["middle", "left"])
@pytest.mark.parametrize("readable", [80, 97, 256, 500])
def test_a_cut_prompt_and_its_answer_fit_and_fill_what_is_read(tokenizer, long_row, readable, truncate):
    plan = plan_of(long_row, tokenizer, readable, truncate=truncate)
    questions, counts = asked(plan)
    room = readable - 32
    assert all(len(question.prompt) <= room for question in questions)
    assert len(questions[0].prompt) >= room - 4
    assert counts.samples == 2
    assert counts.truncated >= 1
    assert counts.lost_tokens == sum(question.facts["n_truncated"] for question in questions)
    assert questions[0].facts["truncation"] == truncate


@pytest.mark.parametrize("readable", range(300, 306))
def test_a_cut_inside_a_character_that_costs_more_tokens_still_fits(tokenizer, tmp_path, readable):
    # Of a character of three bytes, cut after the first, a replacement of three bytes is left.
    row = files.LONGBENCH["hotpotqa"] | {"context": "北京市" * 300}
    path = files.write_lines(tmp_path / "hotpotqa.jsonl", [row])
    plan = plan_of(path, tokenizer, readable)
    found = next(plan.fitted(plan.tasks[0], CutCounts()))
    assert len(found.ids) <= readable - 32
    assert found.ids == prompt_ids(tokenizer, found.sample)


def test_the_middle_keeps_both_ends_and_left_keeps_the_question(tokenizer, long_row):
    def text(truncate):
        plan = plan_of(long_row, tokenizer, 400, truncate=truncate)
        return tokenizer.decode(asked(plan)[0][0].prompt)

    assert "Answer the question based on the given passages" in text("middle")[:120]
    assert text("left").startswith("<|im_start|>user\nword") or "word2" in text("left")[:60]
    assert "The following are given passages" not in text("left")
    for truncate in ("middle", "left"):
        assert "Question: What of hotpotqa?" in text(truncate)


def test_what_fits_is_not_touched(tokenizer, long_row):
    plan = plan_of(long_row, tokenizer, 100_000)
    questions, counts = asked(plan)
    assert [question.facts["n_truncated"] for question in questions] == [0, 0]
    assert "truncation" not in questions[0].facts
    assert (counts.truncated, counts.lost_tokens, counts.skipped) == (0, 0, 0)


def test_error_names_the_row_before_anything_is_asked(tokenizer, long_row):
    with pytest.raises(
        DataError, match=r"hotpotqa.jsonl:1 .*its prompt has [\d,]+ tokens, 368 are read"
    ) as refused:
        plan_of(long_row, tokenizer, 400, truncate="error")
    assert "--truncate middle" in refused.value.hint


def test_skip_leaves_long_ones_out_and_counts_them(tokenizer, long_row):
    plan = plan_of(long_row, tokenizer, 400, truncate="skip")
    counts = CutCounts()

    class Says:
        def answer(self, ids, max_new_tokens, stop=()):
            return Answer([1], "Paris", "eos")

    rows = list(predict(Says(), plan.questions(plan.tasks[0], counts), max_new_tokens=1))
    summary, scored = score_file_task(plan.tasks[0].family, "hotpotqa", rows, counts)
    assert (summary["n"], summary["samples"], summary["skipped"]) == (1, 2, 1)
    assert scored[0]["row"] == "hotpotqa.jsonl:2"


def test_a_task_of_which_everything_is_skipped_is_an_error_and_no_score(tokenizer, long_row):
    long_row.write_text(long_row.read_text().splitlines()[0] + "\n")
    plan = plan_of(long_row, tokenizer, 400, truncate="skip")
    counts = CutCounts()
    rows = list(predict(None, plan.questions(plan.tasks[0], counts), max_new_tokens=1))
    with pytest.raises(DataError, match="all 1 samples are longer"):
        score_file_task(plan.tasks[0].family, "hotpotqa", rows, counts)


def test_a_chat_of_several_turns_is_never_cut(tokenizer, tmp_path):
    chat = [
        {"role": "user", "content": WORDS},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
    ]
    row = {"prompt": json.dumps(chat), "answer": "x7 no", "random_string_to_prepend": "x7"}
    path = files.write_lines(tmp_path / "a.jsonl", [row])

    def plan(**settings):
        config = EvalConfig(out="o", tasks=["mrcr_files"], data=[path], max_new_tokens=8, **settings)
        return plan_files(config, tokenizer, 400)

    with pytest.raises(DataError, match="a chat of several turns has") as refused:
        plan()
    assert "--truncate skip" in refused.value.hint
    assert asked(plan(truncate="skip"))[1].skipped == 1


def test_an_answer_that_leaves_no_room_is_refused_and_may_be_made_shorter(tokenizer, tmp_path):
    path = files.write_lines(tmp_path / "gov_report.jsonl", [files.LONGBENCH["gov_report"]])
    with pytest.raises(SettingsError, match="the answer may have 512 tokens, the model reads 512") as refused:
        plan_of(path, tokenizer, 512)
    assert "--max-new-tokens" in refused.value.hint
    plan = plan_of(path, tokenizer, 512, max_new_tokens=50)
    assert asked(plan)[0][0].max_new_tokens == 50
    assert plan.longest == 512


def test_a_longer_prompt_that_was_asked_for_is_planned_with_its_answer_and_template(tokenizer, long_row):
    plan = plan_of(long_row, tokenizer, 128, max_prompt=2000)
    questions, counts = asked(plan)
    assert counts.truncated == 0
    assert len(questions[0].prompt) + 32 <= plan.longest < 2000 + 32 + 40


def test_names_of_control_tokens_in_a_text_that_is_cut_stay_text(tokenizer, tmp_path):
    row = files.LONGBENCH["hotpotqa"] | {"context": f"<|im_end|> {WORDS} <|im_end|>"}
    path = files.write_lines(tmp_path / "hotpotqa.jsonl", [row])
    question = asked(plan_of(path, tokenizer, 600))[0][0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(question.prompt).count(end) == 1  # the template's own
