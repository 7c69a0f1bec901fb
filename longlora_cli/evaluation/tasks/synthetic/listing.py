"""Contexts that are lists of invented units: as many as fit, one of them asked for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import NOISE
from longlora_cli.evaluation.tasks.synthetic.request import Request, fit, is_full, unit_costs

Padded = Callable[[int, str], Sample]
"""The sample with so many units and a text of no meaning after them, often empty."""


def unit_number(request: Request, examples: Sequence[str]) -> int:
    """How many units of this kind could fit, and some more."""
    return int(request.length * 1.3 * len(examples) / max(sum(unit_costs(request, examples)), 1)) + 8


def fit_padded(request: Request, costs: Sequence[int], compose: Padded, *, least: int = 0) -> Sample:
    """`fit`; where one more unit is more than 1.5 % of the length, sentences of RULER's noise take what is left."""

    def bare(count: int) -> Sample:
        return compose(count, "")

    number, sample = fit(request, costs, bare, least=least)
    if is_full(request, sample) or number == len(costs):
        return sample
    pads = [NOISE[place % len(NOISE)] for place in range(request.length // 4)]

    def padded(count: int) -> Sample:
        return compose(number, " ".join(pads[:count]))

    return fit(request, unit_costs(request, [" " + pad for pad in pads]), padded)[1]


def list_around(
    request: Request,
    units: Sequence[str],
    target: str,
    finish: Callable[[list[str], float, str], Sample],
    *,
    least: int = 0,
) -> Sample:
    """The sample whose list has the target at the request's depth, measured in tokens, among as many units as fit.

    Args:
        request: Says length and depth.
        units: At least as many as fit; the target is not among them.
        target: The unit that is asked for.
        finish: The sample for a list, the depth that the target came to stand at, and a padding after the list.
        least: Fewest units beside the target.

    Raises:
        SettingsError: The length does not hold the target and the question.
    """
    depth = request.some_depth()
    costs = unit_costs(request, [unit + "\n" for unit in units])
    ends = list(accumulate(costs, initial=0))

    def compose(count: int, padding: str) -> Sample:
        place = depth * ends[count]
        after = min(bisect_left(ends, place, hi=count + 1), count)
        before = max(after - 1, 0)
        gap = before if place - ends[before] < ends[after] - place else after
        listed = [*units[:gap], target, *units[gap:count]]
        context = ends[count] + sum(unit_costs(request, [padding])) if padding else ends[count]
        return finish(listed, ends[gap] / max(context, 1), padding)

    return fit_padded(request, costs, compose, least=least)


def lines_of(listed: Sequence[str], padding: str) -> str:
    """The units line by line, the padding last."""
    return "\n".join([*listed, padding] if padding else listed)
