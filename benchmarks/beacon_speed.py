"""Seconds to read a long text, tokens per second to go on from it, and the keys and values held: plain or in windows.

    python benchmarks/beacon_speed.py MODEL TEXT --tokens 65536                       # full attention
    python benchmarks/beacon_speed.py RUN TEXT --tokens 65536 --ratio 8 --parallel 8  # beacons

One JSON object on standard output. The text is repeated until it is long enough; an eighth of it is read before, so
that kernels are compiled and memory is allocated when it counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlora_cli.beacon.arithmetic import held_rows
from longlora_cli.beacon.loading import load_model
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.models.loading import LoadedModel
from longlora_cli.sections import ModelSection

_PREFILL_CHUNK = 4096  # what `longlora eval` and `chat` read at one time


class FullReader:
    """transformers' own cache of every token, filled a chunk at a time as `longlora eval` does it."""

    def __init__(self, loaded: LoadedModel) -> None:
        from transformers import DynamicCache

        self.loaded, self.cache, self.read = loaded, DynamicCache(), 0

    @torch.no_grad()
    def feed(self, ids: list[int]) -> Tensor:
        """Logits after these tokens, `[vocabulary]`."""
        tokens = torch.tensor([ids], device=self.loaded.device)
        for piece in tokens.split(_PREFILL_CHUNK, dim=1):
            places = torch.arange(self.read, self.read + piece.shape[1], device=piece.device)[None]
            out = self.loaded.hidden(piece, use_cache=True, past_key_values=self.cache, position_ids=places)
            self.read += piece.shape[1]
        logits: Tensor = self.loaded.causal_lm.get_output_embeddings()(out.last_hidden_state[0, -1])
        return logits

    def step(self, token: int) -> Tensor:
        """Logits after one token more."""
        return self.feed([token])

    @property
    def kv_bytes(self) -> int:
        """Bytes held."""
        return sum(
            t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values)
        )


class BeaconReader:
    """Windows at one ratio."""

    def __init__(self, loaded: LoadedModel, ratio: int, parallel: int) -> None:
        settings = replace(loaded.beacons.with_ratios(ratio), parallel=parallel)
        self.session = BeaconSession(loaded, settings)
        self.feed, self.step = self.session.feed, self.session.step

    @property
    def kv_bytes(self) -> int:
        """Bytes held."""
        return self.session.stats().kv_bytes


def measure(
    loaded: LoadedModel, ids: list[int], ratio: int | None, parallel: int, new_tokens: int
) -> dict[str, Any]:
    """Read `ids`, then make `new_tokens` greedily.

    Args:
        loaded: With beacons unless `ratio` is None.
        ids: The text.
        ratio: None: full attention.
        parallel: Windows in one pass.
        new_tokens: At least two.
    """

    def reader() -> Any:
        return FullReader(loaded) if ratio is None else BeaconReader(loaded, ratio, parallel)

    warm = reader()
    logits = warm.feed(ids[: max(len(ids) // 8, 1)])
    warm.step(int(logits.argmax()))
    del warm
    used = reader()
    logits, prefill_seconds = _timed(loaded, lambda: used.feed(ids))
    kv_bytes = used.kv_bytes

    def decode() -> None:
        token = int(logits.argmax())
        for _ in range(new_tokens):
            token = int(used.step(token).argmax())

    _, decode_seconds = _timed(loaded, decode)
    element_bytes = 4 if loaded.dtype == "fp32" else 2
    rows = len(ids) if ratio is None else held_rows(loaded.beacons, ratio, len(ids))
    return {
        "tokens": len(ids),
        "ratio": ratio,
        "prefill_seconds": round(prefill_seconds, 4),
        "decode_tok_s": round(new_tokens / decode_seconds, 2),
        "kv_bytes": kv_bytes,
        "kv_bytes_per_token": round(kv_bytes / len(ids), 2),
        "planned_kv_bytes_per_token": round(
            rows * loaded.facts.kv_bytes_per_token(element_bytes) / len(ids), 2
        ),
    }


def _timed(loaded: LoadedModel, work: Callable[[], Any]) -> tuple[Any, float]:
    def settle() -> None:
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)

    settle()
    begin = time.perf_counter()
    result = work()
    settle()
    return result, time.perf_counter() - begin


def main() -> None:
    """Measure once and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ratio", type=int)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    loaded = load_model(ModelSection(model=options.model))
    text = options.text.read_text(encoding="utf-8")
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False).input_ids
    ids = (ids * (options.tokens // len(ids) + 1))[: options.tokens]
    found = measure(loaded, ids, options.ratio, options.parallel, options.new_tokens)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
