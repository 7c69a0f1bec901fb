"""The memory engine for any Hugging Face decoder: kept inputs, groups of layers, tiled MLPs.

No class is touched. Each decoder layer *instance* gets a `forward` of its own, and so does its `mlp`; `undo` takes
them away again. Plain twin: the model as it is.

transformers' models call their layers in a loop and give each its own keywords (a mask and rotary embeddings per kind
of attention). So in a group the first layers only note what they were given and pass their input on; the last one runs
them all, each with its own keywords, under one `GroupPass`. Groups may therefore mix sliding and full attention.
What this needs of a model, and checks: nothing changes the hidden state between a group's layers, and each layer
returns it alone, or alone in a tuple. `output_hidden_states` shows a group's input in place of the states inside it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.recompute import Ambient, Call, GroupPass, first
from longlora_cli.memory.token_tiles import is_token_wise, replace_forward, use_tiles

_log = logging.getLogger("longlora")
_LAYER_LISTS = ("layers", "h", "blocks", "block")
_MLPS = ("mlp", "feed_forward", "ffn")
_STASHING = ("MatMul8bitLtBackward", "MatMul8bitFpBackward")
# Longest walk through one layer's graph in search of them; a layer with LoRA on 7 linears has about 150 nodes.
_MAX_NODES = 5_000


class LayerChoice(Protocol):
    """What the engine reads of a plan for one layer."""

    @property
    def input(self) -> str:
        """`gpu`, `host` or `disk`: where the input waits; `recompute`: the layer belongs to the group before it."""


class Plan(Protocol):
    """What the engine reads of a memory plan."""

    @property
    def layers(self) -> Sequence[LayerChoice]:
        """One choice a decoder layer."""

    @property
    def tile_tokens(self) -> int:
        """Tokens an MLP sees at once; 0: all."""

    @property
    def inner_input(self) -> str:
        """Where the inputs inside a group wait during its backward: `gpu`, `host` or `disk`."""


def use_generic_engine(causal_lm: nn.Module, plan: Plan, arena: HostArena) -> Callable[[], None]:
    """Let a model instance train by a memory plan; its loss and gradients stay what they are.

    Only calls in training mode, with gradients and without a cache are changed.

    Args:
        causal_lm: A transformers causal LM, with or without PEFT around it.
        plan: Which layer inputs are kept and where, and the MLP's tile.
        arena: Where they are kept.

    Returns:
        A function that undoes it.

    Raises:
        IncompatibleError: The plan is for another number of layers, the model's own checkpointing is on, or the
            model's layers are not found. In training: a model does something between or around a group's layers.
    """
    decoder, layers = decoder_and_layers(causal_lm)
    groups = _groups(plan, len(layers))
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise IncompatibleError(
            "the model's own gradient checkpointing is on",
            rule="layers are recomputed by the memory engine or by the model, not by both",
            hint="Call model.gradient_checkpointing_disable() first.",
        )
    engine = _Engine(plan, arena)
    undos: list[Callable[[], None]] = []
    for group in groups:
        members = [layers[i] for i in group]
        stashes = any(type(m).__name__ == "Linear8bitLt" for layer in members for m in layer.modules())
        for position in range(len(members)):
            place, starts = plan.layers[group[0]].input, group[0] + position == 0
            undos.append(_wrap(_Wrapped(members, position, place, starts, stashes), engine))
    undos.append(decoder.register_forward_hook(lambda *_: engine.finish(layers[-1])).remove)
    tiled = _tile_mlps(causal_lm, layers, plan.tile_tokens, undos) if plan.tile_tokens else 0
    places = [plan.layers[group[0]].input for group in groups]
    kept = ", ".join(f"{places.count(p)} on {p}" for p in ("gpu", "host", "disk") if p in places)
    _log.info(
        "memory engine (generic): %d layers in %d groups, inputs %s; %d MLPs in tiles of %d tokens",
        len(layers), len(groups), kept, tiled, plan.tile_tokens,
    )  # fmt: skip

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def decoder_and_layers(causal_lm: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The module that calls the decoder layers, and these in order.

    Raises:
        IncompatibleError: No list of as many layers as the config says.
    """
    base: Any = causal_lm.get_base_model() if hasattr(causal_lm, "get_base_model") else causal_lm  # type: ignore[operator]
    decoder = base.get_decoder()
    config = decoder.config.get_text_config()
    for name in _LAYER_LISTS:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) >= config.num_hidden_layers:
            return decoder, list(layers[: config.num_hidden_layers])
    raise IncompatibleError(
        f"{type(decoder).__name__} has no list of {config.num_hidden_layers} layers",
        rule=f"a decoder's layers are looked for under {', '.join(_LAYER_LISTS)}",
    )


def _groups(plan: Plan, count: int) -> list[range]:
    choices = [layer.input for layer in plan.layers]
    if len(choices) != count or choices[0] == "recompute":
        raise IncompatibleError(
            f"a memory plan for {len(choices)} layers, the first's input {choices[0] if choices else 'missing'}, "
            f"and a model of {count}",
            rule="a plan has one choice a layer, and keeps the first layer's input",
        )
    starts = [i for i, choice in enumerate(choices) if choice != "recompute"]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


class _Open:
    """A group whose layers are being called: what they were given so far."""

    def __init__(self, members: list[nn.Module], hidden: Tensor) -> None:
        self.members, self.hidden = members, hidden
        self.calls: list[Call] = []


