"""Chunks and a cached prefix change nothing, and an interruption leaves whole chunks."""

from __future__ import annotations

import pytest
import torch

from longlora_cli.errors import NumericError
from longlora_cli.generation.cache import cache_bytes, cache_length, crop, new_cache
from longlora_cli.generation.prefill import prefill, step

KINDS = ["tied", "untied", "sliding", "adapter", "nf4"]


def random_ids(count, seed=0):
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_logits(loaded, ids):
    """The last row of the whole model's logits, without a cache."""
    with torch.no_grad():
        return loaded.causal_lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])  # one token, uneven, exact, larger than the prompt
def test_chunks_give_the_logits_of_the_whole_model(make_loaded, kind, chunk):
    loaded, ids = make_loaded(kind), random_ids(50)
    logits = prefill(loaded, ids, new_cache(), chunk=chunk)
    torch.testing.assert_close(logits, plain_logits(loaded, ids), rtol=0, atol=1e-5)


def test_chunks_agree_to_rounding_in_float64(make_loaded):
    loaded = make_loaded("untied")
    loaded.causal_lm.double()
    try:
        ids = random_ids(50)
        logits = prefill(loaded, ids, new_cache(), chunk=7)
        torch.testing.assert_close(logits, plain_logits(loaded, ids), rtol=1e-12, atol=1e-12)
    finally:
        loaded.causal_lm.float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cropped_cache_goes_on_like_a_new_one(make_loaded, kind):
    loaded, ids, other = make_loaded(kind), random_ids(60), random_ids(20, seed=1)
    cache = new_cache()
    prefill(loaded, ids, cache, chunk=16)
    crop(cache, 40)
    logits = prefill(loaded, other, cache, chunk=16)
    torch.testing.assert_close(logits, plain_logits(loaded, ids[:40] + other), rtol=0, atol=1e-5)


def test_steps_give_the_logits_of_the_whole_model(tiny):
    ids, cache = random_ids(12), new_cache()
    prefill(tiny, ids[:10], cache, chunk=16)
    step(tiny, ids[10], cache)
    torch.testing.assert_close(step(tiny, ids[11], cache), plain_logits(tiny, ids), rtol=0, atol=1e-5)


def test_no_forward_is_larger_than_the_chunk(tiny, count_tokens):
    with count_tokens(tiny) as counts:
        prefill(tiny, random_ids(50), new_cache(), chunk=16)
    assert counts == [16, 16, 16, 2]


def test_progress_adds_up_to_the_tokens_run(tiny):
    counts = []
    prefill(tiny, random_ids(50), new_cache(), chunk=16, advance=counts.append)
    assert counts == [16, 16, 16, 2]


def test_an_interruption_between_chunks_leaves_whole_chunks(tiny):
    ids, cache, done = random_ids(50), new_cache(), []

    def interrupt(count):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prefill(tiny, ids, cache, chunk=16, advance=interrupt)
    assert cache_length(cache) == 32
    logits = prefill(tiny, ids[32:], cache, chunk=16)
    torch.testing.assert_close(logits, plain_logits(tiny, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["layer", "between keys and values"])
def test_an_interruption_inside_a_chunk_leaves_whole_chunks(tiny, part):
    ids, cache = random_ids(50), new_cache()
    prefill(tiny, ids[:16], cache, chunk=16)
    layer = cache.layers[1]
    if part == "layer":
        hook = tiny.causal_lm.model.layers[1].register_forward_pre_hook(raise_interrupt)
    else:
        update = layer.update

        def half(keys, values, *args, **kwargs):
            layer.keys = torch.cat([layer.keys, keys], dim=-2)
            raise KeyboardInterrupt

        layer.update = half
    with pytest.raises(KeyboardInterrupt):
        prefill(tiny, ids[16:], cache, chunk=16)
    if part == "layer":
        hook.remove()
    else:
        layer.update = update
    assert {t.shape[-2] for each in cache.layers for t in (each.keys, each.values)} == {16}
    logits = prefill(tiny, ids[16:], cache, chunk=16)
    torch.testing.assert_close(logits, plain_logits(tiny, ids), rtol=0, atol=1e-5)


def raise_interrupt(*args):
    raise KeyboardInterrupt


def test_crop_keeps_the_given_length_in_every_layer(tiny):
    cache = new_cache()
    prefill(tiny, random_ids(20), cache, chunk=20)
    expected = [layer.keys[..., :7, :].clone() for layer in cache.layers]
    crop(cache, 7)
    assert cache_length(cache) == 7 == cache.get_seq_length()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, expected, strict=True))
    assert cache_bytes(cache) == 7 * tiny.facts.kv_bytes_per_token(4)


def test_crop_agrees_with_the_librarys_own(tiny):
    """transformers counts the tokens to remove, as a negative number; ours names the length that stays."""
    ours, theirs = new_cache(), new_cache()
    for cache in (ours, theirs):
        prefill(tiny, random_ids(20), cache, chunk=20)
    crop(ours, 15)
    theirs.crop(-5)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


def test_crop_to_nothing_is_an_empty_cache(tiny):
    cache, ids = new_cache(), random_ids(9)
    prefill(tiny, random_ids(20, seed=1), cache, chunk=20)
    crop(cache, 0)
    assert cache_length(cache) == 0
    torch.testing.assert_close(prefill(tiny, ids, cache, chunk=4), plain_logits(tiny, ids), rtol=0, atol=1e-5)


def test_no_tokens_are_refused(tiny):
    with pytest.raises(ValueError, match="no token"):
        prefill(tiny, [], new_cache(), chunk=4)


def test_logits_that_are_no_numbers_are_refused(tiny):
    norm = tiny.causal_lm.model.norm.weight
    saved = norm.data.clone()
    norm.data.fill_(float("nan"))
    try:
        with pytest.raises(NumericError, match="not finite"):
            prefill(tiny, random_ids(4), new_cache(), chunk=4)
    finally:
        norm.data.copy_(saved)


def test_dynamic_positions_are_read_at_once_and_leave_nothing_behind(make_loaded):
    """Beyond 32 tokens the frequencies depend on the length; the plain model runs before any longer text."""
    loaded, ids = make_loaded("dynamic"), random_ids(50)
    expected = plain_logits(loaded, ids)
    prefill(loaded, random_ids(100, seed=1), new_cache(), chunk=16)
    logits = prefill(loaded, ids, new_cache(), chunk=16)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_dynamic_positions_do_not_go_on_from_a_prefix(make_loaded):
    loaded, cache = make_loaded("dynamic"), new_cache()
    prefill(loaded, random_ids(8), cache, chunk=16)
    with pytest.raises(ValueError, match="dynamic"):
        prefill(loaded, random_ids(8), cache, chunk=16)
