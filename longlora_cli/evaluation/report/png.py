"""Pictures of results, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Dark blue to yellow, even in lightness and the same to colour-blind eyes: Nuñez et al. 2018, PLOS ONE 13(7).
_COLOURS = "cividis"
_DPI = 150
# Cells of a larger grid are too small to write in.
_MOST_WRITTEN = 400


def save_heatmap(path: Path, task: dict[str, Any], *, title: str) -> None:
    """Draw the grid of `score_grid`: lengths from left to right, depths from top to bottom.

    Each cell shows its share of right answers in per cent and its n.

    Args:
        path: The PNG file to write.
        task: The summary from `score_grid`.
        title: First line above the picture; the overall n is added.
    """
    from matplotlib.figure import Figure

    lengths = sorted({cell["length"] for cell in task["cells"]})
    depths = sorted({cell["depth"] for cell in task["cells"]})
    shares = np.full((len(depths), len(lengths)), np.nan)
    figure = Figure(figsize=(2.4 + 0.9 * len(lengths), 1.9 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    for cell in task["cells"]:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        shares[row, column] = 100 * cell["score"]
        if len(task["cells"]) <= _MOST_WRITTEN:
            colour = "black" if cell["score"] > 0.5 else "white"
            text = f"{100 * cell['score']:.0f}\nn={cell['n']}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    image = axes.imshow(shares, vmin=0, vmax=100, cmap=_COLOURS, aspect="auto")
    figure.colorbar(image, label="right answers (%)")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the answer")
    low, high = task["ci95"]
    axes.set_title(
        f"{title}\n{100 * task['score']:.0f}% right [{100 * low:.0f}, {100 * high:.0f}], n={task['n']}",
        fontsize=9,
    )
    _save(figure, path)


def save_position_curve(path: Path, task: dict[str, Any], *, title: str) -> None:
    """Draw perplexity by tokens of context from `summarize`, with its 95 % band where there is one.

    Args:
        path: The PNG file to write.
        task: The summary from `perplexity.summarize`.
        title: Line above the picture.
    """
    from matplotlib.figure import Figure

    buckets = task["by_position"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(buckets))  # evenly: a bucket is twice as long as the one before it
    axes.plot(places, [b["perplexity"] for b in buckets], marker="o", color="#00429d")
    if all(b["ci95"] for b in buckets):
        lows, highs = zip(*(b["ci95"] for b in buckets), strict=True)
        axes.fill_between(places, lows, highs, color="#00429d", alpha=0.2, linewidth=0)
    axes.set_xticks(places, [f"{b['from']:,}-{b['to']:,}" for b in buckets], rotation=30, fontsize=8)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    counted = f"{task['curve_windows']} {task['curve_source']}, n={sum(b['n'] for b in buckets):,} tokens"
    axes.set_title(f"{title}\n{counted}", fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without matplotlib's version in it, equal results are equal files.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
