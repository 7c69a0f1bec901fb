"""The rules that every synthetic task keeps, on three kinds of tokenizer and SmolLM2's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_parts as parts

from longlora_cli.data.counting import token_counter
from longlora_cli.data.haystack import Haystack
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.sample_files import ruler_lines
from longlora_cli.evaluation.tasks.prompts import prompt_ids
from longlora_cli.evaluation.tasks.registry import TASKS, make_sample, requests
from longlora_cli.evaluation.tasks.synthetic import request as request_module
from longlora_cli.task_names import GROUPS, SYNTHETIC

KINDS = ("embedded", "sentencepiece", "base", pytest.param("smollm2", marks=pytest.mark.real_model))
LENGTHS = (512, 4096, pytest.param(131_072, marks=pytest.mark.slow))
every_kind = pytest.mark.parametrize("kind", KINDS)
every_length = pytest.mark.parametrize("length", LENGTHS)
every_task = pytest.mark.parametrize("task", SYNTHETIC)
DEPTH_TASKS = [name for name, task in TASKS.items() if task.has_depth]
# What the question needs to name, or asks to choose from; what is computed and stands nowhere.
NAMED_IN_THE_QUESTION = {"sort", "code_debug"}
COMPUTED = {"count", "code_run"}
IN_BOOKS = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"} | {
    "niah_latent", "topic", "qa_needle", "babi_long", "mrcr", "count", "sort", "repeat"
}  # fmt: skip


def number_of(length: int) -> int:
    return 3 if length < 100_000 else 1


def content(sample) -> str:
    return "\n".join(message["content"] for message in sample.messages)


def context_of(sample) -> tuple[int, int]:
    """Where the context begins and ends in the content."""
    text = content(sample)
    if sample.task.startswith("niah_") and sample.task != "niah_latent":
        return text.index("\n") + 1, text.rindex("\n")
    if sample.task in ("niah_latent", "repeat"):
        return 0, text.rindex("\n\n")
    if sample.task == "code_debug":
        return text.index("\n\n") + 2, text.index("\n\nWhich one?")
    return text.index("\n\n") + 2, text.rindex("\n\n")


def question_of(sample) -> str:
    """What stands after the context."""
    joint = "\n" if sample.task in GROUPS["ruler"] else "\n\n"
    return content(sample).rpartition(joint)[2] + sample.answer_prefix


@every_kind
@every_length
@every_task
def test_prompt_and_answer_fill_the_length_and_never_pass_it(task, length, kind):
    for sample in parts.samples(task, kind, length, number=number_of(length)):
        tokens = len(prompt_ids(parts.tokenizer(kind), sample))
        assert tokens == sample.facts["tokens"]  # counted without encoding the whole, and equal
        assert tokens + sample.max_new_tokens <= length
        assert tokens + sample.max_new_tokens >= (0.95 if task in ("vt", "cwe") else 0.98) * length


@every_kind
@every_length
@every_task
def test_the_answer_fits_into_the_room_kept_for_it(task, length, kind):
    for sample in parts.samples(task, kind, length, number=number_of(length)):
        said = sample.outputs[:1] if sample.scorer.startswith("infinitebench") else sample.outputs
        assert token_counter(parts.tokenizer(kind)).count(" " + ", ".join(said)) <= sample.max_new_tokens


def expected_counts(sample) -> list[int]:
    """How often each output is meant to stand in the content."""
    facts = sample.facts
    if sample.task == "vt":
        return [2] * (len(sample.outputs) - 1) + [1]
    if sample.task == "cwe":
        return [facts["repeats"][0]] * 10
    if sample.task == "qa_needle":
        return [1 if facts["hops"] == 3 else 2]
    if sample.task == "icl_many":
        return [facts["shots"]]
    if sample.task == "code_debug":
        return [2, content(sample).count(f"\n{sample.outputs[1]}. ")]
    return [1] * len(sample.outputs)


@pytest.mark.parametrize("kind", ["embedded"])
@every_length
@pytest.mark.parametrize(
    "task", sorted(set(SYNTHETIC) - COMPUTED - {"fwe", "babi_long", "graphwalk", "sort"})
)
def test_the_answer_stands_in_the_text_exactly_as_often_as_meant(task, length, kind):
    for sample in parts.samples(task, kind, length, number=number_of(length)):
        outputs = sample.outputs
        if task == "mrcr":
            outputs = [sample.extra["prefix"], outputs[0].removeprefix(sample.extra["prefix"])]
        text = content(sample)
        found = [len(re.findall(rf"(?<!\w){re.escape(output)}(?!\w)", text)) for output in outputs]
        if task == "code_debug":
            found[1] = text.count(f"\n{outputs[1]}. ")
        assert found == (expected_counts(sample) if task != "mrcr" else [1, 1])


@pytest.mark.parametrize("kind", ["embedded"])
@every_length
@pytest.mark.parametrize("task", sorted(set(SYNTHETIC) - NAMED_IN_THE_QUESTION - {"mrcr"}))
def test_the_answer_is_neither_in_the_question_nor_in_how_the_answer_begins(task, length, kind):
    for sample in parts.samples(task, kind, length, number=number_of(length)):
        said = question_of(sample).lower()
        assert not any(re.search(rf"\b{re.escape(output.lower())}\b", said) for output in sample.outputs)


# How the line begins that holds the answer; kv's is the pair's key.
BEGINS = {
    "niah_latent": "",
    "topic": "New subject",
    "code_debug": "def ",
    "lines": "line ",
    "repeat": "Paragraph ",
    "kv": '"',
}


def line_of(sample) -> tuple[int, int]:
    """Where the line with the answer begins and ends in the content."""
    text = content(sample)
    start, _ = context_of(sample)
    place = text.index(sample.outputs[0], start)
    begins = BEGINS.get(sample.task, "One of the special")
    first = place - 40 if sample.task == "kv" else text.rindex(begins, 0, place + len(begins))
    ending = {"niah_latent": r"\.", "code_debug": r"\n\n", "repeat": r"\n\n", "topic": r"\n\n"}
    end = re.compile(ending.get(sample.task, r"\.|\n")).search(text, place + len(sample.outputs[0]))
    return first, len(text) if end is None else end.end()


@every_kind
@every_length
@pytest.mark.parametrize("task", DEPTH_TASKS)
def test_the_stored_depth_is_the_share_of_the_contexts_tokens_before_the_answer(task, length, kind):
    counter = token_counter(parts.tokenizer(kind))
    for sample in parts.samples(task, kind, length, number=number_of(length)):
        text = content(sample)
        (start, end), (first, last) = context_of(sample), line_of(sample)
        before, after = counter.count(text[start:first]), counter.count(text[last:end])
        # A paragraph that is asked for is part of the context; a line that was put in is not.
        inside = counter.count(text[first:last]) if task == "repeat" else 0
        measured = before / max(before + after + inside, 1)
        # At 512 tokens the other needles' lines are up to a quarter of the text.
        nearby = 0.01 if length > 1000 else 0.25 if task == "niah_multikey_1" else 0.1
        assert measured == pytest.approx(sample.facts["actual_depth"], abs=nearby)


@every_length
@pytest.mark.parametrize("task", DEPTH_TASKS)
def test_the_depth_is_the_one_asked_for_up_to_one_sentence_or_unit(task, length):
    # A sentence or paragraph may take 160 tokens, and one in two topics lies between.
    nearby = max(0.01, 170 / length) + (0.5 / max(length // 500, 3) if task == "topic" else 0)
    for sample in parts.samples(task, "embedded", length):
        assert sample.facts["depth"] in (0.0, 0.5, 1.0)
        wanted = sample.facts["depth"]
        if task in ("topic", "repeat"):  # the last one begins before the end
            wanted *= 1 - 1 / (sample.facts["topics"] if task == "topic" else sample.facts["paragraphs"])
        assert sample.facts["actual_depth"] == pytest.approx(wanted, abs=nearby)


@every_length
@pytest.mark.parametrize("task", sorted(IN_BOOKS))
def test_a_context_begins_at_its_own_place_of_a_book_and_repeats_nothing(task, length):
    made = parts.samples(task, "embedded", length, number=max(2, number_of(length)))
    books = [re.sub(r"\s+", " ", content(sample)) for sample in made]
    spans = [[text[place : place + 70] for place in range(300, len(text) - 400, 997)] for text in books]
    for text, own in zip(books, spans, strict=True):
        assert all(text.count(span) == 1 for span in own if "The grass" not in span)
    if length < 5000:  # the embedded book holds little more than 131,072 tokens
        assert not set(spans[0]) & set(spans[1])


@every_kind
@every_task
def test_the_answers_beginning_stands_at_the_end_of_the_prompt(task, kind):
    tokenizer = parts.tokenizer(kind)
    sample = parts.samples(task, kind, 512)[0]
    text = tokenizer.decode(prompt_ids(tokenizer, sample), skip_special_tokens=False)
    assert text.endswith(sample.answer_prefix.strip() or ("\n", "[/INST]", "Assistant:"))
    if tokenizer.chat_template and sample.answer_prefix:
        marks = {"embedded": "assistant\n", "smollm2": "assistant\n", "sentencepiece": "[/INST]"}
        assert text.removesuffix(sample.answer_prefix.strip()).rstrip(" ").endswith(marks[kind])


def digest(task: str, sample_numbers, haystack: Haystack) -> str:
    tokenizer = parts.tokenizer("embedded")
    asked = list(requests(task, haystack, tokenizer, lengths=[640], depths=2, samples=2, seed=7))
    made = {number: make_sample(asked[number]) for number in sample_numbers}
    lines = ruler_lines(tokenizer, [made[number] for number in sorted(made)])
    return hashlib.sha256(lines.encode()).hexdigest()


def digests() -> dict[str, str]:
    return {task: digest(task, range(4), parts.haystack()) for task in SYNTHETIC}


@every_task
def test_samples_have_the_bytes_that_they_always_had(task):
    # A change of these files changes scores: it is meant, or it is a fault. synthetic_digests.json holds `digests()`.
    known = json.loads((Path(__file__).parent / "synthetic_digests.json").read_text())
    assert digest(task, range(4), parts.haystack())[:16] == known[task]


def test_a_fresh_process_and_another_order_make_the_same_bytes():
    code = "import json, test_synthetic_rules as t; print(json.dumps(t.digests()))"
    environment = os.environ | {"PYTHONHASHSEED": "4", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    own = {task: digest(task, (3, 1, 0, 2), parts.haystack()) for task in SYNTHETIC}
    assert json.loads(out.splitlines()[-1]) == own


@every_task
def test_a_share_of_the_samples_is_equal_to_that_part_of_all(task):
    # Another process has read nothing of the haystack before, and makes every third sample only.
    all_of_it = [digest(task, [number], parts.haystack()) for number in range(4)]
    other = Haystack([(parts.BUILTIN / "book.txt").read_text("utf-8")])
    assert digest(task, [3], other) == all_of_it[3]
    assert len(set(all_of_it)) == 4


@pytest.mark.parametrize("task", SYNTHETIC)
def test_the_length_is_found_with_a_few_exact_counts(task, monkeypatch):
    counted = []
    exact = request_module.prompt_tokens
    monkeypatch.setattr(request_module, "prompt_tokens", lambda *a: counted.append(1) or exact(*a))
    asked = requests(
        task, parts.haystack(), parts.tokenizer("embedded"), lengths=[4096], depths=2, samples=2, seed=5
    )
    for request in asked:
        counted.clear()
        make_sample(request)
        assert len(counted) <= 10  # of whole prompts; one for each sentence would be two hundred


@every_task
def test_a_length_that_holds_no_sample_is_refused_with_what_is_needed(task):
    asked = requests(
        task, parts.haystack(), parts.tokenizer("embedded"), lengths=[64], depths=1, samples=1, seed=0
    )
    with pytest.raises(
        SettingsError, match=rf"--lengths 64 is too short for {task}: a sample needs about \d+"
    ):
        make_sample(next(asked))
