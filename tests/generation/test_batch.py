"""Prompts that are answered together get the answers that each gets alone."""

from __future__ import annotations

import random

import pytest
import torch

from longlora_cli.generation import batch as batches
from longlora_cli.generation.batch import answer_together
from longlora_cli.generation.requests import Request, shared_tokens
from longlora_cli.generation.session import Session
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection

KINDS = ["tied", "untied", "sliding", "adapter", "nf4"]


def drawn(count, seed):
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(loaded, request, stop_ids=()):
    session = Session(loaded)
    return session.answer(
        list(request.ids), max_new_tokens=request.max_new_tokens, stop_ids=stop_ids, stop=request.stop
    )


def logits_alone(loaded, ids):
    with torch.no_grad():
        return loaded.causal_lm(torch.tensor([ids])).logits[0, -1]


APART = [drawn(n, n) for n in (40, 37, 1, 12, 40)]
TEXT = drawn(60, 1)
ABOUT_ONE_TEXT = [TEXT + drawn(n, n) for n in (9, 4, 1, 20)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [4096, 31, 1])
@pytest.mark.parametrize("prompts", [APART, ABOUT_ONE_TEXT], ids=["apart", "about one text"])
def test_answers_are_those_of_each_prompt_alone(make_loaded, kind, chunk, prompts):
    loaded = make_loaded(kind)
    requests = [Request(ids, 3 + 5 * n) for n, ids in enumerate(prompts)]
    found = answer_together(loaded, requests, stop_ids=(), prefill_chunk=chunk)
    wanted = [alone(loaded, request) for request in requests]
    assert [a.ids for a in found] == [a.ids for a in wanted]
    assert [(a.text, a.finish, a.prompt_tokens) for a in found] == [
        (a.text, a.finish, a.prompt_tokens) for a in wanted
    ]


@pytest.mark.parametrize("kind", ["tied", "sliding"])
@pytest.mark.parametrize("prompts", [APART, ABOUT_ONE_TEXT], ids=["apart", "about one text"])
@pytest.mark.parametrize("chunk", [4096, 31])
def test_logits_are_those_of_each_prompt_alone_to_rounding(make_loaded, monkeypatch, kind, chunk, prompts):
    loaded, seen = make_loaded(kind), []
    true = batches.next_logits
    monkeypatch.setattr(batches, "next_logits", lambda *a: seen.append(true(*a)) or seen[-1])
    found = answer_together(loaded, [Request(ids, 3) for ids in prompts], stop_ids=(), prefill_chunk=chunk)
    for step, logits in enumerate(seen):
        wanted = [logits_alone(loaded, [*ids, *a.ids[:step]]) for ids, a in zip(prompts, found, strict=True)]
        torch.testing.assert_close(logits, torch.stack(wanted), rtol=1e-4, atol=1e-5)


def test_a_text_that_all_prompts_begin_with_is_read_once(tiny):
    assert shared_tokens(ABOUT_ONE_TEXT) == 60
    assert shared_tokens([TEXT, TEXT]) == 59, "the last token is read for its logits"
    assert shared_tokens([TEXT, TEXT[:20] + drawn(40, 9)]) == 0
    ran = []
    hook = tiny.causal_lm.get_input_embeddings().register_forward_hook(
        lambda module, args, out: ran.append(args[0].numel())
    )
    try:
        found = answer_together(
            tiny, [Request(ids, 1) for ids in ABOUT_ONE_TEXT], stop_ids=(), prefill_chunk=4096
        )
    finally:
        hook.remove()
    assert ran == [60, 4 * 20]
    assert [a.reused_tokens for a in found] == [0, 60, 60, 60]


@pytest.mark.parametrize(
    ("kind", "behind", "places"), [("tied", 20, 20), ("tied", 1030, 1130), ("sliding", 20, 120)]
)
def test_a_text_that_all_begin_with_is_held_once_unless_a_window_or_much_is_behind_it(
    make_loaded, monkeypatch, kind, behind, places
):
    made = []
    true = batches._Batch
    monkeypatch.setattr(batches, "_Batch", lambda *a: made.append(true(*a)) or made[-1])
    text = drawn(1100, 1) if behind > 1000 else drawn(100, 1)
    places += 1000 if behind > 1000 else 0
    prompts = [text + drawn(behind, n) for n in (2, 3, 4)]
    answer_together(make_loaded(kind), [Request(ids, 1) for ids in prompts], stop_ids=(), prefill_chunk=4096)
    assert made[0].cache.layers[0].keys.shape[:3] == (3, 2, places)


def test_each_row_ends_by_itself_and_the_others_go_on(tiny):
    rng = random.Random(5)
    prompts = [drawn(rng.randint(1, 30), seed) for seed in range(9)]
    free = [alone(tiny, Request(ids, 12)) for ids in prompts]
    ends = {free[2].ids[0], free[5].ids[3]}  # end tokens of some rows only
    texts = [one.text for one in free]
    stop = (next(text for text in texts if len(text) > 8)[4:7],)
    requests = [Request(ids, 1 + n, stop if n % 2 else ()) for n, ids in enumerate(prompts)]
    found = answer_together(tiny, requests, stop_ids=ends, prefill_chunk=64)
    wanted = [alone(tiny, request, ends) for request in requests]
    assert [(a.ids, a.finish) for a in found] == [(a.ids, a.finish) for a in wanted]
    assert {a.finish for a in found} >= {"eos", "length"}


def test_equal_logits_give_the_lowest_token():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
    assert batches._likeliest(logits) == [1, 0]


def test_positions_that_depend_on_the_length_are_refused(make_loaded):
    with pytest.raises(ValueError, match="depend on the length"):
        answer_together(make_loaded("dynamic"), [Request([5], 1)], stop_ids=(), prefill_chunk=16)
    with pytest.raises(ValueError, match="at least one token"):
        answer_together(make_loaded("tied"), [Request([], 1)], stop_ids=(), prefill_chunk=16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("prompts", [APART, ABOUT_ONE_TEXT], ids=["apart", "about one text"])
def test_on_a_gpu_logits_are_those_of_each_prompt_alone(make_folder, monkeypatch, dtype, prompts):
    loaded, seen = load_model(ModelSection(model=str(make_folder("gpu")), dtype=dtype, device="cuda")), []
    true = batches.next_logits
    monkeypatch.setattr(batches, "next_logits", lambda *a: seen.append(true(*a)) or seen[-1])
    answer_together(loaded, [Request(ids, 1) for ids in prompts], stop_ids=(), prefill_chunk=31)
    with torch.no_grad():
        wanted = [
            loaded.causal_lm(torch.tensor([ids], device="cuda")).logits[0, -1].float() for ids in prompts
        ]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "fp32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(seen[0].float(), torch.stack(wanted), **tolerance)
