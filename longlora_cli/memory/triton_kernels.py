"""The passes of `elementwise` as Triton kernels: one read and one write of memory each. Imported on CUDA only.

A program takes one row (or one token's block of heads, or a block of a row), computes in float32 and rounds where its
plain twin in `elementwise` rounds. Row numbers become 64-bit before they meet a stride: 1,048,576 tokens with a
row stride of 28,672 are 3e10 elements. Weight gradients are summed by a fixed number of programs into one row each and
then added up, so that the same call gives the same bits. Idea of fusing these passes: Hsu et al. 2024, Liger Kernel
(arXiv:2410.10989).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a block that four warps hold comfortably: 16 float32 registers a thread.
_BLOCK_ELEMENTS = 2048
_SILU_COLUMNS = 1024
# Programs that sum a weight gradient, for each multiprocessor; four fill an H100's warp slots at eight warps each.
_PROGRAMS_PER_SM = 4
# Multiply and add may become one instruction. Triton 3.9 warns that its default changes; said, it stays the same.
_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _rms_norm(
    x, weight, out, rstd, x_row, out_row, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    tl.store(rstd + row, scale)
    x_hat = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + columns, (factor * x_hat).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    dh, x, weight, rstd, grad, partial, dh_row, x_row, grad_row, tokens, width, programs,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    while row < tokens:
        scale = tl.load(rstd + row)
        slope = tl.load(dh + row * dh_row + columns, mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32) * scale
        if SUM:
            total += slope * x_hat.to(x.dtype.element_ty).to(tl.float32)
        slope *= factor
        mean = tl.sum(slope * x_hat, axis=0) / width
        place = grad + row * grad_row + columns
        added = tl.load(place, mask=inside, other=0.0).to(tl.float32) + (slope - x_hat * mean) * scale
        tl.store(place, added.to(grad.dtype.element_ty), mask=inside)
        row += programs
    if SUM:
        tl.store(partial + tl.program_id(0).to(tl.int64) * width + columns, total, mask=inside)


@triton.jit
def _rope(
    heads, cos, sin, token_stride, head_stride, cos_row, sin_row, count, half,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    c = tl.load(cos + token * cos_row + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_row + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        s = -s
    inside = (head < count)[:, None] & (column < half)[None, :]
    place = heads + token * token_stride + head.to(tl.int64)[:, None] * head_stride + column[None, :]
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (low * c - high * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(place + half, (high * c + low * s).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm(
    heads, weight, out, rstd, token_stride, head_stride, out_token, out_head, count, width, eps,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (head < count)[:, None] & (column < width)[None, :]
    place = heads + token * token_stride + head[:, None] * head_stride + column[None, :]
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(rstd + token * count + head, scale, mask=head < count)
    x_hat = (values * scale[:, None]).to(heads.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    place = out + token * out_token + head[:, None] * out_head + column[None, :]
    tl.store(place, (factor * x_hat).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm_backward(
    dheads, raw, weight, rstd, partial, d_token, d_head, raw_token, raw_head, tokens, count, width, programs,
    SUM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (head < count)[:, None] & (column < width)[None, :]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    while token < tokens:
        scale = tl.load(rstd + token * count + head, mask=head < count, other=0.0)[:, None]
        place = dheads + token * d_token + head[:, None] * d_head + column[None, :]
        slope = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        source = raw + token * raw_token + head[:, None] * raw_head + column[None, :]
        x_hat = tl.load(source, mask=inside, other=0.0).to(tl.float32) * scale
        if SUM:
            total += tl.sum(slope * x_hat.to(raw.dtype.element_ty).to(tl.float32), axis=0)
        slope *= factor
        mean = tl.sum(slope * x_hat, axis=1)[:, None] / width
        tl.store(place, ((slope - x_hat * mean) * scale).to(dheads.dtype.element_ty), mask=inside)
        token += programs
    if SUM:
        row = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        tl.store(partial + row * width + column, total, mask=column < width)


@triton.jit
def _silu_mul(gate_up, out, row_stride, out_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = gate_up + row * row_stride + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_row + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_backward(
    gate_up, dact, act, row_stride, dact_row, act_row, width, ACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = gate_up + row * row_stride + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dact + row * dact_row + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if ACT:
        tl.store(act + row * act_row + column, (silu * up).to(act.dtype.element_ty), mask=inside)
    dgate = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(place, dgate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(place + width, (slope * silu).to(gate_up.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, rstd: Tensor) -> None:
    """`elementwise.rms_norm` into `out` and `rstd`."""
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    if x.numel():
        with _device_of(x):
            _rms_norm[(tokens,)](
                x, weight, out, rstd, x.stride(0), out.stride(0), width, eps,
                BLOCK=block, num_warps=_warps(block), **_OPTIONS
            )  # fmt: skip


def rms_norm_backward(
    dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, dweight: Tensor | None
) -> None:
    """`elementwise.rms_norm_backward`."""
    tokens, width = x.shape
    if not x.numel():
        return
    block = triton.next_power_of_2(width)
    programs = tokens if dweight is None else min(tokens, _summing_programs(x))
    partial = rstd if dweight is None else rstd.new_empty(programs, width)
    with _device_of(x):
        _rms_norm_backward[(programs,)](
            dh, x, weight, rstd, grad, partial, dh.stride(0), x.stride(0), grad.stride(0), tokens, width,
            programs, SUM=dweight is not None, BLOCK=block, num_warps=_warps(block), **_OPTIONS
        )  # fmt: skip
    if dweight is not None:
        dweight += partial.sum(0)


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """`elementwise.apply_rope`."""
    tokens, count, width = heads.shape
    if not heads.numel():
        return
    block = triton.next_power_of_2(width // 2)
    at_once = _heads_at_once(count, block)
    with _device_of(heads):
        _rope[(tokens, triton.cdiv(count, at_once))](
            heads, cos, sin, heads.stride(0), heads.stride(1), cos.stride(0), sin.stride(0), count,
            width // 2, BACKWARD=backward, HEADS=at_once, HALF=block, num_warps=4, **_OPTIONS
        )  # fmt: skip


def head_norm(heads: Tensor, weight: Tensor, eps: float, out: Tensor, rstd: Tensor) -> None:
    """`elementwise.head_norm` into `out` and `rstd`."""
    tokens, count, width = heads.shape
    if not heads.numel():
        return
    block = triton.next_power_of_2(width)
    at_once = _heads_at_once(count, block)
    with _device_of(heads):
        _head_norm[(tokens, triton.cdiv(count, at_once))](
            heads, weight, out, rstd, heads.stride(0), heads.stride(1), out.stride(0), out.stride(1), count,
            width, eps, HEADS=at_once, BLOCK=block, num_warps=4, **_OPTIONS
        )  # fmt: skip


def head_norm_backward(
    dheads: Tensor, raw: Tensor, weight: Tensor, rstd: Tensor, dweight: Tensor | None
) -> None:
    """`elementwise.head_norm_backward`."""
    tokens, count, width = raw.shape
    if not raw.numel():
        return
    block = triton.next_power_of_2(width)
    at_once = _heads_at_once(count, block)
    pieces = triton.cdiv(count, at_once)
    programs = tokens if dweight is None else min(tokens, _summing_programs(raw))
    partial = rstd if dweight is None else rstd.new_empty(programs * pieces, width)
    with _device_of(raw):
        _head_norm_backward[(programs, pieces)](
            dheads, raw, weight, rstd, partial, dheads.stride(0), dheads.stride(1), raw.stride(0),
            raw.stride(1), tokens, count, width, programs,
            SUM=dweight is not None, HEADS=at_once, BLOCK=block, num_warps=4, **_OPTIONS
        )  # fmt: skip
    if dweight is not None:
        dweight += partial.sum(0)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """`elementwise.silu_mul`."""
    tokens, width = out.shape
    if out.numel():
        with _device_of(out):
            _silu_mul[(tokens, triton.cdiv(width, _SILU_COLUMNS))](
                gate_up,
                out,
                gate_up.stride(0),
                out.stride(0),
                width,
                BLOCK=_SILU_COLUMNS,
                num_warps=4,
                **_OPTIONS,
            )


def silu_mul_backward(gate_up: Tensor, dact: Tensor, act: Tensor | None) -> None:
    """`elementwise.silu_mul_backward`."""
    tokens, width = dact.shape
    target = dact if act is None else act
    if dact.numel():
        with _device_of(dact):
            _silu_mul_backward[(tokens, triton.cdiv(width, _SILU_COLUMNS))](
                gate_up, dact, target, gate_up.stride(0), dact.stride(0), target.stride(0), width,
                ACT=act is not None, BLOCK=_SILU_COLUMNS, num_warps=4, **_OPTIONS
            )  # fmt: skip


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _heads_at_once(count: int, block: int) -> int:
    return min(triton.next_power_of_2(count), max(_BLOCK_ELEMENTS // block, 1))


def _summing_programs(x: Tensor) -> int:
    if not x.is_cuda:  # Triton's interpreter
        return _PROGRAMS_PER_SM
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
