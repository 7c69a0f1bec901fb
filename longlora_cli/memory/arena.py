"""Host memory and disk that activations wait in between forward and backward.

At a million tokens a hidden state of 4,096 bf16 numbers a token takes 8 GiB; a GPU holds a few of them, the host
dozens. `HostArena` copies them out while the GPU computes on, and back before they are needed, on two streams of
their own (55 GB/s each way over PCIe 5). Memory is one registered range with exact sizes (`pinned.py`), the third
tier a nameless file (`spill.py`). On a CPU the same class copies at once, so that every test runs this code.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from longlora_cli.errors import ResourceError
from longlora_cli.memory.pinned import Blocks, PinnedRange, human, in_pages
from longlora_cli.memory.spill import SpillFile

Place = Literal["gpu", "host", "disk"]
# Tensors on their way out keep their GPU memory. With more than this many under way the compute stream waits for the
# oldest, else a fast forward pass would hold all tensors of all layers at once. A layer saves up to five (input,
# attention output, log-sum-exp, q/k/v, gate/up) and the first must not wait for the last of the layer before it.
_LEAVING = 5


@dataclass(eq=False)
class Slot:
    """One saved tensor: what it was and where it waits. Made by `HostArena.save`, ended by `take` or `drop`."""

    place: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    size_bytes: int
    offset: int = 0
    ended: bool = False
    turn: int = 0  # of the arena, when the copy out began
    # The tensor itself while it stays on the GPU or is still being copied out; the fresh one while it comes back.
    source: Tensor | None = field(default=None, repr=False)
    fetched: Tensor | None = field(default=None, repr=False)
    saved: torch.cuda.Event | Future[None] | None = field(default=None, repr=False)
    returned: torch.cuda.Event | Future[None] | None = field(default=None, repr=False)


class HostArena:
    """Saves device tensors to host memory or disk and brings them back.

    Args:
        device: Where the tensors live; a CPU device copies at once and uses no streams.
        capacity_bytes: The most host memory to use. The caller has checked that the machine has it. It is made real
            and registered only as far as it is used, see `reserve`.
        disk: Folder of the third tier, if there is one.
        disk_bytes: Size of the file there.

    Raises:
        ResourceError: No such address range, or not enough space in `disk`.
    """

    def __init__(
        self, device: torch.device, capacity_bytes: int, *, disk: Path | None = None, disk_bytes: int = 0
    ) -> None:
        gpu = torch.device(device).type == "cuda"
        # "cuda" alone means the current one; tensors are compared with it.
        self.device = torch.empty(0, device=device).device
        self._range = PinnedRange(capacity_bytes, register=gpu)
        self.capacity_bytes = self._range.capacity_bytes
        self.used_bytes = self.peak_bytes = 0
        self.disk_used_bytes = self.disk_peak_bytes = 0
        self._blocks = Blocks(self.capacity_bytes)
        try:
            self._spill = SpillFile(disk, disk_bytes, self.device) if disk is not None else None
        except BaseException:
            self._range.close()
            raise
        self._out = torch.cuda.Stream(self.device) if gpu else None
        self._in = torch.cuda.Stream(self.device) if gpu else None
        self._leaving: deque[Slot] = deque()
        self._turn = 0
        # Blocks whose last copy is still under way: (event, offset, bytes, tensor that the copy needs).
        self._ending: deque[tuple[torch.cuda.Event, int, int, Tensor | None]] = deque()
        self._failure: BaseException | None = None
        # Garbage collection can end slots in the middle of any call, so `drop` then only leaves a note.
        self._lock = threading.Lock()
        self._dropped: deque[Slot] = deque()
        # Runs at close, when the arena is collected, and at exit; once.
        self._release = weakref.finalize(
            self, _release, os.getpid(), self._range, self._spill, [self._out, self._in]
        )

    @property
    def registered_bytes(self) -> int:
        """Host memory that was made real and registered so far."""
        return self._range.registered_bytes

    @property
    def free_bytes(self) -> int:
        """The largest block of host memory that can still be saved into."""
        return self._blocks.largest_bytes

    def reserve(self, size_bytes: int) -> None:
        """Register the first `size_bytes` now (about 0.64 s/GiB), so that no training step pays for it.

        Raises:
            ResourceError: More than the capacity, or CUDA refuses.
        """
        if in_pages(size_bytes) > self.capacity_bytes:
            raise self._full("host", size_bytes, self._blocks, self.capacity_bytes)
        self._range.ensure(in_pages(size_bytes))

    def save(self, tensor: Tensor, *, place: str = "host") -> Slot:
        """Start copying a tensor out and return its slot.

        The caller may drop the tensor at once and must not write into it; the arena holds it until the copy is done.

        Args:
            tensor: Any shape and dtype; what is not contiguous is made so first.
            place: `gpu` (kept as it is), `host` or `disk`.

        Raises:
            ResourceError: The place is full; nothing has changed then.
            ValueError: No such place, `disk` without a folder, or another GPU's tensor.
        """
        if tensor.is_cuda and tensor.device != self.device:
            raise ValueError(f"a tensor on {tensor.device} in the arena of {self.device}")
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        slot = Slot(place, tensor.shape, tensor.dtype, tensor.device, size)
        with self._call():
            if place == "gpu":
                slot.source = tensor
            elif place == "host":
                slot.offset = self._host_block(size)
                self._copy_out(slot, _as_bytes(tensor))
            elif place == "disk" and self._spill is not None:
                self._spill_out(slot, _as_bytes(tensor), self._spill)
            else:
                raise ValueError(f"place is {place!r}, must be gpu, host, or disk with a folder given")
        return slot

    def next_turn(self) -> None:
        """A layer's work begins: what left the GPU before the last such moment gives its memory back.

        The CPU queues kernels seconds ahead of the GPU (a layer's attention takes 15 s at a million tokens), so it sees
        no copy end in time; the compute stream waits for the copies instead, which had a layer's work to end in.
        """
        with self._call():
            self._turn += 1
            while self._leaving and self._leaving[0].turn < self._turn - 1:
                self._let_go(self._leaving.popleft())

    def _let_go(self, slot: Slot) -> None:
        if isinstance(slot.saved, Future):
            slot.saved.result()
        elif slot.saved is not None:
            # In stream order the memory may be reused after this; the CPU does not wait.
            torch.cuda.current_stream(self.device).wait_event(slot.saved)
        slot.source = None

    def prefetch(self, slot: Slot) -> None:
        """Start copying back into a fresh device tensor, on a stream of its own; a second call does nothing."""
        with self._call():
            self._fetch(slot)

    def _fetch(self, slot: Slot) -> None:
        self._check_live(slot)
        if slot.place == "gpu" or slot.fetched is not None:
            return
        slot.fetched = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
        target = _as_bytes(slot.fetched)
        if slot.place == "disk":
            assert self._spill is not None  # `save` has put it there
            slot.returned = self._spill.read(target, slot.offset)
        elif self._in is None or slot.device.type == "cpu":
            self._copy(slot, target, to_host=False)
        else:
            # The fresh tensor may reuse memory that kernels already queued still read.
            self._in.wait_stream(torch.cuda.current_stream(self.device))
            if isinstance(slot.saved, torch.cuda.Event):
                self._in.wait_event(slot.saved)
            with torch.cuda.stream(self._in):
                self._copy(slot, target, to_host=False)
            slot.returned = self._in.record_event()

    def take(self, slot: Slot) -> Tensor:
        """The saved tensor, ready for the current stream; its slot ends.

        Raises:
            RuntimeError: The slot was taken or dropped before.
            ResourceError: The disk failed.
        """
        with self._call():
            self._fetch(slot)
            if slot.place == "gpu":
                tensor = slot.source
            else:
                tensor, slot.fetched = slot.fetched, None
                if isinstance(slot.saved, Future):
                    slot.saved.result()  # first: what a failed write has left reads as zeros
                if isinstance(slot.returned, Future):
                    slot.returned.result()
                elif slot.returned is not None:
                    torch.cuda.current_stream(self.device).wait_event(slot.returned)
            self._end(slot)
        assert tensor is not None  # a live slot has one or the other
        return tensor

    def drop(self, slot: Slot) -> None:
        """End a slot without its tensor; one that has ended, or whose arena is closed, is left as it is."""
        self._dropped.append(slot)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Give host memory and disk back. Slots end with it; a second call does nothing."""
        self._release()  # waits for the copies under way, so that what they read can go after it
        self._leaving.clear()
        self._ending.clear()

    def __enter__(self) -> HostArena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """One call at a time, on an arena that is open, after what has finished let go of its memory."""
        with self._lock:
            if not self._release.alive:
                raise RuntimeError("the arena was closed")
            self._settle()
            if self._failure is not None:  # of a write that nobody has waited for
                raise self._failure
            yield

    def _check_live(self, slot: Slot) -> None:
        if slot.ended:
            raise RuntimeError("the slot was taken or dropped before")

    def _host_block(self, size: int) -> int:
        offset = self._blocks.take(size)
        while offset is None and self._ending:
            self._ending[0][0].synchronize()
            self._settle()
            offset = self._blocks.take(size)
        if offset is None:
            raise self._full("host", size, self._blocks, self.capacity_bytes)
        try:
            self._range.ensure(offset + in_pages(size))
        except ResourceError:
            self._blocks.give(offset, size)
            raise
        self.used_bytes += in_pages(size)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return offset

    def _full(self, place: str, size: int, blocks: Blocks, capacity: int) -> ResourceError:
        return ResourceError(
            f"no room for {human(size)} of activations on the {place}: {human(blocks.free_bytes)} free of "
            f"{human(capacity)}, the largest piece {human(blocks.largest_bytes)}",
            rule="activations that are kept must fit where the plan puts them",
            hint=f"Allow more {'host memory' if place == 'host' else 'disk'}, keep fewer layers' inputs, "
            "or shorten the context.",
        )

    def _copy_out(self, slot: Slot, data: Tensor) -> None:
        if self._out is None or slot.device.type == "cpu":
            self._copy(slot, data, to_host=True)
            return
        compute = torch.cuda.current_stream(self.device)
        self._out.wait_stream(compute)
        with torch.cuda.stream(self._out):
            self._copy(slot, data, to_host=True)
        slot.saved = self._out.record_event()
        slot.source = data
        slot.turn = self._turn
        self._leaving.append(slot)
        if len(self._leaving) > _LEAVING:
            self._let_go(self._leaving.popleft())

    def _spill_out(self, slot: Slot, data: Tensor, spill: SpillFile) -> None:
        offset = spill.blocks.take(slot.size_bytes)
        if offset is None:
            raise self._full("disk", slot.size_bytes, spill.blocks, spill.capacity_bytes)
        slot.offset = offset
        self.disk_used_bytes += in_pages(slot.size_bytes)
        self.disk_peak_bytes = max(self.disk_peak_bytes, self.disk_used_bytes)
        slot.saved = spill.write(data, offset)
        slot.turn = self._turn
        self._leaving.append(slot)
        waiting = [s.saved for s in self._leaving if isinstance(s.saved, Future)]
        if len(waiting) > _LEAVING:
            waiting[0].result()

    def _copy(self, slot: Slot, data: Tensor, *, to_host: bool) -> None:
        """Between a tensor's bytes and its block, piece by piece, on the current stream."""
        start = 0
        for piece in self._range.pieces(slot.offset, slot.size_bytes):
            part = data[start : start + len(piece)]
            target, source = (piece, part) if to_host else (part, piece)
            target.copy_(source, non_blocking=True)
            start += len(piece)

    def _settle(self) -> None:
        """Let go of what finished copies and dropped slots held. Never waits."""
        while self._dropped:
            slot = self._dropped.popleft()
            if not slot.ended and self._release.alive:
                self._end(slot)
        while self._leaving and _done(self._leaving[0].saved):
            slot = self._leaving.popleft()
            slot.source = None
            if isinstance(slot.saved, Future):
                self._failure = self._failure or slot.saved.exception()
        while self._ending and self._ending[0][0].query():
            _, offset, size, _ = self._ending.popleft()
            self._blocks.give(offset, size)

    def _end(self, slot: Slot) -> None:
        self._check_live(slot)
        slot.ended = True
        if slot.place == "disk":
            assert self._spill is not None  # `save` has put it there
            # The worker keeps the order, so a later slot's write comes after this one's copies.
            self._spill.blocks.give(slot.offset, slot.size_bytes)
            self.disk_used_bytes -= in_pages(slot.size_bytes)
        elif slot.place == "host":
            self.used_bytes -= in_pages(slot.size_bytes)
            last = slot.returned or slot.saved
            if isinstance(last, torch.cuda.Event) and not last.query():
                self._ending.append((last, slot.offset, slot.size_bytes, slot.fetched))
            else:
                self._blocks.give(slot.offset, slot.size_bytes)
        else:
            slot.source = None
        slot.fetched = None


def _done(copy: torch.cuda.Event | Future[None] | None) -> bool:
    if copy is None:
        return True
    return copy.done() if isinstance(copy, Future) else copy.query()


def _as_bytes(tensor: Tensor) -> Tensor:
    """uint8 `[bytes]` over the same memory, or over a contiguous copy."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _release(
    owner: int, memory: PinnedRange, spill: SpillFile | None, streams: list[torch.cuda.Stream | None]
) -> None:
    if os.getpid() != owner:
        return  # a forked child has neither the range nor the worker
    try:
        for stream in streams:
            if stream is not None:
                stream.synchronize()
    finally:
        if spill is not None:
            spill.close()
        memory.close()
