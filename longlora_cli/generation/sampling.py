"""Choose the next token from logits: the likeliest, or a draw with temperature and top-p.

Nucleus sampling (top-p): Holtzman et al. 2020, The Curious Case of Neural Text Degeneration
(arXiv:1904.09751).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sampler = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    """The likeliest token of `logits` `[vocabulary]`; the lowest id when several are equal.

    Equal logits occur in 16-bit formats, and `argmax` may break such a tie differently on each device.
    """
    return int((logits == logits.max()).nonzero()[0])


def probabilities(logits: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """What a sampler draws from.

    Args:
        logits: `[vocabulary]`, any floating dtype.
        temperature: Above 0; logits are divided by it.
        top_p: Tokens are taken from the likeliest on until their sum reaches this, the last one included; the
            rest get 0.

    Returns:
        Probabilities, float64 `[vocabulary]` on the CPU, so that one seed draws the same tokens on every
        device.
    """
    shares = (logits.detach().to("cpu", torch.float64) / temperature).softmax(-1)
    if top_p >= 1.0:
        return shares
    ordered, order = shares.sort(descending=True, stable=True)
    # A token belongs to the nucleus when what is likelier than it does not yet reach top_p.
    kept = ordered.cumsum(-1) - ordered < top_p
    kept[0] = True
    shares = torch.zeros_like(shares).index_put_((order[kept],), ordered[kept])
    return shares / shares.sum()


def make_sampler(*, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Sampler:
    """`greedy` for temperature 0, else draws with a random generator of its own.

    One uniform number is used for each token, so that the n-th draw depends on the seed and the n-th
    distribution alone; torch's global generator is neither read nor moved.
    """
    if temperature == 0.0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> int:
        shares = probabilities(logits, temperature=temperature, top_p=top_p)
        point = torch.rand((), generator=generator, dtype=torch.float64)
        cumulative = shares.cumsum(-1)
        # `right` keeps a token of probability 0 from being drawn when the point is exactly on its border.
        index = int(torch.searchsorted(cumulative, point * cumulative[-1], right=True))
        return min(index, int(shares.nonzero()[-1]))

    return draw
