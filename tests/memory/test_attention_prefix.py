"""Rows behind a prefix that is held once get what each gets over prefix and own tokens behind each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory import attention_prefix
from longlora_cli.memory.attention import Gap, make_attention, plain_attention
from longlora_cli.memory.attention_prefix import SharedPrefix, attend_behind_prefix, by_tiles

SCALE = 0.3


class Layer(torch.nn.Module):
    """What attention asks of a module."""

    layer_idx = 1


def draw(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Tensor:
    drawn = torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def inputs(
    heads: int, queries: int, tokens: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    rows, prefix = 3, 37
    shapes = (rows, heads, queries), (rows, 2, tokens), (rows, 2, tokens), (1, 2, prefix), (1, 2, prefix)
    return tuple(draw(*shape, 8, dtype=dtype, seed=n, device=device) for n, shape in enumerate(shapes))


def each_row_whole(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, widths: list[int]) -> Tensor:
    """Of each row the queries that are tokens, over the prefix and its own tokens behind each other."""
    found = []
    for row, width in enumerate(widths):
        keys, values = torch.cat((pk[0], k[row, :, width:]), 1), torch.cat((pv[0], v[row, :, width:]), 1)
        own = q[row][:, max(0, q.shape[2] - (k.shape[2] - width)) :]
        found.append(plain_attention(own, keys, values, scaling=SCALE).transpose(0, 1).flatten(0, 1))
    return torch.cat(found)


def tokens_alone(out: Tensor, tokens: int, widths: list[int]) -> Tensor:
    return torch.cat(
        [row[max(0, len(row) - (tokens - w)) :].flatten(0, 1) for row, w in zip(out, widths, strict=True)]
    )


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("queries", "tokens"), [(5, 5), (1, 9), (3, 7)])
@pytest.mark.parametrize("widths", [[0, 0, 0], [2, 0, 4]], ids=["no gap", "gaps"])
def test_rows_get_what_each_gets_over_prefix_and_own_tokens(
    heads: int, queries: int, tokens: int, widths: list[int]
) -> None:
    q, k, v, *prefix = inputs(heads, queries, tokens, torch.float64)
    gap = Gap(0, torch.tensor(widths))
    other = draw(1, 2, 37, 8, seed=9)
    held = SharedPrefix(((other, other), (prefix[0], prefix[1])))
    out, _ = make_attention("auto")(Layer(), q, k, v, scaling=SCALE, prefix=held, gap=gap)
    found = tokens_alone(out, tokens, widths)
    torch.testing.assert_close(found, each_row_whole(q, k, v, *prefix, widths), rtol=1e-12, atol=1e-12)


def test_without_a_gap_all_own_tokens_before_a_query_are_seen() -> None:
    q, k, v, *prefix = inputs(4, 3, 7, torch.float64)
    held = SharedPrefix(((prefix[0], prefix[1]),) * 2)
    out, _ = make_attention("auto")(Layer(), q, k, v, scaling=SCALE, prefix=held)
    found = tokens_alone(out, 7, [0, 0, 0])
    torch.testing.assert_close(found, each_row_whole(q, k, v, *prefix, [0, 0, 0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile_scores", [1, 37 * 2 * 4, 2**26])
def test_tiles_of_any_size_are_one_softmax(monkeypatch: pytest.MonkeyPatch, tile_scores: int) -> None:
    monkeypatch.setattr(attention_prefix, "_TILE_SCORES", tile_scores)
    q, k, v = draw(1, 2, 11, 8), draw(1, 2, 37, 8, seed=1), draw(1, 2, 37, 8, seed=2)
    out, lse = by_tiles(q, k, v, SCALE)
    scores = q @ k.transpose(2, 3) * SCALE
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [40, 44])
def test_a_window_shorter_than_prefix_and_tokens_is_refused(window: int) -> None:
    q, k, v, *prefix = inputs(4, 3, 7, torch.float64)
    held = SharedPrefix(((prefix[0], prefix[1]),) * 2)
    attend = make_attention("auto")
    if window == 44:
        attend(Layer(), q, k, v, scaling=SCALE, prefix=held, sliding_window=window)
        return
    with pytest.raises(IncompatibleError, match="44 in all, with a model that sees 40"):
        attend(Layer(), q, k, v, scaling=SCALE, prefix=held, sliding_window=window)


def test_a_prefix_beside_documents_is_refused() -> None:
    q, k, v, *prefix = inputs(4, 3, 3, torch.float64)
    held = SharedPrefix(((prefix[0], prefix[1]),) * 2)
    with pytest.raises(IncompatibleError, match="a shared prefix works without documents"):
        make_attention("auto")(Layer(), q, k, v, scaling=SCALE, prefix=held, document_lengths=[[3]] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 40])
def test_on_a_gpu_it_is_no_further_from_float64_than_the_plain_softmax(
    dtype: torch.dtype, queries: int
) -> None:
    parts = inputs(6, queries, 40, dtype, "cuda")
    q, k, v, *prefix = parts
    seen = torch.ones(queries, 40, dtype=torch.bool, device="cuda").tril(40 - queries).expand(3, -1, -1)
    exact = each_row_whole(*(part.double().cpu() for part in parts), [0, 0, 0])
    plain = each_row_whole(*(part.cpu() for part in parts), [0, 0, 0])
    out = attend_behind_prefix(q, k, v, (prefix[0], prefix[1]), seen, SCALE)
    ours = (tokens_alone(out, 40, [0, 0, 0]).double().cpu() - exact).norm()
    theirs = (plain.double() - exact).norm()
    assert ours <= 1.2 * theirs
