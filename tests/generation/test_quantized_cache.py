"""Keys and values in 8 and 4 bits: bounded errors, exact cuts, bytes as computed, answers that no chunk changes."""

from __future__ import annotations

import pytest
import torch

from longlora_cli.errors import SettingsError
from longlora_cli.generation.cache import cache_bytes, cache_bytes_for, cache_length, crop, exact_length
from longlora_cli.generation.kv_effect import kv_divergence
from longlora_cli.generation.past import Past
from longlora_cli.generation.prefill import prefill, step
from longlora_cli.generation.quantized_cache import (
    QuantizedCache,
    QuantizedLayer,
    decode_by_channel,
    decode_by_token,
    encode_by_channel,
    encode_by_token,
    quantized_bytes,
)
from longlora_cli.generation.session import Session

BLOCK = 32
CODECS = {
    "keys by channel": (encode_by_channel, decode_by_channel),
    "values by token": (encode_by_token, decode_by_token),
}


def random_ids(count, seed=0):
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_states(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def groups_of(name, numbers):
    """The numbers that share a scale along the last dimension, for an independent bound."""
    if name == "keys by channel":
        return numbers.unflatten(-2, (-1, 32)).movedim(-2, -1)
    return numbers.unflatten(-1, (-1, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CODECS)
def test_no_number_is_off_by_more_than_half_a_step_and_a_rounding(name, bits, dtype):
    encode, decode = CODECS[name]
    numbers = random_states(2, 3, 96, 64, dtype=dtype) * 5 + 20  # an offset, as keys of Qwen2 have
    groups = groups_of(name, numbers.double())
    steps = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    error = groups_of(name, decode(encode(numbers, bits), bits).double() - numbers.double()).abs().amax(-1)
    eps = torch.finfo(dtype).eps
    # The step is kept rounded up by at most two units of the format, and the result is rounded once.
    assert (error <= steps * (0.5 + 2 * eps * 2**bits) + eps / 2 * groups.abs().amax(-1)).all()
    assert (error >= 0.3 * steps).any()  # it is quantized


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CODECS)
def test_the_ends_of_a_group_come_back_as_they_were(name, bits):
    encode, decode = CODECS[name]
    numbers = random_states(1, 1, 32, 32)
    found = groups_of(name, decode(encode(numbers, bits), bits))
    wanted = groups_of(name, numbers)
    torch.testing.assert_close(found.amin(-1), wanted.amin(-1), rtol=0, atol=0)
    torch.testing.assert_close(found.amax(-1), wanted.amax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_equal_numbers_come_back_exactly(name):
    encode, decode = CODECS[name]
    numbers = torch.full((1, 2, 32, 32), 0.1)
    torch.testing.assert_close(decode(encode(numbers, 4), 4), numbers, rtol=0, atol=0)


def test_an_outlier_channel_costs_other_channels_of_keys_nothing():
    """What KIVI is about: one scale for a token would spend its 16 levels on one channel."""
    keys = random_states(1, 1, 64, 64)
    keys[..., 7] *= 1000
    others = [c for c in range(64) if c != 7]
    by_channel = decode_by_channel(encode_by_channel(keys, 4), 4)[..., others] - keys[..., others]
    by_token = decode_by_token(encode_by_token(keys, 4), 4)[..., others] - keys[..., others]
    assert by_channel.abs().mean() < 0.1 * by_token.abs().mean()


def test_a_number_that_is_not_finite_is_not_hidden():
    for bad in (float("nan"), float("inf")):
        keys = random_states(1, 1, 32, 32)
        keys[0, 0, 3, 5] = bad
        assert not torch.isfinite(decode_by_channel(encode_by_channel(keys, 8), 8)).all()


def fed(layer, keys, values, sizes):
    """Give a layer its tokens in forwards of these sizes; what the last forward saw."""
    seen, start = None, 0
    for count in sizes:
        seen = layer.update(keys[..., start : start + count, :], values[..., start : start + count, :])
        start += count
    return seen


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sizes", [[32, 32, 32, 4], [7, 25, 32, 32, 4], [96, 4], [1] * 100])
def test_blocks_hold_the_same_however_the_tokens_came(bits, sizes):
    keys, values = random_states(1, 2, 100, 16), random_states(1, 2, 100, 16, seed=1)
    one, other = QuantizedLayer(bits, BLOCK), QuantizedLayer(bits, BLOCK)
    fed(one, keys, values, [32, 32, 32, 4])
    fed(other, keys, values, sizes)
    more = random_states(1, 2, 1, 16, seed=2), random_states(1, 2, 1, 16, seed=3)
    for a, b in zip(one.update(*more), other.update(*more), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_tokens_of_the_open_block_are_seen_in_full():
    keys, values = random_states(1, 2, 70, 16), random_states(1, 2, 70, 16, seed=1)
    seen_keys, seen_values = fed(QuantizedLayer(4, BLOCK), keys, values, [32, 32, 6])
    assert torch.equal(seen_keys[..., 64:, :], keys[..., 64:, :])
    assert torch.equal(seen_values[..., 64:, :], values[..., 64:, :])
    assert not torch.equal(seen_keys[..., :64, :], keys[..., :64, :])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("asked", "kept"), [(0, 0), (31, 0), (32, 32), (63, 32), (64, 64), (66, 66), (70, 70)]
)
def test_a_cut_layer_is_one_that_never_read_more(bits, asked, kept):
    keys, values = random_states(1, 2, 70, 16), random_states(1, 2, 70, 16, seed=1)
    cut, fresh = QuantizedLayer(bits, BLOCK), QuantizedLayer(bits, BLOCK)
    fed(cut, keys, values, [32, 32, 6])
    assert cut.whole_until(asked) == kept
    cut.cut(kept)
    fed(fresh, keys[..., :kept, :], values[..., :kept, :], [n for n in (32, 32, 6) if n])
    assert (cut.held_tokens, cut.held_bytes) == (kept, fresh.held_bytes)
    more = random_states(1, 2, 40, 16, seed=2), random_states(1, 2, 40, 16, seed=3)
    for a, b in zip(cut.update(*more), fresh.update(*more), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_cut_inside_a_quantized_block_is_refused():
    layer = QuantizedLayer(8, BLOCK)
    fed(layer, random_states(1, 2, 70, 16), random_states(1, 2, 70, 16), [32, 32, 6])
    with pytest.raises(ValueError, match="inside a quantized block"):
        layer.cut(40)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [5, 32, 100])
@pytest.mark.parametrize(
    ("width", "dtype", "element_bytes"), [(16, torch.float32, 4), (96, torch.bfloat16, 2)]
)
def test_bytes_are_as_computed(bits, tokens, width, dtype, element_bytes):
    layer = QuantizedLayer(bits, BLOCK)
    states = random_states(1, 3, tokens, width, dtype=dtype)
    fed(layer, states, states, [tokens])
    wanted = quantized_bytes(
        tokens, heads=3, width=width, element_bytes=element_bytes, bits=bits, block=BLOCK
    )
    assert layer.held_bytes == wanted


def test_a_token_in_16_bit_models_takes_9_and_5_bits_a_number():
    for bits, wanted in ((8, 9), (4, 5)):
        held = quantized_bytes(1024, heads=8, width=128, element_bytes=2, bits=bits)
        assert held * 8 == 1024 * 2 * 8 * 128 * wanted


def small_blocks(loaded, ids, bits, chunk):
    cache = QuantizedCache(bits, BLOCK)
    return prefill(loaded, ids, cache, chunk=chunk), cache


@pytest.mark.parametrize("kind", ["tied", "untied", "sliding", "adapter", "nf4"])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_no_chunk_changes_the_logits(make_loaded, kind, chunk):
    loaded, ids = make_loaded(kind), random_ids(100)
    wanted, _ = small_blocks(loaded, ids, 4, 32)
    found, _ = small_blocks(loaded, ids, 4, chunk)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_four_bits_change_the_logits_more_than_eight_and_both_but_little(tiny):
    ids = random_ids(200)
    full = prefill(tiny, ids, QuantizedCache(8, 256), chunk=4096)  # nothing is quantized yet
    errors = {bits: float((small_blocks(tiny, ids, bits, 4096)[0] - full).abs().max()) for bits in (8, 4)}
    assert 1e-7 < errors[8] < 0.1 * errors[4]
    assert errors[4] < 0.05 * float(full.abs().max())


def test_a_cache_cut_back_goes_on_like_a_new_one(tiny):
    ids, other = random_ids(100), random_ids(20, seed=1)
    _, cache = small_blocks(tiny, ids, 4, 4096)
    kept = exact_length(cache, 80)
    crop(cache, kept)
    assert (kept, cache_length(cache)) == (64, 64)
    found = prefill(tiny, ids[64:80] + other, cache, chunk=4096)
    wanted, _ = small_blocks(tiny, ids[:80] + other, 4, 4096)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_reading_and_then_writing_is_reading_it_all(tiny):
    """A conversation goes on from what was written token by token as if it had been read at once."""
    ids = random_ids(100)
    _, cache = small_blocks(tiny, ids[:50], 4, 4096)
    for token in ids[50:]:
        found = step(tiny, token, cache)
    torch.testing.assert_close(found, small_blocks(tiny, ids, 4, 4096)[0], rtol=0, atol=1e-5)


def test_an_interruption_where_one_layer_closed_a_block_leaves_what_all_have(tiny):
    _, cache = small_blocks(tiny, random_ids(60), 8, 4096)
    calls = [0]

    def strike(*args):
        raise KeyboardInterrupt

    hook = tiny.causal_lm.model.layers[1].register_forward_pre_hook(strike)
    try:
        with pytest.raises(KeyboardInterrupt):
            prefill(tiny, random_ids(8, seed=1), cache, chunk=4096)
    finally:
        hook.remove()
    assert calls == [0]
    assert {layer.held_tokens for layer in cache.layers} == {32}


# --- sessions --------------------------------------------------------------------------------------------------


def ask(session, ids, new=8):
    return session.answer(ids, max_new_tokens=new, stop_ids=())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_session_tells_its_bytes_before_and_after(tiny, bits):
    session = Session(tiny, past=Past(kv_bits=bits))
    answer = ask(session, random_ids(600))
    assert answer.kv_bytes == session.kv_bytes == session.kv_bytes_for(600 + 8 - 1)
    assert answer.kv_bytes == cache_bytes_for(tiny.facts, 607, element_bytes=4, kv_bits=bits)
    assert answer.kv_bytes < 0.66 * Session(tiny).kv_bytes_for(607)


@pytest.mark.parametrize("bits", [8, 4])
def test_reuse_changes_no_answer_and_begins_at_a_block(tiny, bits):
    warm, first = Session(tiny, past=Past(kv_bits=bits)), random_ids(620)
    ask(warm, first)
    second = first[:600] + random_ids(30, seed=1)
    found = ask(warm, second)
    wanted = ask(Session(tiny, past=Past(kv_bits=bits)), second)
    assert (found.ids, found.reused_tokens) == (wanted.ids, 600)  # the last block is open
    third = first[:500] + random_ids(30, seed=2)
    found = ask(warm, third)
    assert (found.ids, found.reused_tokens) == (ask(Session(tiny, past=Past(kv_bits=bits)), third).ids, 256)


def test_a_likelihood_does_not_depend_on_the_ones_before_it(tiny):
    """The first continuation closes a block in which the prompt ends; the second begins where it began."""
    prompt, long, short = random_ids(510), random_ids(9, seed=1), random_ids(3, seed=2)
    past = Past(kv_bits=4)
    together = Session(tiny, past=past).log_likelihoods(prompt, [long, short, long])
    alone = [Session(tiny, past=past).log_likelihoods(prompt, [one])[0] for one in (long, short)]
    assert together == pytest.approx([*alone, alone[0]], abs=1e-5)


def test_dynamic_positions_are_refused(make_loaded):
    with pytest.raises(SettingsError, match="dynamic"):
        Session(make_loaded("dynamic"), past=Past(kv_bits=8))


def test_a_divergence_is_zero_where_nothing_is_quantized_and_grows_with_fewer_bits(tiny):
    assert kv_divergence(tiny, random_ids(600), Past()) is None
    assert kv_divergence(tiny, random_ids(256), Past(kv_bits=4)) is None
    found = {bits: kv_divergence(tiny, random_ids(600), Past(kv_bits=bits)) for bits in (8, 4)}
    assert 0 < found[8].kl < 1e-4
    assert found[8].kl < 0.1 * found[4].kl
    assert (found[8].tokens, found[8].text_tokens) == (256, 600)


def test_a_divergence_is_that_of_the_whole_models_logits(tiny):
    ids = random_ids(300)
    found = kv_divergence(tiny, ids, Past(kv_bits=4))
    with torch.no_grad():
        full = tiny.causal_lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 256:].log_softmax(-1)
    cache, rows = QuantizedCache(4), []
    prefill(tiny, ids[:256], cache, chunk=4096)
    for token in ids[256:]:
        rows.append(step(tiny, token, cache).log_softmax(-1))
    assert cache_bytes(cache) == cache_bytes_for(tiny.facts, 300, element_bytes=4, kv_bits=4)
    wanted = (full.exp() * (full - torch.stack(rows))).sum(-1).mean()
    assert found.kl == pytest.approx(float(wanted), rel=5e-2)
    assert found.tokens == 44
