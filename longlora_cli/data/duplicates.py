"""Which documents are duplicates of earlier ones: equal but for white space, or nearly.

All sources are read once, before anything is drawn from them or tokenized. A document is left out when an earlier one
that stays is its like; so for each that is left out there is one that stays, and nothing depends on threads or chance.

Near duplicates are searched for as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3: documents
whose signatures agree in all slots of one of several bands are compared. Slots a band are chosen so that of pairs as
similar as the threshold 99 % share a band. Signatures lie in a temporary file, 1,024 bytes a document and 8 a band; in
memory are 72 bytes a document for exact duplicates and 148 for near ones at the threshold 0.8, and beyond 600 MB of
them reading stops with an error.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.data.document import Document, Source
from longlora_cli.data.fingerprints import (
    DIGEST_BYTES,
    SIGNATURE,
    SLOTS,
    Slots,
    characters_of,
    digest,
    require_signatures,
    signature,
)
from longlora_cli.errors import DataError

_MOST_BYTES = 600_000_000
_EXACT_BYTES = 72  # digest, characters, and sorting: 16 + 8 + 48
_NEAR_BYTES = 64  # digest, characters, and sorting one band: 16 + 8 + 40; and 4 a band
_RECALL = 0.99
# Documents compared along each band, the latest first. Without a limit, chats of one template that are all a little
# below the threshold would be compared each with each: 100,000 of them for hours.
_MOST_STEPS = 64
_BLOCK = 4096  # documents whose bands are written at once: 1 MB
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Bools = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Duplicates:
    """What was found in one source.

    Args:
        source: Reads only what stays.
        documents: Documents there are.
        exact: Left out, because an earlier one is equal.
        near: Left out, because an earlier one is nearly equal.
        characters: Characters of those left out.
    """

    source: Source
    documents: int
    exact: int
    near: int
    characters: int


def find_duplicates(
    sources: list[Source], *, threshold: float | None, folder: Path, advance: Callable[[int], None]
) -> list[Duplicates]:
    """Read all sources once and find what is there twice, within and across them.

    Args:
        sources: In the order that says which of two comes first. Samples and weights do not count here.
        threshold: Near duplicates have at least this similarity, 0 to 1; None finds exact ones only.
        folder: Where the temporary file is made.
        advance: Told the bytes read.

    Raises:
        DataError: A source with faults, or more documents than there is memory for.
        SettingsError: Near duplicates, and rensa is not installed.
    """
    digests, characters, ends = bytearray(), array("q"), []
    table = _Table(folder, threshold) if threshold is not None else None
    most = _MOST_BYTES // (_EXACT_BYTES if table is None else _NEAR_BYTES + 4 * table.bands)
    try:
        for source in sources:
            for document in source.read():
                if len(characters) == most:
                    raise _too_many(most)
                characters.append(characters_of(document))
                digests += (found := digest(document))
                if table is not None:
                    table.add(signature(document, found))
                advance(document.size_bytes)
                del document
            ends.append(len(characters))
        exact = _equal_to_earlier(digests)
        digests.clear()
        near = np.zeros_like(exact) if table is None else table.like_earlier(exact)
    finally:
        if table is not None:
            table.close()
    return _by_source(sources, ends, exact, near, np.array(characters))


def bands_of(threshold: float) -> tuple[int, int]:
    """Bands of a signature and slots of a band, as many as leave 99 % of pairs at the threshold a common band."""
    shapes = [(SLOTS // slots, slots) for slots in range(SLOTS, 0, -1)]
    return next(s for s in shapes if 1 - (1 - threshold ** s[1]) ** s[0] >= _RECALL)


def _too_many(most: int) -> DataError:
    room = _MOST_BYTES // _EXACT_BYTES
    exact = f"--dedup exact has room for {room:,}. Or " if room > most else ""
    return DataError(
        f"--dedup: the inputs have more than {most:,} documents",
        rule=f"Their fingerprints are held in memory, {_MOST_BYTES // 1_000_000} MB at most.",
        hint=f"{exact}prepare parts of the inputs by themselves; train takes several folders.",
    )


def _equal_to_earlier(digests: bytearray) -> Bools:
    keys = np.frombuffer(digests, np.uint64).reshape(-1, DIGEST_BYTES // 8)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal ones stay in the order of documents
    equal = np.zeros(len(keys), bool)
    ordered = keys[order]
    equal[order[1:]] = (ordered[1:] == ordered[:-1]).all(1)
    return equal


def _by_source(
    sources: list[Source], ends: list[int], exact: Bools, near: Bools, characters: npt.NDArray[np.int64]
) -> list[Duplicates]:
    found = []
    for source, start, end in zip(sources, [0, *ends], ends, strict=False):
        part = slice(start, end)
        left_out = exact[part] | near[part]
        found.append(
            Duplicates(
                replace(source, read=partial(_read_others, source, left_out)),
                end - start,
                int(exact[part].sum()),
                int(near[part].sum()),
                int(characters[part][left_out].sum()),
            )
        )
    return found


def _read_others(source: Source, left_out: Bools) -> Iterator[Document]:
    """What stays; the bytes of what is left out count as the next one's, so that progress comes to its end."""
    passed_bytes = 0
    rest = iter(left_out)
    for document in source.read():
        is_left_out = next(rest, None)
        if is_left_out is None:
            raise DataError(f"{source.name} has changed while it was read")
        passed_bytes += document.size_bytes
        if not is_left_out:
            yield replace(document, size_bytes=passed_bytes)
            passed_bytes = 0
        del document  # a long text goes before the next one is read


