"""Curves with bands of their 95 % intervals, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longlora_cli.evaluation.report.markup import Markup, join, tag
from longlora_cli.evaluation.report.numbers import interval, number, percent, ticks, tokens

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _BOTTOM = 64, 64, 56
_TOP, _TOP_WITH_NAMES = 16, 38  # names of curves stand above the plot, where no curve runs through them


@dataclass(frozen=True)
class Point:
    """One value of a curve.

    Args:
        place: Which of the plot's places on the x axis, from 0.
        value: On the left axis.
        band: Its interval on the left axis, where there is one.
        said: The same in words, for its title.
    """

    place: int
    value: float
    band: tuple[float, float] | None
    said: str


@dataclass(frozen=True)
class Curve:
    """A named row of points; the first curve of a plot is drawn through, the second is dashed with hollow points."""

    name: str
    points: list[Point]


@dataclass(frozen=True)
class Frame:
    """A plot without its curves.

    Args:
        label: What it shows, for who does not see it.
        places: Names on the x axis, evenly spaced.
        x_title: Below them.
        y_ticks: Heights of the lines, lowest and highest first and last.
        y_text: Writes a tick of the left axis.
        y_title: Of the left axis.
        right_text: Writes a tick of the right axis; without it there is none.
        right_title: Of the right axis.
        top: Where the plot begins.
    """

    label: str
    places: list[str]
    x_title: str
    y_ticks: list[float]
    y_text: Callable[[float], str]
    y_title: str
    right_text: Callable[[float], str] | None = None
    right_title: str = ""
    top: int = _TOP

    def x(self, place: int) -> float:
        """Horizontal position of a place."""
        return _LEFT + (place + 0.5) * (_WIDTH - _LEFT - _RIGHT) / len(self.places)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.top + (high - value) / (high - low) * (_HEIGHT - self.top - _BOTTOM)


def accuracy_by_length(task: str, summary: dict[str, Any]) -> Markup:
    """Score by context length, with the interval of each length as a band.

    Args:
        task: For the label.
        summary: Has `lengths`: `length`, `score`, `ci95`, `n`.
    """
    lengths = summary["lengths"]
    points = [
        Point(
            place,
            part["score"],
            _band(part.get("ci95")),
            f"{part['length']:,} tokens: {percent(part['score'])} {interval(part.get('ci95'), is_share=True)}, "
            f"n={part['n']}",
        )
        for place, part in enumerate(lengths)
    ]
    frame = Frame(
        label=f"{task}: score by context length, with 95 % intervals",
        places=[tokens(part["length"]) for part in lengths],
        x_title="context length (tokens)",
        y_ticks=[0, 0.25, 0.5, 0.75, 1],
        y_text=lambda share: percent(share, 0),
        y_title="score",
    )
    return draw(frame, [Curve("", points)])


def loss_by_position(task: str, summary: dict[str, Any]) -> Markup:
    """Loss by tokens of context: nats on the left axis, and perplexity, their exponential, on the right.

    Args:
        task: For the label.
        summary: Has `by_position` as `perplexity.position_curve` makes it: `from`, `to`, `n`, `nll`, `perplexity`,
            `ci95` (of the perplexity). Where buckets have `short_nll`, `short_perplexity` and `short_ci95` too, losses
            of the same tokens with at most `short_context` tokens of context, they are the second curve.
    """
    buckets = summary["by_position"]
    short = any("short_nll" in bucket for bucket in buckets)
    curves = [Curve("full context" if short else "", _loss_points(buckets, ""))]
    if short:
        name = f"at most {summary['short_context']:,} tokens of context"
        curves.append(Curve(name, _loss_points(buckets, "short_")))
    heights = [height for curve in curves for p in curve.points for height in (p.value, *(p.band or ()))]
    frame = Frame(
        label=f"{task}: loss by tokens of context, with 95 % intervals",
        places=[f"{tokens(bucket['from'])}–{tokens(bucket['to'])}" for bucket in buckets],
        x_title="tokens of context",
        y_ticks=ticks(min(heights), max(heights)),
        y_text=lambda nats: f"{nats:.4g}",
        y_title="nats a token",
        right_text=lambda nats: f"{math.exp(nats):.3g}",
        right_title="perplexity",
        top=_TOP_WITH_NAMES if short else _TOP,
    )
    return draw(frame, curves)


def _loss_points(buckets: Sequence[dict[str, Any]], prefix: str) -> list[Point]:
    points = []
    for place, bucket in enumerate(buckets):
        if f"{prefix}nll" not in bucket:
            continue
        nll, perplexity, ci95 = (bucket[prefix + key] for key in ("nll", "perplexity", "ci95"))
        said = (
            f"{bucket['from']:,} to {bucket['to']:,} tokens of context: {number(nll)} nats, perplexity "
            f"{number(perplexity)} {interval(ci95, is_share=False)}, n={bucket['n']:,} tokens"
        )
        band = _band(ci95)
        points.append(
            Point(place, nll, None if band is None else (math.log(band[0]), math.log(band[1])), said)
        )
    return points


def _band(ci95: Sequence[float] | None) -> tuple[float, float] | None:
    return None if ci95 is None else (ci95[0], ci95[1])


def draw(frame: Frame, curves: list[Curve]) -> Markup:
    """The plot; a second curve is told from the first by colour, dashes and hollow points, and both have names."""
    names = [curve.name for curve in curves if curve.name]
    label = frame.label + (f"; curves: {', '.join(names)}" if names else "")
    return tag(
        "svg",
        tag("title", label),
        *_left_axis(frame),
        *_x_axis(frame),
        *(_band_of(frame, curve, f"series-{n}") for n, curve in enumerate(curves)),
        *(_line_of(frame, curve, f"series-{n}") for n, curve in enumerate(curves)),
        *(_name_of(curve, number) for number, curve in enumerate(curves) if curve.name),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width=_WIDTH,
        role="img",
        aria_label=label,
        class_="plot curve",
    )


def _left_axis(frame: Frame) -> list[Markup]:
    pieces = []
    for value in frame.y_ticks:
        y = frame.y(value)
        pieces.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:g}", y2=f"{y:g}", class_="grid"))
        pieces.append(tag("text", frame.y_text(value), x=_LEFT - 8, y=f"{y + 4:g}", class_="tick end"))
        if frame.right_text is not None:
            x = _WIDTH - _RIGHT + 8
            pieces.append(tag("text", frame.right_text(value), x=x, y=f"{y + 4:g}", class_="tick"))
    middle = (frame.top + _HEIGHT - _BOTTOM) / 2
    for x, title, turn in ((14, frame.y_title, -90), (_WIDTH - 10, frame.right_title, 90)):
        if title:
            place = {"x": x, "y": f"{middle:g}", "transform": f"rotate({turn} {x} {middle:g})"}
            pieces.append(tag("text", title, class_="axis mid", **place))
    return pieces


def _x_axis(frame: Frame) -> list[Markup]:
    room = (_WIDTH - _LEFT - _RIGHT) / len(frame.places)
    widest = 7 * max(map(len, frame.places)) + 8  # a digit is 7 wide
    every = max(1, math.ceil(widest / room))
    texts = [
        tag("text", name, x=f"{frame.x(place):g}", y=_HEIGHT - _BOTTOM + 20, class_="tick mid")
        for place, name in enumerate(frame.places)
        if place % every == 0
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [*texts, tag("text", frame.x_title, x=f"{middle:g}", y=_HEIGHT - 12, class_="axis mid")]


def _band_of(frame: Frame, curve: Curve, class_: str) -> Markup:
    """The area between the intervals' ends; points without an interval interrupt it, a lone one is a bar."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for point in curve.points:
        if point.band is None:
            stretches.append([])
            continue
        low, high = point.band
        stretches[-1].append((frame.x(point.place), frame.y(low), frame.y(high)))
    areas = []
    for stretch in stretches:
        if len(stretch) == 1:
            x, low, high = stretch[0]
            areas.append(
                tag("rect", x=f"{x - 6:g}", y=f"{high:g}", width=12, height=f"{low - high:g}", class_="band")
            )
        elif stretch:
            corners = [(x, high) for x, _, high in stretch] + [(x, low) for x, low, _ in reversed(stretch)]
            areas.append(
                tag("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in corners), class_="band")
            )
    return tag("g", *areas, class_=class_)


def _line_of(frame: Frame, curve: Curve, class_: str) -> Markup:
    places = [(frame.x(point.place), frame.y(point.value)) for point in curve.points]
    line = tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_="line")
    dots = [
        tag("circle", tag("title", point.said), cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_="dot")
        for point, (x, y) in zip(curve.points, places, strict=True)
    ]
    return tag("g", line, *dots, class_=class_)


