"""`longlora prepare --overlap-check`: documents that hold what evaluation will ask are told, left out, or an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from longlora_cli.config import PrepareConfig
from longlora_cli.console import Console
from longlora_cli.data.documents import Document, Source, read_documents
from longlora_cli.data.overlap import RUN_WORDS, OverlapCheck
from longlora_cli.errors import DataError

_TOLD = 5


@dataclass
class OverlapWatch:
    """Looks at documents as they pass.

    Args:
        check: What the evaluation data hold; None looks at nothing.
        action: `report`, `drop` or `error`.
        found: Documents with overlap: their source, shared runs and runs in all.
    """

    check: OverlapCheck | None
    action: str
    found: list[tuple[str, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, config: PrepareConfig, sources: list[Source]) -> OverlapWatch:
        """Read the evaluation data `sources`, if there are any.

        Raises:
            DataError: They cannot be read, or hold too little.
        """
        if not sources:
            return cls(None, config.on_overlap)
        documents = read_documents(sources, seed=config.seed)
        return cls(OverlapCheck(t for d in documents for t in _texts(d)), config.on_overlap)

    def keeps(self, document: Document) -> bool:
        """Whether a document goes on.

        Raises:
            DataError: It overlaps and the action is `error`.
        """
        if self.check is None:
            return True
        shared, total = self.check.shared(_texts(document))
        if not shared:
            return True
        if self.action == "error":
            raise DataError(
                f"{document.source}: {shared:,} of {total:,} runs of {RUN_WORDS} words are in the evaluation data",
                hint="--on-overlap drop leaves such documents out, --on-overlap report only tells.",
            )
        self.found.append((document.source, shared, total))
        return self.action != "drop"

    @property
    def left_out(self) -> int:
        """Documents found that are not prepared."""
        return len(self.found) if self.action == "drop" else 0

    def facts(self) -> dict[str, Any]:
        """For the summary; nothing when nothing was checked."""
        if self.check is None:
            return {}
        rows = [{"source": source, "shared": n, "of": total} for source, n, total in self._worst()]
        return {"overlap": {"documents": len(self.found), "action": self.action, "most": rows}}

    def show(self, console: Console) -> None:
        """Say what was found."""
        if self.check is None:
            return
        if not self.found:
            console.print(f"No document shares {RUN_WORDS} words in a row with the evaluation data.")
            return
        left = "left out" if self.action == "drop" else "kept; --on-overlap drop leaves them out"
        shares = f"{len(self.found):,} documents share {RUN_WORDS} words in a row with the evaluation data ({left}):"
        console.warn(shares)
        for source, shared, total in self._worst():
            console.warn(f"  {source}: {shared:,} of {total:,} runs")

    def _worst(self) -> list[tuple[str, int, int]]:
        return sorted(self.found, key=lambda row: -row[1])[:_TOLD]


def _texts(document: Document) -> Iterable[str]:
    content = document.content
    return [content] if isinstance(content, str) else [message["content"] for message in content]
