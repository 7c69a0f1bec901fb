"""Explicit attention equals a masked softmax and its autograd gradients, whatever the split into calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.memory import attention_kernels
from longlora_cli.memory.attention_documents import BlockwiseKernel, CpuKernel, PlainKernel, document_runs
from longlora_cli.memory.attention_kernels import (
    AttentionKernel,
    attend,
    attend_backward,
    attend_forward,
    shifted_lengths,
)

WIDTH, SCALE = 8, 0.3
KERNELS: dict[str, AttentionKernel] = {
    "plain": PlainKernel(),
    "cpu": CpuKernel(),
    "blockwise": BlockwiseKernel(tile_scores=60),  # tiles of 1 to 5 rows
}
HEADS = [(4, 4), (4, 2), (4, 1), (9, 3)]
LENGTHS = [[1], [13], [5, 1, 7], [4, 4, 4, 1]]


class Problem(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    def copy(self) -> Problem:
        return packed(torch.cat([t.flatten(1) for t in self[:3]], 1), self.q.shape[1], self.grad)


def packed(buffer: Tensor, heads: int, grad: Tensor) -> Problem:
    """q, k and v as views of one `[tokens, (heads + 2 * kv_heads) * WIDTH]` buffer."""
    kv_heads = (buffer.shape[1] // WIDTH - heads) // 2
    views = buffer.unflatten(1, (-1, WIDTH)).split([heads, kv_heads, kv_heads], 1)
    return Problem(*views, grad)


def problem(tokens: int, heads: int, kv_heads: int) -> Problem:
    generator = torch.Generator().manual_seed(tokens + heads)
    draw = torch.randn(tokens, 2 * heads + 2 * kv_heads, WIDTH, generator=generator, dtype=torch.float64)
    return packed(draw[:, heads:].flatten(1), heads, draw[:, :heads])


def reference(
    p: Problem, documents: list[Sequence[int]], scale: float = SCALE
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output, log-sum-exp and gradients by autograd; each query head has its own documents."""
    q, k, v = (t.detach().clone().requires_grad_() for t in p[:3])
    tokens, times = q.shape[0], q.shape[1] // k.shape[1]
    outs, sums = [], []
    for head, lengths in enumerate(documents):
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (number[:, None] == number[None, :])
        scores = (q[:, head] @ k[:, head // times].T * scale).masked_fill(~allowed, float("-inf"))
        sums.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v[:, head // times])
    out, lse = torch.stack(outs, 1), torch.stack(sums)
    return out.detach(), lse.detach(), torch.autograd.grad(out, (q, k, v), p.grad)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_kernel_equals_a_masked_softmax_in_value_sums_and_all_gradients(
    name: str, heads: int, kv_heads: int, lengths: list[int]
) -> None:
    p = problem(sum(lengths), heads, kv_heads)
    out, lse, gradients = reference(p, [lengths] * heads)
    actual = KERNELS[name].forward(p.q, p.k, p.v, lengths, SCALE)
    close(actual, (out, lse))
    close(KERNELS[name].backward(p.grad, p.q, p.k, p.v, *actual, lengths, SCALE), gradients)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("kv_heads_per_call", [0, 1, 2])
def test_gradients_replace_q_k_and_v_inside_a_packed_buffer(
    name: str, heads: int, kv_heads: int, kv_heads_per_call: int
) -> None:
    lengths = [5, 1, 7]
    p = problem(13, heads, kv_heads)
    out, lse, gradients = reference(p, [lengths] * heads)
    options = {"kv_heads_per_call": kv_heads_per_call}
    actual = attend_forward(KERNELS[name], p.q, p.k, p.v, lengths, SCALE, **options)
    close(actual, (out, lse))
    attend_backward(KERNELS[name], p.grad, p.q, p.k, p.v, *actual, lengths, SCALE, **options)
    close(p[:3], gradients)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (9, 3), (4, 1), (3, 1)])
@pytest.mark.parametrize("kv_heads_per_call", [0, 1])
def test_shifted_groups_equal_a_softmax_masked_by_each_heads_own_groups(
    name: str, heads: int, kv_heads: int, kv_heads_per_call: int
) -> None:
    lengths, straight, shifted = [11, 6, 1], [4, 4, 3, 4, 2, 1], [2, 4, 4, 1, 2, 4, 1]
    p = problem(18, heads, kv_heads)
    times = heads // kv_heads
    middle = (kv_heads + 1) // 2 * times if kv_heads > 1 else (heads + 1) // 2
    out, lse, gradients = reference(p, [straight] * middle + [shifted] * (heads - middle))
    options = {"kv_heads_per_call": kv_heads_per_call, "shifted_group": 4}
    actual = attend_forward(KERNELS[name], p.q, p.k, p.v, lengths, SCALE, **options)
    close(actual, (out, lse))
    attend_backward(KERNELS[name], p.grad, p.q, p.k, p.v, *actual, lengths, SCALE, **options)
    close(p[:3], gradients)


@pytest.mark.parametrize("options", [{}, {"kv_heads_per_call": 1}, {"shifted_group": 4}])
def test_autograd_gives_the_explicit_gradients_and_keeps_its_inputs(options: dict[str, int]) -> None:
    lengths, p = [5, 8], problem(13, 4, 2)
    before = p.copy()
    leaves = [t.detach().requires_grad_() for t in p[:3]]
    out = attend(*leaves, lengths, SCALE, KERNELS["cpu"], **options)
    gradients = torch.autograd.grad(out, leaves, p.grad)
    close(p[:3], before[:3])
    actual = attend_forward(KERNELS["cpu"], p.q, p.k, p.v, lengths, SCALE, **options)
    close(out.detach(), actual[0])
    attend_backward(KERNELS["cpu"], p.grad, p.q, p.k, p.v, *actual, lengths, SCALE, **options)
    close(gradients, p[:3])


class Recorder(CpuKernel):
    """Keeps the shapes it is called with and whether operands were contiguous."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.contiguous: list[bool] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        self.seen.append((q.shape[1], k.shape[1]))
        self.contiguous.append(all(t.is_contiguous() for t in (q, k, v)))
        return super().forward(q, k, v, lengths, scale)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        self.seen.append((q.shape[1], k.shape[1]))
        self.contiguous.append(all(t.is_contiguous() for t in (grad, q, k, v)))
        return super().backward(grad, q, k, v, *rest, **options)


def test_a_kernel_gets_the_slope_of_a_sum_as_whole_numbers_in_memory() -> None:
    p, kernel = problem(13, 4, 2), Recorder()
    leaves = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in p[:3]]
    attend(*leaves, [13], SCALE, kernel).sum().backward()
    _, _, gradients = reference(p._replace(grad=torch.ones_like(p.q)), [[13]] * 4)
    close([t.grad for t in leaves], list(gradients))
    assert kernel.contiguous == [True, True]  # not as one number with strides of zero


def test_autograd_passes_the_numerical_check() -> None:
    p = problem(6, 2, 1)
    leaves = tuple(t.clone().requires_grad_() for t in p[:3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, [2, 4], SCALE, KERNELS["cpu"], shifted_group=2), leaves
    )


def test_the_output_lands_in_the_given_tensor() -> None:
    p, wide = problem(13, 4, 2), torch.zeros(13, 9, WIDTH, dtype=torch.float64)
    for options in ({}, {"kv_heads_per_call": 1}):
        out, _ = attend_forward(
            KERNELS["cpu"], p.q, p.k, p.v, [13], SCALE, out=wide[:, 2:6].zero_(), **options
        )
        assert out.data_ptr() == wide[:, 2:].data_ptr()
        close(wide[:, 2:6], reference(p, [[13]] * 4)[0])
    assert not wide[:, :2].any()
    assert not wide[:, 6:].any()


def test_a_call_gets_no_more_kv_heads_than_asked_and_views_of_the_buffer() -> None:
    kernel, p = Recorder(), problem(13, 9, 3)
    attend_forward(kernel, p.q, p.k, p.v, [13], SCALE, kv_heads_per_call=2)
    assert kernel.seen == [(6, 2), (3, 1)]
    assert not any(kernel.contiguous)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "limit", "seen"),
    [
        (4, 2, 13 * 2 * WIDTH, [(2, 1), (2, 1)]),
        (4, 2, 13 * 1 * WIDTH, [(1, 1)] * 4),
        (4, 1, 13 * 3 * WIDTH, [(3, 1), (1, 1)]),
    ],
)
def test_no_call_has_more_elements_than_kernels_can_index(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, limit: int, seen: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(attention_kernels, "_MAX_ELEMENTS", limit)
    kernel, p = Recorder(), problem(13, heads, kv_heads)
    out, lse, gradients = reference(p, [[6, 7]] * heads)
    actual = attend_forward(kernel, p.q, p.k, p.v, [6, 7], SCALE)
    close(actual, (out, lse))
    attend_backward(kernel, p.grad, p.q, p.k, p.v, *actual, [6, 7], SCALE)
    close(p[:3], gradients)
    assert kernel.seen == seen * 2
    assert all(kernel.contiguous)  # the buffer's rows reach further than the limit


def test_heads_that_lie_far_apart_are_copied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_MAX_ELEMENTS", 13 * 4 * WIDTH)
    kernel, p = Recorder(), problem(13, 4, 4)
    longer = (torch.cat([t, t]).transpose(0, 1).contiguous().transpose(0, 1) for t in p[:3])
    attend_forward(kernel, *(t[:13] for t in longer), [13], SCALE)
    assert kernel.contiguous[0]


class Overwriting(CpuKernel):
    """Uses the permission to put gradients over its operands, as FlashAttention-4 does."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, overwrite: bool = False
    ) -> Any:
        gradients = super().backward(grad, q, k, v, *rest)
        if not overwrite:
            return gradients
        return tuple(t.copy_(g) for t, g in zip((q, k, v), gradients, strict=True))


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)])
@pytest.mark.parametrize("options", [{}, {"kv_heads_per_call": 1}, {"shifted_group": 4}])
def test_a_kernel_that_overwrites_its_operands_gives_the_same_gradients(
    heads: tuple[int, int], options: dict[str, int]
) -> None:
    p = problem(13, *heads)
    other = p.copy()
    actual = attend_forward(KERNELS["cpu"], p.q, p.k, p.v, [5, 8], SCALE, **options)
    attend_backward(Overwriting(), p.grad, p.q, p.k, p.v, *actual, [5, 8], SCALE, **options)
    attend_backward(KERNELS["cpu"], p.grad, other.q, other.k, other.v, *actual, [5, 8], SCALE, **options)
    close(p[:3], other[:3])


