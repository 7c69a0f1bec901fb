"""Norms, rotary positions and the gated activation of a Llama-like layer, forward and backward, in place.

Between its matrix products a layer only moves memory: at 131,072 tokens of width 4,096 one bfloat16 tensor is 1 GiB,
so each pass reads its inputs once, writes over what nobody needs any more, and keeps nothing but a norm's `rstd`.
The formulas are Hugging Face's (`LlamaRMSNorm`, `rotate_half`, `LlamaMLP`); RMSNorm: Zhang and Sennrich 2019
(arXiv:1910.07467), rotary positions: Su et al. 2021 (arXiv:2104.09864), SwiGLU: Shazeer 2020 (arXiv:2002.05202).

The functions below are plain PyTorch, and their own documentation. On CUDA, with 16- and 32-bit tensors and Triton
installed, `triton_kernels` does the same in one pass over memory. All tensors may be views of wider ones: the last
dim is contiguous, every other stride is free. Nothing here is recorded by autograd.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

# A Triton program holds one row in registers: 16,384 float32 values over 512 threads are 32 registers each.
_WIDEST_ROW = 16_384
# Rows the plain path works on at once: its float32 temporaries are at most 128 MiB each at a width of 4,096.
_PLAIN_ROWS = 8_192


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`weight * x / sqrt(mean(x^2) + eps)`, with Hugging Face's rounding: `x * rstd` to `x`'s dtype, then `weight`.

    Args:
        x: `[tokens, width]`.
        weight: `[width]`, in any floating dtype.
        eps: Added to the mean square.
        out: Where to write, `[tokens, width]` in `x`'s dtype; it may be `x` itself. New memory when None.

    Returns:
        `out`, and `rstd` `[tokens]` for the backward: float32, or float64 for float64 `x`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    rstd = torch.empty(x.shape[0], dtype=_sum_dtype(x), device=x.device)
    kernels = _kernels(x.shape[-1], x, weight, out)
    if kernels is not None:
        kernels.rms_norm(x, weight, eps, out, rstd)
        return out, rstd
    for rows in _tiles(x.shape[0]):
        _norm_into(out[rows], x[rows], weight, eps, rstd[rows])
    return out, rstd


@torch.no_grad()
def rms_norm_backward(
    dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, dweight: Tensor | None = None
) -> None:
    """Add `rms_norm`'s gradient to that of its input, which a residual branch has already written.

    Args:
        dh: Gradient of the output, `[tokens, width]`.
        x: The forward's input.
        weight: The forward's weight.
        rstd: What the forward returned.
        grad: `[tokens, width]`; the gradient of `x` is added in place, with one rounding.
        dweight: `[width]`, float32 or float64; the gradient of `weight` is added in place.
    """
    kernels = _kernels(x.shape[-1], dh, x, weight, grad, dweight)
    if kernels is not None:
        kernels.rms_norm_backward(dh, x, weight, rstd, grad, dweight)
        return
    for rows in _tiles(x.shape[0]):
        dx = _norm_backward(dh[rows], x[rows], weight, rstd[rows], dweight)
        grad[rows] = (grad[rows].to(dx.dtype) + dx).to(grad.dtype)


@torch.no_grad()
def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> None:
    """Rotate each pair `(i, i + head_dim / 2)` of every head in place, computed in float32 (float64 for float64).

    Args:
        heads: `[tokens, heads, head_dim]`, overwritten.
        cos: `[tokens, head_dim / 2]` in float32 (or float64); YaRN's attention factor may be multiplied in.
        sin: As `cos`.
        backward: Apply the transpose instead: `heads` holds the gradient of the rotated heads and receives that of
            the heads. It is the inverse rotation only where `cos^2 + sin^2` is 1.
    """
    kernels = _kernels(heads.shape[-1], heads, cos, sin)
    if kernels is not None:
        kernels.apply_rope(heads, cos, sin, backward)
        return
    half = heads.shape[-1] // 2
    for rows in _tiles(heads.shape[0]):
        c, s = cos[rows, None].to(_sum_dtype(heads)), sin[rows, None].to(_sum_dtype(heads))
        s = -s if backward else s
        first, second = (part.to(c.dtype) for part in heads[rows].split(half, -1))
        rotated = first * c - second * s, second * c + first * s
        heads[rows, :, :half], heads[rows, :, half:] = (part.to(heads.dtype) for part in rotated)


@torch.no_grad()
def head_norm(heads: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Qwen3's `q_norm` and `k_norm`: RMSNorm of each head on its own.

    Args:
        heads: `[tokens, heads, head_dim]`.
        weight: `[head_dim]`, shared by the heads.
        eps: Added to the mean square.
        out: Where to write, shaped and typed as `heads`. In place when None; but `head_norm_backward` needs the
            values before the norm, so the caller then has to compute them again.

    Returns:
        `rstd` `[tokens, heads]`: float32, or float64 for float64 `heads`.
    """
    out = heads if out is None else out
    rstd = torch.empty(heads.shape[:2], dtype=_sum_dtype(heads), device=heads.device)
    kernels = _kernels(heads.shape[-1], heads, weight, out)
    if kernels is not None:
        kernels.head_norm(heads, weight, eps, out, rstd)
        return rstd
    for rows in _tiles(heads.shape[0]):
        _norm_into(out[rows], heads[rows], weight, eps, rstd[rows])
    return rstd


