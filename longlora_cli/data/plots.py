"""Prepared data as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEARNT, _MASKED = "#00429d", "#b8c4d8"  # dark and light: told apart in grey as well
_DPI = 150


def load_library() -> None:
    """Import what `save_lengths` needs, 0.3 s of CPU time; for a thread that has nothing else to do."""
    import matplotlib.figure  # noqa: F401


def save_lengths(path: Path, lengths: npt.NDArray[np.int64], learnt: npt.NDArray[np.int64]) -> None:
    """Draw how many tokens lie in documents of which length, and which share of them is learnt.

    Args:
        path: The PNG file to write.
        lengths: Tokens of each document as it lies in the chunks, `[documents]`, at least one.
        learnt: How many of them the loss counts, `[documents]`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    shown = range(int(powers.min()), int(powers.max()) + 1)
    totals, counted = (
        [int(tokens[powers == power].sum()) for power in shown] for tokens in (lengths, learnt)
    )
    _draw_bars(axes, totals, counted)
    documents = [int((powers == power).sum()) for power in shown]
    for place, (total, number) in enumerate(zip(totals, documents, strict=True)):
        if number:
            axes.text(place, total, f"{number:,}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(totals)), [f"{1 << power:,}" for power in shown], rotation=30, fontsize=8)
    axes.set_xlabel("tokens of a document, up to (number of documents above)")
    axes.set_ylabel("tokens")
    share = sum(counted) / max(sum(totals), 1)
    within = "1 document" if len(lengths) == 1 else f"{len(lengths):,} documents"
    axes.set_title(f"{sum(totals):,} tokens in {within}, {share:.1%} learnt", fontsize=9)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})  # equal data, equal file


def _draw_bars(axes: Axes, totals: list[int], counted: list[int]) -> None:
    masked = [total - part for total, part in zip(totals, counted, strict=True)]
    axes.bar(range(len(totals)), counted, color=_LEARNT, label="learnt")
    axes.bar(range(len(totals)), masked, bottom=counted, color=_MASKED, label="masked")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
