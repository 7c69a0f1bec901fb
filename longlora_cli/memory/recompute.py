"""Run a few decoder layers, keep only the first one's input, and compute the rest again when backward needs it.

The plain form is `torch.utils.checkpoint` (Chen et al. 2016, arXiv:1604.06174): everything a layer saves for backward
is replaced by a ticket, and the first ticket that backward redeems runs the layer again. Added here: the one kept
input waits in a `HostArena`; k layers share it, and when their backward starts the inputs between them are computed
without a graph first, so that never more than one layer's intermediates exist; a layer's second run stops at the last
tensor backward needs, which usually leaves out its last matrix product. The graph is the one the forward pass built, so
gradients reach parameters, hooks and data-parallel reducers as in plain training.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.arena import HostArena, Slot


@dataclass(frozen=True)
class Ambient:
    """What a computation depends on beside its inputs: random state and autocast, as they are when it is made."""

    device: torch.device
    cpu_state: Tensor
    gpu_state: Tensor | None
    autocasts: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: torch.device) -> Ambient:
        """The state at this moment of the CPU and of `device`."""
        kinds = dict.fromkeys((device.type, "cpu"))
        return cls(
            device,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds),
        )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the same numbers are drawn and the same casts are made; outside, nothing has changed."""
        gpus = [self.device] if self.device.type == "cuda" else []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=gpus))
            torch.set_rng_state(self.cpu_state)
            if self.gpu_state is not None:
                torch.cuda.set_rng_state(self.gpu_state, self.device)
            for kind, enabled, dtype in self.autocasts:
                # A weight's cast that is cached without a graph would be reused where one is needed.
                cast = torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False)
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(cast)
            yield


@dataclass(frozen=True)
class Call:
    """One layer's forward with everything but its hidden state, which is the first argument."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Any:
        """What the layer returns: a tensor, or a tuple whose first is one."""
        return self.run(hidden, *self.args, **self.kwargs)


def first(output: Any) -> Tensor:
    """The hidden state in what a layer returned."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


@dataclass(eq=False)
class GroupPass:
    """One pass of a hidden state through a group's layers, until its backward is done.

    Args:
        calls: The layers.
        arena: Where kept inputs wait.
        place: Of the group's input.
        inner_place: Of the inputs between layers, from the start of the group's backward to that of each layer's.
        previous: The pass through the group before this one; its input is brought back while this one's backward runs.
    """

    calls: list[Call]
    arena: HostArena
    place: str
    inner_place: str
    previous: weakref.ref[GroupPass] | None = None
    ambients: list[Ambient] = field(default_factory=list)
    # Input of each layer that waits in the arena, by position; outlives the pass only as long as it takes to drop it.
    slots: dict[int, Slot] = field(default_factory=dict)
    _last: Tensor | None = None
    _filled: bool = False

    def forward(self, hidden: Tensor) -> Any:
        """The last layer's output; `hidden` is `[batch, tokens, width]`."""
        self.slots[0] = self.arena.save(hidden, place=self.place)
        # A graph that is dropped without its backward (an error, a skipped step) gives its slots back.
        weakref.finalize(self, _drop, self.arena, self.slots).atexit = False
        output: Any = hidden
        for position, call in enumerate(self.calls):
            self.arena.next_turn()
            hidden = first(output)
            self.ambients.append(Ambient.now(hidden.device))
            layer = _LayerPass(self, position, hidden.requires_grad)
            with saved_tensors_hooks(layer.give_ticket, layer.redeem):
                output = call(hidden)
        return output

    def prefetch(self) -> None:
        """Start bringing the group's input back, if it still waits."""
        if not self._filled and 0 in self.slots:
            self.arena.prefetch(self.slots[0])

    def input_of(self, position: int) -> Tensor:
        """The input of one layer, once each, the last layer's first.

        Raises:
            RuntimeError: Backward through the same pass a second time.
        """
        if not self._filled:
            self._fill()
        self.arena.next_turn()
        if position == len(self.calls) - 1:
            hidden, self._last = self._last, None
        else:
            slot = self.slots.pop(position, None)
            hidden = None if slot is None else self.arena.take(slot)
        if hidden is None:
            raise RuntimeError(
                "the inputs of these layers were used by an earlier backward; retain_graph has no effect"
            )
        if position - 1 in self.slots:
            self.arena.prefetch(self.slots[position - 1])
        return hidden

    @torch.no_grad()
    def _fill(self) -> None:
        """Take the group's input and compute the inputs between its layers."""
        self._filled = True
        hidden = self.arena.take(self.slots.pop(0))
        before = self.previous() if self.previous is not None else None
        if before is not None:
            before.prefetch()
        for position, call in enumerate(self.calls[:-1]):
            self.arena.next_turn()
            self.slots[position] = self.arena.save(hidden, place=self.inner_place)
            with self.ambients[position].again():
                hidden = first(call(hidden))
        self._last = hidden


def _drop(arena: HostArena, slots: dict[int, Slot]) -> None:
    for slot in slots.values():
        arena.drop(slot)


class _Enough(BaseException):
    """Every tensor that backward needs is there. Not an `Exception`, which a model's own code might catch."""


@dataclass(eq=False)
class _Ticket:
    """Stands in the graph for one saved tensor."""

    layer: _LayerPass
    number: int


class _LayerPass:
    """One layer in a `GroupPass`: tickets in forward, tensors in backward."""

    def __init__(self, group: GroupPass, position: int, needs_grad: bool) -> None:
        self.group, self.position, self.needs_grad = group, position, needs_grad
        # Weak: tickets that the graph has already let go of need no tensor.
        self.tickets: list[weakref.ref[_Ticket]] = []
        self.facts: list[tuple[torch.Size, torch.dtype]] = []
        self.tensors: dict[int, Tensor] = {}
        self.seen = 0

    def give_ticket(self, tensor: Tensor) -> _Ticket:
        ticket = _Ticket(self, len(self.tickets))
        self.tickets.append(weakref.ref(ticket))
        self.facts.append((tensor.shape, tensor.dtype))
        return ticket

    def redeem(self, ticket: _Ticket) -> Tensor:
        if not self.seen:
            self._run_again()
        try:
            return self.tensors.pop(ticket.number)
        except KeyError:
            raise RuntimeError(
                "a saved tensor was asked for twice; retain_graph has no effect here"
            ) from None

    def _run_again(self) -> None:
        hidden = self.group.input_of(self.position).detach().requires_grad_(self.needs_grad)
        call, ambient = self.group.calls[self.position], self.group.ambients[self.position]
        with (
            ambient.again(),
            torch.enable_grad(),
            saved_tensors_hooks(self._collect, lambda tensor: tensor),
            contextlib.suppress(_Enough),
        ):
            call(hidden)
        if self.seen != len(self.tickets):
            raise self._differs(f"{self.seen} tensors instead of {len(self.tickets)}")

    def _collect(self, tensor: Tensor) -> Tensor:
        number, self.seen = self.seen, self.seen + 1
        if (tensor.shape, tensor.dtype) != self.facts[number]:
            shape, dtype = self.facts[number]
            raise self._differs(f"{tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}")
        # Detached, or an output saved by its own node would keep the second graph alive for good.
        tensor = tensor.detach()
        if self.tickets[number]() is not None:
            self.tensors[number] = tensor
        if self.seen == len(self.tickets):
            raise _Enough
        return tensor

    def _differs(self, what: str) -> IncompatibleError:
        return IncompatibleError(
            f"layer {self.position} of a group computed {what} when it was run again",
            rule="a layer that is recomputed must compute the same each time",
            hint="Report the model; with every layer's input and intermediates kept it trains without this.",
        )
