"""Evaluations by one name: what `--preset` sets, where nothing else does."""

from __future__ import annotations

from typing import Any

_GRID = ["ppl", "passkey", "needle", "ruler"]
_K = 1024

PRESETS: dict[str, dict[str, Any]] = {
    # Every way through the code, with any model: two minutes with the embedded one on two CPU cores.
    "smoke": {
        "tasks": [*_GRID, "kv", "qa_needle", "graphwalk"],
        "lengths": [_K, 2 * _K],
        "depths": 2,
        "samples": 1,
        "window": 512,
        "short_context": 128,
        "compat": ["hf-docs", "lm-eval"],
        "max_tokens": 4 * _K,
        "beyond": True,
    },
    # 22 samples of each RULER task and length.
    "quick": {
        "tasks": _GRID,
        "lengths": [4 * _K, 8 * _K, 16 * _K, 32 * _K],
        "depths": 11,
        "samples": 2,
        "needle_facts": 16,
        "window": 8 * _K,
        "short_context": 2 * _K,
        "max_tokens": 64 * _K,
    },
    # 50 of each: a share of 85 % is known to 10 points.
    "standard": {
        "tasks": _GRID,
        "lengths": [4 * _K, 8 * _K, 16 * _K, 32 * _K, 64 * _K, 128 * _K],
        "depths": 10,
        "samples": 5,
        "needle_facts": 16,
        "window": 32 * _K,
        "short_context": 2 * _K,
    },
    # 500 of each, as RULER's paper has it.
    "paper": {
        "tasks": _GRID,
        "lengths": [4 * _K, 8 * _K, 16 * _K, 32 * _K, 64 * _K, 128 * _K],
        "depths": 10,
        "samples": 50,
        "needle_facts": 16,
        "window": 32 * _K,
        "short_context": 2 * _K,
        "compat": ["lm-eval"],
    },
}
"""Settings by preset. They are defaults: what the user gives wins, and may make others of them pointless."""
