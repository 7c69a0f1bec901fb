"""Perplexity and answers from quantized keys and values, as evaluation measures them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.evaluation.perplexity import window_losses
from longlora_cli.evaluation.plan import make_plan
from longlora_cli.generation.past import Past
from longlora_cli.generation.prefill import step
from longlora_cli.generation.quantized_cache import QuantizedCache
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection


@pytest.fixture(scope="module")
def builtin():
    return load_model(ModelSection(model="builtin", device="cpu", dtype="fp32"))


def rows_of(count, tokens):
    return torch.randint(3, 500, (count, tokens), generator=torch.Generator().manual_seed(5))


def test_losses_are_those_of_reading_token_by_token(builtin):
    """What an answer is written from is what is measured."""
    [row] = rows_of(1, 400).tolist()
    cache, losses = QuantizedCache(4), []
    for token, following in pairwise(row):
        losses.append(-float(step(builtin, token, cache).log_softmax(-1)[following]))
    found = window_losses(builtin, torch.tensor([row]), [1], chunk=4096, past=Past(kv_bits=4))
    torch.testing.assert_close(found[0, 1:], torch.tensor(losses), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [32, 100, 256, 4096])
def test_no_chunk_changes_a_loss(builtin, chunk):
    rows = rows_of(2, 400)
    wanted = window_losses(builtin, rows, [1, 1], chunk=300, past=Past(kv_bits=4))
    found = window_losses(builtin, rows, [1, 1], chunk=chunk, past=Past(kv_bits=4))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_only_tokens_after_the_first_block_are_changed_and_by_little(builtin):
    rows = rows_of(1, 500)
    full = window_losses(builtin, rows, [1], chunk=4096)[0]
    for bits, most in ((8, 0.02), (4, 0.5)):
        change = (window_losses(builtin, rows, [1], chunk=4096, past=Past(kv_bits=bits))[0] - full).abs()
        assert float(change[:257].max()) < 1e-4
        assert 1e-5 < float(change[257:].mean()) < most


def test_greedy_answers_of_the_embedded_model_are_the_same_with_8_bits(builtin):
    """Needles of 500 tokens, half of which are quantized when the answer begins."""
    config = EvalConfig(tasks=["needle"], lengths=[500], depths=3, samples=3, out="unused")
    plain, eight = Session(builtin), Session(builtin, past=Past(kv_bits=8))
    told = []
    for question in make_plan(config, builtin.tokenizer).grid_questions("needle"):
        said, wanted = (
            s.answer(question.prompt, max_new_tokens=24, stop_ids=stop_ids(builtin)) for s in (eight, plain)
        )
        assert said.ids == wanted.ids
        assert said.kv_bytes < 0.7 * wanted.kv_bytes
        told += [reference in wanted.text for reference in question.references]
    assert sum(told) > len(told) / 2  # the answers say something


def evaluate(tiny_model_folder, out, **settings):
    grid = {
        "tasks": ["passkey"],
        "lengths": [400],
        "depths": 1,
        "samples": 2,
        "max_new_tokens": 4,
        "beyond": True,
    }
    config = EvalConfig(model=str(tiny_model_folder), device="cpu", out=out, **(grid | settings))
    return command.run(config, Console(json_mode=True), dry_run=False)


def test_an_evaluation_tells_bits_and_bytes(tiny_model_folder, tmp_path):
    full = evaluate(tiny_model_folder, tmp_path / "full")
    four = evaluate(tiny_model_folder, tmp_path / "four", kv_bits=4)
    assert (four["settings"]["kv_bits"], four["model"]["kv_bits"]) == (4, 4)
    assert "kv_bits" not in full["model"]
    assert four["tasks"]["passkey"]["kv_bytes"] < 0.75 * full["tasks"]["passkey"]["kv_bytes"]
    rows = [json.loads(line) for line in (tmp_path / "four/samples/passkey.jsonl").read_text().splitlines()]
    assert max(row["kv_bytes"] for row in rows) == four["tasks"]["passkey"]["kv_bytes"]


def test_answers_with_other_bits_are_not_taken_for_finished_ones(tiny_model_folder, tmp_path):
    keys = []
    for bits in (16, 4):
        evaluate(tiny_model_folder, tmp_path / str(bits), kv_bits=bits)
        lines = (tmp_path / str(bits) / "samples/passkey.jsonl").read_text().splitlines()
        keys.append({json.loads(line)["key"] for line in lines})
    assert not keys[0] & keys[1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kv_bits": 5}, "16, 8 or 4"),
        ({"kv_bits": 4, "rope": "dynamic", "rope_factor": 2.0}, "dynamic"),
        ({"kv_bits": 4, "prefill_chunk": 1024}, "blocks of 256"),
        ({"kv_bits": 4, "make": True, "tasks": ["niah"]}, "measures no model"),
    ],
)
def test_bits_that_cannot_be_had_are_refused_in_one_line(settings, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        EvalConfig(out=tmp_path / "out", **settings)
