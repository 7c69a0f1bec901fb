"""What is handed to GPU operators, checked on a CPU: stand-ins bind the arguments to the operators' own schemas."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longlora_cli.memory import attention_cuda
from longlora_cli.memory.attention_cuda import CudnnKernel, EfficientKernel, FlashKernel
from longlora_cli.memory.attention_documents import PlainKernel
from longlora_cli.memory.attention_fa4 import Fa4Kernel
from longlora_cli.memory.attention_kernels import AttentionKernel, attend_backward, attend_forward

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3
PLAIN = PlainKernel()
ATEN = torch.ops.aten


def bind(operator: Any, args: tuple[Any, ...], options: dict[str, Any]) -> SimpleNamespace:
    """Arguments by the schema's names; a missing, doubled or unknown one fails as it would in the operator."""
    names = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    known = {argument.name: argument for argument in operator._schema.arguments}
    given = dict(zip(names, args, strict=False))
    assert len(args) <= len(names)
    assert not set(options) & set(given)
    assert set(options) <= set(known)
    given |= options
    for name, argument in known.items():
        if name not in given:
            assert argument.has_default_value(), f"{name} is missing"
    return SimpleNamespace(**given)


class CudnnStandIn:
    """`[count, heads, tokens, width]`, only whole buckets, log-sum-exp with `dimensions` dimensions."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.forward_op = ATEN._scaled_dot_product_cudnn_attention.default
        self.backward_op = ATEN._scaled_dot_product_cudnn_attention_backward.default

    def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        a = bind(self.forward_op, args, options)
        count, _, tokens, _ = a.query.shape
        assert tokens % 128 == 0
        assert (a.attn_bias, a.compute_log_sumexp, a.dropout_p, a.is_causal) == (None, True, 0.0, True)
        q, k, v = (t.transpose(1, 2).flatten(0, 1).double() for t in (a.query, a.key, a.value))
        out, lse = PLAIN.forward(q, k, v, [tokens] * count, a.scale)
        lse = lse.unflatten(1, (count, tokens)).transpose(0, 1)
        lse = lse[..., None] if self.dimensions == 4 else lse
        return (out.unflatten(0, (count, tokens)).transpose(1, 2), lse, None, None, tokens, tokens, 0, 0, 0)

    def backward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        a = bind(self.backward_op, args, options)
        count, heads, tokens, _ = a.query.shape
        assert (a.max_q, a.max_k, a.dropout_p, a.is_causal) == (tokens, tokens, 0.0, True)
        assert (a.attn_bias, a.cum_seq_q, a.cum_seq_k) == (None, None, None)
        assert a.philox_seed.dtype == a.philox_offset.dtype == torch.int64
        assert a.logsumexp.dim() == self.dimensions
        assert a.logsumexp.is_contiguous()
        assert a.logsumexp.isfinite().all()
        lse = a.logsumexp.reshape(count, heads, tokens).transpose(0, 1).flatten(1)
        tensors = (t.transpose(1, 2).flatten(0, 1) for t in (a.grad_out, a.query, a.key, a.value, a.out))
        gradients = PLAIN.backward(*tensors, lse, [tokens] * count, a.scale)
        return tuple(t.unflatten(0, (count, tokens)).transpose(1, 2) for t in gradients)


class FlashStandIn:
    """Packed tensors and where documents start."""

    forward_op = ATEN._flash_attention_forward.default
    backward_op = ATEN._flash_attention_backward.default

    def lengths(self, a: SimpleNamespace) -> list[int]:
        assert a.cum_seq_q.dtype == a.cum_seq_k.dtype == torch.int32
        lengths = a.cum_seq_q.diff().tolist()
        assert a.cum_seq_k.diff().tolist() == lengths
        assert a.max_q == a.max_k == max(lengths)
        assert (a.dropout_p, a.is_causal) == (0.0, True)
        return lengths

    def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        a = bind(self.forward_op, args, options)
        assert a.return_debug_mask is False
        return (*PLAIN.forward(a.query, a.key, a.value, self.lengths(a), a.scale), None, None, None)

    def backward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        a = bind(self.backward_op, args, options)
        assert a.rng_state.dtype == torch.uint64
        tensors = (a.grad_out, a.query, a.key, a.value, a.out, a.logsumexp)
        return PLAIN.backward(*tensors, self.lengths(a), a.scale)


class EfficientStandIn:
    """`[count, tokens, heads, width]` with a KV head for each query head; rows of sums in multiples of 32."""

    forward_op = ATEN._efficient_attention_forward.default
    backward_op = ATEN._efficient_attention_backward.default

    def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        a = bind(self.forward_op, args, options)
        count, tokens, heads, _ = a.query.shape
        assert a.key.shape == a.value.shape == a.query.shape
        assert (a.bias, a.cu_seqlens_q, a.cu_seqlens_k, a.dropout_p) == (None, None, None, 0.0)
        assert (a.custom_mask_type, a.compute_log_sumexp) == (1, True)
        out, lse = PLAIN.forward(
            *(t.flatten(0, 1) for t in (a.query, a.key, a.value)), [tokens] * count, a.scale
        )
        rows = lse.new_full((count, heads, math.ceil(tokens / 32) * 32), float("inf"))
        rows[:, :, :tokens] = lse.unflatten(1, (count, tokens)).transpose(0, 1)
        return out.unflatten(0, (count, tokens)), rows, None, None, tokens, tokens

    def backward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        a = bind(self.backward_op, args, options)
        count, tokens, heads, _ = a.query.shape
        assert a.grad_out_.shape == a.key.shape == a.value.shape == a.query.shape
        assert (a.max_seqlen_q, a.max_seqlen_k, a.dropout_p, a.custom_mask_type) == (tokens, tokens, 0.0, 1)
        assert a.bias_requires_grad is False
        assert a.logsumexp.shape == (count, heads, math.ceil(tokens / 32) * 32)
        assert a.logsumexp[:, :, tokens:].isposinf().all()
        lse = a.logsumexp[:, :, :tokens].transpose(0, 1).flatten(1)
        tensors = (t.flatten(0, 1) for t in (a.grad_out_, a.query, a.key, a.value, a.out))
        gradients = PLAIN.backward(*tensors, lse, [tokens] * count, a.scale)
        return (*(t.unflatten(0, (count, tokens)) for t in gradients), None)


class Fa4StandIn:
    """The shapes of flash-attn-4 4.0.0b18: fixed-length with a batch of one, or packed with cumulative lengths."""

    def _flash_attn_fwd(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        return_lse: bool,
        **packing: Any,
    ) -> tuple[Tensor, Tensor]:
        assert causal
        assert return_lse
        lengths, one = self.lengths(q, packing)
        out, lse = PLAIN.forward(*(t[0] if one else t for t in (q, k, v)), lengths, softmax_scale)
        return (out[None], lse[None]) if one else (out, lse)

    def _flash_attn_bwd(
        self, *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: float,
        causal: bool, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None, **packing: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert causal
        lengths, one = self.lengths(q, packing)
        tensors = (t[0] if one else t for t in (dout, q, k, v, out, lse))
        gradients = PLAIN.backward(*tensors, lengths, softmax_scale)
        results = []
        for gradient, operand, target in zip(gradients, (q, k, v), (dq, dk, dv), strict=True):
            target = torch.empty_like(operand) if target is None else target
            results.append(target.copy_(gradient[None] if one else gradient))
        return tuple(results)

    def lengths(self, q: Tensor, packing: dict[str, Any]) -> tuple[list[int], bool]:
        if not packing:
            assert q.dim() == 4
            return [q.shape[1]], True
        assert set(packing) == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
        lengths = packing["cu_seqlens_q"].diff().tolist()
        assert packing["cu_seqlens_k"].diff().tolist() == lengths
        assert packing["cu_seqlens_q"].dtype == packing["cu_seqlens_k"].dtype == torch.int32
        assert (packing["max_seqlen_q"], packing["max_seqlen_k"]) == (max(lengths), max(lengths))
        assert q.dim() == 3
        return lengths, False


def operators(stand_in: Any) -> SimpleNamespace:
    """What takes the place of `torch.ops.aten`: the two operators of the stand-in, and no other."""
    pairs = ((stand_in.forward_op, stand_in.forward), (stand_in.backward_op, stand_in.backward))
    names = {
        op._schema.name.removeprefix("aten::"): SimpleNamespace(default=function) for op, function in pairs
    }
    return SimpleNamespace(**names)


@pytest.fixture(params=["cudnn", "cudnn of 3 dimensions", "flash", "efficient", "fa4"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    if request.param == "fa4":
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        return Fa4Kernel(Fa4StandIn())
    made: dict[str, tuple[AttentionKernel, Any]] = {
        "cudnn": (CudnnKernel(), CudnnStandIn(4)),
        "cudnn of 3 dimensions": (CudnnKernel(), CudnnStandIn(3)),
        "flash": (FlashKernel(), FlashStandIn()),
        "efficient": (EfficientKernel(), EfficientStandIn()),
    }
    kernel, stand_in = made[request.param]
    monkeypatch.setattr(attention_cuda, "_ATEN", operators(stand_in))
    attention_cuda._cudnn_lse_dimensions.cache_clear()
    attention_cuda.document_starts.cache_clear()
    return kernel


@pytest.mark.parametrize("lengths", [[40], [5, 1, 34], [13, 13, 14]])
@pytest.mark.parametrize("kv_heads_per_call", [0, 1])
def test_operators_get_what_their_schema_names_and_give_plain_attention(
    kernel: AttentionKernel, lengths: list[int], kv_heads_per_call: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(40, 2 * HEADS + 2 * KV_HEADS, WIDTH, generator=generator, dtype=torch.float64)
    grad, q, k, v = draw.split([HEADS, HEADS, KV_HEADS, KV_HEADS], 1)
    out, lse = PLAIN.forward(q, k, v, lengths, SCALE)
    gradients = PLAIN.backward(grad, q, k, v, out, lse, lengths, SCALE)
    options = {"kv_heads_per_call": kv_heads_per_call}
    actual = attend_forward(kernel, q, k, v, lengths, SCALE, **options)
    torch.testing.assert_close(actual, (out, lse), rtol=1e-10, atol=1e-12)
    attend_backward(kernel, grad, q, k, v, *actual, lengths, SCALE, **options)
    torch.testing.assert_close((q, k, v), gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "overwritten"),
    [(4, 2, 8, {"dq", "dk", "dv"}), (4, 4, 8, {"dq"}), (4, 2, 256, set())],
)
def test_flash_attention_4_writes_over_an_operand_only_after_its_last_read(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, width: int, overwritten: set[str]
) -> None:
    """Without shared KV heads its main kernel writes dk and dv itself; 256 wide it writes all three."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    seen: set[str] = set()

    class Targets(Fa4StandIn):
        def _flash_attn_bwd(self, **options: Any) -> tuple[Tensor, ...]:
            seen.update({"dq", "dk", "dv"} & set(options))
            return super()._flash_attn_bwd(**options)

    q, k, v = (torch.randn(5, n, width, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    kernel = Fa4Kernel(Targets())
    out, lse = attend_forward(kernel, q, k, v, [5], SCALE)
    attend_backward(kernel, torch.ones_like(out), q, k, v, out, lse, [5], SCALE)
    assert seen == overwritten


def test_cudnn_gets_documents_in_buckets_of_512_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Sizes(CudnnStandIn):
        def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
            sizes.append(args[0].shape[2])
            return super().forward(*args, **options)

    monkeypatch.setattr(attention_cuda, "_ATEN", operators(Sizes(4)))
    q = torch.randn(1100, 1, WIDTH, dtype=torch.float64)
    CudnnKernel().forward(q, q, q, [1, 512, 587], SCALE)
    assert sizes == [512, 512, 1024]
