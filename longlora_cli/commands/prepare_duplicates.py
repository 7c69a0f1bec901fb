"""`longlora prepare --dedup`: what an earlier document is equal or nearly equal to is left out, counted and told."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from longlora_cli.config import PrepareConfig
from longlora_cli.console import Console
from longlora_cli.data.document import Source
from longlora_cli.data.duplicates import Duplicates, find_duplicates
from longlora_cli.data.fingerprints import require_signatures


class Deduplicated:
    """The inputs without duplicates.

    Args:
        sources: From `find_sources`; they are read once here, if duplicates are looked for.
        config: Settings of the command.
        console: Shows the reading.

    Raises:
        DataError: A source with faults, or too many documents.
        SettingsError: Near duplicates, and rensa is not installed.
    """

    def __init__(self, sources: list[Source], config: PrepareConfig, console: Console) -> None:
        self.sources = sources
        self._mode, self._found = config.dedup, list[Duplicates]()
        self._threshold = config.dedup_threshold if config.dedup == "near" else None
        if config.dedup == "none":
            return
        if self._threshold is not None:
            require_signatures()
        size_bytes = sum(source.size_bytes for source in sources)
        with console.progress("Looking for duplicates, bytes", size_bytes or None) as advance:
            self._found = find_duplicates(
                sources, threshold=self._threshold, folder=_room(config.out), advance=advance
            )
        self.sources = [found.source for found in self._found]

    def facts(self) -> dict[str, Any]:
        """For the summary; nothing where duplicates were not looked for."""
        if self._mode == "none":
            return {}
        rows: list[dict[str, Any]] = [
            {
                "input": found.source.name,
                "documents": found.exact + found.near,
                "of_documents": found.documents,
                "exact": found.exact,
                "near": found.near,
                "characters": found.characters,
            }
            for found in self._found
        ]
        sums = {name: sum(row[name] for row in rows) for name in ("documents", "exact", "near", "characters")}
        return {"duplicates": {"mode": self._mode, "threshold": self._threshold, **sums, "inputs": rows}}

    def show(self, console: Console) -> None:
        """Say what was left out of which input."""
        if self._mode == "none":
            return
        rows = [row for row in self.facts()["duplicates"]["inputs"] if row["documents"]]
        if not rows:
            console.print("No document is a duplicate of an earlier one.")
        for row in rows:
            kinds = [f"{row[kind]:,} {kind}" for kind in ("exact", "near") if row[kind]]
            console.print(
                f"{row['input']}: {row['documents']:,} of {row['of_documents']:,} documents are left out as duplicates "
                f"of earlier ones ({', '.join(kinds)}; {row['characters']:,} characters)."
            )


def _room(out: Path) -> Path:
    """Where temporary files fit: on the disk of the output, or where nothing may be written there."""
    there = next(folder for folder in out.absolute().parents if folder.is_dir())
    return there if os.access(there, os.W_OK) else Path(gettempdir())
