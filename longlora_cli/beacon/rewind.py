"""Going back in a session: what it read last is forgotten as if it had never been read.

Within the open window every token can be gone back to: its raw keys and values are still there. Of a closed window
they are gone, so it is kept or forgotten as a whole. What it left behind is a beginning of the memory, which later
windows have not changed. With a stride below the window what stayed raw from one window to the next is gone too, so
that a closed past is forgotten altogether.
"""

from __future__ import annotations

from dataclasses import replace

from longlora_cli.beacon.cache import BeaconMemory, Rows
from longlora_cli.beacon.session import BeaconSession, _Row
from longlora_cli.beacon.windows import beginning, layout
from longlora_cli.errors import SettingsError


def rewinds_to(session: BeaconSession, tokens: int) -> int:
    """How many tokens of a session are left when at most the first `tokens` are kept."""
    if tokens >= _open_from(session):
        return min(tokens, session.cursors[0].tokens)
    hop = session.settings.hop
    return tokens // hop * hop if hop == session.settings.window else 0


def rewind(session: BeaconSession, tokens: int) -> None:
    """Forget what a session read after the first `tokens`, a number that `rewinds_to` gives. Ratios stay as drawn.

    Raises:
        SettingsError: Another number, or a batch.
    """
    row, cursor = session._rows[0], session.cursors[0]
    if session._batched or rewinds_to(session, tokens) != tokens:
        raise SettingsError(f"a session of {cursor.tokens} tokens cannot go back to {tokens}")
    if tokens >= _open_from(session):
        after = replace(cursor, tokens=tokens, filled=cursor.filled - (cursor.tokens - tokens))
    else:
        after = beginning(session.settings, row.ratios, tokens // session.settings.hop)
    held = after.memory
    if after.filled:
        held += layout(session.settings, session._ratios.of_window(after.windows)).rows(after.filled)
    session._memory = _first(session.memory, held)
    session._rows = [_Row(after, row.ratios[: after.windows])]
    session._ids = [session._ids[0][:tokens]]


def _open_from(session: BeaconSession) -> int:
    """Tokens that had been read when the open window began."""
    cursor = session.cursors[0]
    stayed = session.settings.window - session.settings.hop if cursor.windows else 0
    return cursor.tokens - (cursor.filled - stayed)


def _first(memory: BeaconMemory, rows: int) -> BeaconMemory:
    """The first rows of every layer, in memory of their own."""
    return BeaconMemory.of(
        [
            [None if r is None or not rows else Rows(*(t[:, :rows] for t in r)) for r in sequence]
            for sequence in memory.rows
        ]
    )
