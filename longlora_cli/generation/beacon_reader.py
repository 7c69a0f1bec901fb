"""A `Reader` whose past is compressed by beacons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from longlora_cli.beacon.ratios import RatioSource, adapted
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import Cursor, layout, next_step
from longlora_cli.generation.prefill import Advance, next_logits
from longlora_cli.generation.reader import common_prefix
from longlora_cli.models.loading import LoadedModel, ModelFacts

# Ratios that are drawn are drawn alike for every text, so that an answer does not depend on what was asked before.
_SEED = 0


class BeaconReader:
    """One text read window by window.

    What was read can be gone back to within the open window, and where a window begins; of a closed window the raw
    tokens are gone, so it is read again from its beginning (with a stride below the window everything is).

    Args:
        loaded: The model, its beacons on it.
        settings: How windows are compressed.

    Raises:
        SettingsError, IncompatibleError: From `BeaconSession`.
    """

    def __init__(self, loaded: LoadedModel, settings: BeaconSettings) -> None:
        self._loaded, self._settings = loaded, settings
        self._session = self._open()
        self._adapted: int | None = None
        self.reused = 0

    def _open(self) -> BeaconSession:
        return BeaconSession(self._loaded, self._settings, generator=Random(_SEED))

    @property
    def ids(self) -> list[int]:
        """The token ids that were read."""
        return self._session.ids

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now: beacons, sink and the open window."""
        return self._session.stats().kv_bytes

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be run. The last always is, for its logits."""
        if self._ratio_of(len(ids)) != self._adapted:
            return 0
        common = min(common_prefix(self._session.ids, ids), len(ids) - 1)
        return self._session.rewinds_to(common)

    def _ratio_of(self, tokens: int) -> int | None:
        """The ratio that `adapt-N` gives a text of so many tokens; None for other mixes."""
        reserve = self._settings.reserve
        if reserve is None or len(self._settings.ratios) == 1:
            return None
        return adapted(tokens + reserve, self._settings, self._loaded.positions)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._session, self._adapted = self._open(), None

    def read(self, ids: Sequence[int], advance: Advance | None = None) -> Tensor:
        """Read a text of which the beginning may be held already; logits `[vocabulary]` of what follows."""
        self.reused = self.reusable(ids)
        if self.reused == 0:
            self.clear()
            self._adapted = self._ratio_of(len(ids))
        else:
            self._session.rewind(self.reused)
        return self._run(self._session, ids[self.reused :], advance)

    def _run(self, session: BeaconSession, ids: Sequence[int], advance: Advance | None) -> Tensor:
        hidden = None
        for hidden in session.hidden_states(list(ids)):
            if advance is not None:
                advance(len(hidden))
        assert hidden is not None
        with torch.no_grad():
            return next_logits(self._loaded, hidden[-1])

    def step(self, token: int) -> Tensor:
        """Read one token more; logits `[vocabulary]` of the next."""
        return self._run(self._session, [token], None)

    def mark(self) -> BeaconSession:
        """This moment, as a fork: no tensor is copied."""
        return self._session.fork()

    def back_to(self, mark: BeaconSession) -> None:
        """Forget what was read since a mark, which stays as it is."""
        self._session = mark.fork()


def read_hidden(
    loaded: LoadedModel, settings: BeaconSettings, ids: Sequence[int]
) -> Iterator[tuple[Tensor, slice]]:
    """The last hidden states of a text that is read by itself, `[1, tokens, width]`, and which tokens they are of.

    Raises:
        SettingsError, IncompatibleError: From `BeaconSession`.
    """
    session, start = BeaconSession(loaded, settings, generator=Random(_SEED)), 0
    for hidden in session.hidden_states(list(ids)):
        yield hidden[None], slice(start, start + len(hidden))
        start += len(hidden)


def beacon_bytes_for(
    facts: ModelFacts, tokens: int, settings: BeaconSettings, *, element_bytes: int, positions: int
) -> int:
    """Bytes of keys and values that so many tokens will take, by the plan's own integers.

    Args:
        facts: Sizes of the decoder.
        tokens: How many were read.
        settings: How windows are compressed.
        element_bytes: Bytes of a number in the model's own format.
        positions: Of the model; `adapt-N` needs it.
    """
    ratios = RatioSource(settings, generator=Random(_SEED), limit=positions)
    ratios.expect(tokens)
    cursor = Cursor()
    while cursor.tokens < tokens:
        ratio = ratios.of_window(cursor.windows)
        _, cursor = next_step(cursor, tokens - cursor.tokens, settings, ratio)
    rows = cursor.memory
    if cursor.filled:
        rows += layout(settings, ratios.of_window(cursor.windows)).rows(cursor.filled)
    return rows * facts.kv_bytes_per_token(element_bytes)
