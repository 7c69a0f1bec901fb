"""What a session reads with: something that holds the past of one text and goes on from it.

`CacheReader` holds keys and values of every token, `BeaconReader` compresses them. The seam is narrow on purpose:
answers, likelihoods and conversations do not know how the past is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from longlora_cli.generation.prefill import Advance


@dataclass(frozen=True)
class Query:
    """The newest question of a text.

    Args:
        text: What is asked.
        tokens: About how many tokens the text has from there to its end; what is before them is searched.
    """

    text: str
    tokens: int


class Reader(Protocol):
    """The past of one text, and how it goes on.

    Attributes:
        reused: Tokens of the text that was read last which were held already.
    """

    reused: int

    @property
    def ids(self) -> list[int]:
        """The token ids that were read; right at every moment, also after an interruption."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now."""
        ...

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be run. The last always is, for its logits."""
        ...

    def clear(self) -> None:
        """Forget everything and free the memory."""
        ...

    def read(self, ids: Sequence[int], advance: Advance | None = None, query: Query | None = None) -> Tensor:
        """Read a text of which the beginning may be held already; logits `[vocabulary]` of what follows.

        Args:
            ids: The whole text.
            advance: Called with the number of tokens just run.
            query: What retrieval searches the past by; without retrieval it is not looked at.
        """
        ...

    def step(self, token: int) -> Tensor:
        """Read one token more; logits `[vocabulary]` of the next."""
        ...

    def mark(self) -> Any:
        """This moment, to come back to."""
        ...

    def back_to(self, mark: Any) -> None:
        """Forget what was read since a mark."""
        ...


def common_prefix(held: Sequence[int], asked: Sequence[int]) -> int:
    """How many first ids are equal."""
    common = 0
    for one, other in zip(held, asked, strict=False):
        if one != other:
            break
        common += 1
    return common
