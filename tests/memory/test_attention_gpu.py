"""On a GPU, in bf16, every kernel is as near to exact attention as PyTorch's own unfused path in bf16.

Errors are the root mean square of the difference over that of the exact values, computed in float64 on the GPU. The
measure of each is `scaled_dot_product_attention` on its math backend with matrix products in bf16; a kernel may be
1.25 times as far off, and is usually nearer, because its scores stay in float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlora_cli.memory.attention_documents import PlainKernel
from longlora_cli.memory.attention_fa4 import fa4_problem
from longlora_cli.memory.attention_kernels import (
    AttentionKernel,
    attend,
    attend_backward,
    attend_forward,
    choose_kernel,
)

# FlashAttention-4 compiles kernels at their first call; what its compiler warns of is not what is tested here.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

SHAPES = {"32q-8kv-128": (32, 8, 128), "9q-3kv-64": (9, 3, 64), "4q-4kv-64": (4, 4, 64)}
DOCUMENTS = {"packed": (1, 700, 2299), "one": (4096,), "equal": (1000, 1000, 1000)}
NAMES = ["fa4", "cudnn", "flash", "efficient", "torch", "auto"]
ALLOWED = 1.25


class Case(NamedTuple):
    """bf16 operands as views of one buffer, the exact result, and the errors of PyTorch's unfused bf16 path."""

    buffer: Tensor
    grad: Tensor
    exact: tuple[Tensor, ...]
    lse: Tensor
    allowed: tuple[float, ...]


def views(buffer: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, head_dim = shape
    q, k, v = buffer.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    return q, k, v


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@lru_cache(maxsize=1)
def case(shape: tuple[int, int, int], lengths: tuple[int, ...]) -> Case:
    heads, kv_heads, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = sum(lengths)

    def draw(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=generator, device="cuda").bfloat16()

    buffer, grad = (
        draw((heads + 2 * kv_heads) * head_dim),
        draw(heads * head_dim).unflatten(1, (heads, head_dim)),
    )
    exact = [t.double() for t in views(buffer, shape)]
    out, lse = attend_forward(PlainKernel(), *exact, lengths, head_dim**-0.5, kv_heads_per_call=1)
    attend_backward(
        PlainKernel(), grad.double(), *exact, out, lse, lengths, head_dim**-0.5, kv_heads_per_call=1
    )
    wanted = (out, *exact)
    measured = unfused(views(buffer, shape), grad, lengths, head_dim**-0.5)
    errors = tuple(ALLOWED * error(a, e) for a, e in zip(measured, wanted, strict=True))
    return Case(buffer, grad, wanted, lse, errors)


def unfused(
    tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor, lengths: tuple[int, ...], scale: float
) -> tuple[Tensor, ...]:
    """PyTorch's math path, document by document, with its matrix products in bf16 instead of float32."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        pieces = []
        with sdpa_kernel(SDPBackend.MATH):
            for parts in zip(*(t.split(list(lengths)) for t in leaves), strict=True):
                q, k, v = (t.transpose(0, 1)[None] for t in parts)
                piece = nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=True
                )
                pieces.append(piece[0].transpose(0, 1))
        out = torch.cat(pieces)
        gradients = torch.autograd.grad(out, leaves, grad)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    return (out.detach(), *gradients)


def kernel_named(name: str, head_dim: int) -> AttentionKernel:
    device = torch.device("cuda", torch.cuda.current_device())
    if name == "fa4" and "not installed" in (fa4_problem(device) or ""):
        pytest.skip("flash-attn-4 is not installed")
    return choose_kernel(name, device, torch.bfloat16, head_dim)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_heads_per_call", [0, 1])
def test_a_kernel_is_no_further_from_exact_than_pytorchs_unfused_path(
    shape: tuple[int, int, int], lengths: tuple[int, ...], name: str, kv_heads_per_call: int
) -> None:
    kernel, problem, scale = kernel_named(name, shape[2]), case(shape, lengths), shape[2] ** -0.5
    q, k, v = views(problem.buffer.clone(), shape)
    options = {"kv_heads_per_call": kv_heads_per_call}
    out, lse = attend_forward(kernel, q, k, v, lengths, scale, **options)
    kept = out.clone()
    attend_backward(kernel, problem.grad, q, k, v, out, lse, lengths, scale, **options)
    found = [error(a, e) for a, e in zip((kept, q, k, v), problem.exact, strict=True)]
    report = dict(zip(("out", "dq", "dk", "dv"), zip(found, problem.allowed, strict=True), strict=True))
    assert all(a <= b for a, b in report.values()), report
    assert lse.dtype == torch.float32
    # Scores of bf16 operands are summed in float32: 2^-10 is far above its rounding and far below one bf16 step.
    assert float((lse.double() - problem.lse).abs().max()) < 2**-10


@pytest.mark.parametrize("name", NAMES)
def test_autograd_gives_the_explicit_gradients(name: str) -> None:
    shape, lengths = SHAPES["9q-3kv-64"], DOCUMENTS["packed"]
    kernel, problem = kernel_named(name, 64), case(shape, lengths)
    leaves = [t.detach().requires_grad_() for t in views(problem.buffer.clone(), shape)]
    out = attend(*leaves, lengths, 0.125, kernel)
    found = [out.detach(), *torch.autograd.grad(out, leaves, problem.grad)]
    for actual, exact, allowed in zip(found, problem.exact, problem.allowed, strict=True):
        assert error(actual, exact) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_shifted_groups_equal_the_plain_twin(name: str) -> None:
    shape, lengths = SHAPES["9q-3kv-64"], DOCUMENTS["packed"]
    kernel, problem = kernel_named(name, 64), case(shape, lengths)
    q, k, v = views(problem.buffer.clone(), shape)
    exact = [t.double() for t in (q, k, v)]
    for chosen, tensors in ((PlainKernel(), exact), (kernel, [q, k, v])):
        out, lse = attend_forward(chosen, *tensors, lengths, 0.125, shifted_group=512)
        grad = problem.grad.to(out.dtype)
        attend_backward(chosen, grad, *tensors, out, lse, lengths, 0.125, shifted_group=512)
    for actual, wanted, allowed in zip((q, k, v), exact, problem.allowed[1:], strict=True):
        assert error(actual, wanted) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_its_own_value_and_gets_no_gradient_through_its_score(name: str) -> None:
    kernel = kernel_named(name, 64)
    q, k, v = (torch.randn(1, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    out, lse = attend_forward(kernel, q, k, v, [1], 0.125)
    assert torch.equal(out, v.repeat_interleave(2, 1))
    attend_backward(kernel, torch.ones_like(out), q, k, v, out, lse, [1], 0.125)
    assert torch.equal(v, torch.full_like(v, 2))
    assert float(q.abs().max()) < 0.05
    assert float(k.abs().max()) < 0.05


def test_float32_on_a_gpu_is_exact_to_its_rounding() -> None:
    kernel = choose_kernel("auto", torch.device("cuda", 0), torch.float32, 64)
    shape, lengths = SHAPES["9q-3kv-64"], DOCUMENTS["packed"]
    problem = case(shape, lengths)
    q, k, v = views(problem.buffer.float(), shape)
    out, lse = attend_forward(kernel, q, k, v, lengths, 0.125)
    kept = out.clone()
    attend_backward(kernel, problem.grad.float(), q, k, v, out, lse, lengths, 0.125)
    for actual, exact in zip((kept, q, k, v), problem.exact, strict=True):
        assert error(actual, exact) < 2e-3  # its products are TF32 where the GPU has it
