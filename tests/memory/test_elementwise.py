"""Norms, rotary positions and gated activation: float64 against autograd of Hugging Face's formulas; Triton against
the plain path, on a GPU or, where Triton is installed, in its interpreter (`TRITON_INTERPRET=1`) on a CPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from longlora_cli.memory import elementwise
from longlora_cli.memory.elementwise import (
    apply_rope,
    head_norm,
    head_norm_backward,
    rms_norm,
    rms_norm_backward,
    silu_mul,
    silu_mul_backward,
)

EPS = 1e-5
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
TOKENS = [0, 1, 7]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Normal = Callable[..., Tensor]


@pytest.fixture
def normal() -> Normal:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


def strided(values: Tensor, more: int = 3) -> Tensor:
    """The same values as a view of rows `more` wider, offset by one; what lies around them is not a number."""
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + more), float("nan"))
    view = wide[..., 1 : 1 + values.shape[-1]]
    view.copy_(values)
    return view


def hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def hf_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("tokens", TOKENS)
def test_rms_norm_is_hugging_faces_with_every_gradient(normal: Normal, tokens: int) -> None:
    x, weight = normal(tokens, 12).requires_grad_(), normal(12).requires_grad_()
    dh, before = normal(tokens, 12), normal(tokens, 12)
    expected = hf_norm(x, weight)
    expected.backward(dh)
    out, rstd = rms_norm(strided(x.detach()), weight, EPS, out=strided(torch.empty(tokens, 12).double()))
    grad, dweight = strided(before), torch.ones(12, dtype=torch.float64)
    rms_norm_backward(strided(dh), strided(x.detach()), weight, rstd, grad, dweight)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(grad, before + x.grad, **EXACT)
    torch.testing.assert_close(dweight, 1 + weight.grad, **EXACT)


def test_rms_norm_may_write_over_its_input(normal: Normal) -> None:
    x, weight = normal(5, 8), normal(8)
    expected = hf_norm(x, weight)
    assert rms_norm(x, weight, EPS, out=x)[0] is x
    torch.testing.assert_close(x, expected, **EXACT)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_rounds_where_hugging_face_rounds(normal: Normal, weight_dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(48, EPS).to(weight_dtype)
    with torch.no_grad():
        module.weight.copy_(normal(48))
    x = normal(9, 48, dtype=torch.bfloat16)
    out, rstd = rms_norm(x, module.weight, EPS)
    assert (out.dtype, rstd.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, module(x).to(torch.bfloat16))


@pytest.mark.parametrize("tokens", TOKENS)
def test_rope_is_hugging_faces_and_its_backward_the_transpose(normal: Normal, tokens: int) -> None:
    # Angles of nothing in particular: cos^2 + sin^2 is not 1, as with YaRN's attention factor.
    heads, cos, sin = normal(tokens, 3, 8).requires_grad_(), normal(tokens, 4), normal(tokens, 4)
    slope = normal(tokens, 3, 8)
    expected = hf_rope(heads, cos, sin)
    expected.backward(slope)
    rotated, gradient = strided(heads.detach()), strided(slope)
    apply_rope(rotated, strided(cos), strided(sin))
    apply_rope(gradient, strided(cos), strided(sin), backward=True)
    torch.testing.assert_close(rotated, expected, **EXACT)
    torch.testing.assert_close(gradient, heads.grad, **EXACT)


def test_rope_takes_the_heads_of_one_packed_projection(normal: Normal) -> None:
    qkv, cos, sin = normal(5, (4 + 2 + 2) * 6), normal(5, 3), normal(5, 3)
    before = qkv.clone().view(5, 8, 6)
    apply_rope(qkv.view(5, 8, 6)[:, 4:6], cos, sin)
    after = qkv.view(5, 8, 6)
    torch.testing.assert_close(after[:, 4:6], hf_rope(before[:, 4:6], cos, sin), **EXACT)
    assert torch.equal(after[:, :4], before[:, :4])
    assert torch.equal(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("tokens", TOKENS)
def test_head_norm_is_qwen3s_with_every_gradient_also_where_a_weight_is_zero(
    normal: Normal, tokens: int
) -> None:
    raw, weight = normal(tokens, 3, 8).requires_grad_(), normal(8)
    weight[2] = 0
    weight.requires_grad_()
    slope = normal(tokens, 3, 8)
    expected = hf_norm(raw, weight)
    expected.backward(slope)
    heads, gradient = strided(raw.detach()), strided(slope)
    dweight = torch.ones(8, dtype=torch.float64)
    rstd = head_norm(heads, weight, EPS)
    head_norm_backward(gradient, strided(raw.detach()), weight, rstd, dweight)
    torch.testing.assert_close(heads, expected, **EXACT)
    torch.testing.assert_close(gradient, raw.grad, **EXACT)
    torch.testing.assert_close(dweight, 1 + weight.grad, **EXACT)


def test_head_norm_can_leave_its_input_alone(normal: Normal) -> None:
    raw, weight = normal(4, 2, 6), normal(6)
    before, out = raw.clone(), torch.empty_like(raw)
    head_norm(raw, weight, EPS, out=out)
    assert torch.equal(raw, before)
    torch.testing.assert_close(out, hf_norm(raw, weight), **EXACT)


@pytest.mark.parametrize("tokens", TOKENS)
def test_silu_mul_is_hugging_faces_with_every_gradient(normal: Normal, tokens: int) -> None:
    gate_up, dact = normal(tokens, 14).requires_grad_(), normal(tokens, 7)
    gate, up = gate_up.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(dact)
    out, act = strided(torch.empty_like(dact)), strided(torch.empty_like(dact))
    silu_mul(strided(gate_up.detach()), out)
    gradient = strided(gate_up.detach())
    silu_mul_backward(gradient, strided(dact), act)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(act, expected, **EXACT)
    torch.testing.assert_close(gradient, gate_up.grad, **EXACT)


def test_silu_mul_may_give_the_activation_in_the_memory_of_its_gradient(normal: Normal) -> None:
    gate_up, dact = normal(5, 14), normal(5, 7)
    separate, act = gate_up.clone(), torch.empty_like(dact)
    silu_mul_backward(separate, dact, act)
    silu_mul_backward(gate_up, dact, dact)
    assert torch.equal(dact, act)
    assert torch.equal(gate_up, separate)


def test_the_plain_path_in_tiles_gives_what_one_tile_gives(
    normal: Normal, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dh, weight = normal(7, 8), normal(7, 8), normal(8)

    def gradients() -> tuple[Tensor, Tensor]:
        grad, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        _, rstd = rms_norm(x, weight, EPS)
        rms_norm_backward(dh, x, weight, rstd, grad, dweight)
        return grad, dweight

    whole = gradients()
    monkeypatch.setattr(elementwise, "_PLAIN_ROWS", 3)
    for tiled, one in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(tiled, one, **EXACT)


def test_nothing_is_recorded_by_autograd(normal: Normal) -> None:
    weight = normal(8).requires_grad_()
    assert not rms_norm(normal(3, 8), weight, EPS)[0].requires_grad


# ---- Triton -----------------------------------------------------------------------------------------------------

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place. A value that is rounded on either side may differ by one, a norm (rounded before and after
# its weight) by two; the interpreter cuts float32 to bfloat16 where a GPU rounds.
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def close(found: Tensor, expected: Tensor, units: int) -> None:
    torch.testing.assert_close(found, expected, rtol=units * UNIT[expected.dtype], atol=1e-5)


def close_sums(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums over tokens of values of `dtype`: by norm, because single ones may cancel."""
    assert (found - expected).norm() <= UNIT[dtype] * expected.norm()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Triton module, also on a CPU; there the public functions take the plain path."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    pytest.importorskip("triton", reason="no triton")
    module = importlib.import_module("longlora_cli.memory.triton_kernels")
    monkeypatch.setattr(elementwise, "_triton_module", lambda: None)
    return module