class _Table:
    """Signatures in a temporary file, and a key for each of their bands in another one.

    Args:
        folder: Where the files are made.
        threshold: Of `like_earlier`.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        require_signatures()
        self.bands, self._slots = bands_of(threshold)
        self._threshold = threshold
        self._count = 0
        self._block = np.zeros((_BLOCK, SIGNATURE), np.uint32)
        # Closed by `close`; without a name on disk, so that a killed process leaves nothing.
        self._signatures: Any = TemporaryFile(dir=folder)  # noqa: SIM115
        self._keys: Any = TemporaryFile(dir=folder)  # noqa: SIM115

    def close(self) -> None:
        """Remove the files."""
        self._signatures.close()
        self._keys.close()

    def add(self, signature: Slots) -> None:
        """Take the next document's."""
        self._block[self._count % _BLOCK] = signature
        self._count += 1
        if self._count % _BLOCK == 0:
            self._flush()

    def _flush(self) -> None:
        self._signatures.write(self._block.data)
        parts = self._block[:, : self.bands * self._slots].reshape(_BLOCK, self.bands, self._slots)
        keys = np.zeros((_BLOCK, self.bands), np.uint64)
        for slot in range(self._slots):
            keys = keys * _MULTIPLIER + parts[:, :, slot]
        self._keys.write(np.ascontiguousarray(keys.T).data)

    def like_earlier(self, left_out: Bools) -> Bools:
        """The documents, besides those left out, of which an earlier one that stays is nearly equal."""
        if self._count % _BLOCK:
            self._flush()
        self._signatures.flush()
        self._keys.flush()
        before = self._before(np.flatnonzero(~left_out).astype(np.int32))
        near = np.zeros(self._count, bool)
        for number in np.flatnonzero((before >= 0).any(1)):
            # Those that went are passed over. Theirs were passed over in their turn, so one step is enough.
            row = before[number]
            gone = np.flatnonzero((row >= 0) & near[row])
            row[gone] = before[row[gone], gone]
            near[number] = self._is_like_one_of(int(number), before)
        return near

    def _before(self, numbers: Int32) -> Int32:
        """For each document and band the last one before it with the same key, -1 where there is none."""
        before = np.full((self._count, self.bands), -1, np.int32)
        for band in range(self.bands):
            keys = self._keys_of(band)[numbers]
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            same = np.flatnonzero(keys[1:] == keys[:-1])
            before[numbers[order[same + 1]], band] = numbers[order[same]]
        return before

    def _keys_of(self, band: int) -> npt.NDArray[np.uint64]:
        keys = np.empty((-(-self._count // _BLOCK), _BLOCK), np.uint64)
        for number, block in enumerate(keys):
            os.preadv(self._keys.fileno(), [block.data], (number * self.bands + band) * block.nbytes)
        return keys.reshape(-1)[: self._count]

    def _is_like_one_of(self, number: int, before: Int32) -> bool:
        along = np.arange(self.bands)
        there, compared = before[number], {-1}
        mine = self._signature(number)
        for _ in range(_MOST_STEPS):
            for other in set(there.tolist()) - compared:
                equal = (mine == self._signature(other)).reshape(-1, SLOTS).mean(1)
                if equal.min() >= self._threshold:
                    return True
                compared.add(other)
            there = np.where(there >= 0, before[there, along], -1)
            if (there < 0).all():
                break
        return False

    def _signature(self, number: int) -> Slots:
        size_bytes = 4 * SIGNATURE
        return np.frombuffer(os.pread(self._signatures.fileno(), size_bytes, number * size_bytes), np.uint32)
