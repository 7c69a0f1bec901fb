"""Plans and context lengths that leave torch's allocator a little of the GPU.

The allocator holds more than the tensors: what lies free between them. So a plan that fills a card to the last byte
runs out of memory, or makes the allocator give blocks back and ask for them again in each layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longlora_cli.errors import ResourceError
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import MemoryPlan, ModelShape
from longlora_cli.memory.planner import longest_context, make_plan

# On one H100 (8B model, torch 2.11): at 93 % of 80 GB the allocator held 2.3 % more than the tensors and never gave a
# block back; at 99 % it did so twice a step, which cost 5-10 % of it. With 12 GB a plan of all of it ran out of memory
# with 279 MiB between the tensors, and with 8 GB a step took five times as long as computed.
_ROOMY_SHARE = 0.97
_BETWEEN_BYTES = 384 * 2**20


def roomy_plan(shape: ModelShape, tokens: int, machine: Machine, **same: Any) -> MemoryPlan:
    """`make_plan` with 3 % of the GPU, at least 384 MiB, left to the allocator, or without where only that fits."""
    try:
        return make_plan(shape, tokens, _with_room(machine), **same)
    except ResourceError:
        return make_plan(shape, tokens, machine, **same)


def roomy_context(shape: ModelShape, machine: Machine, **same: Any) -> int:
    """`longest_context` with 3 % of the GPU, at least 384 MiB, left to the allocator: the longest to train at.

    Raises:
        SettingsError: As `longest_context`.
        ResourceError: As `longest_context`; a model that fits only without that room gets what fits.
    """
    try:
        return longest_context(shape, _with_room(machine), **same)
    except ResourceError:
        return longest_context(shape, machine, **same)


def _with_room(machine: Machine) -> Machine:
    room = max(int((1 - _ROOMY_SHARE) * machine.gpu_bytes), _BETWEEN_BYTES)
    return replace(machine, gpu_bytes=max(machine.gpu_bytes - room, 0))
