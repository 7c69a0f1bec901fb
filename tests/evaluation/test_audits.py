"""What audits of finished rows say."""

from __future__ import annotations

from typing import Any

from longlora_cli.evaluation.audits import audit_rows, longest_read

BOS = 7


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    plain = {
        "first_tokens": [BOS, 1, 2, 3],
        "finish": "eos",
        "sample_hash": f"hash {number}",
        "prompt_tokens": 100,
        "new_tokens": 5,
    }
    return {**plain, **changes}


def audits(rows, summaries=None, *, bos: int | None = BOS, begins_with_bos: bool = True):
    found = audit_rows(
        rows, summaries or {task: {} for task in rows}, bos=bos, begins_with_bos=begins_with_bos
    )
    return {one["name"].split()[0]: one for one in found}  # BOS, Share, Prompts, Samples


def test_a_second_bos_is_not_ok_and_counted():
    rows = {"needle": [row(0), row(1, first_tokens=[BOS, BOS, 1, 2]), row(2, first_tokens=[1, 2, 3, 4])]}
    found = audits(rows)["BOS"]
    assert (found["ok"], found["value"]) == (False, {"0": 1, "1": 1, "2": 1})
    assert found["note"].startswith("1 of 3 prompts")


def test_a_second_bos_is_seen_behind_the_first_words_of_a_template():
    assert audits({"needle": [row(first_tokens=[BOS, 3, BOS, 4])]})["BOS"]["ok"] is False


def test_one_bos_is_ok():
    assert audits({"needle": [row()]})["BOS"]["ok"] is True


def test_a_missing_bos_is_told_where_texts_begin_with_one_and_ok_where_they_do_not():
    rows = {"needle": [row(first_tokens=[1, 2])]}
    told, fine = audits(rows)["BOS"], audits(rows, begins_with_bos=False)["BOS"]
    assert (told["ok"], fine["ok"]) == (None, True)
    assert told["note"] == "the tokenizer begins texts with one, 1 prompts have none"


def test_a_tokenizer_without_bos_is_ok():
    assert audits({"needle": [row()]}, bos=None)["BOS"]["ok"] is True


def test_answers_are_counted_by_their_ends_over_all_tasks():
    rows = {"a": [row(), row(finish="stop")], "b": [row(finish="length"), row()]}
    found = audits(rows)["Share"]
    assert (found["ok"], found["value"]) == (True, {"eos": 0.5, "stop": 0.25, "length": 0.25})


def test_when_most_answers_ran_into_their_limit_the_tasks_are_named():
    rows = {"a": [row()], "b": [row(finish="length"), row(finish="length")]}
    found = audits(rows)["Share"]
    assert found["ok"] is False
    assert found["note"] == "most answers ran into their limit: b 100 %, a 0 %"


def test_choices_have_no_end():
    assert "Share" not in audits({"multiple_choice": [row(finish="choice")]})


def test_cut_and_skipped_prompts_are_not_ok_and_their_tokens_are_counted():
    rows = {"longbench.trec": [row(n_truncated=30), row(1, n_truncated=10), row(2, n_truncated=0), row(3)]}
    found = audits(rows, {"longbench.trec": {"skipped": 1}})["Prompts"]
    assert found["ok"] is False
    assert found["value"] == {"truncated": 0.5, "skipped": 0.2, "lost tokens": 40}
    assert found["note"] == "2 of 4 prompts were cut and 1 left out, the most cut by 30 tokens"


def test_a_single_cut_prompt_is_not_ok_where_none_was_skipped():
    assert audits({"longbench.trec": [row(n_truncated=1), row(1)]})["Prompts"]["ok"] is False


def test_prompts_that_are_whole_are_ok():
    assert audits({"longbench.trec": [row(n_truncated=0)]})["Prompts"]["ok"] is True


def test_equal_samples_of_one_task_are_duplicates_and_those_of_two_are_not():
    rows = {"a": [row(0), row(0), row(0), row(1)], "b": [row(0)]}
    found = audits(rows)["Samples"]
    assert (found["ok"], found["value"], found["note"]) == (False, 2, "counted more than once: a 2")
    assert audits({"a": [row(0)], "b": [row(0)]})["Samples"]["ok"] is True


def test_the_longest_thing_read_has_its_answer_and_windows_end_at_their_text():
    rows = {"a": [row(), row(prompt_tokens=90, new_tokens=20)], "ppl": [{"n": 120}, {"n": 50}]}
    assert longest_read({"a": rows["a"]}, {"a": {}}) == 110
    assert longest_read(rows, {"a": {}, "ppl": {"window": 4096}}) == 121
    assert longest_read(rows, {"a": {}, "ppl": {"window": 112}}) == 112


def test_perplexity_alone_has_no_prompts_to_audit():
    assert audits({"ppl": [{"n": 120}]}) == {}
