"""Questions that are answered together: the same rows as one by one, in the same order, resumed and sharded alike."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation import answerer as answerers_module
from longlora_cli.evaluation.answerer import SessionAnswerer, choose_batching
from longlora_cli.evaluation.batching import Batching, groups
from longlora_cli.evaluation.generation import Question, predict
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.sharding import Shard
from longlora_cli.generation.past import Past
from longlora_cli.generation.requests import Request

COSTS = ("seconds", "reused_tokens")


def prompt(count, seed):
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(count)]


@pytest.fixture(scope="module")
def questions():
    """Short ones of similar length, three about one text, equal ones, and one with a limit of its own."""
    text = prompt(70, 99)
    apart = [Question("t", prompt(20 + n, n), ["x"], {"sample": n, "length": 32}) for n in range(5)]
    about = [Question("t", text + prompt(5, n), ["x"], {"sample": 9, "length": 96}) for n in range(3)]
    twins = [Question("t", prompt(9, 50), ["x"], {"row": name}) for name in ("f:1", "f:2")]
    return [*apart, *about, *twins, Question("t", prompt(8, 51), ["x"], {"row": "f:3"}, max_new_tokens=2)]


def make(loaded, rows=None):
    batching = None if rows is None else Batching(rows)
    return SessionAnswerer(loaded, prefill_chunk=4096, batching=batching)


def ask(answerer, questions, **options):
    found = predict(answerer, questions, max_new_tokens=7, **options)
    return [{k: v for k, v in row.items() if k not in COSTS} for row in found]


@pytest.mark.parametrize("rows", [2, 3, 16])
def test_rows_are_those_of_questions_asked_one_by_one_in_their_order(tiny_loaded, questions, rows):
    one, together = Journal(), Journal()
    wanted = ask(make(tiny_loaded), questions, journal=one)
    assert ask(make(tiny_loaded, rows), questions, journal=together) == wanted
    assert list(together._rows) == list(one._rows), "the journal has their order too"


@pytest.mark.parametrize(("shares", "behind", "rows"), [(True, 50, 6), (False, 50, 2), (True, 1100, 2)])
def test_a_text_that_is_held_once_leaves_room_for_more_questions_about_it(shares, behind, rows):
    asked = [Request(prompt(2000, 1) + prompt(behind, n), 20) for n in range(2, 8)]
    whole = 2000 + behind + 20
    batching = Batching(16, 2 * whole + 300, shares)
    assert next(len(group) for group in groups(asked, lambda one: one, batching)) == rows


def test_batches_are_really_run(tiny_loaded, questions, monkeypatch):
    sizes = []
    true = answerers_module.answer_together
    monkeypatch.setattr(
        answerers_module, "answer_together", lambda m, r, **o: sizes.append(len(r)) or true(m, r, **o)
    )
    told = []
    list(predict(make(tiny_loaded, 16), questions, max_new_tokens=7, advance=told.append))
    assert sizes == [5, 3], "five apart, then three about one text; of two equal ones one is asked"
    assert told == [1] * len(questions)


def test_a_killed_evaluation_goes_on_with_what_is_missing(tiny_loaded, questions, tmp_path):
    wanted = ask(make(tiny_loaded), questions)
    path = tmp_path / "journal.jsonl"
    begun = predict(make(tiny_loaded, 3), questions, max_new_tokens=7, journal=Journal(path))
    for _ in range(4):
        next(begun)
    begun.close()
    kept = Journal(path)
    assert 4 <= len(kept) < len(questions) - 1
    counted = make(tiny_loaded, 3)
    asked = []
    true, several = counted.answer, counted.answer_together
    counted.answer = lambda *a: asked.append(1) or true(*a)
    counted.answer_together = lambda requests: asked.append(len(requests)) or several(requests)
    before = len(kept)
    assert ask(counted, questions, journal=kept) == wanted
    assert sum(asked) == len(questions) - 1 - before, "two questions are equal"


def test_shares_together_are_the_whole(tiny_loaded, questions):
    wanted = {row["key"]: row for row in ask(make(tiny_loaded), questions)}
    found = {}
    for number in (1, 2, 3):
        share = Journal(shard=Shard(number, 3))
        found |= {row["key"]: row for row in ask(make(tiny_loaded, 4), questions, journal=share)}
    assert {k: r["prediction"] for k, r in found.items()} == {k: r["prediction"] for k, r in wanted.items()}


def sizes_of(requests, batching):
    return [len(group) for group in groups(requests, lambda one: one, batching)]


def test_groups_are_bounded_by_rows_by_tokens_and_by_padding():
    equal = [Request(prompt(100, n), 28) for n in range(7)]
    assert sizes_of(equal, None) == [1] * 7
    assert sizes_of(equal, Batching(3)) == [3, 3, 1]
    assert sizes_of(equal, Batching(16, tokens=4 * 128)) == [4, 3]
    assert sizes_of(equal, Batching(16, tokens=100)) == [1] * 7
    long = [Request(prompt(n, n), 8) for n in (4000, 4100, 10_000, 10_000)]
    assert sizes_of(long, Batching(16)) == [2, 2], "6,000 tokens of padding in 8,000 of text are too many"
    short = [Request(prompt(n, n), 8) for n in (5, 80, 200)]
    assert sizes_of(short, Batching(16)) == [3], "of short ones padding costs nothing"


def test_questions_about_one_text_are_grouped_by_text():
    texts = [prompt(400, n) for n in range(3)]
    asked = [Request([*text, n], 4) for text in texts for n in range(3)]
    assert sizes_of(asked, Batching(16)) == [3, 3, 3]


def test_what_is_known_joins_no_batch_and_keeps_its_place():
    items = ["a", "known", "b", "known too", "c"]
    found = groups(items, lambda one: None if "known" in one else Request([1], 1), Batching(2))
    assert list(found) == [["a", "known", "b"], ["known too"], ["c"]]


def test_nothing_is_read_ahead_of_its_group():
    seen = []

    def items():
        for n in range(6):
            seen.append(n)
            yield Request(prompt(10, n), 1)

    found = groups(items(), lambda one: one, Batching(2))
    next(found)
    assert seen == [0, 1]


def test_positions_that_change_with_the_length_are_answered_one_by_one(tiny_loaded, monkeypatch):
    assert choose_batching("auto", tiny_loaded) == Batching(16, 32_768)
    assert choose_batching(5, tiny_loaded) == Batching(5)
    assert choose_batching(1, tiny_loaded) is None
    monkeypatch.setattr(answerers_module, "depends_on_length", lambda loaded: True)
    assert choose_batching("auto", tiny_loaded) is None
    assert choose_batching(1, tiny_loaded) is None
    with pytest.raises(SettingsError, match="--batch-size 5: the model's positions are"):
        choose_batching(5, tiny_loaded)


@pytest.mark.parametrize("past", [Past(kv_bits=8), Past(beacon=BeaconSettings(window=32, ratios=(4,)))])
def test_a_compressed_past_is_answered_one_by_one(tiny_loaded, past):
    assert choose_batching("auto", tiny_loaded, past) is None
    assert choose_batching(1, tiny_loaded, past) is None
    with pytest.raises(
        SettingsError, match="--batch-size 5: questions are answered together on a plain cache"
    ):
        choose_batching(5, tiny_loaded, past)


@pytest.mark.parametrize(("free_bytes", "tokens"), [(0, 32_768), (1 << 32, (1 << 30) // 512)])
def test_on_a_gpu_a_batch_takes_a_quarter_of_the_free_memory(tiny_loaded, monkeypatch, free_bytes, tokens):
    each = tiny_loaded.facts.kv_bytes_per_token(4)
    assert each == 512
    on_gpu = dataclasses.replace(tiny_loaded, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 1 << 40))
    assert choose_batching("auto", on_gpu) == Batching(16, tokens)
