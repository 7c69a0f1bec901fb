"""One decoder layer of the Llama family with a backward of its own, a tile of tokens at a time.

    h = norm(x);  q, k, v = h W + LoRA;  rotate q, k;  O = attention(q, k, v)
    m = x + O W_o;  y = m + (silu(gate) * up) W_d,  gate, up = norm(m) W

Autograd keeps about 140 KiB a token for one such layer of Llama-3.1-8B. Here only `x` and, where the plan says so,
`O` with its log-sum-exp, q/k/v and gate/up outlive the forward pass; the rest exists for one tile of tokens, and the
MLP runs forward twice (once in forward, once fused with its backward), not three times as tiles under layer
checkpoints do (training memory after Luo et al. 2024, Mini-Sequence Transformer, arXiv:2407.15892). In backward dq, dk
and dv overwrite q, k and v, and the gradient of `y` becomes that of `x` in place. The plain twin is transformers'
layer under autograd; the figures are in docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.memory.attention_kernels import AttentionKernel, attend_backward, attend_forward
from longlora_cli.memory.elementwise import (
    apply_rope,
    head_norm,
    head_norm_backward,
    rms_norm,
    rms_norm_backward,
    silu_mul,
    silu_mul_backward,
)
from longlora_cli.memory.linear import GradientSums, LinearStack, LoadedStack
from longlora_cli.memory.plan import HELD_BYTES


@dataclass(frozen=True)
class Passage:
    """One packed sequence on its way through the layers: what all of them share.

    Args:
        cos: Rotary cosines, `[tokens, head_dim / 2]`, float32 (float64 for float64).
        sin: Rotary sines.
        documents: Lengths of the documents, in order; attention stays inside each.
        kernel: Attention of this device.
        tile_tokens: Tokens whose MLP exists at one time.
        kv_heads_per_call: Key-value heads in one attention call; 0 is all.
        shifted_group: Tokens of an S2-Attn group; 0 is full attention.
    """

    cos: Tensor
    sin: Tensor
    documents: list[int]
    kernel: AttentionKernel
    tile_tokens: int
    kv_heads_per_call: int = 0
    shifted_group: int = 0

    def tiles(self) -> Iterator[slice]:
        """Consecutive slices of at most `tile_tokens` tokens."""
        tokens = self.cos.shape[0]
        for start in range(0, tokens, self.tile_tokens):
            yield slice(start, min(start + self.tile_tokens, tokens))


@dataclass(frozen=True)
class Norm:
    """An RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467): its weight, frozen or trained, and epsilon."""

    weight: nn.Parameter
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """From a transformers RMSNorm, also inside PEFT's `modules_to_save`."""
        saved = getattr(module, "modules_to_save", None)
        if saved is not None:
            module = saved[module.active_adapters[0]]
        eps = getattr(module, "variance_epsilon", None)
        return cls(module.weight, float(module.eps if eps is None else eps))

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weight, if it is trained."""
        return [self.weight] if self.weight.requires_grad else []

    def sum_in(self, sums: GradientSums) -> Tensor | None:
        """Where the weight's gradient is collected; None for a frozen one."""
        return sums.zeros_for(self.weight) if self.weight.requires_grad else None