def on(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies as strided views on the device under test."""
    return tuple(strided(t.to(DEVICE)) for t in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (5, 12), (9, 300), (0, 8)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_triton_rms_norm_is_the_plain_one(
    kernels: ModuleType,
    normal: Normal,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    weight_dtype: torch.dtype | None,
) -> None:
    x, dh, before = (normal(tokens, width, dtype=dtype) for _ in range(3))
    weight = normal(width, dtype=weight_dtype or dtype).to(DEVICE)
    x, dh, grad, expected_grad = on(x, dh, before, before)
    expected, rstd = rms_norm(x, weight, EPS)
    (out,), found_rstd = on(torch.empty(tokens, width, dtype=dtype)), torch.empty_like(rstd)
    kernels.rms_norm(x, weight, EPS, out, found_rstd)
    torch.testing.assert_close(found_rstd, rstd)
    close(out, expected, units=2)
    dweight, expected_dweight = (torch.ones(width, device=DEVICE) for _ in range(2))
    rms_norm_backward(dh, x, weight, rstd, expected_grad, expected_dweight)
    without = strided(grad)
    kernels.rms_norm_backward(dh, x, weight, rstd, grad, dweight)
    kernels.rms_norm_backward(dh, x, weight, rstd, without, None)
    close(grad, expected_grad, units=1)
    assert torch.equal(without, grad)
    close_sums(dweight, expected_dweight, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 4), (5, 3, 12), (6, 40, 128)])
@pytest.mark.parametrize("backward", [False, True])
def test_triton_rope_is_the_plain_one(
    kernels: ModuleType,
    normal: Normal,
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    width: int,
    backward: bool,
) -> None:
    cos, sin = on(*(normal(tokens, width // 2, dtype=torch.float32) for _ in range(2)))
    (packed,) = on(normal(tokens, heads + 2, width, dtype=dtype))
    expected = packed.clone()
    views = [t[:, 1 : 1 + heads] for t in (packed, expected)]
    kernels.apply_rope(views[0], cos, sin, backward)
    apply_rope(views[1], cos, sin, backward=backward)
    close(packed, expected, units=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 4), (7, 3, 12), (9, 40, 128)])
def test_triton_head_norm_is_the_plain_one(
    kernels: ModuleType, normal: Normal, dtype: torch.dtype, tokens: int, heads: int, width: int
) -> None:
    raw, slope = on(*(normal(tokens, heads, width, dtype=dtype) for _ in range(2)))
    weight = normal(width, dtype=dtype).to(DEVICE)
    out, expected, expected_slope = torch.empty_like(raw), torch.empty_like(raw), strided(slope)
    rstd = head_norm(raw, weight, EPS, out=expected)
    found_rstd = torch.empty_like(rstd)
    kernels.head_norm(raw, weight, EPS, out, found_rstd)
    torch.testing.assert_close(found_rstd, rstd)
    close(out, expected, units=2)
    dweight, expected_dweight = (torch.ones(width, device=DEVICE) for _ in range(2))
    without = strided(slope)
    kernels.head_norm_backward(slope, raw, weight, rstd, dweight)
    kernels.head_norm_backward(without, raw, weight, rstd, None)
    head_norm_backward(expected_slope, raw, weight, rstd, expected_dweight)
    close(slope, expected_slope, units=1)
    assert torch.equal(without, slope)
    close_sums(dweight, expected_dweight, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 7), (3, 1500), (0, 4)])
def test_triton_silu_mul_is_the_plain_one(
    kernels: ModuleType, normal: Normal, dtype: torch.dtype, tokens: int, width: int
) -> None:
    gate_up, dact = on(normal(tokens, 2 * width, dtype=dtype), normal(tokens, width, dtype=dtype))
    out, act, expected, expected_act = (strided(torch.empty_like(dact)) for _ in range(4))
    kernels.silu_mul(gate_up, out)
    silu_mul(gate_up, expected)
    close(out, expected, units=1)
    gradient, expected_gradient, in_place = (strided(gate_up) for _ in range(3))
    kernels.silu_mul_backward(gradient, dact, act)
    silu_mul_backward(expected_gradient, dact, expected_act)
    close(gradient, expected_gradient, units=1)
    close(act, expected_act, units=1)
    kernels.silu_mul_backward(in_place, dact, dact)
    assert torch.equal(in_place, gradient)
    assert torch.equal(dact, act)


@pytest.mark.gpu
def test_on_a_gpu_the_public_functions_run_the_kernels_and_64_bit_tensors_do_not(
    normal: Normal, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton", reason="no triton")
    module = importlib.import_module("longlora_cli.memory.triton_kernels")
    calls: list[torch.dtype] = []
    monkeypatch.setattr(module, "silu_mul", lambda gate_up, out: calls.append(gate_up.dtype))
    for dtype in (torch.bfloat16, torch.float64):
        gate_up = normal(2, 8, dtype=dtype).cuda()
        silu_mul(gate_up, gate_up.new_empty(2, 4))
    assert calls == [torch.bfloat16]


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_are_reached() -> None:
    """2.5e9 elements, 4.7 GiB: the last row of a 16-bit tensor whose offset does not fit 32 bits."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tokens, width = 625_000, 4_000
    gate_up = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    gate_up[-1] = 1
    out = torch.empty(tokens, width // 2, dtype=torch.bfloat16, device="cuda")
    silu_mul(gate_up, out)
    torch.testing.assert_close(
        out[-1].float(), torch.full((width // 2,), 0.73, device="cuda"), rtol=1e-2, atol=0
    )
    normed, _ = rms_norm(gate_up, torch.ones(width, device="cuda"), EPS, out=gate_up)
    torch.testing.assert_close(normed[-1].float(), torch.ones(width, device="cuda"), rtol=1e-2, atol=0)
    assert not normed[-2].any()
