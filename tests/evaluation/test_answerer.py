from __future__ import annotations

import pytest
import torch

from longlora_cli.evaluation.answerer import SessionAnswerer
from longlora_cli.evaluation.generation import Question, predict
from longlora_cli.generation.stopping import cut_at


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 500, (180,), generator=generator).tolist()
    ends = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in (5, 9, 1)]
    return [shared + end for end in ends] + [shared[:90] + ends[0]]


def test_a_shared_prefix_is_read_once_and_changes_no_answer(tiny_loaded, prompts):
    one = SessionAnswerer(tiny_loaded, prefill_chunk=4096)
    reused = [one.answer(prompt, 12) for prompt in prompts]
    fresh = [SessionAnswerer(tiny_loaded, prefill_chunk=4096).answer(prompt, 12) for prompt in prompts]
    assert [a.ids for a in reused] == [a.ids for a in fresh]
    assert [a.reused_tokens >= n for a, n in zip(reused, [0, 180, 180, 90], strict=True)] == [True] * 4
    assert all(a.reused_tokens == 0 for a in fresh)


@pytest.mark.parametrize("chunk", [1, 37, 180])
def test_the_prefill_chunk_changes_no_answer(tiny_loaded, prompts, chunk):
    whole = SessionAnswerer(tiny_loaded, prefill_chunk=4096)
    pieces = SessionAnswerer(tiny_loaded, prefill_chunk=chunk)
    for prompt in prompts:
        assert pieces.answer(prompt, 8).ids == whole.answer(prompt, 8).ids


def test_ctrl_c_is_no_answer(tiny_loaded, prompts, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    answerer = SessionAnswerer(tiny_loaded, prefill_chunk=4096)
    monkeypatch.setattr(type(tiny_loaded), "hidden", interrupt)
    with pytest.raises(KeyboardInterrupt):
        answerer.answer(prompts[0], 4)


def test_a_row_with_a_stop_string_has_the_text_of_before_and_fewer_tokens(tiny_loaded):
    answerer = SessionAnswerer(tiny_loaded, prefill_chunk=4096)
    asked = [[n, n + 1, n + 2] for n in range(3, 40)]
    said = {n: answerer.answer(prompt, 24) for n, prompt in enumerate(asked)}
    place, free = next((n, one) for n, one in said.items() if len(one.text.strip()) > 20)
    stop = (free.text.strip()[3:6],)
    question = Question("t", asked[place], ["x"], stop=stop)
    (row,) = predict(answerer, [question], max_new_tokens=24)
    assert (row["prediction"], row["finish"]) == (cut_at(free.text, stop), "stop")
    assert 0 < row["new_tokens"] < len(free.ids)