class _Engine:
    """State that the wrapped layers of one model share."""

    def __init__(self, plan: Plan, arena: HostArena) -> None:
        self.plan, self.arena = plan, arena
        self.open: _Open | None = None
        self.last: weakref.ref[GroupPass] | None = None
        self.in_tuple: dict[type, bool] = {}
        self.warned = False

    def step(self, wrapped: _Wrapped, hidden: Tensor, call: Call) -> Any:
        """One layer's call in training: noted, or with the group's last layer run."""
        members, position = wrapped.members, wrapped.position
        layer = members[position]
        if wrapped.starts_model:  # what an interrupted pass has left is of no interest
            self.open = self.last = None
        if position == 0:
            self.finish(layer)
            self.open = _Open(members, hidden)
        now = self.open
        if (
            now is None
            or now.members is not members
            or len(now.calls) != position
            or hidden is not now.hidden
        ):
            self.open = None
            raise _unfit(layer, "something changes the hidden state between a group's layers, or skips one")
        now.calls.append(call)
        if position < len(members) - 1:
            return (hidden,) if self._returns_tuple(layer, hidden, call) else hidden
        self.open = None
        _check_whole(members)
        group = GroupPass(now.calls, self.arena, wrapped.place, self.plan.inner_input, self.last)
        output = group.forward(hidden)
        self.last = weakref.ref(group)
        if wrapped.stashes:
            _forget_stashed_inputs(first(output))
        self._learn(layer, output, len(members))
        return output

    def finish(self, layer: nn.Module) -> None:
        """Nothing may be left noted and not run."""
        if self.open is not None:
            self.open = None
            raise _unfit(layer, "not all layers of a group were called")

    def warn_of_cache(self) -> None:
        """Say once that training with a cache goes past the engine."""
        if not self.warned:
            self.warned = True
            _log.warning(
                "a cache was handed to the layers in training: activations are kept; pass use_cache=False"
            )

    def _returns_tuple(self, layer: nn.Module, hidden: Tensor, call: Call) -> bool:
        """Whether a layer wraps its hidden state in a tuple; found out once by running it, if none of its kind ran."""
        if type(layer) not in self.in_tuple:
            with Ambient.now(hidden.device).again(), torch.no_grad():
                self._learn(layer, call(hidden), 2)
        return self.in_tuple[type(layer)]

    def _learn(self, layer: nn.Module, output: Any, group_size: int) -> None:
        if group_size > 1 and not isinstance(output, Tensor) and any(o is not None for o in output[1:]):
            raise _unfit(layer, "its layers return more than the hidden state")
        self.in_tuple[type(layer)] = not isinstance(output, Tensor)


def _unfit(layer: nn.Module, what: str) -> IncompatibleError:
    return IncompatibleError(
        f"{type(layer).__name__} cannot be trained in groups of layers: {what}",
        hint="Use groups of one layer: a plan in which no layer's input is recomputed.",
    )


def _check_whole(members: list[nn.Module]) -> None:
    """Sharded parameters are gathered around each layer's own call, so they are not there for another's."""
    for layer in members[:-1]:
        if type(layer).__name__.startswith("FSDP") or any(hasattr(p, "ds_id") for p in layer.parameters()):
            raise _unfit(layer, "its parameters are sharded over processes layer by layer (FSDP, ZeRO-3)")


@dataclass(frozen=True)
class _Wrapped:
    """What one layer's new `forward` knows."""

    members: list[nn.Module]
    position: int
    place: str
    starts_model: bool
    stashes: bool


def _wrap(wrapped: _Wrapped, engine: _Engine) -> Callable[[], None]:
    from transformers.cache_utils import Cache

    layer = wrapped.members[wrapped.position]
    run = layer.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return run(*args, **kwargs)
        if kwargs.get("use_cache") or any(isinstance(v, Cache) for v in (*args, *kwargs.values())):
            engine.warn_of_cache()
            return run(*args, **kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        return engine.step(wrapped, hidden, Call(run, rest, kwargs))

    return replace_forward(layer, forward)


def _tile_mlps(
    causal_lm: Any, layers: list[nn.Module], tile_tokens: int, undos: list[Callable[[], None]]
) -> int:
    """Tile what can be tiled; MLPs of one class are alike, so one of each is tried."""
    config = causal_lm.config.get_text_config()
    fits: dict[type, bool] = {}
    count = 0
    for layer in layers:
        mlp = next((m for m in (getattr(layer, n, None) for n in _MLPS) if isinstance(m, nn.Module)), None)
        if mlp is None:
            continue
        if type(mlp) not in fits:
            fits[type(mlp)] = is_token_wise(mlp, config.hidden_size, causal_lm.dtype)
        if fits[type(mlp)]:
            undos.append(use_tiles(mlp, tile_tokens))
            count += 1
    return count


def _forget_stashed_inputs(output: Tensor) -> None:
    """Let bitsandbytes' int8 products forget their inputs.

    They keep them as plain attributes, where no saved-tensor hook sees them, although backward reads them only to
    train the int8 weight itself: every linear's input would stay in GPU memory.
    """
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes and len(seen) < _MAX_NODES:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ in _STASHING and not node.needs_input_grad[1]:
            if hasattr(node, "tensors"):
                node.tensors = (None, None, None)
            if hasattr(node, "A"):
                node.A = None
        nodes += [parent for parent, _ in node.next_functions]
