"""Fill and balance of packings at 32K, and the seconds they take.

    python benchmarks/packing.py

Lengths: 22 books and the 197 meetings of QMSum by the embedded tokenizer (tests/data/books_and_meetings.json), cut into
pieces as `prepare` cuts texts; chats of log-normal lengths; both together; and a million pieces. For each: how full the
chunks are, the spread of their costs (standard deviation over mean) by best fit alone and as packed, and the balance of
8 processes with 1, 4 and 8 micro-batches a step.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longlora_cli.data.chunk_cost import chunk_costs, default_cost
from longlora_cli.data.ordering import GROUP, cost_balance, reading_order
from longlora_cli.data.packing import best_fit, pack

LENGTHS = Path(__file__).parent.parent / "tests" / "data" / "books_and_meetings.json"
CAPACITY = 32768
SEEDS = range(5)
MICRO_BATCHES = (1, 4, 8)
Int64 = npt.NDArray[np.int64]


def pieces(documents: list[int]) -> Int64:
    """Tokens of the pieces of split texts."""
    found = []
    for tokens in documents:
        found += [CAPACITY] * (tokens // CAPACITY) + ([tokens % CAPACITY] if tokens % CAPACITY else [])
    return np.array(found, dtype=np.int64)


def chats(count: int, log_mean: float, log_spread: float) -> Int64:
    """Tokens of chats, cut off at a chunk."""
    lengths = np.random.default_rng(0).lognormal(log_mean, log_spread, count)
    return np.clip(lengths, 1, CAPACITY).astype(np.int64)


def main() -> None:
    """Print one line a set."""
    content = json.loads(LENGTHS.read_text(encoding="utf-8"))
    mix = pieces(content["books"] + content["meetings"])
    sets = {
        "books and meetings": mix,
        "20,000 chats": chats(20_000, 7.0, 1.2),
        "books, meetings, 3,000 chats": np.concatenate([mix, chats(3_000, 7.0, 1.2)]),
        "1,000,000 pieces": chats(1_000_000, 6.5, 1.5),
    }
    cost = default_cost()
    print(f"{'':30}{'chunks':>8}{'full':>8}{'spread':>16}{'balance of 8':>27}{'seconds':>9}")
    for name, lengths in sets.items():
        start = time.perf_counter()
        chunks = pack(lengths, CAPACITY, cost)
        seconds = time.perf_counter() - start
        costs = chunk_costs([lengths[chunk] for chunk in chunks], cost)
        alone = chunk_costs([lengths[chunk] for chunk in best_fit(lengths, CAPACITY, cost)], cost)
        spreads = [float(c.std() / c.mean()) for c in (alone, costs)]
        balances = [
            float(
                np.mean([cost_balance(costs[reading_order(costs, seed, 0, GROUP * micro)]) for seed in SEEDS])
            )
            for micro in MICRO_BATCHES
        ]
        fill = lengths.sum() / (len(chunks) * CAPACITY)
        print(
            f"{name:30}{len(chunks):>8,}{fill:>8.2%}{spreads[0]:>8.3f}{spreads[1]:>8.3f}"
            f"{''.join(f'{share:>9.1%}' for share in balances)}{seconds:>9.2f}"
        )


if __name__ == "__main__":
    main()
