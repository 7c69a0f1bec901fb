"""How fast each attention kernel is: causal, one document, forward and backward apart.

    python benchmarks/attention_rates.py --seq 8k 32k 128k --heads 9,3,64 32,8,128 --kernels fa4 cudnn flash \
        --rows ROWS.jsonl --commit HASH --machine "1x H100 80GB"

Heads are QUERY,KV,WIDTH. FLOPs are those of half of the square: 2 n^2 heads width forward, 2.5 times as many backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import add_rows

from longlora_cli.errors import LongLoRAError
from longlora_cli.memory.attention_kernels import choose_kernel
from longlora_cli.values import parse_length

CASE = "attention-rate"
_SECONDS = 0.15  # of each measurement, by a guess of 400 TFLOP/s
_GUESS = 4e14


def seconds_of(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Mean of one call, after one that compiles."""
    work()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - begin) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(
    name: str, tokens: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """FLOP/s forward and backward.

    Raises:
        LongLoRAError: The kernel is not there, or not for such heads.
    """
    query_heads, kv_heads, width = heads
    q, grad = (torch.randn(tokens, query_heads, width, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(tokens, kv_heads, width, device=device, dtype=dtype) for _ in range(2))
    kernel, scale, documents = choose_kernel(name, device, dtype, width), width**-0.5, [tokens]
    flops = 2.0 * tokens**2 * query_heads * width
    times = max(1, int(_SECONDS / (3.5 * flops / _GUESS))) if device.type == "cuda" else 1
    out, lse = kernel.forward(q, k, v, documents, scale)
    forward = seconds_of(lambda: kernel.forward(q, k, v, documents, scale), times, device)
    backward = seconds_of(lambda: kernel.backward(grad, q, k, v, out, lse, documents, scale), times, device)
    return {"forward": flops / forward, "backward": 2.5 * flops / backward}


def _heads(text: str) -> tuple[int, int, int]:
    query, kv, width = (int(part) for part in text.split(","))
    return query, kv, width


def main() -> None:
    """Measure, say, and write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", nargs="+", type=parse_length, default=[32768, 131072])
    parser.add_argument("--heads", nargs="+", type=_heads, default=[(9, 3, 64), (32, 8, 128)])
    parser.add_argument("--kernels", nargs="+", default=["fa4", "cudnn", "flash"])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--machine", default="")
    options = parser.parse_args()
    if options.rows and not (options.commit and options.machine):
        parser.error("--rows needs --commit and --machine")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts = {"case": CASE, "metric": "tflops", "unit": "TFLOP/s", "machine": options.machine}
    facts |= {"commit": options.commit, "command": "python benchmarks/attention_rates.py --seq 8k 32k 128k"}
    rows = []
    for heads in options.heads:
        for tokens in options.seq:
            for name in options.kernels:
                try:
                    found = rates(name, tokens, heads, device, dtype)
                except LongLoRAError as error:
                    print(f"{name}: {error.message}", flush=True)
                    continue
                told = ", ".join(f"{way} {rate / 1e12:,.4g}" for way, rate in found.items())
                print(
                    f"{heads[0]}/{heads[1]} heads {heads[2]} wide, {tokens:,} tokens, {name}: {told} TFLOP/s"
                )
                for way, rate in found.items():
                    variant = f"{heads[0]} query, {heads[1]} KV heads, {heads[2]} wide, {way}"
                    row = {"stack": name, "variant": variant, "seq": tokens, "value": round(rate / 1e12)}
                    rows.append(facts | row)
    if options.rows:
        add_rows(rows, options.rows)


if __name__ == "__main__":
    main()
