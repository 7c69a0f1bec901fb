"""My place among several processes, and sums over them; with one process every method is the identity.

`accelerate launch` and `torchrun` start the processes and set the environment read here. This is the only code that
knows there is more than one.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longlora_cli.errors import LongLoRAError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Mesh:
    """The data axis.

    Args:
        rank: Place of this process, from 0.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: torch.device, *, patience: timedelta | None = None) -> Mesh:
        """Join the other processes, if a launcher started several: NCCL on GPUs, gloo on CPUs.

        Args:
            device: Where what is exchanged lies.
            patience: How long a process waits for the others before it gives up; None: torch's, 10 to 30 minutes.
        """
        if any(name.startswith("ACCELERATE_") for name in os.environ):
            # accelerate's launcher for one process dies of SIGTERM without passing it on; the kernel then does.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The tensor added over all processes; the same shape on each."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """True everywhere when it is true anywhere."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item() > 0)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something once and give all processes its result, or its error."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except LongLoRAError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the group."""
        if (
            dist.is_available() and dist.is_initialized()
        ):  # Trainer makes one even under a launcher of one process
            dist.destroy_process_group()
