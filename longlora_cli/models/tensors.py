"""Tensors on disk, read a block of rows at a time, and the one rounding of what is computed from them.

safetensors files are read with `preadv` instead of memory maps: a mapped page counts as resident memory, so that two
mapped 1.2 GB models cost 3.8 GB while blocks cost 0.1 GB. The format is safetensors' own: eight bytes of header
length, a JSON header, then the bodies in the header's order (https://github.com/huggingface/safetensors). Loading a
model with its adapter and merging both compute with what is here, so that they give the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longlora_cli.errors import IntegrityError, NotFoundError, SecurityError

MODEL_FILE = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
# A block holds about this many elements, 2 MiB in float64: with 8 MiB, each temporary is fresh pages from the kernel
# and a weighted sum takes 14 ms per million elements instead of 7.
BLOCK_ELEMENTS = 1 << 18
_NF4_BLOCK = 64  # blocks start at multiples of NF4's 64 values
_HEADER_LIMIT = 100_000_000  # safetensors' own limit
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# What settings and records call them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Rows(Protocol):
    """A matrix that is computed when it is asked for, a block of rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), `[last - first, columns]` in float64."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor of any rank as rows and columns: the last axis is the columns, a vector is one column."""
    if len(shape) < 2:
        return (shape[0] if shape else 1, 1)
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `file` from byte `offset` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        rows, columns = matrix_shape(self.shape)
        return rows * columns * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` of the matrix view, `[rows, columns]` in the stored dtype."""
        rows, columns = matrix_shape(self.shape)
        last = rows if last is None else last
        width = columns * self.dtype.itemsize
        buffer = bytearray((last - first) * width)
        if not buffer:
            return torch.empty(last - first, columns, dtype=self.dtype)
        _read_into(buffer, self.file, self.offset + first * width)
        return torch.frombuffer(buffer, dtype=self.dtype).view(last - first, columns)


@dataclass(frozen=True)
class StoredRows:
    """A stored tensor as `Rows`."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return matrix_shape(self.tensor.shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), `[last - first, columns]` in float64."""
        return self.tensor.read(first, last).double()


class SharedRows:
    """Computes each block once although several sources ask for it in turn."""

    def __init__(self, source: Rows) -> None:
        self._source = source
        self._block: tuple[int, int, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._source.shape

    def rows(self, first: int, last: int) -> Tensor:
        """The block; the caller must not change it in place."""
        if self._block is None or self._block[:2] != (first, last):
            self._block = (first, last, self._source.rows(first, last))
        return self._block[2]


def _read_into(buffer: bytearray, path: Path, offset: int) -> None:
    view = memoryview(buffer)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise IntegrityError(f"{path} ends at byte {offset + done:,}, in the middle of a tensor")
            done += count
    finally:
        os.close(descriptor)


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together cover a matrix; each starts at a multiple of 64 elements."""
    rows, columns = shape
    align = _NF4_BLOCK // math.gcd(columns, _NF4_BLOCK)
    step = max(align, BLOCK_ELEMENTS // max(columns, 1) // align * align)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """True when shape, dtype and every value are equal."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(torch.equal(one.read(*b), other.read(*b)) for b in blocks(matrix_shape(one.shape)))


@dataclass(frozen=True)
class TensorFolder:
    """The safetensors files of a folder; only their headers are read until a tensor is asked for."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_folder(folder: Path, file: str = MODEL_FILE) -> TensorFolder:
    """Read the headers of a model folder (one file, or shards with an index) or of one named file in it.

    Raises:
        NotFoundError: There are no safetensors.
        IntegrityError: A header cannot be read, or the index and the files differ; the tensor is named.
        SecurityError: The index points outside the folder.
    """
    index = folder / MODEL_INDEX
    if (folder / file).is_file():
        return TensorFolder(folder, _read_header(folder / file))
    if file != MODEL_FILE or not index.is_file():
        raise NotFoundError(
            f"{folder} has no {file}",
            rule="Only safetensors are read; pickled weights (.bin, .pt) could run foreign code.",
        )
    try:
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(placed.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(f"{index} is damaged: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if Path(name).name != name:
            raise SecurityError(f"{index} names the file {name!r} outside its folder")
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder / name} is missing", rule=f"{index.name} lists it.")
        tensors |= _read_header(folder / name)
    if differing := sorted(set(placed) ^ set(tensors)):
        raise IntegrityError(f"{index} and its files differ: {', '.join(differing[:3])}")
    return TensorFolder(folder, tensors)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header: dict[str, Any] = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(
                name, STORED_DTYPES[entry["dtype"]], tuple(entry["shape"]), path, 8 + length + begin
            )
            if begin < 0 or end - begin != tensor.nbytes or tensor.offset + tensor.nbytes > size:
                raise ValueError(f"{name} does not fit its bytes")
            found[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged or of an unknown kind: {error}") from error
    return found


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 -> `dtype`, correctly rounded (ties to even).

    torch converts float64 to 16 bits by way of float32, which rounds twice: a value just beside the middle of
    two 16-bit neighbours can first land on the middle and then on the wrong side. Where the float32 form is such
    a middle, it is rounded to odd instead, which makes the second rounding exact (Boldo and Melquiond 2008,
    doi:10.1109/TC.2007.70819).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    middle = values.to(torch.float32)
    bits = middle.view(torch.int32)
    if dtype == torch.bfloat16:
        on_middle = (bits & 0xFFFF) == 0x8000
    else:  # below 2^-14, float16 keeps fewer bits than the 11 of its normal numbers: all are looked at
        on_middle = ((bits & 0x1FFF) == 0x1000) | (middle.abs() < 2.0**-14)
    suspects = on_middle.nonzero(as_tuple=True)
    exact, near = values[suspects], middle[suspects]
    inexact = (near.double() != exact) & exact.isfinite()
    towards_zero = bits[suspects] - (near.double().abs() > exact.abs()).int()
    bits[suspects] = torch.where(inexact, towards_zero | 1, bits[suspects])
    return middle.to(dtype)