def _name_of(curve: Curve, number_: int) -> Markup:
    x, y = _LEFT + 160 * number_, 18
    line = tag("line", x1=x, x2=x + 26, y1=y - 4, y2=y - 4, class_="line")
    dot = tag("circle", cx=x + 13, cy=y - 4, r=4, class_="dot")
    return tag(
        "g", line, dot, tag("text", curve.name, x=x + 34, y=y, class_="tick"), class_=f"series-{number_}"
    )


def interval_bar(value: float, ci95: Sequence[float] | None, said: str) -> Markup:
    """A share and its interval on a line from 0 to 1, small enough for a table's cell."""
    width, height = 120, 14
    pieces = [tag("title", said), tag("line", x1=0, x2=width, y1=7, y2=7, class_="grid")]
    if ci95 is not None:
        low, high = ci95
        span = max(1.5, (high - low) * width)
        pieces.append(
            tag("rect", x=f"{low * width:g}", y=3, width=f"{span:g}", height=8, rx=2, class_="band")
        )
    x = min(max(value, 0), 1) * width
    pieces.append(tag("line", x1=f"{x:g}", x2=f"{x:g}", y1=1, y2=13, class_="line"))
    return tag(
        "svg",
        join(*pieces),
        viewBox=f"-4 0 {width + 8} {height}",
        width=width + 8,
        role="img",
        aria_label=said,
        class_="bar series-0",
    )
