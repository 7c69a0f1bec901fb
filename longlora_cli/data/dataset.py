"""Prepared data on disk: Arrow shards, memory-mapped, with a manifest that says what they were made with.

A folder holds `shard-00000.arrow`, ... (Arrow IPC streams that `datasets.Dataset.from_file` opens too) with
the int32 list columns `input_ids`, `labels` and `document_lengths`, one row a chunk.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longlora_cli.data.chunk import IGNORE, Chunk, Int32
from longlora_cli.data.chunk_cost import ChunkCost, default_cost
from longlora_cli.errors import IncompatibleError, IntegrityError
from longlora_cli.storage import Manifest, atomic_folder, verify_folder

COLUMNS = ("input_ids", "labels", "document_lengths")
_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
# A record batch is what one read maps; a shard is what one checksum covers.
_BATCH_TOKENS = 1 << 20
_SHARD_TOKENS = 1 << 25  # 256 MiB of ids and labels


class ChunkWriter:
    """Writes chunks as a stream into a folder; made by `ChunkDataset.writing`.

    Args:
        folder: The staging folder. Other temporary files may live in it, if they are gone at the end.
        meta: Facts for the manifest; `chunks`, `tokens`, `trained_tokens` and `longest_chunk` are added at
            the end.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self._rows: list[tuple[Int32, Int32, Int32]] = []
        self._row_tokens = 0
        self._shard_tokens = 0
        self._shards = 0
        self._writer: Any = None
        self._sums = {"chunks": 0, "tokens": 0, "trained_tokens": 0, "longest_chunk": 0}

    def add(self, input_ids: Int32, labels: Int32, document_lengths: Int32) -> None:
        """Append one chunk: int32 `[tokens]`, `[tokens]` and `[documents]`.

        Raises:
            ValueError: The lengths do not sum to the tokens, or ids and labels differ in length.
        """
        tokens = len(input_ids)
        if len(labels) != tokens or int(np.sum(document_lengths)) != tokens:
            raise ValueError(f"{tokens} ids, {len(labels)} labels, document lengths {document_lengths}")
        self._rows.append((input_ids, labels, document_lengths))
        self._row_tokens += tokens
        self._sums["chunks"] += 1
        self._sums["tokens"] += tokens
        self._sums["trained_tokens"] += int(np.count_nonzero(np.asarray(labels) != IGNORE))
        self._sums["longest_chunk"] = max(self._sums["longest_chunk"], tokens)
        if self._row_tokens >= _BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is buffered and complete `meta`."""
        self._flush()
        self._end_shard()
        self.meta.update(self._sums)

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            path = self.folder / f"shard-{self._shards:05d}.arrow"
            self._writer = pa.ipc.new_stream(str(path), _SCHEMA)
            self._shards += 1
        columns = [_list_array([row[column] for row in self._rows]) for column in range(len(COLUMNS))]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._shard_tokens += self._row_tokens
        self._rows, self._row_tokens = [], 0
        if self._shard_tokens >= _SHARD_TOKENS:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._shard_tokens = None, 0


def _list_array(rows: list[Int32]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows).astype(np.int32, copy=False)
    return pa.ListArray.from_arrays(_int32_array(offsets), _int32_array(values))


def _int32_array(values: Int32) -> pa.Int32Array:
    """The same memory as an Arrow array; not by `pa.array`, which imports pandas to ask whether this is one of its."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


