"""Bytes and FLOPs of a step: the arithmetic under the planner, for many candidate plans at once. No torch.

A batch of candidates is an array `[candidates, kinds, layers]` of places. Peaks are the maximum over the moments of a
step: each layer's forward pass, the loss, each recomputation, and each layer's backward pass in two phases (MLP, then
attention). tests/memory/test_planner.py walks the same step tensor by tensor and compares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora_cli.memory.machine import CONTEXT_BYTES, Machine
from longlora_cli.memory.plan import KINDS, LSE_BYTES, ModelShape

Array = np.ndarray[Any, Any]
RECOMPUTE, GPU, HOST, DISK = 0, 1, 2, 3
INPUT, ATTENTION, QKV, GATE_UP = range(4)
WORKSPACE_BYTES = 64 * 2**20  # cuBLAS's own, and torch's rounding of small blocks
_MASTER_BYTES = 8  # a trained parameter and its gradient, both float32
_TOKEN_BYTES = 24  # id, label and position, int64 each
_LOGIT_BYTES = 10  # logits and softmax in float32, the gradient in 16 bits
_FLASH_ROWS = 128  # query rows that one thread block of a flash kernel takes
# One KV group (4 heads) of an 8B model gets 47 % of the full rate at 8,192 tokens and 95 % at 32,768, measured on one
# H100 (132 multiprocessors): b^2 / (b^2 + 272^2) with b thread blocks.
_HALF_FULL_BLOCKS_PER_PROCESSOR = 272 / 132
_COPY_SHARE = 0.8  # of the copy rate: the copies share memory and link with kernels and with each other
# One core copies random rows of 8 KiB at 7.6 GB/s, measured on a server; torch uses more of them where it may.
_GATHER_BYTES_PER_SECOND = 7e9
# What is limited by the GPU's memory and not by FLOPs (norms, RoPE, gates, thin adapter products,
# strided copies): so many times width + intermediate numbers a token and layer are read or written in a step. Fitted to
# steps of an 8B model on one H100: 650, 720, 845, 650, 590, 760 ns a token and layer at 32K, 128K, 256K, and on 12, 16,
# 24 GB; 680 ns is 61 times 18,432 bf16 numbers at 3.35 TB/s. A third of it is the forward pass's.
_STREAMED_TIMES = 61
_FORWARD_SHARE = 1 / 3
_HALF_FULL_TILE = 512  # tokens: tiles of 4K/8K/16K reach 688/711/752 of 780 TFLOP/s on one H100


def squared_lengths(documents: Sequence[int], shifted_group: int = 0) -> float:
    """Sum over queries and documents of twice the keys seen, per head: n^2 for a document of n tokens.

    With `shifted_group`, half of the heads see groups of that many tokens, the other half groups shifted by half of it
    (S2-Attn, Chen et al. 2023, arXiv:2309.12307); the result is the mean over heads.
    """
    if not shifted_group:
        return float(sum(n * n for n in documents))

    def cut(tokens: int) -> int:
        full, rest = divmod(tokens, shifted_group)
        return full * shifted_group**2 + rest**2

    half = shifted_group // 2
    shifted = sum(min(n, half) ** 2 + cut(max(n - half, 0)) for n in documents)
    return (sum(cut(n) for n in documents) + shifted) / 2


@dataclass(frozen=True)
class Flops:
    """FLOPs of one layer's parts in one forward pass of all tokens, adapters included; `head` is the model's.

    Adapters are apart in `adapters` because their weights get gradients: they cost three times their forward pass,
    frozen weights two.
    """

    qkv: float
    out: float
    gate_up: float
    down: float
    adapters: float
    head: float
    attention: float

    @classmethod
    def of(cls, shape: ModelShape, tokens: int, squares: float) -> Flops:
        """Count them for `tokens` tokens; `squares` is `squared_lengths` of the documents."""
        part = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out", "down_proj": "down"}
        count = {"qkv": 0.0, "out": 0.0, "gate_up": 0.0, "down": 0.0}
        adapters = 0.0
        for name, (inputs, outputs) in shape.linears.items():
            extra = shape.lora_rank * (inputs + outputs) if name in shape.lora_targets else 0
            count[part.get(name, "gate_up")] += 2.0 * tokens * (inputs * outputs + extra)
            adapters += 2.0 * tokens * extra
        return cls(
            **count,
            adapters=adapters,
            head=2.0 * tokens * shape.width * shape.vocabulary,
            attention=2.0 * shape.heads * shape.head_dim * squares,
        )

    @property
    def linear(self) -> float:
        """All linears of one layer."""
        return self.qkv + self.out + self.gate_up + self.down

    def model(self, layers: int) -> float:
        """A step without recomputation: 2 passes of linears, 3 of adapters and 3.5 of attention."""
        return layers * (2 * self.linear + self.adapters + 3.5 * self.attention) + 2 * self.head


@dataclass(frozen=True)
class Setting:
    """What candidates of one batch have in common: tiles, heads per call, and where a group's inner tensors wait."""

    tile_tokens: int
    loss_tile: int
    kv_heads_per_call: int
    inner_input: int = GPU
    inner_attention: int = GPU


