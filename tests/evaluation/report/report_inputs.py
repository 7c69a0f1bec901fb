"""Rows and summaries of which reports are made in tests."""

from __future__ import annotations

import math
import random
from typing import Any

from longlora_cli.evaluation.grid import score_grid

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>\"'&lt;"


def grid_rows(
    task: str = "needle", lengths: tuple[int, ...] = (4096, 8192, 16384), samples: int = 4
) -> list[dict[str, Any]]:
    """Answers of a grid: the longer and the more in the middle, the worse; some say it in a sentence."""
    rng = random.Random(0)
    rows = []
    for length in lengths:
        for depth in (0.0, 0.5, 1.0):
            for sample in range(samples):
                draw = rng.random()
                said = (
                    "48213"
                    if draw > 0.3 * lengths.index(length) * (2 if depth == 0.5 else 1)
                    else "it is 48213"
                )
                rows.append(
                    {
                        "key": f"{task}-{length}-{depth}-{sample}",
                        "task": task,
                        "length": length,
                        "depth": depth,
                        "sample": sample,
                        "prediction": said if draw > 0.15 else "99999",
                        "references": ["48213"],
                        "finish": "eos" if draw > 0.25 else "length",
                        "prompt_tokens": length - 24,
                        "reused_tokens": 100,
                        "new_tokens": 5,
                        "seconds": 0.25,
                    }
                )
    return rows


def generation_rows(count: int = 3) -> list[dict[str, Any]]:
    """Answers of rows, each with four scores."""
    return [
        {
            "key": f"row-{number}",
            "task": "generate",
            "line": number,
            "prediction": f"answer {number}",
            "references": ["an answer", "another answer"],
            "scores": {"rougeL": 0.5, "f1": 0.25, "exact_match": 0.0, "accuracy": 1.0},
            "finish": "eos",
            "prompt_tokens": 900,
            "reused_tokens": 0,
            "new_tokens": 3,
            "seconds": 0.5,
        }
        for number in range(count)
    ]


def position_curve(losses: list[float]) -> list[dict[str, Any]]:
    """Buckets of a loss curve, each twice as far as the one before."""
    return [
        {
            "from": 0 if place == 0 else 64 << place,
            "to": 128 << place,
            "n": 1000 * (place + 1),
            "nll": nll,
            "perplexity": math.exp(nll),
            "ci95": [math.exp(nll - 0.1), math.exp(nll + 0.2)],
        }
        for place, nll in enumerate(losses)
    ]


def make_evaluation() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """`results.json` and samples of an evaluation with every kind of task, audits and a curve of short context."""
    needle, scored = score_grid(grid_rows())
    ppl = {
        "n": 12345,
        "texts": 1,
        "nll": 2.5,
        "perplexity": math.exp(2.5),
        "ci95": [12.0, 12.5],
        "perplexity_macro": 12.75,
        "bits_per_byte": 0.8125,
        "by_position": [
            {**full, **{f"short_{key}": short[key] for key in ("nll", "perplexity", "ci95")}}
            for full, short in zip(
                position_curve([3.0, 2.75, 2.5]), position_curve([3.0, 2.875, 2.875]), strict=True
            )
        ],
        "gain": {"gain": 0.125, "gain_ci95": [0.0625, 0.25], "n": 7000, "beyond": {"gain": None, "n": 0}},
        "short_context": 128,
        "compat": {"longlora": {"rule": "mean of windows", "n": 9999, "perplexity": 11.5}},
        "curve_windows": 7,
        "curve_source": "full windows",
        "window": 512,
    }
    scores = {
        name: {"n": 3, "score": value, "ci95": [value, value], "scorer": f"{name}@1"}
        for name, value in generation_rows()[0]["scores"].items()
    }
    results = {
        "model": {
            "name": "runs/long",
            "base": "SmolLM2",
            "adapter": "runs/long/adapter",
            "adapter_folded": True,
            "rope": {"parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
            "dtype": "bf16",
            "quantization": "none",
            "device": "cuda",
        },
        "settings": {"tasks": ["ppl", "needle", "generate"], "seed": 17, "adapter": None},
        "versions": {"longlora": "1.2.3", "torch": "2.11.0"},
        "seconds": 61.5,
        "peak_bytes": 3 << 30,
        "tasks": {
            "ppl": ppl,
            "needle": needle,
            "generate": {"n": 3, "scores": scores, "scorers": list(scores), "cut": 0.0},
        },
        "audits": [
            {"name": "BOS tokens", "value": 1, "ok": True, "note": "one, as in training"},
            {"name": "cut answers", "value": 0.25, "ok": False, "note": "raise --max-new-tokens"},
            {"name": "attention", "value": "torch", "ok": None, "note": None},
        ],
    }
    texts = [{"text": "book.txt", "n": 12345, "nll": 2.5, "bytes": 55555, "seconds": 1.5}]
    return results, {"ppl": texts, "needle": scored, "generate": generation_rows()}
