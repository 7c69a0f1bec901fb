"""Segments of queries over ranges of keys: values and gradients against one softmax a row, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from loop_kernel import Loops
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.attention import make_attention
from longlora_cli.memory.attention_segments import (
    AttentionSegment,
    AttentionSegments,
    attend_segments,
    plain_segments,
    segment_kernel,
)

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-11, "atol": 1e-12}
MASK = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
STRIDED = (np.array([4, 6, 9]), np.array([5, 7, 10]))
CASES = {
    "one causal document": [AttentionSegment(7, ((0, 7),))],
    "a memory and a window": [AttentionSegment(5, ((0, 12),))],
    "one query": [AttentionSegment(1, ((0, 9),))],
    "as many keys as queries, apart": [AttentionSegment(4, ((0, 1), (7, 10)))],
    "two windows over one memory": [AttentionSegment(3, ((0, 6),)), AttentionSegment(4, ((0, 2), (8, 14)))],
    "packed sequences": [AttentionSegment(n, (keys,)) for n, keys in ((1, (0, 4)), (6, (4, 10)), (2, (10, 15)))],
    "a mask": [AttentionSegment(2, ((0, 4),)), AttentionSegment(3, ((1, 3), (6, 9)), MASK)],
    "keys by their numbers": [AttentionSegment(3, ((4, 6), np.array([1, 8, 0])))],
    "three parts": [AttentionSegment(2, ((0, 4),)), AttentionSegment(3, ((0, 4), (8, 11)), also=STRIDED)],
    "parts and a mask": [AttentionSegment(3, ((2, 8),), also=STRIDED[:1]), AttentionSegment(3, ((1, 6),), MASK)],
    "two and three parts": [
        AttentionSegment(2, ((0, 2),), also=STRIDED), AttentionSegment(3, ((0, 7),)),
        AttentionSegment(1, ((3, 4),), also=STRIDED[1:]), AttentionSegment(3, ((5, 9),), also=STRIDED),
    ],
}  # fmt: skip


def tensors(segments: Sequence[AttentionSegment], heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = sum(segment.queries for segment in segments)
    keys = AttentionSegments(segments, CPU).last_key + 1
    sizes = [(1, heads, queries, 8), (1, kv_heads, keys, 8), (1, kv_heads, keys, 8)]
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [tensor.requires_grad_(True) for tensor in drawn]


@pytest.mark.parametrize("kernel", [None, Loops()])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_softmax_a_row(name: str, kernel: Loops | None) -> None:
    segments = CASES[name]
    inputs = tensors(segments)
    expected = plain_segments(*inputs, segments, 0.3)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, inputs, slope)
    found = attend_segments(*inputs, AttentionSegments(segments, CPU), 0.3, kernel=kernel)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, slope), expected_gradients, **EXACT)


@pytest.mark.parametrize("kernel", [None, Loops()])
@pytest.mark.parametrize("name", CASES)
def test_queries_in_another_order_are_the_same_queries(name: str, kernel: Loops | None) -> None:
    segments = CASES[name]
    query, key, value = tensors(segments)
    expected = plain_segments(query, key, value, segments, 0.3)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), slope)
    order = np.random.default_rng(2).permutation(query.shape[2])
    rows = torch.from_numpy(np.argsort(order))
    moved = query[:, :, rows].detach().requires_grad_(True)
    found = attend_segments(moved, key, value, AttentionSegments(segments, CPU, order), 0.3, kernel=kernel)
    torch.testing.assert_close(found, expected[:, rows], **EXACT)
    dq, *rest = torch.autograd.grad(found, (moved, key, value), slope[:, rows])
    torch.testing.assert_close(
        [dq, *rest], [expected_gradients[0][:, :, rows], *expected_gradients[1:]], **EXACT
    )


def test_masks_and_a_single_query_are_left_to_torch_and_the_rest_is_fused() -> None:
    fused = {name: AttentionSegments(segments, CPU).fused for name, segments in CASES.items()}
    apart = {name: found for name, found in fused.items() if found != tuple(range(len(CASES[name])))}
    assert apart == {"one query": (), "a mask": (0,), "parts and a mask": (0,)}


def test_keys_that_lie_behind_each_other_are_not_copied() -> None:
    copied = {}
    for name, segments in CASES.items():
        grouped = AttentionSegments(segments, CPU)
        copied[name] = bool(grouped.fused) and grouped.gathering(grouped.last_key).copies_keys
    assert [name for name, copy in copied.items() if not copy] == [
        "one causal document",
        "a memory and a window",
        "one query",
        "packed sequences",
    ]


def test_the_registered_attention_takes_segments() -> None:
    segments = CASES["two windows over one memory"]
    inputs = [t.detach() for t in tensors(segments)]
    attention = make_attention("auto")
    found, _ = attention(nn.Module(), *inputs, scaling=0.3, segments=AttentionSegments(segments, CPU))
    torch.testing.assert_close(found, plain_segments(*inputs, segments, 0.3), **EXACT)


def test_on_a_cpu_no_fused_kernel_is_named() -> None:
    assert segment_kernel("auto", torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize(
    ("segments", "part"),
    [
        ([AttentionSegment(3, ((0, 2),))], "3 causal queries over 2 keys"),
        ([AttentionSegment(3, ((0, 9),))], "3 queries in a row of 4"),
        ([AttentionSegment(4, ((0, 11),))], "beyond the 10 keys"),
        ([AttentionSegment(4, ((0, 9),), also=(np.array([3, 2, 1]),))], "4 causal queries over 3 keys"),
        ([AttentionSegment(3, ((1, 6),), MASK, also=STRIDED)], "no further parts"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments: list[AttentionSegment], part: str) -> None:
    query, key = torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 10, 8)
    with pytest.raises(IncompatibleError, match=part):
        attend_segments(query, key, key, AttentionSegments(segments, CPU), 1.0)


def test_a_batch_is_refused() -> None:
    query = torch.zeros(2, 4, 4, 8)
    with pytest.raises(IncompatibleError, match="batch of 2"):
        attend_segments(query, query, query, AttentionSegments([AttentionSegment(4, ((0, 4),))], CPU), 1.0)


ON_GPU = {
    "causal": [
        AttentionSegment(1024, ((0, 3000),)),
        AttentionSegment(1100, ((0, 1976), (3000, 4100))),
        AttentionSegment(77, ((4100, 4400),)),
    ],
    "two windows and their beacons": [
        AttentionSegment(1024, ((0, 1024),)),
        AttentionSegment(1024, ((3072, 3200), (1024, 2048))),
        AttentionSegment(128, ((3072, 3200),), also=tuple(np.arange(n, 1024, 8) for n in range(8))),
        AttentionSegment(25, ((3200, 4400),), also=tuple(np.arange(1024 + n, 1074, 2) for n in range(2))),
    ],
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 2])
def test_on_a_gpu_one_query_of_each_of_many_sequences_is_no_further_from_float64_than_torch_one_by_one(
    heads: int,
) -> None:
    device = torch.device("cuda")
    ends = [300, 1000, 1001, 1700, 4096]
    segments = [AttentionSegment(1, ((first, end),)) for first, end in zip([0, *ends], ends, strict=False)]
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, count, rows, 64, generator=generator, device=device).bfloat16()
        for count, rows in ((heads, 5), (2, 4096), (2, 4096))
    )
    grouped = AttentionSegments(segments, device)
    assert grouped.fused == (0, 1, 2, 3, 4)
    kernel = segment_kernel("auto", query)
    assert kernel is not None
    exact = plain_segments(query.double(), key.double(), value.double(), segments, 0.125)
    apart = attend_segments(query, key, value, grouped, 0.125).double()
    fused = attend_segments(query, key, value, grouped, 0.125, kernel=kernel).double()
    assert (fused - exact).norm() <= 1.2 * (apart - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flash", "fa4"])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_fused_segments_are_no_further_from_float64_than_torch_segment_by_segment(
    name: str, backend: str, heads: int
) -> None:
    device = torch.device("cuda")
    segments = ON_GPU[name]
    generator = torch.Generator(device).manual_seed(0)
    drawn = [
        torch.randn(1, count, rows, 64, generator=generator, device=device).bfloat16().requires_grad_(True)
        for count, rows in ((heads, 2201), (2, 4400), (2, 4400))
    ]
    slope = torch.randn(1, 2201, heads, 64, generator=generator, device=device).bfloat16()

    def run(inputs: list[Tensor], fused: bool) -> list[Tensor]:
        kernel = segment_kernel(backend, inputs[0]) if fused else None
        assert not fused or kernel is not None
        grouped = AttentionSegments(segments, inputs[0].device)
        out = attend_segments(*inputs, grouped, 0.125, kernel=kernel)
        return [out, *torch.autograd.grad(out, inputs, slope.to(out))]

    exact = run([t.detach().cpu().double().requires_grad_(True) for t in drawn], fused=False)

    def errors(found: list[Tensor]) -> list[float]:
        pairs = zip(found, exact, strict=True)
        return [float((f.detach().cpu().double() - e.detach()).norm() / e.detach().norm()) for f, e in pairs]

    plain, fused = errors(run(drawn, fused=False)), errors(run(drawn, fused=True))
    assert all(ours <= 1.2 * theirs for ours, theirs in zip(fused, plain, strict=True)), (fused, plain)