class FusedLayer:
    """The parts of one decoder layer.

    Args:
        layer: A decoder layer of Llama, Mistral, Qwen2 or Qwen3; `engine.fused_fault` says whether it is one.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
    """

    def __init__(self, layer: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale = float(getattr(attention, "scaling", head_dim**-0.5))
        self.norm_in, self.norm_mlp = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        has_head_norms = hasattr(attention, "q_norm")
        self.norm_q = Norm.of(attention.q_norm) if has_head_norms else None
        self.norm_k = Norm.of(attention.k_norm) if has_head_norms else None
        self.qkv = LinearStack([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = LinearStack([attention.o_proj])
        self.gate_up = LinearStack([mlp.gate_proj, mlp.up_proj])
        self.down = LinearStack([mlp.down_proj])

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that want a gradient, each once."""
        norms = (self.norm_in, self.norm_mlp, self.norm_q, self.norm_k)
        found = [p for norm in norms if norm is not None for p in norm.trained]
        for stack in self.stacks:
            found += stack.trained
        return found

    @property
    def stacks(self) -> tuple[LinearStack, LinearStack, LinearStack, LinearStack]:
        """Its linear layers by common input."""
        return self.qkv, self.o, self.gate_up, self.down

    def load(self, dtype: torch.dtype, device: torch.device, *, again: bool = False) -> LoadedLayer:
        """Its matrices for one pass; `again` for a later one of the same step, see `LinearStack.load`."""
        return LoadedLayer(self, *(stack.load(dtype, device, again=again) for stack in self.stacks))


def hold_matrices(layers: Sequence[FusedLayer]) -> int:
    """Let small layers hold their matrices ready between passes; the bytes that takes, 0 where they do not.

    `ModelShape.held_bytes` is the same from sizes alone.
    """
    stacks = [stack for layer in layers for stack in layer.stacks]
    sizes = [stack.held_bytes for stack in stacks]
    total = sum(size for size in sizes if size is not None)
    if None in sizes or total > HELD_BYTES:
        return 0
    for stack in stacks:
        stack.hold = True
    return total


@dataclass(frozen=True)
class LoadedLayer:
    """A layer with its matrices in compute precision, for one pass.

    Activations are `[tokens, features]`; heads lie side by side in q/k/v: all query heads, key heads, value heads.
    """

    layer: FusedLayer
    qkv: LoadedStack
    o: LoadedStack
    gate_up: LoadedStack
    down: LoadedStack

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q, k, v as `[tokens, heads, head_dim]`."""
        heads, kv = self.layer.heads, self.layer.kv_heads
        together = qkv.view(qkv.shape[0], heads + 2 * kv, self.layer.head_dim)
        return together[:, :heads], together[:, heads : heads + kv], together[:, heads + kv :]

    def project(self, x: Tensor, passage: Passage) -> Tensor:
        """Normed, projected and rotated q, k, v, `[tokens, (heads + 2 kv_heads) head_dim]`, of inputs `x`."""
        out = x.new_empty(x.shape[0], self.qkv.stack.outputs)
        for rows in passage.tiles():
            buffer, _ = self._normed(self.qkv, x[rows], self.layer.norm_in)
            self.qkv.forward(buffer, out=out[rows])
            q, k, _ = self.split(out[rows])
            for heads, norm in ((q, self.layer.norm_q), (k, self.layer.norm_k)):
                if norm is not None:
                    head_norm(heads, norm.weight, norm.eps)
                apply_rope(heads, passage.cos[rows], passage.sin[rows])
        return out

    def attend(self, qkv: Tensor, passage: Passage) -> tuple[Tensor, Tensor]:
        """Attention output `[tokens, heads head_dim]` and log-sum-exp `[heads, tokens]`."""
        out, lse = attend_forward(
            passage.kernel,
            *self.split(qkv),
            passage.documents,
            self.layer.scale,
            kv_heads_per_call=passage.kv_heads_per_call,
            shifted_group=passage.shifted_group,
        )
        return out.reshape(out.shape[0], -1), lse

    def finish(
        self, x: Tensor, attended: Tensor, passage: Passage, *, keep_gate_up: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The rest of the layer: outputs `[tokens, width]`, and gate and up `[tokens, 2 intermediate]` if kept."""
        y = torch.empty_like(x)
        kept = x.new_empty(x.shape[0], self.gate_up.stack.outputs) if keep_gate_up else None
        for rows in passage.tiles():
            _, middle = self._middle(x[rows], attended[rows])
            buffer, _ = self._normed(self.gate_up, middle, self.layer.norm_mlp)
            gate_up = self.gate_up.forward(buffer, out=None if kept is None else kept[rows])
            torch.add(self.down.forward(self._activated(gate_up)), middle, out=y[rows])
        return y, kept

    def finish_backward(
        self,
        grad: Tensor,
        x: Tensor,
        attended: Tensor,
        gate_up: Tensor | None,
        passage: Passage,
        sums: GradientSums,
    ) -> Tensor:
        """Backward of `finish`, recomputing it tile by tile.

        Args:
            grad: Of the outputs, `[tokens, width]`; becomes the gradient of `x + O W_o`, in place.
            x: Inputs of the layer.
            attended: Attention output.
            gate_up: Kept gate and up, whose memory is overwritten, or None to compute them again.
            passage: The sequence.
            sums: Collects the parameters' gradients.

        Returns:
            Gradient of the attention output, `[tokens, heads head_dim]`.
        """
        norm = self.layer.norm_mlp
        norm_sum = norm.sum_in(sums)
        grad_attended = torch.empty_like(attended)
        for rows in passage.tiles():
            attended_buffer, middle = self._middle(x[rows], attended[rows])
            buffer, rstd = self._normed(self.gate_up, middle, norm)
            both = self.gate_up.forward(buffer) if gate_up is None else gate_up[rows]
            grad_activated = self.down.backward(grad[rows], self._activated(both), sums)
            silu_mul_backward(both, grad_activated)
            del grad_activated
            grad_normed = self.gate_up.backward(both, buffer, sums)
            rms_norm_backward(grad_normed, middle, norm.weight, rstd, grad[rows], norm_sum)
            grad_attended[rows] = self.o.backward(grad[rows], attended_buffer, sums)
        return grad_attended

    def attend_backward(
        self, grad: Tensor, qkv: Tensor, attended: Tensor, lse: Tensor, passage: Passage
    ) -> None:
        """Backward of `attend`: `qkv` becomes its own gradient, in place."""
        shape = (grad.shape[0], self.layer.heads, self.layer.head_dim)
        attend_backward(
            passage.kernel,
            grad.view(shape),
            *self.split(qkv),
            attended.view(shape),
            lse,
            passage.documents,
            self.layer.scale,
            kv_heads_per_call=passage.kv_heads_per_call,
            shifted_group=passage.shifted_group,
        )

    def project_backward(
        self, grad: Tensor, grad_qkv: Tensor, x: Tensor, passage: Passage, sums: GradientSums
    ) -> None:
        """Backward of `project`: adds to `grad` `[tokens, width]` in place; `grad_qkv` is overwritten."""
        norm = self.layer.norm_in
        norm_sum = norm.sum_in(sums)
        for rows in passage.tiles():
            buffer, rstd = self._normed(self.qkv, x[rows], norm)
            q, k, _ = self.split(grad_qkv[rows])
            for heads in (q, k):
                apply_rope(heads, passage.cos[rows], passage.sin[rows], backward=True)
            self._head_norms_backward(q, k, buffer, sums)
            grad_normed = self.qkv.backward(grad_qkv[rows], buffer, sums)
            rms_norm_backward(grad_normed, x[rows], norm.weight, rstd, grad[rows], norm_sum)

    def _head_norms_backward(
        self, grad_q: Tensor, grad_k: Tensor, buffer: Tensor, sums: GradientSums
    ) -> None:
        """Qwen3 norms each head of q and k: needs them as they were before, so they are projected again."""
        norm_q, norm_k = self.layer.norm_q, self.layer.norm_k
        if norm_q is None or norm_k is None:
            return
        raw_q, raw_k, _ = self.split(self.qkv.forward(buffer))
        for grad, raw, norm in ((grad_q, raw_q, norm_q), (grad_k, raw_k, norm_k)):
            rstd = head_norm(raw, norm.weight, norm.eps, out=torch.empty_like(raw))
            head_norm_backward(grad, raw, norm.weight, rstd, norm.sum_in(sums))

    def _normed(self, stack: LoadedStack, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Input buffer of a stack that reads `norm(x)`, and the reciprocal deviations."""
        buffer = stack.input_buffer(x.shape[0])
        _, rstd = rms_norm(x, norm.weight, norm.eps, out=buffer[:, : stack.stack.inputs])
        stack.reduce(buffer)
        return buffer, rstd

    def _middle(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Input buffer of the output projection, and `x + O W_o`."""
        buffer = self.o.input_buffer(x.shape[0])
        buffer[:, : self.o.stack.inputs] = attended
        self.o.reduce(buffer)
        return buffer, self.o.forward(buffer).add_(x)

    def _activated(self, gate_up: Tensor) -> Tensor:
        """Input buffer of the down projection: `silu(gate) * up`."""
        buffer = self.down.input_buffer(gate_up.shape[0])
        silu_mul(gate_up, buffer[:, : self.down.stack.inputs])
        self.down.reduce(buffer)
        return buffer


def trained_parameters(layers: Sequence[FusedLayer]) -> list[nn.Parameter]:
    """Parameters of several layers that want a gradient, in order."""
    return [p for layer in layers for p in layer.trained]