class ChunkDataset:
    """Chunks of one or several prepared folders; a map-style dataset for torch's `DataLoader`.

    Args:
        folders: The folders, in the order of their chunks.
        manifests: What each of them says of itself.
    """

    def __init__(self, folders: list[Path], manifests: list[Manifest]) -> None:
        self.folders = folders
        self.manifests = manifests
        self._batches: list[pa.RecordBatch] = []
        self._ends: list[int] = []  # chunks up to and with each record batch
        for folder, manifest in zip(folders, manifests, strict=True):
            for name in sorted(n for n in manifest.files if n.endswith(".arrow")):
                self._map_shard(folder / name)

    def _map_shard(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            if reader.schema.names != list(COLUMNS):
                raise IntegrityError(f"{path} has the columns {', '.join(reader.schema.names)}")
            for batch in reader:
                self._batches.append(batch)
                self._ends.append(len(self) + batch.num_rows)
        except pa.ArrowInvalid as error:
            raise IntegrityError(f"{path} is damaged: {str(error).splitlines()[0]}") from error

    @staticmethod
    @contextmanager
    def writing(folder: Path, meta: dict[str, Any], *, inside: Path | None = None) -> Iterator[ChunkWriter]:
        """Make a prepared folder chunk by chunk; it appears complete at the end, or not at all.

        Args:
            folder: The folder to make.
            meta: Facts for its manifest; may be filled while writing. Needs `tokenizer_sha256`,
                `template_sha256` and `max_length` by the end.
            inside: Where it is made until then, see `storage.atomic_folder`.

        Raises:
            SettingsError: The folder exists.
            ResourceError: The disk is full.
        """
        with atomic_folder(folder, kind="dataset", meta=meta, inside=inside) as staging:
            writer = ChunkWriter(staging, meta)
            yield writer
            writer.close()

    @staticmethod
    def write(folder: Path, chunks: Iterable[Chunk], meta: dict[str, Any]) -> ChunkDataset:
        """Write all chunks and open the folder; see `writing` for `meta` and errors."""
        with ChunkDataset.writing(folder, meta) as writer:
            for chunk in chunks:
                writer.add(chunk.input_ids, chunk.labels, chunk.document_lengths)
        return ChunkDataset.open(folder)

    @staticmethod
    def open(folder: Path, *, verify: bool = False) -> ChunkDataset:
        """Open one prepared folder; see `open_all`."""
        return ChunkDataset.open_all([folder], verify=verify)

    @staticmethod
    def open_all(folders: list[Path], *, verify: bool = False) -> ChunkDataset:
        """Open prepared folders as one dataset, memory-mapped.

        Args:
            folders: At least one folder made by `longlora prepare`.
            verify: Also hash every shard; otherwise only names and sizes are compared with the manifest.

        Raises:
            NotFoundError: A folder has no manifest.
            IntegrityError: A shard is missing or differs from its manifest; it is named.
            IncompatibleError: The folders were made with different tokenizers or chat templates.
        """
        manifests = [verify_folder(folder, "dataset", deep=verify) for folder in folders]
        for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
            for part, name in (("tokenizer_sha256", "tokenizer"), ("template_sha256", "chat template")):
                if manifest.meta.get(part) != manifests[0].meta.get(part):
                    raise IncompatibleError(
                        f"{folder} and {folders[0]} were prepared with different {name}s",
                        hint="Prepare both with the same --model and --chat-template.",
                    )
        return ChunkDataset(list(folders), manifests)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkDataset.open_all, (self.folders,)  # a spawned worker maps the files anew

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Chunk:
        """The chunk at `index`; its arrays are read-only views of the mapped file."""
        return Chunk(*(self._column(index, column) for column in range(len(COLUMNS))))

    def _column(self, index: int, column: int) -> Int32:
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        row = index - (self._ends[number] - batch.num_rows)
        values: Int32 = batch.column(column)[row].values.to_numpy(zero_copy_only=True)
        return values

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest chunk."""
        return max(int(manifest.meta["longest_chunk"]) for manifest in self.manifests)

    def trained_tokens(self, index: int) -> int:
        """How many tokens of the chunk at `index` are learnt."""
        return int(np.count_nonzero(self._column(index, 1) != IGNORE))

    def document_lengths(self, index: int) -> Int32:
        """Tokens of each document of the chunk at `index`, int32 `[documents]`."""
        return self._column(index, 2)

    @property
    def cost(self) -> ChunkCost:
        """What the chunks were packed by; the default for data that does not say."""
        content = self.manifests[0].meta.get("cost")
        return ChunkCost(**content) if content else default_cost()

    def require_tokenizer(self, tokenizer: Any, chat_template: str = "auto") -> None:
        """Refuse a tokenizer or chat template other than the one the data was made with.

        Args:
            tokenizer: As it will be used, its chosen chat template in it.
            chat_template: `--chat-template` as it was given.

        Raises:
            IncompatibleError: One differs; the message says which, and what to type.
        """
        from longlora_cli.models.tokenizer import template_sha256, tokenizer_sha256

        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            then, now = manifest.meta["tokenizer_sha256"], tokenizer_sha256(tokenizer)
            if then != now:
                raise IncompatibleError(
                    f"{folder} was prepared with another tokenizer than this model's ({then[:12]} and {now[:12]})",
                    hint="Run longlora prepare again with --model set to this model.",
                )
            then, now = manifest.meta["template_sha256"], template_sha256(tokenizer)
            if then != now:
                chosen = manifest.meta.get("chat_template", "auto")
                raise IncompatibleError(
                    f"{folder} was prepared with another chat template: {_named(chosen)} ({then[:12]}), "
                    f"not {_named(chat_template)} ({now[:12]})",
                    hint=_remedy(chosen, chat_template),
                )


def _named(chat_template: str) -> str:
    return "its model's own" if chat_template == "auto" else f"--chat-template {chat_template}"


def _remedy(then: str, now: str) -> str:
    """What to type when data were prepared with the template `then` and are to be used with `now`."""
    again = "Run longlora prepare again with " + (
        f"--chat-template {now}" if now != "auto" else "this --model"
    )
    if then == now:  # the same name, another text
        return f"{again}." if then == "auto" else f"{then} has changed since: put it back. Or: {again}."
    return (
        f"Add --chat-template {then}. " if then != "auto" else "Leave --chat-template out. "
    ) + f"Or: {again}."
