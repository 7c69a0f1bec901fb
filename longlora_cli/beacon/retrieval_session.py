"""A session whose past can be searched: a question gets the spans it is about at a finer level.

The memory itself stays coarse. `answering(query)` gives a fork in whose memory the retrieved spans stand at the fine
level, everything in order and at compact positions; the question is fed to the fork and answered there. The session
it came from holds what it held, bit for bit, and goes on from there.

Retrieval over compressed activations is the origin's of April 2024 (FlagEmbedding, Long_LLM/activation_beacon). Two
things differ. A window is run at the fine level when a question first needs it, not always: what a window is computed
behind is the beginning of the memory, which never changes, so the rows are the same bits, reading is not slowed down by
a second pass over everything, and the CPU holds what was asked for; `eager` gives the origin's way. And the question
is answered in a fork, so that nothing need be rewound.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from longlora_cli.beacon.cache import BeaconMemory, Rows, join
from longlora_cli.beacon.fine_level import FineRunner, FineWindow, Swap, first_rows
from longlora_cli.beacon.retrieval import (
    NONE,
    RetrievalSettings,
    Retriever,
    Span,
    refuse_no_past,
    refuse_no_query,
)
from longlora_cli.beacon.session import BeaconSession, BeaconStats
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.swap_plan import ClosedWindow, swap_plan
from longlora_cli.beacon.windows import beginning, sink_rows
from longlora_cli.errors import SettingsError
from longlora_cli.models.loading import LoadedModel
from longlora_cli.storage import atomic_folder, verify_folder

KIND = "beacon-retrieval-session"
# Of a `BeaconSession`, what changes while it reads.
_STATE = ("_memory", "_rows", "_ids", "_batched", "_ratios", "_generator")


@dataclass(frozen=True)
class RetrievalStats(BeaconStats):
    """What a session with retrieval holds.

    Args:
        fine_windows: Windows whose fine rows wait on the CPU.
        fine_bytes: Bytes of host memory that they take; `kv_bytes` does not count them.
    """

    fine_windows: int
    fine_bytes: int


class RetrievalSession(BeaconSession):
    """A `BeaconSession` of one sequence with an index of what it has read.

    Args:
        loaded: As of `BeaconSession`; its tokenizer turns the past back into text, and a dense encoder computes where
            it does.
        settings: The plan of the coarse level.
        retrieval: How to search; its method is not `none`.
        fine_ratio: Raw tokens per beacon of the fine level; 0: raw keys and values.
        generator: As of `BeaconSession`.
        eager: Run every window at the fine level as soon as it is full, and keep all on the CPU. A stride below the
            window needs it, and has it always: what stayed raw from the window before is known only then.

    Raises:
        SettingsError: As `BeaconSession`; a fine ratio that is coarser than a coarse one, or does not divide the
            stride; no search can be made of `retrieval`.
        DataError, NotFoundError, SecurityError: From `DenseEncoder`.
        IncompatibleError: As `BeaconSession`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: BeaconSettings,
        retrieval: RetrievalSettings,
        *,
        fine_ratio: int = 0,
        generator: Random | None = None,
        eager: bool = False,
    ) -> None:
        super().__init__(loaded, settings, generator=generator)
        _refuse_levels(settings, fine_ratio)
        self.fine_ratio = fine_ratio
        self._retriever = Retriever(loaded.tokenizer, retrieval, loaded.device)
        self._eager = eager or settings.hop < settings.window
        self._runner = FineRunner(
            self._decoder, self._projections, self._inv_freq, self._dtype, settings, fine_ratio
        )

    def reset(self) -> None:
        """As `BeaconSession.reset`; the fine level goes too."""
        super().reset()
        self._fine: dict[int, FineWindow] = {}
        self._fine_ids: list[int] = []  # what had been read when the newest of them was run
        self._stayed: list[Rows] = []  # of each layer what stayed raw when the open window began

    def fork(self) -> RetrievalSession:
        """As `BeaconSession.fork`; what is run at the fine level later is each one's own."""
        twin = object.__new__(RetrievalSession)
        twin.__dict__.update(self._plain_fork().__dict__)
        twin._fine = dict(self._fine)
        return twin

    def save(self, path: Path) -> None:
        """As `BeaconSession.save`, with the fine level and how to search.

        Raises:
            SettingsError, ResourceError: As `BeaconSession.save`.
        """
        from safetensors.torch import save_file

        self._drop_stale()
        rows = {
            f"{number}.{layer}.{name}": tensor
            for number, fine in self._fine.items()
            for layer, held in enumerate(fine.layers)
            for name, tensor in zip(held._fields, held, strict=True)
        }
        content = {
            "retrieval": asdict(self._retriever.settings),
            "fine_ratio": self.fine_ratio,
            "eager": self._eager,
            "fine_ids": self._fine_ids,
            "positions": {str(number): fine.positions for number, fine in self._fine.items()},
        }
        stayed = {f"{layer}.{n}": t for layer, r in enumerate(self._stayed) for n, t in r._asdict().items()}
        with atomic_folder(path, KIND) as folder:
            super().save(folder / "session")
            save_file(rows, str(folder / "fine.safetensors"))
            save_file(stayed, str(folder / "stayed.safetensors"))
            (folder / "retrieval.json").write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, loaded: LoadedModel) -> RetrievalSession:
        """The session that `save` wrote, on the same model.

        Raises:
            NotFoundError, IntegrityError, IncompatibleError: As `BeaconSession.load`.
            SettingsError: The dense encoder's folder is no longer there.
        """
        from safetensors.torch import load_file

        verify_folder(path, KIND)
        plain = BeaconSession.load(path / "session", loaded)
        content = json.loads((path / "retrieval.json").read_text(encoding="utf-8"))
        retrieval, fine_ratio = RetrievalSettings(**content["retrieval"]), content["fine_ratio"]
        session = cls(loaded, plain.settings, retrieval, fine_ratio=fine_ratio, eager=content["eager"])
        session.__dict__.update({name: vars(plain)[name] for name in _STATE})
        layers = range(loaded.facts.layers)
        rows = load_file(str(path / "fine.safetensors"))
        for number, positions in content["positions"].items():
            held = [_rows_of(rows, f"{number}.{layer}") for layer in layers]
            session._fine[int(number)] = FineWindow(tuple(held), tuple(positions))
        session._fine_ids = content["fine_ids"]
        if stayed := load_file(str(path / "stayed.safetensors"), device=str(loaded.device)):
            session._stayed = [_rows_of(stayed, str(layer)) for layer in layers]
        return session

    def stats(self) -> RetrievalStats:
        """As `BeaconSession.stats`, and what the fine level takes."""
        self._drop_stale()
        fine = self._fine.values()
        return RetrievalStats(
            **vars(super().stats()),
            fine_windows=len(fine),
            fine_bytes=sum(window.kv_bytes for window in fine),
        )

    def retrieved(self, query: str | None) -> list[Span]:
        """The spans of the closed windows that a question is about; none while all that was read is raw.

        Args:
            query: The newest input of the user.

        Raises:
            SettingsError: There is no query, or nothing was read.
        """
        refuse_no_query(query)
        refuse_no_past(self._ids[0])
        past = self._ids[0][: self.cursors[0].windows * self.settings.hop]
        return self._retriever.find(past, query) if past else []

    def answering(self, query: str | None) -> BeaconSession:
        """A fork with what `query` is about at the fine level, in which to feed the question and generate.

        Raises:
            SettingsError: There is no query, or nothing was read.
        """
        return self.with_fine(self.retrieved(query))

    def with_fine(self, spans: Sequence[Span]) -> BeaconSession:
        """A fork in whose memory these tokens stand at the fine level.

        Args:
            spans: Tokens of the past, in order, not touching; each is widened to whole beacons of both levels.
        """
        twin = self._plain_fork()
        row, held = self._rows[0], self._memory.rows[0]
        windows = self._closed_windows()
        sink = sink_rows(self.settings, 0) if windows else 0
        swap = Swap(swap_plan(windows, spans), row.cursor.memory, self._memory.length(), sink)
        wanted = sorted({piece.window for piece in swap.pieces if piece.window is not None})
        if wanted:
            self._drop_stale()
            fine = {number: self._fine_window(number) for number in wanted}
            twin._memory = BeaconMemory.of([swap.apply(held, fine, self._inv_freq, self._dtype)])
            twin._rows = [replace(row, cursor=replace(row.cursor, memory=swap.new_memory))]
        return twin

    def _plain_fork(self) -> BeaconSession:
        twin = object.__new__(BeaconSession)
        twin.__dict__.update(super().fork().__dict__)
        return twin

    def _closed_windows(self) -> list[ClosedWindow]:
        hop = self.settings.hop
        return [
            ClosedWindow(number * hop, hop, ratio, self.fine_ratio, sink_rows(self.settings, number))
            for number, ratio in enumerate(self._rows[0].ratios)
        ]

    def _fine_window(self, number: int) -> FineWindow:
        if number not in self._fine:
            at = beginning(self.settings, self._rows[0].ratios, number)
            before = first_rows(self._memory.rows[0], at.memory)
            if at.filled:
                before = [join([r for r in pair if r]) for pair in zip(before, self._stayed, strict=True)]
            ids = self._ids[0][at.tokens : at.tokens - at.filled + self.settings.window]
            self._fine[number] = self._runner.run(before, at, ids)
            self._fine_ids = list(self._ids[0])
        return self._fine[number]

    def _drop_stale(self) -> None:
        """Forget the fine level of windows that were read anew, or are read no more, since it was run."""
        ids = self._ids[0]
        if ids[: len(self._fine_ids)] == self._fine_ids:
            return
        pairs = enumerate(zip(ids, self._fine_ids, strict=False))
        same = next((n for n, (one, other) in pairs if one != other), min(len(ids), len(self._fine_ids)))
        hop, window = self.settings.hop, self.settings.window
        self._fine = {n: fine for n, fine in self._fine.items() if n * hop + window <= same}
        self._fine_ids = ids[:same]

    def _begin(self, ids: object, mask: Tensor | None) -> list[list[int]]:
        rows = super()._begin(ids, mask)  # type: ignore[arg-type]
        if self._batched:
            raise SettingsError("retrieval searches the past of one sequence, not of a batch")
        return rows

    def _forward(self, waiting: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        before = self._memory.copy(), list(self._rows), len(self._ids[0])
        closed = self.cursors[0].windows
        hidden = super()._forward(waiting)
        if self._eager and self.cursors[0].windows > closed:
            try:
                self._drop_stale()
                for number in range(closed, self.cursors[0].windows):
                    self._fine_window(number)
            except BaseException:  # also Ctrl-C: a window without its fine level was not read
                self._memory, self._rows = before[0], before[1]
                del self._ids[0][before[2] :]
                raise
            if self.settings.hop < self.settings.window:
                first = self.cursors[0].memory
                rows = [r for r in self._memory.rows[0] if r is not None]
                whole = torch.contiguous_format  # as files take them
                self._stayed = [Rows(*(t[:, first:].clone(memory_format=whole) for t in r)) for r in rows]
        return hidden


def _rows_of(tensors: dict[str, Tensor], name: str) -> Rows:
    return Rows(tensors[f"{name}.keys"], tensors[f"{name}.values"])


def _refuse_levels(settings: BeaconSettings, fine_ratio: int) -> None:
    if fine_ratio < 0 or (fine_ratio and settings.hop % fine_ratio):
        raise SettingsError(
            f"fine ratio {fine_ratio} does not divide the beacon stride of {settings.hop} tokens"
        )
    coarser = [ratio for ratio in settings.ratios if max(ratio, 1) < max(fine_ratio, 1)]
    if coarser:
        raise SettingsError(
            f"fine ratio {fine_ratio} is coarser than beacon ratio {coarser[0]}",
            rule="Retrieved spans get more room, not less.",
        )


def split_levels(ratios: Sequence[int]) -> tuple[int, int]:
    """The coarse and the fine ratio that a list of ratios means when retrieval is on.

    One ratio: retrieved spans are raw (0). Two: the finer one is for retrieved spans, and 0 is the finest.

    Raises:
        SettingsError: More than two, or nothing would be compressed.
    """
    different = sorted(set(ratios))
    if len(different) > 2:
        raise SettingsError(
            f"--beacon-ratio {','.join(map(str, ratios))} with retrieval",
            rule="Retrieval has two levels: the whole past at one ratio, retrieved spans at a finer one.",
            hint="Give one ratio (retrieved spans are then raw) or two.",
        )
    if not different or different[-1] == 0:
        raise SettingsError(
            "--beacon-ratio 0 with retrieval",
            rule="Nothing is compressed, so that retrieved spans cannot be finer.",
            hint="Give a larger ratio, or --retrieval-method none.",
        )
    return different[-1], different[0] if len(different) == 2 else 0


def open_session(
    loaded: LoadedModel,
    settings: BeaconSettings,
    retrieval: RetrievalSettings,
    *,
    generator: Random | None = None,
) -> BeaconSession:
    """The session that settings ask for: a `RetrievalSession` when there is a retrieval method.

    Raises:
        SettingsError, DataError, NotFoundError, SecurityError, IncompatibleError: As the two sessions, and from
            `split_levels`.
    """
    if retrieval.method == NONE:
        return BeaconSession(loaded, settings, generator=generator)
    coarse, fine = split_levels(settings.ratios)
    return RetrievalSession(loaded, settings.with_ratios(coarse), retrieval, fine_ratio=fine)
