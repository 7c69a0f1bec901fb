"""Tensors written a block of rows at a time.

Files are written header first, which is possible because all names, shapes and dtypes are known before the first byte.
The format is safetensors' own (https://github.com/huggingface/safetensors), as `models/tensors.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlora_cli.errors import NumericError
from longlora_cli.models.tensors import (
    MODEL_FILE,
    STORED_DTYPES,
    Rows,
    StoredTensor,
    blocks,
    matrix_shape,
    round_once,
)

SHARD_BYTES = 5_000_000_000
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result.

    Args:
        name: Its name in the model.
        shape: Any rank.
        dtype: What the float64 rows are rounded to, once.
        open: Makes the rows when the tensor's turn comes, so that only one tensor's factors live at a time; or the
            stored tensor itself, whose bytes are copied when the dtype is the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    open: Callable[[], Rows | StoredTensor]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        rows, columns = matrix_shape(self.shape)
        return rows * columns * self.dtype.itemsize


def write_model(
    folder: Path,
    outputs: Sequence[OutputTensor],
    *,
    advance: Callable[[int], None],
    file: str = MODEL_FILE,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as safetensors into a staging folder: one file, or shards with an index.

    Memory is one block of rows and one tensor's low-rank factors, whatever the model's size.

    Args:
        folder: Where the files go.
        outputs: The tensors; written in this order.
        advance: Called with the number of bytes just written.
        file: Name of the file when one is enough.
        shard_bytes: A file ends before it would hold more than this.

    Raises:
        NumericError: A value is too large for float16.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    if len(shards) == 1:
        _write_file(folder / file, shards[0], advance)
        return
    stem, _, ending = file.rpartition(".")
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        _write_file(folder / name, shard, advance)
        placed |= {output.name: name for output in shard}
    index = {"metadata": {"total_size": sum(o.nbytes for o in outputs)}, "weight_map": placed}
    (folder / f"{file}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, outputs: Sequence[OutputTensor], advance: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        begin, end = end, end + output.nbytes
        header[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # bodies start on a multiple of 8, as readers that map the file like it
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            source = output.open()
            for first, last in blocks(matrix_shape(output.shape)):
                block = _block(source, first, last, output.dtype)
                if output.dtype == torch.float16 and not block.isfinite().all():
                    raise NumericError(
                        f"{output.name} has values that float16 cannot hold (above 65,504)",
                        hint="Use --dtype bf16 or fp32.",
                    )
                data = block.contiguous().view(torch.uint8).numpy()
                stream.write(data.data)
                advance(data.nbytes)


def _block(source: Rows | StoredTensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(source, StoredTensor):
        stored = source.read(first, last)
        return stored if stored.dtype == dtype else round_once(stored.double(), dtype)
    return round_once(source.rows(first, last), dtype)
