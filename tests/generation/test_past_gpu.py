"""Quantized keys and values and beacons on a GPU, in bf16 and with its attention kernels."""

from __future__ import annotations

import pytest
import torch

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.weights import attach
from longlora_cli.evaluation.perplexity import window_losses
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.generation.session import Session
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
FOUR = BeaconSettings(window=128, ratios=(4,), sink=1)


@pytest.fixture(scope="module")
def builtin():
    loaded = load_model(ModelSection(model="builtin", device="cuda", dtype="bf16"))
    attach(loaded.causal_lm, FOUR, eos_token_id=2, bos_token_id=1).to(torch.bfloat16)
    return loaded


def text(count):
    return torch.randint(3, 2000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def losses(loaded, past, tokens=500):
    return window_losses(loaded, torch.tensor([text(tokens)]), [1], chunk=4096, past=past)[0, 1:]


@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.5)])
def test_quantized_losses_stay_near_the_full_ones(builtin, bits, most):
    change = (losses(builtin, Past(kv_bits=bits)) - losses(builtin, PLAIN)).abs()
    assert 0 < float(change[256:].mean()) < most


@pytest.mark.parametrize(
    "past", [Past(kv_bits=8), Past(kv_bits=4), Past(beacon=FOUR)], ids=["8", "4", "beacons"]
)
def test_bytes_are_those_told_before(builtin, past):
    one = Session(builtin, past=past)
    answer = one.answer(text(450), max_new_tokens=8, stop_ids=())
    assert answer.kv_bytes == one.kv_bytes_for(450 + 8 - 1)


def test_ratio_0_has_the_losses_of_a_plain_session(builtin):
    whole = losses(builtin, Past(beacon=BeaconSettings(window=128, ratios=(0,))))
    torch.testing.assert_close(whole, losses(builtin, PLAIN), rtol=0, atol=0.15)


def test_what_was_read_with_beacons_is_gone_on_from(builtin):
    one, ids = Session(builtin, past=Past(beacon=FOUR)), text(450)
    one.answer(ids, max_new_tokens=4, stop_ids=())
    answer = one.answer([*ids[:420], 7, 8], max_new_tokens=4, stop_ids=())
    assert answer.reused_tokens == 420