@torch.no_grad()
def head_norm_backward(
    dheads: Tensor, raw: Tensor, weight: Tensor, rstd: Tensor, dweight: Tensor | None = None
) -> None:
    """Turn the gradient of `head_norm`'s output into that of its input, in place.

    It takes the values before the norm: those after it are `weight * x_hat`, and where a trained weight is zero, or
    so small that 16 bits lose `x_hat`, they cannot be divided back.

    Args:
        dheads: `[tokens, heads, head_dim]`, overwritten.
        raw: What `head_norm` was given.
        weight: `[head_dim]`.
        rstd: What `head_norm` returned.
        dweight: `[head_dim]`, float32 or float64; the gradient of `weight` is added in place.
    """
    kernels = _kernels(dheads.shape[-1], dheads, raw, weight, dweight)
    if kernels is not None:
        kernels.head_norm_backward(dheads, raw, weight, rstd, dweight)
        return
    for rows in _tiles(dheads.shape[0]):
        dx = _norm_backward(dheads[rows], raw[rows], weight, rstd[rows], dweight)
        dheads[rows] = dx.to(dheads.dtype)


@torch.no_grad()
def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """`out = silu(gate) * up`, computed in float32 (float64 for float64) and rounded once.

    Args:
        gate_up: `[tokens, 2 * intermediate]`, the gate first.
        out: `[tokens, intermediate]`, written; it may be the gate's own memory, `gate_up[:, :intermediate]`.
    """
    kernels = _kernels(1, gate_up, out)
    if kernels is not None:
        kernels.silu_mul(gate_up, out)
        return
    for rows in _tiles(gate_up.shape[0]):
        gate, up = gate_up[rows].to(_sum_dtype(gate_up)).chunk(2, -1)
        out[rows] = (torch.nn.functional.silu(gate) * up).to(out.dtype)


@torch.no_grad()
def silu_mul_backward(gate_up: Tensor, dact: Tensor, act: Tensor | None = None) -> None:
    """Overwrite the gate and up values by their gradients, and give the activation once more on the way.

    Args:
        gate_up: `[tokens, 2 * intermediate]`, the gate first; becomes `(dgate, dup)`.
        dact: Gradient of `silu_mul`'s output, `[tokens, intermediate]`.
        act: When given, receives `silu(gate) * up`; it may be `dact` itself, which is then overwritten.
    """
    kernels = _kernels(1, gate_up, dact, act)
    if kernels is not None:
        kernels.silu_mul_backward(gate_up, dact, act)
        return
    for rows in _tiles(gate_up.shape[0]):
        gate, up = gate_up[rows].to(_sum_dtype(gate_up)).chunk(2, -1)
        slope = dact[rows].to(gate.dtype)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        dgate = slope * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup, activation = slope * silu, silu * up  # all read before anything is written: memory may be shared
        if act is not None:
            act[rows] = activation.to(act.dtype)
        gate_up[rows] = torch.cat((dgate, dup), -1).to(gate_up.dtype)


def _norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float, rstd: Tensor) -> None:
    wide = x.to(rstd.dtype)
    torch.rsqrt(wide.square().mean(-1) + eps, out=rstd)
    out.copy_(weight * (wide * rstd[..., None]).to(x.dtype))


def _norm_backward(dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dweight: Tensor | None) -> Tensor:
    """The gradient of `x` in `rstd`'s dtype; adds that of `weight` over all dims but the last."""
    x_hat = x.to(rstd.dtype) * rstd[..., None]
    dh = dh.to(rstd.dtype)
    if dweight is not None:  # the weight met the rounded values
        dweight += (dh * x_hat.to(x.dtype)).flatten(0, -2).sum(0)
    slope = dh * weight
    return (slope - x_hat * (slope * x_hat).mean(-1, keepdim=True)) * rstd[..., None]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(rows: int) -> Iterator[slice]:
    return (slice(start, start + _PLAIN_ROWS) for start in range(0, rows, _PLAIN_ROWS))


def _kernels(width: int, *tensors: Tensor | None) -> ModuleType | None:
    """The Triton module when it can take these tensors, with rows of `width` in one program; else None."""
    given = [t for t in tensors if t is not None]
    if width > _WIDEST_ROW:
        return None
    if not all(t.is_cuda and t.element_size() <= 4 and t.stride(-1) == 1 for t in given):
        return None
    return _triton_module()


@functools.cache
def _triton_module() -> ModuleType | None:
    try:
        return importlib.import_module("longlora_cli.memory.triton_kernels")
    except ImportError:
        return None
