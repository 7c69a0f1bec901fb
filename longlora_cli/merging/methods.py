"""How the tensors of several sources become one: a table of methods.

A method is given the sources' rows of one tensor and their weights, and returns the rows of the result. What it needs
to know of the whole tensor first (a norm, a threshold, a Gram matrix) it gathers in `prepare`, which may pass over the
rows as often as it likes; nothing larger than a block is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longlora_cli.models.tensors import Rows


@dataclass(frozen=True)
class Method:
    """One way of mixing.

    Args:
        name: What the user types and the card says.
        summary: One line for people.
        prepare: Sources' rows (all of one shape) and their weights -> the rows of the result, in float64.
    """

    name: str
    summary: str
    prepare: Callable[[Sequence[Rows], Sequence[float]], Rows]


@dataclass(frozen=True)
class WeightedSum:
    """`sum_i weights[i] * sources[i]`, accumulated in float64. A source with weight 0 is not read."""

    sources: Sequence[Rows]
    weights: Sequence[float]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.sources[0].shape

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), `[last - first, columns]` in float64."""
        total: Tensor | None = None
        for source, weight in zip(self.sources, self.weights, strict=True):
            if weight == 0:
                continue  # not even 0 * infinity may change the result
            block = source.rows(first, last)
            # The first product makes a new tensor: a block may be shared with other readers.
            total = block * weight if total is None else total.add_(block, alpha=weight)
        if total is None:
            return torch.zeros(last - first, self.shape[1], dtype=torch.float64)
        return total


METHODS = {
    "linear": Method(
        "linear",
        "weighted sum of the models' tensors (model soups, Wortsman et al. 2022, arXiv:2203.05482)",
        WeightedSum,
    ),
}
