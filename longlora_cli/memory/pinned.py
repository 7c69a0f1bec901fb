"""One range of host memory that a GPU copies from and to at full speed, and the bookkeeping of blocks in it.

torch's own pinned allocator rounds each block up to a power of two (a 4.1 GiB state takes 8 GiB) and keeps what it
got. Here the range is mapped once, exact to the page, and registered with CUDA piece by piece as it comes into use:
registration makes the pages real and costs about 0.64 s/GiB on an H100 host, so a small run pays for what it uses.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longlora_cli.errors import ResourceError

PAGE_BYTES = 4096
# One registration each; a copy never crosses an edge, because CUDA promises nothing for a range in two registrations.
PIECE_BYTES = 1 << 30
# Linux: do not set swap aside for the whole range; do not hand the range to forked children, so that a data loader's
# fork neither copies 25 million page table entries nor turns pinned pages into copy-on-write ones.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_MADV_DONTFORK = 10


def in_pages(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def human(size_bytes: int) -> str:
    """`1.5 GiB`; bytes below 1 MiB in full, so that small numbers in messages stay exact."""
    if size_bytes < 1 << 20:
        return f"{size_bytes:,} bytes"
    unit, name = (1 << 30, "GiB") if size_bytes >= 1 << 30 else (1 << 20, "MiB")
    return f"{size_bytes / unit:.2f} {name}"


class Blocks:
    """First-fit allocation of whole pages in `[0, capacity_bytes)`; neighbours that are free become one hole."""

    def __init__(self, capacity_bytes: int) -> None:
        self.holes: list[tuple[int, int]] = [(0, capacity_bytes)] if capacity_bytes else []

    @property
    def free_bytes(self) -> int:
        """Bytes in all holes together."""
        return sum(length for _, length in self.holes)

    @property
    def largest_bytes(self) -> int:
        """Bytes in the largest hole: the largest block that can be had."""
        return max((length for _, length in self.holes), default=0)

    def take(self, size_bytes: int) -> int | None:
        """The offset of a block of `in_pages(size_bytes)`, or None when no hole is as large."""
        size_bytes = in_pages(size_bytes)
        if not size_bytes:
            return 0
        for i, (start, length) in enumerate(self.holes):
            if length >= size_bytes:
                rest = [(start + size_bytes, length - size_bytes)] if length > size_bytes else []
                self.holes[i : i + 1] = rest
                return start
        return None

    def give(self, start: int, size_bytes: int) -> None:
        """Return the block that `take` gave at `start`."""
        size_bytes = in_pages(size_bytes)
        if not size_bytes:
            return
        i = bisect.bisect(self.holes, (start, 0))
        end = start + size_bytes
        if i < len(self.holes) and self.holes[i][0] == end:
            end += self.holes.pop(i)[1]
        if i and sum(self.holes[i - 1]) == start:
            i -= 1
            start = self.holes.pop(i)[0]
        self.holes.insert(i, (start, end - start))


class PinnedRange:
    """An anonymous mapping of exactly `capacity_bytes`, page by page made real and registered up to a growing mark.

    Args:
        capacity_bytes: Address space to set aside; memory is used only below the mark.
        register: Whether to register with CUDA (a GPU copies) or not (the CPU is the device).

    Raises:
        ResourceError: The system grants no such range.
    """

    def __init__(self, capacity_bytes: int, *, register: bool) -> None:
        self.capacity_bytes = in_pages(capacity_bytes)
        self.registered_bytes = 0
        self._register = register
        self._owner = os.getpid()
        self._registrations: list[int] = []
        self._libc = _libc()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        size = max(self.capacity_bytes, PAGE_BYTES)
        address = self._libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise ResourceError(
                f"the system grants no range of {human(size)} of host memory: {os.strerror(ctypes.get_errno())}",
                hint="Ask for less host memory, or raise the limit that `ulimit -v` shows.",
            )
        self._address: int | None = address
        if sys.platform == "linux":
            self._libc.madvise(address, size, _MADV_DONTFORK)
        self._bytes = torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)

    def ensure(self, end_bytes: int) -> None:
        """Register everything below `end_bytes`; without a GPU, pages become real when they are written.

        Raises:
            ResourceError: CUDA refuses; what was registered before stays usable.
        """
        if not self._register:
            return
        while self.registered_bytes < end_bytes:
            start = self.registered_bytes
            size = min(PIECE_BYTES, self.capacity_bytes - start)
            code = int(torch.cuda.cudart().cudaHostRegister(self._start() + start, size, 0))
            if code:
                raise ResourceError(
                    f"CUDA refuses to register {human(size)} of host memory after {human(start)} (error {code})",
                    rule="registered memory cannot be swapped, so it must be free and allowed to this process",
                    hint="Ask for less host memory, or end what else uses it.",
                )
            self._registrations.append(start)
            self.registered_bytes += size

    def pieces(self, start: int, size_bytes: int) -> Iterator[Tensor]:
        """Views, uint8 `[bytes]`, that cover a block in order, none across the edge of a registration.

        They must not be kept: `close` takes the memory away from under them.
        """
        self._start()
        end = start + size_bytes
        while start < end:
            stop = min(end, (start // PIECE_BYTES + 1) * PIECE_BYTES)
            yield self._bytes[start:stop]
            start = stop

    def view(self, size_bytes: int) -> memoryview:
        """The first `size_bytes` as bytes for file operations; must not be kept, as `pieces`."""
        self._start()
        array: Any = self._bytes.numpy()
        return memoryview(array)[:size_bytes]

    def close(self) -> None:
        """Unregister and unmap; twice is fine, and in a forked child, which has no such range, nothing happens."""
        address, self._address = self._address, None
        if address is None or os.getpid() != self._owner:
            return
        for start in self._registrations:
            torch.cuda.cudart().cudaHostUnregister(address + start)
        self._libc.munmap(address, max(self.capacity_bytes, PAGE_BYTES))

    def _start(self) -> int:
        if self._address is None:
            raise RuntimeError("the host memory was closed")
        if os.getpid() != self._owner:
            raise RuntimeError("the host memory belongs to the process that made this one by fork")
        return self._address


def _libc() -> ctypes.CDLL:
    # Not `mmap.mmap`: a forked child would unmap its copy's range, where it may long have something else.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
