"""What answering together spares: random prompts one by one, and in batches, by length and number of new tokens.

    python benchmarks/eval_batch.py builtin --lengths 128,512,2k --new-tokens 24,128 --batches 4,16

Seconds are those of the processor on a CPU, so that other work on the machine does not count, and of the clock on a
GPU. In fp32 the answers must be the same, else it stops; in other formats it says how many are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from longlora_cli.generation.batch import answer_together
from longlora_cli.generation.requests import Request
from longlora_cli.generation.session import Session
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.sections import ModelSection
from longlora_cli.values import parse_length, split_commas

PREFILL_CHUNK = 4096


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def prompts(vocabulary: int, length: int, count: int) -> list[list[int]]:
    """Random ones, the same each time, up to 6 tokens shorter than `length`."""
    generator = torch.Generator().manual_seed(0)
    sizes = [length - number % 7 for number in range(count)]
    return [torch.randint(3, vocabulary, (size,), generator=generator).tolist() for size in sizes]


def timed(loaded: LoadedModel, work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    """What the work gives, and its seconds."""
    if loaded.device.type != "cuda":
        begin = time.process_time()
        return work(), time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return found, time.perf_counter() - begin


def one_by_one(loaded: LoadedModel, asked: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Answers from a fresh cache each."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "stop_ids": (), "allow_beyond": True}
    return [Session(loaded, prefill_chunk=PREFILL_CHUNK).answer(ids, **options).ids for ids in asked]


def together(
    loaded: LoadedModel, asked: Sequence[Sequence[int]], new_tokens: int, rows: int
) -> list[list[int]]:
    """Answers in batches of so many rows."""
    found = []
    for start in range(0, len(asked), rows):
        requests = [Request(ids, new_tokens) for ids in asked[start : start + rows]]
        answers = answer_together(loaded, requests, stop_ids=(), prefill_chunk=PREFILL_CHUNK)
        found += [answer.ids for answer in answers]
    return found


def main() -> None:
    """Measure and say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lengths", default="128,512,2k")
    parser.add_argument("--new-tokens", default="24,128")
    parser.add_argument("--batches", default="4,16")
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    loaded = load_model(ModelSection(model=options.model))
    batches = [int(rows) for rows in split_commas(options.batches)]
    for length in map(parse_length, split_commas(options.lengths)):
        asked = prompts(loaded.facts.vocabulary, length, options.prompts)
        one_by_one(loaded, asked[:1], 2)  # kernels are made once
        for new_tokens in map(int, split_commas(options.new_tokens)):
            wanted, alone = timed(loaded, partial(one_by_one, loaded, asked, new_tokens))
            told = []
            for rows in batches:
                found, seconds = timed(loaded, partial(together, loaded, asked, new_tokens, rows))
                same = sum(a == b for a, b in zip(found, wanted, strict=True))
                if loaded.dtype == "fp32" and same < len(asked):
                    raise SystemExit(f"{len(asked) - same} of {len(asked)} answers differ")
                told.append(f"{rows} rows {alone / seconds:.2f} times as fast ({same} answers the same)")
            say(f"{length:,} tokens, {new_tokens} new: {alone:.2f} s one by one; {', '.join(told)}")


if __name__ == "__main__":
    main()