@dataclass(frozen=True)
class StepCost:
    """Costs of candidate plans for one model, step and machine.

    Args:
        shape: The model.
        tokens: Tokens of the step.
        squares: `squared_lengths` of its documents.
        machine: Rates; its sizes are not looked at.
    """

    shape: ModelShape
    tokens: int
    squares: float
    machine: Machine

    @functools.cached_property
    def flops(self) -> Flops:
        """FLOPs of the parts."""
        return Flops.of(self.shape, self.tokens, self.squares)

    @functools.cached_property
    def sizes(self) -> Array:
        """Bytes of each kind of one layer, `[kinds]`."""
        return np.array([float(self.tokens * self.shape.kept_bytes(kind)) for kind in KINDS])

    @functools.cached_property
    def static_bytes(self) -> float:
        """GPU memory that a step does not change: weights, trained parameters, context, tables, one layer's weights."""
        s = self.shape
        rank = [s.lora_rank if name in s.lora_targets else 0 for name in s.linears]
        layer = sum(
            i * o + r * (i + o) for (i, o), r in zip(s.linears.values(), rank, strict=True)
        )  # adapters are extra columns of the dequantized weights
        rope = 2 * (s.head_dim // 2) * 4 * self.tokens
        trained = s.trainable * (_MASTER_BYTES + s.optimizer_bytes_per_parameter)
        weights = s.weight_bytes + (s.held_bytes or layer * s.element_bytes)
        fixed = weights + trained + CONTEXT_BYTES + WORKSPACE_BYTES
        return fixed + rope + _TOKEN_BYTES * self.tokens

    def tile_bytes(self, setting: Setting) -> float:
        """Buffers of one MLP tile: gate/up with their gradients, the activation with its, normed input and output."""
        s = self.shape
        columns = (s.mlp_matrices + 1) * s.intermediate + 4 * s.width
        return float(min(setting.tile_tokens, self.tokens) * columns * s.element_bytes)

    def projection_bytes(self, setting: Setting) -> float:
        """Buffers of one projection tile: the normed input and its gradient."""
        return float(min(setting.tile_tokens, self.tokens) * 2 * self.shape.width * self.shape.element_bytes)

    def loss_bytes(self, setting: Setting) -> float:
        """Logits of one loss tile with the normed rows under them."""
        s = self.shape
        row = s.vocabulary * _LOGIT_BYTES + 2 * s.width * s.element_bytes
        return float(min(setting.loss_tile, self.tokens) * row)

    def attention_bytes(self, setting: Setting) -> tuple[float, float]:
        """Temporaries of one attention call, forward and backward.

        Backward: dq, dk, dv, a float32 accumulator of dq, and as much again as half of it for delta and alignment (32
        KiB a token for all heads of an 8B model). A call of few heads copies its operands to be contiguous.
        """
        s, per_call = self.shape, setting.kv_heads_per_call
        share = per_call / s.kv_heads if per_call else 1.0
        q = float(self.tokens * s.heads * s.head_dim)
        qkv = self.sizes[QKV]
        backward = (qkv + q * 4 + q * s.element_bytes / 2) * share
        if share == 1.0:
            return 0.0, backward
        copies = (qkv + q * s.element_bytes) * share
        return copies, backward + copies + q * s.element_bytes * share

    def gpu_peak(self, places: Array, setting: Setting) -> Array:
        """Most bytes on the GPU at any moment, `[candidates]`."""
        groups = Groups.of(places)
        own = self._bytes_at(places, GPU)
        away = self._bytes_at(places, HOST) + self._bytes_at(places, DISK)
        x = self.sizes[INPUT]
        total = own.sum(1)
        earlier = np.cumsum(total, 1) - total
        # The graph's call holds a group's input until its last layer; in its second layer that is still on its way out.
        held = ((groups.depth > 1) & (groups.at_start(places[:, INPUT]) != GPU)) * x
        forward = earlier + held + self._forward_run(places, setting) + _shift(away.sum(1), 1)
        loss = total.sum(1) + x + self.loss_bytes(setting) + away[:, :, -1].sum(1)
        inner = self._inner(own, groups, setting, GPU)
        up, down = self._arriving(places, away, groups, setting)
        again = groups.through_group(total) - own[:, :QKV].sum(1) + inner + up
        again = again + x + self._recompute_run(places, setting) + self._inner_bytes(setting, HOST)
        again = np.where(groups.inside, again, 0.0)
        backward = earlier + inner + self._backward_run(places, groups, setting) + down
        peaks = [forward.max(1), loss, again.max(1), backward.max(1)]
        return np.maximum.reduce(peaks) + self.static_bytes

    def _forward_run(self, places: Array, setting: Setting) -> Array:
        """What the running layer holds in forward: the larger of attention and MLP, kept tensors in full."""
        x, attention, qkv, gate_up = self.sizes
        kept = (places[:, QKV] > 0) * qkv + (places[:, GATE_UP] > 0) * gate_up
        attend = max(self.projection_bytes(setting), attention + self.attention_bytes(setting)[0])
        return np.maximum(x + qkv + attend, 2 * x + attention + kept + self.tile_bytes(setting))

    def _recompute_run(self, places: Array, setting: Setting) -> Array:
        """The same when a group is recomputed; attention only where O was not kept."""
        x, attention, qkv, _ = self.sizes
        fresh = (places[:, QKV] != GPU) * qkv
        attend = max(self.projection_bytes(setting), attention + self.attention_bytes(setting)[0])
        attends = (places[:, ATTENTION] == 0) * (x + fresh + attend)
        return np.maximum(attends, 2 * x + attention + self.tile_bytes(setting))

    def _backward_run(self, places: Array, groups: Groups, setting: Setting) -> Array:
        """What the running layer holds in backward: gradient, x, O, dO and either an MLP tile or attention's parts.

        Before that, where O was not kept, it holds what attention's forward pass takes, without dO.
        """
        x, attention, qkv, gate_up = self.sizes
        dout = attention - self.tokens * self.shape.heads * LSE_BYTES
        common = 2 * x + attention + dout
        # Computed together with O, q/k/v stay until attention's backward; else they are computed after the MLP's.
        early = np.where(places[:, ATTENTION] > 0, places[:, QKV] > 0, ~groups.inside) * qkv
        gated = (places[:, GATE_UP] > 0) * gate_up
        mlp = early + gated + self.tile_bytes(setting)
        ahead, behind = self.attention_bytes(setting)
        attend = qkv + max(self.projection_bytes(setting), behind)
        again = 2 * x + qkv + gated + max(self.projection_bytes(setting), attention + ahead)
        again = np.where((places[:, ATTENTION] == 0) & ~groups.inside, again, 0.0)
        return np.maximum(common + np.maximum(mlp, attend), again)

    def away_peak(self, places: Array, setting: Setting, place: int) -> Array:
        """Most bytes at `HOST` or `DISK` at any moment, `[candidates]`; what goes to disk passes the host in pieces."""
        groups = Groups.of(places)
        kept = self._bytes_at(places, place)
        through = np.cumsum(kept.sum(1), 1) + self._inner(kept, groups, setting, place)
        peak = np.maximum(kept.sum((1, 2)), through.max(1))
        if place == HOST:
            spills = (places == DISK).any((1, 2))
            peak = peak + np.where(spills, 2 * self.sizes[:2].max(), 0.0)
        return peak

    def seconds(self, places: Array, setting: Setting) -> tuple[Array, Array]:
        """Predicted seconds, copies that computation does not hide included, and FLOPs as run, `[candidates]` each."""
        (ahead, behind), flops = self._compute(places, setting)
        disk = self._bytes_at(places, DISK).sum(1)
        away = self._bytes_at(places, HOST).sum(1) + disk
        # Both directions at once: a group's inner tensors leave while others come.
        inner = Groups.of(places).inside * self._inner_bytes(setting, HOST)
        slow = disk / self.machine.disk_bytes_per_second
        forward = np.maximum.reduce([ahead, away / self._copy_rate, slow])
        backward = np.maximum.reduce([behind, (away + inner) / self._copy_rate, slow])
        return forward.sum(1) + backward.sum(1) + self._head_seconds(setting), flops

    def compute_seconds(self, places: Array, setting: Setting) -> Array:
        """Predicted seconds with every copy hidden, `[candidates]`."""
        (ahead, behind), _ = self._compute(places, setting)
        return ahead.sum(1) + behind.sum(1) + self._head_seconds(setting)

    def _compute(self, places: Array, setting: Setting) -> tuple[tuple[Array, Array], Array]:
        f, groups = self.flops, Groups.of(places)
        attended, projected, gated = (places[:, kind] > 0 for kind in (ATTENTION, QKV, GATE_UP))
        inside = groups.inside
        again = inside * (f.out + f.gate_up + f.down) + (inside & ~attended & ~projected) * f.qkv
        second_qkv = np.where(inside, ~(projected & attended), ~projected) * f.qkv
        back = f.linear + f.adapters + again + second_qkv + f.out + ~gated * f.gate_up
        fill, heads = self._fill(setting)
        matmul = self.machine.matmul_flops * fill
        ahead = f.attention / (self.machine.attention_flops_forward * heads)
        behind = 2.5 * f.attention / (self.machine.attention_flops_backward * heads)
        streamed = self._streamed_seconds
        forward = np.full(inside.shape, f.linear / matmul + ahead + _FORWARD_SHARE * streamed)
        backward = back / matmul + behind + ~attended * ahead + (1 - _FORWARD_SHARE) * streamed
        flops = (f.linear + back + (3.5 + ~attended) * f.attention).sum(1) + 2 * f.head
        return (forward, backward), flops

    @property
    def _streamed_seconds(self) -> float:
        """What one layer's passes over the GPU's memory take in a step, beside its matrix products and attention."""
        s = self.shape
        numbers = _STREAMED_TIMES * self.tokens * (s.width + s.intermediate)
        return numbers * s.element_bytes / self.machine.memory_bytes_per_second

    def copies_hide(self, setting: Setting) -> bool:
        """Whether everything of a layer can leave while a layer runs forward."""
        (ahead, _), _ = self._compute(np.full((1, 4, self.shape.layers), HOST), setting)
        return bool(float(self.sizes.sum()) / self._copy_rate <= ahead[0, 0])

    @property
    def lookup_seconds(self) -> float:
        """Rows of an embedding on the host: gathered by the CPU, then copied, before anything else can run."""
        rows = float(self.sizes[INPUT])
        return rows / _GATHER_BYTES_PER_SECOND + rows / self._copy_rate

    @property
    def _copy_rate(self) -> float:
        return _COPY_SHARE * self.machine.copy_bytes_per_second

    def _fill(self, setting: Setting) -> tuple[float, float]:
        """Share of the matmul rate that a tile reaches, and of the attention rate that a call reaches."""
        tile = min(setting.tile_tokens, self.tokens)
        heads = self.shape.heads
        if setting.kv_heads_per_call:
            heads = heads * setting.kv_heads_per_call // self.shape.kv_heads
        blocks = heads * math.ceil(self.tokens / _FLASH_ROWS)
        half_full = _HALF_FULL_BLOCKS_PER_PROCESSOR * self.machine.multiprocessors
        return tile / (tile + _HALF_FULL_TILE), blocks**2 / (blocks**2 + half_full**2)

    def _head_seconds(self, setting: Setting) -> float:
        rows = min(setting.loss_tile, self.tokens)
        return 2 * self.flops.head / (self.machine.matmul_flops * rows / (rows + _HALF_FULL_TILE / 2))

    def _bytes_at(self, places: Array, place: int) -> Array:
        return (places == place) * self.sizes[None, :, None]

    def _inner_bytes(self, setting: Setting, place: int) -> float:
        """Bytes of one layer's inner tensors at `place`."""
        x, attention = self.sizes[:2]
        return float((setting.inner_input == place) * x + (setting.inner_attention == place) * attention)

    def _inner(self, kept: Array, groups: Groups, setting: Setting, place: int) -> Array:
        """Bytes that a group's earlier layers have moved to `place`, less what they had kept there, `[c, layers]`."""
        had = groups.since_start(kept[:, :QKV].sum(1))
        return groups.depth * self._inner_bytes(setting, place) - had

    def _arriving(self, places: Array, away: Array, groups: Groups, setting: Setting) -> tuple[Array, Array]:
        """Bytes on their way back for the layer whose turn is next, `[candidates, layers]`.

        First while a group is recomputed, upwards: the next layer's kept O. Then in backward, downwards: the inner
        tensors of the layer below, or what the group below starts with.
        """
        rest = away[:, QKV:].sum(1)
        attends = groups.inside & (places[:, ATTENTION] == 0)
        needed = away[:, ATTENTION] + np.where(groups.inside, attends * away[:, QKV], rest)
        up = _shift(needed, -1)
        entry = _shift(groups.at_start(away[:, INPUT] + needed), 1)
        inner = _shift(rest, 1) + self._inner_bytes(setting, HOST)
        return up, np.where(groups.depth > 0, inner, entry)


@dataclass(frozen=True)
class Groups:
    """Where each layer stands in its group, `[candidates, layers]` each.

    Args:
        start: Index of the group's first layer.
        depth: Layers of the group before this one.
        inside: The layer is recomputed with its group; false for a group's last layer.
        end: Index of the group's last layer.
    """

    start: Array
    depth: Array
    inside: Array
    end: Array

    @classmethod
    def of(cls, places: Array) -> Groups:
        """Read them off the places."""
        leads = places[:, INPUT] > 0
        index = np.broadcast_to(np.arange(leads.shape[1]), leads.shape)
        start = np.maximum.accumulate(np.where(leads, index, 0), 1)
        inside = np.concatenate([~leads[:, 1:], np.zeros((len(leads), 1), bool)], 1)
        last = leads.shape[1] - 1
        end = np.minimum.accumulate(np.where(inside, last, index)[:, ::-1], 1)[:, ::-1]
        return cls(start, index - start, inside, end)

    def since_start(self, values: Array) -> Array:
        """Sum of `values` over the layers from the group's first one to the one before."""
        total = np.cumsum(values, 1) - values
        return total - np.take_along_axis(total, self.start, 1)

    def through_group(self, values: Array) -> Array:
        """Sum of `values` over all layers up to the group's last one."""
        return np.take_along_axis(np.cumsum(values, 1), self.end, 1)

    def at_start(self, values: Array) -> Array:
        """The value at the group's first layer."""
        return np.take_along_axis(values, self.start, 1)


def _shift(values: Array, by: int) -> Array:
    """`values` of the layer `by` before (after, when negative); 0 where there is none."""
    moved = np.zeros_like(values)
    if by > 0:
        moved[:, by:] = values[:, :-by]
    else:
        moved[:, :by] = values[:, -by:]
    return moved
