"""The heatmap of a grid, as SVG: lengths from left to right, depths from top to bottom, n in every cell."""

from __future__ import annotations

from functools import cache
from typing import Any

from longlora_cli.evaluation.report.markup import Markup, join, tag
from longlora_cli.evaluation.report.numbers import interval, percent, tokens

_LEFT, _TOP, _BOTTOM, _RIGHT = 64, 10, 46, 84
_CELL_WIDTH, _WIDEST = 78, 760
_CELL_HEIGHT, _LOW_CELL_HEIGHT = 40, 10
# More rows than this are drawn low and without numbers; those are in the title of a cell and in the table.
_MOST_WRITTEN_ROWS = 16
_NARROWEST_WRITTEN = 34
_LEGEND_STEPS = 32


def heatmap(task: str, summary: dict[str, Any]) -> Markup:
    """Draw `cells` of a summary from `score_grid`.

    A cell is a link to its samples, with its share, interval and n as title. The grid is one stop of the Tab key; arrow
    keys go from cell to cell (page.js).

    Args:
        task: The task, for titles and links.
        summary: Has `cells`: `length`, `depth`, `score`, `ci95`, `n`.
    """
    cells = {(cell["length"], cell["depth"]): cell for cell in summary["cells"]}
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    width = min(_CELL_WIDTH, _WIDEST / len(lengths))
    written = len(depths) <= _MOST_WRITTEN_ROWS and width >= _NARROWEST_WRITTEN
    height = _CELL_HEIGHT if len(depths) <= _MOST_WRITTEN_ROWS else _LOW_CELL_HEIGHT
    drawn: list[Markup] = []
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            if (cell := cells.get((length, depth))) is not None:
                place = (_LEFT + column * width, _TOP + row * height, width, height)
                drawn.append(_cell(task, cell, place, written=written, first=not drawn))
    bottom, right = _TOP + len(depths) * height, _LEFT + len(lengths) * width
    label = (
        f"{task}: score by length and depth, {len(lengths)} lengths, {len(depths)} depths, n={summary['n']}, "
        f"{percent(summary['score'])} in all"
    )
    return tag(
        "svg",
        tag("title", label),
        *_axis_texts(lengths, depths, width, height),
        tag("g", *drawn, class_="cells"),
        _legend(right + 26, bottom),
        viewBox=f"0 0 {right + _RIGHT:g} {bottom + _BOTTOM:g}",
        width=f"{right + _RIGHT:g}",
        role="group",
        aria_label=label,
        class_="plot heatmap",
    )


def _cell(
    task: str, cell: dict[str, Any], place: tuple[float, float, float, float], *, written: bool, first: bool
) -> Markup:
    x, y, width, height = place
    fill, ink = shade(cell["score"])
    said = (
        f"{cell['length']:,} tokens, depth {percent(cell['depth'])}: {percent(cell['score'])} "
        f"{interval(cell.get('ci95'), is_share=True)}, n={cell['n']}"
    )
    pieces = [
        tag("title", said),
        tag("rect", x=f"{x:g}", y=f"{y:g}", width=f"{width:g}", height=f"{height:g}", fill=fill),
    ]
    if written:
        middle = f"{x + width / 2:g}"
        pieces += [
            tag("text", f"{100 * cell['score']:.0f}", x=middle, y=f"{y + 18:g}", class_=f"share {ink}"),
            tag("text", f"n={cell['n']}", x=middle, y=f"{y + 32:g}", class_=f"count {ink}"),
        ]
    return tag(
        "a",
        *pieces,
        href="#samples",
        class_="cell",
        tabindex="0" if first else "-1",
        aria_label=said,
        data_task=task,
        data_length=cell["length"],
        data_depth=repr(cell["depth"]),
    )


def _axis_texts(lengths: list[int], depths: list[float], width: float, height: float) -> list[Markup]:
    bottom = _TOP + len(depths) * height
    every = max(1, round(13 / height))  # a line of text is 13 high
    skip = max(1, round(40 / width))
    texts = [
        tag(
            "text",
            percent(depth, 0),
            x=_LEFT - 8,
            y=f"{_TOP + (row + 0.5) * height + 4:g}",
            class_="tick end",
        )
        for row, depth in enumerate(depths)
        if row % every == 0
    ]
    texts += [
        tag("text", tokens(length), x=f"{_LEFT + (column + 0.5) * width:g}", y=bottom + 17, class_="tick mid")
        for column, length in enumerate(lengths)
        if column % skip == 0
    ]
    middle = _TOP + len(depths) * height / 2
    return [
        *texts,
        tag(
            "text",
            "context length (tokens)",
            x=f"{_LEFT + len(lengths) * width / 2:g}",
            y=bottom + 38,
            class_="axis mid",
        ),
        tag(
            "text",
            "depth",
            x=14,
            y=f"{middle:g}",
            class_="axis mid",
            transform=f"rotate(-90 14 {middle:g})",
        ),
    ]


def _legend(x: float, bottom: float) -> Markup:
    """The scale from 0 to 100 %, as high as the grid but not higher than 200."""
    height = min(200.0, bottom - _TOP)
    step = height / _LEGEND_STEPS
    bars = [
        tag(
            "rect",
            x=f"{x:g}",
            y=f"{_TOP + number * step:g}",
            width=12,
            height=f"{step + 0.5:g}",
            fill=shade(1 - number / (_LEGEND_STEPS - 1))[0],
        )
        for number in range(_LEGEND_STEPS)
    ]
    ends = [
        tag("text", said, x=f"{x + 18:g}", y=f"{_TOP + (1 - share) * height + 4:g}", class_="tick")
        for share, said in ((0.97, "100 %"), (0.5, "50 %"), (0.03, "0 %"))
    ]
    return join(*bars, *ends)


@cache
def shade(share: float) -> tuple[str, str]:
    """Colour of a share of right answers, and the class of the ink that is read best on it.

    The scale is cividis: dark blue to yellow, even in lightness and the same to colour-blind eyes. Source: Nuñez et al.
    2018, PLOS ONE 13(7). The ink is the one of black and white with more contrast by WCAG 2.1: black from a luminance
    of 0.179.
    """
    from matplotlib import colormaps

    colour = [float(part) for part in colormaps["cividis"](float(share))[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    fill = "#" + "".join(f"{round(255 * part):02x}" for part in colour)
    return fill, "dark-ink" if luminance > 0.179 else "light-ink"