def test_one_kernel_continues_from_anothers_output_and_sums() -> None:
    p = problem(13, 4, 2)
    gradients = reference(p, [[5, 8]] * 4)[2]
    out, lse = KERNELS["blockwise"].forward(p.q, p.k, p.v, [5, 8], SCALE)
    close(KERNELS["cpu"].backward(p.grad, p.q, p.k, p.v, out, lse, [5, 8], SCALE), gradients)


def test_float32_sums_stay_float32() -> None:
    p = problem(13, 4, 2)
    for kernel in KERNELS.values():
        out, lse = kernel.forward(*(t.float() for t in p[:3]), [5, 8], SCALE)
        assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)


def test_no_shifted_group_looks_into_the_future_or_another_document() -> None:
    p, lengths = problem(18, 4, 2), [11, 7]
    before, _ = attend_forward(KERNELS["cpu"], p.q, p.k, p.v, lengths, SCALE, shifted_group=4)
    p.k[6:11] += 1
    p.v[6:11] += 1
    after, _ = attend_forward(KERNELS["cpu"], p.q, p.k, p.v, lengths, SCALE, shifted_group=4)
    same = (before == after).flatten(1).all(1)
    assert same.tolist() == [True] * 6 + [False] * 5 + [True] * 7


def test_shifted_groups_have_shorter_ends() -> None:
    assert shifted_lengths([10, 1, 4], 4) == ([4, 4, 2, 1, 4], [2, 4, 4, 1, 2, 2])


