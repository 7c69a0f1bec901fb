"""The third tier: a file without a name that activations wait in when host memory does not suffice.

From about 512K tokens a layer takes so long that an ordinary NVMe hides the traffic (reference rates: 8 KiB a token
and layer in 0.95 GB/s at 512K tokens, 0.50 GB/s at 1M). The file is unlinked the moment it is open, so nothing
remains after any kind of end. One worker thread does all reading and writing in the order it was asked for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from longlora_cli.errors import ResourceError
from longlora_cli.memory.pinned import Blocks, PinnedRange, human, in_pages

# A disk writes this in ~20 ms, a GPU copies it in ~1 ms: a second buffer would gain 5 % at most.
_BOUNCE_BYTES = 64 << 20


class SpillFile:
    """Slots in an unlinked file.

    Args:
        folder: Where the file lies; must exist.
        capacity_bytes: Size of the file.
        device: Whose tensors are saved.

    Raises:
        ResourceError: The folder is missing, or has less space than `capacity_bytes`.
    """

    def __init__(self, folder: Path, capacity_bytes: int, device: torch.device) -> None:
        self.capacity_bytes = in_pages(capacity_bytes)
        if not folder.is_dir():
            raise ResourceError(
                f"{folder} is not a folder", rule="activations on disk need an existing folder"
            )
        free = shutil.disk_usage(folder).free
        if free < self.capacity_bytes:
            raise ResourceError(
                f"{folder} has {human(free)} free, {human(self.capacity_bytes)} are needed",
                rule="the space for activations on disk must be there before training starts",
                hint="Name a folder on a larger disk, allow less disk, or shorten the context.",
            )
        self.blocks = Blocks(self.capacity_bytes)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the arena
        os.ftruncate(self._file.fileno(), self.capacity_bytes)
        gpu = device.type == "cuda"
        self._bounce = PinnedRange(min(_BOUNCE_BYTES, max(self.capacity_bytes, 1)), register=gpu)
        self._bounce.ensure(self._bounce.capacity_bytes)
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="longlora-spill")

    def write(self, data: Tensor, offset: int) -> Future[None]:
        """Start writing uint8 `[bytes]`; `data` is held until it is done, errors come out of the future."""
        return self._worker.submit(self._write, data, offset, self._now())

    def read(self, into: Tensor, offset: int) -> Future[None]:
        """Start reading into uint8 `[bytes]`; when the future is done the bytes are on the device."""
        return self._worker.submit(self._read, into, offset, self._now())

    def close(self) -> None:
        """Wait for the worker and give file and buffer back; twice is fine."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._bounce.close()
        self._file.close()

    def _now(self) -> torch.cuda.Event | None:
        """The point in the caller's stream after which its memory may be touched."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def _write(self, data: Tensor, offset: int, ready: torch.cuda.Event | None) -> None:
        for piece in self._pieces(data):
            self._copy(next(self._bounce.pieces(0, len(piece))), piece, ready)
            left = self._bounce.view(len(piece))
            try:
                while left:
                    count = os.pwrite(self._file.fileno(), left, offset)
                    left, offset = left[count:], offset + count
            except OSError as error:
                raise ResourceError(
                    f"activations could not be written to disk: {error.strerror}",
                    hint="Name a folder on a larger disk, or shorten the context.",
                ) from error

    def _read(self, into: Tensor, offset: int, ready: torch.cuda.Event | None) -> None:
        for piece in self._pieces(into):
            left = self._bounce.view(len(piece))
            while left:
                count = os.preadv(self._file.fileno(), [left], offset)
                if not count:
                    raise ResourceError(
                        "activations on disk are cut short", rule="nobody else may use the file"
                    )
                left, offset = left[count:], offset + count
            self._copy(piece, next(self._bounce.pieces(0, len(piece))), ready)

    def _pieces(self, data: Tensor) -> tuple[Tensor, ...]:
        return data.split(self._bounce.capacity_bytes) if len(data) else ()

    def _copy(self, target: Tensor, source: Tensor, ready: torch.cuda.Event | None) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()
