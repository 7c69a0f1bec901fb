"""The fused path: whole decoder layers of the Llama family in groups, with what they keep chosen by a plan.

`use_engine` wraps one model instance, not its class. A training call then runs embedding, groups of layers, and norm
with loss; each group is one autograd Function that keeps its first input and what the plan says, recomputes the rest
in backward, and returns the gradients of its parameters to autograd, so that the hooks of DDP and of optimizers see
them. A group of k layers keeps one input instead of k: 8/k KiB a token of Llama-3.1-8B. While it is recomputed, each
layer's attention output and log-sum-exp stay, so attention runs forward twice, never a third time. Design and figures:
docs/memory.md; k-layer checkpoints after Chen et al. 2016 (arXiv:1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.memory.arena import HostArena, Slot
from longlora_cli.memory.attention_kernels import choose_kernel
from longlora_cli.memory.elementwise import rms_norm
from longlora_cli.memory.layer import (
    FusedLayer,
    LoadedLayer,
    Norm,
    Passage,
    hold_matrices,
    trained_parameters,
)
from longlora_cli.memory.linear import GradientSums, fusing_fault
from longlora_cli.memory.loss import IGNORE, head_weight
from longlora_cli.memory.norm_loss import normed_loss
from longlora_cli.memory.plan import LayerPlan, MemoryPlan

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fused_fault(causal_lm: Any, *, adapted: bool = True) -> str | None:
    """Why a causal LM must take the generic path; None when the fused one computes what its own code does.

    Args:
        causal_lm: A transformers causal LM; its adapter, if it has one, inside.
        adapted: Also look at its linear layers, which must be frozen but for LoRA.
    """
    config = causal_lm.config
    if config.model_type not in _FAMILIES:
        return f"its family is {config.model_type}, not {', '.join(_FAMILIES)}"
    if config.hidden_act != "silu":
        return f"its MLP uses {config.hidden_act}, not silu"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        return "some of its layers attend to a sliding window"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    if head_weight(causal_lm) is None:
        return "its head is more than one matrix"
    for layer in causal_lm.get_decoder().layers if adapted else ():
        for name, module in layer.named_modules():
            if name.rsplit(".", 1)[-1] in _LINEARS and (fault := fusing_fault(module)):
                return f"it has {fault}"
    return None


@dataclass
class _Kept:
    """Where the activations of one layer wait; None for what is recomputed."""

    input: Slot | None = None
    attention: tuple[Slot, Slot] | None = None
    qkv: Slot | None = None
    gate_up: Slot | None = None

    def slots(self) -> list[Slot]:
        """All of them, in the order in which backward needs them."""
        pair = self.attention or (None, None)
        return [slot for slot in (self.input, *pair, self.gate_up, self.qkv) if slot is not None]


@dataclass
class _Step:
    """One forward pass on its way to its backward."""

    engine: FusedEngine
    plan: MemoryPlan
    passage: Passage
    kept: list[_Kept] = field(default_factory=list)

    def __del__(self) -> None:
        # A graph that is dropped without backward gives its memory back.
        for kept in self.kept:
            for slot in kept.slots():
                self.engine.arena.drop(slot)

    def save(self, tensor: Tensor, place: str) -> Slot | None:
        return None if place == "recompute" else self.engine.arena.save(tensor, place=place)


class FusedEngine:
    """A model's layers, ready to run in groups.

    Args:
        causal_lm: A transformers causal LM without fault (`fused_fault`), with its adapter inside.
        plan_for: Plan for a number of tokens.
        arena: Memory outside the GPU.
        kernel: Attention backend, or `auto`.
    """

    def __init__(
        self, causal_lm: Any, plan_for: Callable[[int], MemoryPlan], arena: HostArena, kernel: str = "auto"
    ) -> None:
        config, decoder = causal_lm.config, causal_lm.get_decoder()
        self.causal_lm, self.decoder, self.plan_for, self.arena = causal_lm, decoder, plan_for, arena
        heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.layers = [FusedLayer(layer, heads, kv_heads, self.head_dim) for layer in decoder.layers]
        hold_matrices(self.layers)
        self.norm = Norm.of(decoder.norm)
        self.kernel_name = kernel

    @property
    def embedding(self) -> Any:
        """The token embedding in use, PEFT's trained copy if there is one."""
        return self.causal_lm.get_input_embeddings()

    def passage(self, x: Tensor, positions: Tensor, documents: list[int], plan: MemoryPlan) -> Passage:
        """Rotary tables and attention for one packed sequence."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        like = torch.empty((), dtype=wide, device=x.device)
        # Rounded as transformers rounds them: in bf16 that moves a gradient by 0.5 % of its norm (SmolLM2, positions
        # from 20,000 on), and the model will be read with these tables, so it must be trained with them.
        cos, sin = (
            table.to(x.dtype).to(wide) for table in self.decoder.rotary_emb(like, positions.reshape(1, -1))
        )
        half = self.head_dim // 2
        return Passage(
            cos[0, :, :half].contiguous(),
            sin[0, :, :half].contiguous(),
            documents,
            choose_kernel(self.kernel_name, x.device, x.dtype, self.head_dim),
            plan.tile_tokens,
            plan.kv_heads_per_call,
            # Shifted groups are for training; what is read afterwards, and measured meanwhile, is full attention.
            plan.shifted_group if torch.is_grad_enabled() else 0,
        )

    def run(self, input_ids: Tensor, positions: Tensor | None, documents: list[list[int]] | None) -> Tensor:
        """Last hidden states before the final norm, `[batch * tokens, width]`, of ids `[batch, tokens]`."""
        batch, tokens = input_ids.shape
        if positions is None:
            positions = torch.arange(tokens, device=input_ids.device)
        lengths = [n for row in documents for n in row] if documents else [tokens] * batch
        plan = self.plan_for(batch * tokens)
        x: Tensor = self.embedding(input_ids).reshape(batch * tokens, -1).to(self.dtype)
        passage = self.passage(x, positions.expand(batch, tokens), lengths, plan)
        if not torch.is_grad_enabled():
            for layer in self.layers:
                x = _through(layer.load(x.dtype, x.device), x, passage)
            return x
        step = _Step(self, plan, passage)
        for group in plan.groups():
            parameters = trained_parameters([self.layers[i] for i in group])
            x = _Group.apply(x, step, group, *parameters)
        return x

    @property
    def dtype(self) -> torch.dtype:
        """Precision of activations and matrix products: the frozen weights' own."""
        return self.layers[0].o.dtype

    def loss(self, labels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed next-token loss in nats of labels `[batch, tokens]`, and how many labels counted."""
        x = self.run(inputs["input_ids"], inputs.get("position_ids"), inputs.get("document_lengths"))
        shifted = labels.new_full(labels.shape, IGNORE)
        shifted[:, :-1] = labels[:, 1:]
        head = head_weight(self.causal_lm)
        assert head is not None  # fused_fault looked
        tile = self.plan_for(labels.numel()).loss_tile
        return normed_loss(x, self.norm.weight, self.norm.eps, head, shifted.reshape(-1), tile_tokens=tile)

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Last hidden states `[batch, tokens, width]`, normed; nothing is kept for a backward pass."""
        ids: Tensor = inputs["input_ids"]
        x = self.run(ids, inputs.get("position_ids"), inputs.get("document_lengths"))
        for rows in x.split(self.plan_for(ids.numel()).tile_tokens):
            rms_norm(rows, self.norm.weight, self.norm.eps, out=rows)
        return x.view(*ids.shape, -1)


def _through(layer: LoadedLayer, x: Tensor, passage: Passage) -> Tensor:
    attended, _ = layer.attend(layer.project(x, passage), passage)
    return layer.finish(x, attended, passage)[0]


class _Group(torch.autograd.Function):
    """Consecutive layers that keep one input; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: _Step, group: range, *parameters: nn.Parameter) -> Tensor:
        ctx.step, ctx.group = step, group
        ctx.parameters = parameters
        with torch.autocast(x.device.type, enabled=False):
            for index in group:
                x = _forward_layer(step, index, x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # The gradient is this Function's alone (its only consumer is the next group), so it is changed in place:
        # a second one would take 8 KiB a token of an 8B model, 8 GiB at a million tokens.
        grad = grads[0].contiguous()
        sums = GradientSums()
        with torch.autocast(grad.device.type, enabled=False):
            _backward_group(ctx.step, ctx.group, grad, sums)
        wanted = grad if ctx.needs_input_grad[0] else None
        return (wanted, None, None, *sums.list(ctx.parameters))


def _forward_layer(step: _Step, index: int, x: Tensor) -> Tensor:
    """One layer of the first pass, keeping what the plan says."""
    plan: LayerPlan = step.plan.layers[index]
    step.engine.arena.next_turn()
    layer = step.engine.layers[index].load(x.dtype, x.device)
    kept = _Kept(input=step.save(x, plan.input))
    step.kept.append(kept)
    qkv = layer.project(x, step.passage)
    attended, lse = layer.attend(qkv, step.passage)
    kept.qkv = step.save(qkv, plan.qkv)
    del qkv
    y, gate_up = layer.finish(x, attended, step.passage, keep_gate_up=plan.gate_up != "recompute")
    kept.attention = _save_pair(step, attended, lse, plan.attention)
    if gate_up is not None:
        kept.gate_up = step.save(gate_up, plan.gate_up)
    return y


def _save_pair(step: _Step, attended: Tensor, lse: Tensor, place: str) -> tuple[Slot, Slot] | None:
    first, second = step.save(attended, place), step.save(lse, place)
    return None if first is None or second is None else (first, second)


def _backward_group(step: _Step, group: range, grad: Tensor, sums: GradientSums) -> None:
    """Recompute a group from its first input, then go back through it; `grad` changes in place."""
    plan, arena = step.plan, step.engine.arena
    arena.next_turn()
    x = _take(step, step.kept[group.start], "input")
    inner: dict[int, _Kept] = {}
    for index in group[:-1]:
        arena.next_turn()
        _prefetch(step, step.kept[index + 1], whole=index + 1 == group[-1])
        layer = step.engine.layers[index].load(x.dtype, x.device)
        attended, lse, qkv = _attended(step, index, layer, x)
        inner[index] = _Kept(step.save(x, plan.inner_input))
        y, _ = layer.finish(x, attended, step.passage)
        inner[index].attention = _save_pair(step, attended, lse, plan.inner_attention)
        x = y
        del attended, lse, qkv, y, layer  # its matrices too: two layers' would take 0.8 GiB of an 8B model
    for index in reversed(group):
        arena.next_turn()
        layer = step.engine.layers[index].load(grad.dtype, grad.device, again=True)
        if index in inner:
            x = _take(step, inner[index], "input")
            attended, lse = _take_pair(step, inner[index])
            qkv = None
        else:
            attended, lse, qkv = _attended(step, index, layer, x)
            arena.next_turn()  # the layers above have left by now; what comes back takes their room
        if index > group.start:
            _prefetch(step, inner[index - 1], whole=True)
            _prefetch(step, step.kept[index - 1], whole=True)
        elif index > 0:
            before = next(g for g in plan.groups() if g.stop == index)
            _prefetch(step, step.kept[before.start], whole=len(before) == 1)
        found = [x, attended, lse, qkv]
        del x, attended, lse, qkv  # the layer's backward frees each where it is used last
        _backward_layer(step, index, layer, found, grad, sums)
        del layer


def _prefetch(step: _Step, kept: _Kept, *, whole: bool) -> None:
    """Start bringing back what the next visit of a layer needs: all of it for its backward, or input and attention.

    One visit ahead is enough to hide the copies, and more would take memory that the plan does not count.
    """
    needed = (kept.input, *(kept.attention or ()), *((kept.gate_up, kept.qkv) if whole else ()))
    for slot in needed:
        if slot is not None:
            step.engine.arena.prefetch(slot)


def _take(step: _Step, kept: _Kept, name: str) -> Tensor:
    """Bring a kept tensor back; its slot is free afterwards."""
    slot: Slot = getattr(kept, name)
    setattr(kept, name, None)
    return step.engine.arena.take(slot)


def _take_pair(step: _Step, kept: _Kept) -> tuple[Tensor, Tensor]:
    assert kept.attention is not None
    first, second = kept.attention
    kept.attention = None
    return step.engine.arena.take(first), step.engine.arena.take(second)


def _attended(step: _Step, index: int, layer: LoadedLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention output and log-sum-exp, kept or computed again; then q/k/v are at hand too."""
    kept = step.kept[index]
    if kept.attention is not None:
        return (*_take_pair(step, kept), None)
    qkv = _take(step, kept, "qkv") if kept.qkv is not None else layer.project(x, step.passage)
    return (*layer.attend(qkv, step.passage), qkv)


def _backward_layer(
    step: _Step,
    index: int,
    layer: LoadedLayer,
    found: list[Any],
    grad: Tensor,
    sums: GradientSums,
) -> None:
    x, attended, lse, qkv = found
    found.clear()
    kept, passage = step.kept[index], step.passage
    gate_up = _take(step, kept, "gate_up") if kept.gate_up is not None else None
    grad_attended = layer.finish_backward(grad, x, attended, gate_up, passage, sums)
    del gate_up
    if qkv is None:
        qkv = _take(step, kept, "qkv") if kept.qkv is not None else layer.project(x, passage)
    layer.attend_backward(grad_attended, qkv, attended, lse, passage)
    del grad_attended, attended, lse
    layer.project_backward(grad, qkv, x, passage, sums)


def use_engine(
    causal_lm: Any, plan_for: Callable[[int], MemoryPlan], *, arena: HostArena, kernel: str = "auto"
) -> Callable[[], None]:
    """Let one causal LM instance train, and read without a cache, through the fused path.

    Calls with `labels` return the loss alone; calls of the decoder under `no_grad` and without a cache return its last
    hidden state. Every other call is the model's own.

    Args:
        causal_lm: A transformers causal LM with its adapter inside (`peft_model.get_base_model()`).
        plan_for: Plan for a number of tokens, batch times length.
        arena: Memory outside the GPU, where the plan puts anything there.
        kernel: Attention backend, or `auto`.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: `fused_fault` has something to say about the model.
    """
    if fault := fused_fault(causal_lm):
        raise ValueError(f"the fused path cannot take this model: {fault}")
    engine = FusedEngine(causal_lm, plan_for, arena, kernel)
    own_forward, own_decoder = causal_lm.forward, engine.decoder.forward

    @functools.wraps(own_forward)
    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None or args or not _is_plain_call(kwargs):
            more = {} if labels is None else {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return own_forward(*args, **more, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        total, count = engine.loss(labels, kwargs)
        divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / divisor)

    @functools.wraps(own_decoder)
    def decode(*args: Any, **kwargs: Any) -> Any:
        if args or torch.is_grad_enabled() or not _is_plain_call(kwargs):
            return own_decoder(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=engine.hidden(kwargs))

    causal_lm.forward, engine.decoder.forward = forward, decode

    def undo() -> None:
        del causal_lm.forward, engine.decoder.forward  # the classes' own show again

    return undo


def _is_plain_call(kwargs: dict[str, Any]) -> bool:
    """True when nothing is asked for but ids, positions and documents: no cache, mask, or hidden states."""
    known = {"input_ids", "position_ids", "document_lengths"}
    return kwargs.get("input_ids") is not None and not any(
        value is not None and value is not False for name, value in kwargs.items() if name not in known
    )
