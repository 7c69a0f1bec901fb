"""Samples as RULER writes them, for any harness that reads RULER's files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from longlora_cli.data.counting import token_counter
from longlora_cli.evaluation.tasks.prompts import prompt_tokens
from longlora_cli.evaluation.tasks.sample import Sample


def ruler_row(tokenizer: Any, index: int, sample: Sample) -> dict[str, Any]:
    """A sample with RULER's fields, and ours after them.

    RULER's (NVIDIA, Apache-2.0; `niah.py` and its neighbours at c3f5e3b): `index`, `input` (without a chat template and
    without the answer's beginning), `outputs`, `length` (tokens of input, answer's beginning and answer),
    `length_w_model_temp` (with the chat template), `answer_prefix`, `token_position_answer` (tokens of the input before
    the answer stands there first; None where it is not there). A chat of several turns also has its `messages`.
    """
    content = "\n".join(message["content"] for message in sample.messages)
    counter = token_counter(tokenizer)
    place = content.find(sample.outputs[0])
    row = {
        "index": index,
        "input": content,
        "outputs": sample.outputs,
        "length": counter.count(content + sample.answer_prefix) + sample.max_new_tokens,
        "length_w_model_temp": prompt_tokens(tokenizer, sample) + sample.max_new_tokens,
        "answer_prefix": sample.answer_prefix,
        "token_position_answer": None if place < 0 else counter.count(content[:place]),
        "task": sample.task,
        "max_length": sample.facts["length"],
        "max_new_tokens": sample.max_new_tokens,
        "scorer": sample.scorer,
        "extra": sample.extra,
        "stop": list(sample.stop),
    }
    row |= {key: value for key, value in sample.facts.items() if key not in ("length", "tokens")}
    return row | ({"messages": sample.messages} if len(sample.messages) > 1 else {})


def ruler_lines(tokenizer: Any, samples: Iterable[Sample]) -> str:
    """JSON lines of `ruler_row`; the same samples give the same bytes."""
    rows = (ruler_row(tokenizer, index, sample) for index, sample in enumerate(samples))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
