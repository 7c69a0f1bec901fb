"""A sequence, or a batch of them, read through beacons: feed tokens, get the next one's logits, go on from there.

A session owns its memory: nothing on the model changes, so any number of sessions share one model, and two prompts in
two sessions cannot meet. Feeding tokens whole or in any pieces gives the same. Rows of a batch may have any lengths:
they are packed, never padded, and each equals a session of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from longlora_cli.beacon.cache import BeaconMemory, Rows
from longlora_cli.beacon.passes import plan_pass, run_pass
from longlora_cli.beacon.projections import projections_of, refuse_model
from longlora_cli.beacon.ratios import RatioSource
from longlora_cli.beacon.rotation import frequencies
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import Cursor, WindowStep, next_step
from longlora_cli.errors import IncompatibleError, NumericError, SettingsError
from longlora_cli.models.loading import LoadedModel
from longlora_cli.storage import atomic_folder, verify_folder

KIND = "beacon-session"
# Numbers of each tensor that stand for it in a digest: enough to tell adapters apart, few enough to cost nothing.
_DIGEST_NUMBERS = 256
Ids = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class BeaconStats:
    """What a session holds.

    Args:
        raw_tokens: Tokens fed, of all rows of a batch.
        memory_rows: Rows of closed windows: sinks, beacons, and the raw rows of windows with ratio 0.
        open_rows: Rows of the open windows, raw tokens and beacons.
        kv_bytes: Bytes of keys and values.
        windows: Windows closed.
        ratios: Ratio of each closed window, row by row.
    """

    raw_tokens: int
    memory_rows: int
    open_rows: int
    kv_bytes: int
    windows: int
    ratios: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Row:
    """One sequence of the batch; what is known of it without its tensors."""

    cursor: Cursor
    ratios: tuple[int, ...]


_EMPTY = _Row(Cursor(), ())


class BeaconSession:
    """Reads one sequence, or the rows of one batch, window by window.

    Args:
        loaded: The model, with beacons attached unless the only ratio is 0.
        settings: The plan.
        generator: Draws ratios; needed for the random mixes of several ratios. Rows of a batch share what is drawn for
            their windows.

    Raises:
        SettingsError: Settings that cannot be used.
        IncompatibleError: A model without beacons, with other projections than the settings say, or on which beacons
            cannot work.
    """

    def __init__(
        self, loaded: LoadedModel, settings: BeaconSettings, *, generator: Random | None = None
    ) -> None:
        self.loaded, self.settings = loaded, settings
        self._model = loaded.causal_lm
        self._generator = generator
        refuse_model(self._model)
        try:
            settings.validate()
            self._ratios = self._source()
        except ValueError as error:
            raise SettingsError(str(error)) from None
        self._projections = projections_of(self._model)
        self._refuse_projections()
        self._decoder = self._model.get_decoder()
        self._inv_freq = frequencies(self._decoder, loaded.facts.head_dim).to(loaded.device)
        self._dtype: torch.dtype = self._model.get_input_embeddings().weight.dtype
        self.reset()

    def _source(self) -> RatioSource:
        return RatioSource(self.settings, generator=self._generator, limit=self.loaded.positions)

    def _refuse_projections(self) -> None:
        if not any(self.settings.ratios):
            return
        if self._projections is None:
            raise IncompatibleError(
                "the model has no beacons", hint="Train some with --beacon, or use --beacon-ratio 0."
            )
        if set(self._projections.names) != set(self.settings.projections):
            raise IncompatibleError(
                f"beacons with projections {','.join(self._projections.names)}, "
                f"settings with {','.join(self.settings.projections)}"
            )

    def reset(self) -> None:
        """Forget everything: the next tokens begin a new sequence, with ratios drawn anew."""
        self._memory = BeaconMemory(1, self.loaded.facts.layers)
        self._rows: list[_Row] = [_EMPTY]
        self._ids: list[list[int]] = [[]]
        self._batched = False
        self._ratios = self._source()

    @property
    def ids(self) -> list[int]:
        """The token ids that were fed, of a session that is no batch."""
        return list(self._ids[0])

    @property
    def memory(self) -> BeaconMemory:
        """The keys and values held."""
        return self._memory

    @property
    def cursors(self) -> tuple[Cursor, ...]:
        """Where each row stands."""
        return tuple(row.cursor for row in self._rows)

    def feed(self, ids: Ids, attention_mask: Tensor | None = None) -> Tensor:
        """Read tokens.

        Args:
            ids: Token ids that come next: of one sequence, or for each row of a batch, which the first call decides.
                Rows may have different lengths; each has at least one token.
            attention_mask: For a padded tensor `[batch, tokens]`: 1 where there is a token. Padding must be on the
                left, and is left out of the windows.

        Returns:
            Logits of the token after the last, `[vocabulary]`, for a batch `[batch, vocabulary]`.

        Raises:
            SettingsError: Another number of rows than before, a row without tokens, or padding between or behind
                tokens.
            NumericError: Logits that are not finite.
        """
        rows = self._begin(ids, attention_mask)
        with torch.no_grad():
            last = [hidden[-1:] for hidden in self._read(rows)]
            logits: Tensor = self._model.get_output_embeddings()(torch.cat(last))
        if not bool(logits.isfinite().all()):
            raise NumericError("the logits are not finite numbers")
        return logits if self._batched else logits[0]

    def step(self, token: int | Sequence[int]) -> Tensor:
        """`feed` of one token, or of one for each row."""
        return self.feed([token] if isinstance(token, int) else [[t] for t in token])

    def hidden_states(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Read tokens of a session that is no batch and see their last hidden states.

        Args:
            ids: Token ids that come next, at least one.

        Yields:
            `[tokens, width]` of the tokens of each forward pass, in order. What is not asked for is not read.
        """
        rows = self._begin(ids, None)
        if self._batched:
            raise SettingsError("hidden states are read from a session of one sequence")
        done = 0
        while done < len(rows[0]):
            with torch.no_grad():
                hidden = self._forward([rows[0][done:]])[0]
            done += len(hidden)
            yield hidden

    def fork(self) -> BeaconSession:
        """A session that holds the same and goes its own way; no tensor is copied."""
        twin = object.__new__(BeaconSession)
        twin.__dict__.update(self.__dict__)
        twin._memory, twin._rows = self._memory.copy(), list(self._rows)
        twin._ids = [list(ids) for ids in self._ids]
        twin._ratios = self._ratios.fork()
        twin._generator = twin._ratios.generator
        return twin

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on, as a folder that is whole or not there.

        Raises:
            SettingsError: The folder exists.
            ResourceError: The disk is full.
        """
        from safetensors.torch import save_file

        tensors = {
            f"{row}.{layer}.{name}": tensor.cpu().contiguous()
            for row, layers in enumerate(self._memory.rows)
            for layer, held in enumerate(layers)
            if held is not None
            for name, tensor in zip(held._fields, held, strict=True)
        }
        content = {
            "settings": self.settings.to_json(),
            "ratios": self._ratios.to_json(),
            "batched": self._batched,
            "ids": self._ids,
            "rows": [{"cursor": asdict(row.cursor), "ratios": row.ratios} for row in self._rows],
        }
        with atomic_folder(path, KIND, {"model": weights_digest(self._model)}) as folder:
            save_file(tensors, str(folder / "memory.safetensors"))
            (folder / "session.json").write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, loaded: LoadedModel) -> BeaconSession:
        """The session that `save` wrote, on the same model; its generator is a new one in the state of that time.

        Raises:
            NotFoundError, IntegrityError: The folder is not whole.
            IncompatibleError: It was read by another model, adapter or beacons.
        """
        from safetensors.torch import load_file

        manifest = verify_folder(path, KIND)
        found = weights_digest(loaded.causal_lm)
        if manifest.meta["model"] != found:
            raise IncompatibleError(
                f"{path} was read by other weights",
                rule="A memory means something to the model that made it alone.",
            )
        content = json.loads((path / "session.json").read_text(encoding="utf-8"))
        settings = BeaconSettings.from_json(content["settings"])
        ratios = RatioSource.from_json(content["ratios"], settings)
        session = cls(loaded, settings, generator=ratios.generator)
        session._ratios, session._batched, session._ids = ratios, content["batched"], content["ids"]
        session._rows = [_Row(Cursor(**row["cursor"]), tuple(row["ratios"])) for row in content["rows"]]
        tensors = load_file(str(path / "memory.safetensors"), device=str(loaded.device))
        held: list[list[Rows | None]] = [[None] * loaded.facts.layers for _ in session._rows]
        for name in {name.rsplit(".", 1)[0] for name in tensors}:
            row, layer = (int(number) for number in name.split("."))
            held[row][layer] = Rows(tensors[f"{name}.keys"], tensors[f"{name}.values"])
        session._memory = BeaconMemory.of(held)
        return session

    def stats(self) -> BeaconStats:
        """What is held now."""
        cursors = self.cursors
        held = sum(self._memory.length(row) for row in range(len(self._rows)))
        memory = sum(cursor.memory for cursor in cursors)
        return BeaconStats(
            raw_tokens=sum(cursor.tokens for cursor in cursors),
            memory_rows=memory,
            open_rows=held - memory,
            kv_bytes=self._memory.kv_bytes,
            windows=sum(cursor.windows for cursor in cursors),
            ratios=tuple(row.ratios for row in self._rows),
        )

    def _begin(self, ids: Ids, mask: Tensor | None) -> list[list[int]]:
        """The new tokens of each row; the first call decides how many rows there are."""
        given, batched = _as_rows(ids, mask)
        started = any(row.cursor.tokens for row in self._rows)
        if started and (batched != self._batched or len(given) != len(self._rows)):
            raise SettingsError(
                f"{len(given)} rows for a session of {len(self._rows)}", hint="Use reset() first."
            )
        if started and mask is not None and not bool(mask.all()):
            raise SettingsError(
                "padding in a sequence that has begun", rule="Padding stands before the first token of a row."
            )
        if not started:
            self._batched = batched
            self._rows = [_EMPTY] * len(given)
            self._ids = [[] for _ in given]
            self._memory = BeaconMemory(len(given), self.loaded.facts.layers)
        waiting = zip(self._rows, given, strict=True)
        self._ratios.expect(max(row.cursor.tokens + len(new) for row, new in waiting))
        return given

    def _read(self, rows: list[list[int]]) -> list[Tensor]:
        """Run all tokens; the hidden states of each row's last pass."""
        last: list[Tensor] = [torch.empty(0)] * len(rows)
        left = rows
        while any(left):
            for number, hidden in self._forward(left).items():
                last[number] = hidden
                left = [new[len(hidden) :] if row == number else new for row, new in enumerate(left)]
        return last

    def _forward(self, waiting: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """One forward pass over what waits of each row; hidden states `[tokens, width]` by row."""
        steps: list[tuple[int, list[WindowStep]]] = []
        after, ids = list(self._rows), [list[int]() for _ in waiting]
        for number, new in enumerate(waiting):
            if new:
                windows, after[number] = self._windows(self._rows[number], new)
                steps.append((number, windows))
                ids[number] = list(new[: sum(step.tokens for step in windows)])
        plan = plan_pass(steps, self._memory.spans, self._inv_freq, self._dtype)
        before = self._memory.copy()
        try:
            tokens = torch.tensor(
                [i for row in ids for i in row], dtype=torch.int64, device=self._inv_freq.device
            )
            hidden = run_pass(self._decoder, self._projections, self._memory, tokens, plan)
        except BaseException:  # also Ctrl-C: some layers have taken their rows and some have not
            self._memory = before
            raise
        self._rows = after
        for held, read in zip(self._ids, ids, strict=True):
            held += read
        pieces = hidden.split(list(plan.raw_counts))
        return {number: piece for (number, _), piece in zip(steps, pieces, strict=True)}

    def _windows(self, row: _Row, new: Sequence[int]) -> tuple[list[WindowStep], _Row]:
        """The windows of one pass, at most `parallel`, and the row after them."""
        windows: list[WindowStep] = []
        cursor, ratios, taken = row.cursor, list(row.ratios), 0
        while taken < len(new) and len(windows) < self.settings.parallel:
            ratio = self._ratios.of_window(cursor.windows)
            step, cursor = next_step(cursor, len(new) - taken, self.settings, ratio)
            windows.append(step)
            taken += step.tokens
            if step.closing is not None:
                ratios.append(ratio)
        return windows, _Row(cursor, tuple(ratios))


def weights_digest(causal_lm: Any) -> str:
    """Hex SHA-256 of the names and first numbers of all tensors, adapter and beacons included."""
    digest = hashlib.sha256()
    for name, tensor in causal_lm.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().flatten()[:_DIGEST_NUMBERS].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_rows(ids: Ids, mask: Tensor | None) -> tuple[list[list[int]], bool]:
    """Token ids of each row without padding, and whether they are a batch."""
    values: Any = ids.tolist() if hasattr(ids, "tolist") else ids
    if not len(values):
        raise SettingsError("there is no token to read")
    batched = not isinstance(values[0], Integral)
    rows = [[int(token) for token in row] for row in (values if batched else [values])]
    if mask is not None:
        marks = mask.tolist() if mask.dim() == 2 else [mask.tolist()]
        rows = [_unpadded(row, marked) for row, marked in zip(rows, marks, strict=True)]
    if not all(rows):
        raise SettingsError("a row of the batch has no token")
    return rows, batched


def _unpadded(row: list[int], marked: list[int]) -> list[int]:
    tokens = sum(bool(mark) for mark in marked)
    if len(marked) != len(row) or any(not mark for mark in marked[len(marked) - tokens :]):
        raise SettingsError(
            "padding behind or between the tokens of a row",
            rule="It would stand inside a window; padding is allowed on the left alone.",
        )
    return row[len(row) - tokens :]