@pytest.mark.parametrize("group", [3, -2])
def test_a_group_without_a_half_is_refused(group: int) -> None:
    with pytest.raises(SettingsError, match=f"groups of {group} tokens"):
        shifted_lengths([8], group)


def test_one_head_cannot_be_shifted() -> None:
    p = problem(8, 1, 1)
    with pytest.raises(IncompatibleError, match="two heads"):
        attend_forward(KERNELS["cpu"], p.q, p.k, p.v, [8], SCALE, shifted_group=4)


@pytest.mark.parametrize("lengths", [[12], [13, 1], [13, 0]])
def test_documents_that_do_not_fill_the_row_are_refused(lengths: list[int]) -> None:
    p = problem(13, 4, 2)
    with pytest.raises(IncompatibleError, match="in a row of 13"):
        attend_forward(KERNELS["cpu"], p.q, p.k, p.v, lengths, SCALE)


def test_equal_documents_in_a_row_are_one_call_of_bounded_size() -> None:
    assert document_runs([3, 3, 5, 3]) == [(0, 3, 2), (6, 5, 1), (11, 3, 1)]
    assert [count for _, _, count in document_runs([1] * 300)] == [128, 128, 44]
    assert [count for _, _, count in document_runs([32_768] * 3)] == [2, 1]
