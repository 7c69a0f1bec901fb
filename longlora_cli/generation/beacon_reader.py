"""A `Reader` whose past is compressed by beacons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from longlora_cli.beacon.ratios import RatioSource, adapted
from longlora_cli.beacon.retrieval import refuse_no_query
from longlora_cli.beacon.retrieval_session import RetrievalSession
from longlora_cli.beacon.rewind import rewind, rewinds_to
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import Cursor, layout, next_step
from longlora_cli.generation.past import Past
from longlora_cli.generation.prefill import Advance, next_logits
from longlora_cli.generation.reader import Query, common_prefix
from longlora_cli.models.loading import LoadedModel, ModelFacts

# Ratios that are drawn are drawn alike for every text, so that an answer does not depend on what was asked before.
_SEED = 0


class BeaconReader:
    """One text read window by window.

    What was read can be gone back to within the open window, and where a window begins; of a closed window the raw
    tokens are gone, so it is read again from its beginning (with a stride below the window everything is).

    With retrieval a question and its answer are read in a fork in whose memory the spans that it is about stand at the
    finer level. What was read before it stays as it was; the next text reads question and answer into it.

    Args:
        loaded: The model, its beacons on it.
        past: How it keeps what it has read, with beacons.

    Raises:
        SettingsError, IncompatibleError: From `BeaconSession` and `RetrievalSession`.
    """

    def __init__(self, loaded: LoadedModel, past: Past) -> None:
        assert past.beacon is not None
        self._loaded, self._past, self._settings = loaded, past, past.beacon
        # Of `adapt-N`, the ratio that it chose for the text at hand.
        self._adapted: int | None = None
        self._answering: BeaconSession | None = None
        self._session = self._open()
        self.reused = 0

    def _open(self) -> BeaconSession:
        generator = Random(_SEED)
        if self._past.retrieval is None:
            return BeaconSession(self._loaded, self._settings, generator=generator)
        return RetrievalSession(
            self._loaded,
            self._settings,
            self._past.retrieval,
            fine_ratio=self._past.fine_ratio,
            generator=generator,
        )

    @property
    def ids(self) -> list[int]:
        """The token ids that were read and are held for what follows; not those of a question with retrieval."""
        return self._session.ids

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now: beacons, sink, open window, and spans that were retrieved."""
        return (self._answering or self._session).stats().kv_bytes

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be run. The last always is, for its logits."""
        return self._reusable(ids, len(ids) - 1)

    def _reusable(self, ids: Sequence[int], most: int) -> int:
        if self._ratio_of(len(ids)) != self._adapted:
            return 0
        return rewinds_to(self._session, min(common_prefix(self._session.ids, ids), most))

    def _ratio_of(self, tokens: int) -> int | None:
        """The ratio that `adapt-N` gives a text of so many tokens; None for other mixes."""
        reserve = self._settings.reserve
        if reserve is None or len(self._settings.ratios) == 1:
            return None
        return adapted(tokens + reserve, self._settings, self._loaded.positions)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._answering, self._adapted = None, None
        self._session = self._open()

    def read(self, ids: Sequence[int], advance: Advance | None = None, query: Query | None = None) -> Tensor:
        """Read a text of which the beginning may be held already; logits `[vocabulary]` of what follows.

        Args:
            ids: The whole text.
            advance: Called with the number of tokens just run.
            query: What retrieval searches the past by.

        Raises:
            SettingsError: Retrieval without a query.
        """
        self._answering = None
        end = self._searched(ids, query)
        self.reused = self._reusable(ids, min(end, len(ids) - 1))
        if self.reused == 0:
            self.clear()
            self._adapted = self._ratio_of(len(ids))
        else:
            rewind(self._session, self.reused)
        logits = None
        if end > self.reused:
            logits = self._run(self._session, ids[self.reused : end], advance)
        if end < len(ids):
            assert isinstance(self._session, RetrievalSession)
            assert query is not None
            self._answering = self._session.answering(query.text)
            logits = self._run(self._answering, ids[end:], advance)
        assert logits is not None  # at least the last token was run
        return logits

    def _searched(self, ids: Sequence[int], query: Query | None) -> int:
        """How many of the tokens are searched, the rest being read in a fork; all of them where nothing is."""
        if self._past.retrieval is None:
            return len(ids)
        refuse_no_query(None if query is None else query.text)
        assert query is not None
        before = len(ids) - max(query.tokens, 1)
        return before if before >= self._settings.window else len(ids)

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
        return self._run(self._answering or self._session, [token], None)

    def mark(self) -> tuple[BeaconSession, BeaconSession | None]:
        """This moment, as forks: no tensor is copied."""
        answering = self._answering
        return self._session.fork(), None if answering is None else answering.fork()

    def back_to(self, mark: tuple[BeaconSession, BeaconSession | None]) -> None:
        """Forget what was read since a mark, which stays as it is."""
        session, answering = mark
        self._session, self._answering = session.fork(), None if answering is None else answering.fork()


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
    facts: ModelFacts, tokens: int, past: Past, *, element_bytes: int, positions: int
) -> int:
    """Bytes of keys and values that so many tokens will take, by the plan's own integers; at most with retrieval.

    Args:
        facts: Sizes of the decoder.
        tokens: How many were read.
        past: How what was read is kept, with beacons.
        element_bytes: Bytes of a number in the model's own format.
        positions: Of the model; `adapt-N` needs it.
    """
    assert past.beacon is not None
    settings = past.beacon
    ratios = RatioSource(settings, generator=Random(_SEED), limit=positions)
    ratios.expect(tokens)
    cursor = Cursor()
    while cursor.tokens < tokens:
        ratio = ratios.of_window(cursor.windows)
        _, cursor = next_step(cursor, tokens - cursor.tokens, settings, ratio)
    rows = cursor.memory + min(past.fine_rows, cursor.windows * settings.hop)
    if cursor.filled:
        rows += layout(settings, ratios.of_window(cursor.windows)).rows(cursor.filled)
    return rows * facts.kv_bytes_per_token(element_bytes)
