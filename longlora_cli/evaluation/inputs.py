"""What an evaluation read, as hashes: the same names may hold another text tomorrow."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.models.tokenizer import template_sha256, tokenizer_sha256


def input_hashes(plan: EvalPlan) -> dict[str, Any]:
    """SHA-256 of what decides the samples: `tokenizer`, `chat_template`, `haystack` and `texts` (token ids of each).

    `haystack` is None where nothing is hidden in text; `texts` is empty without perplexity.
    """
    return {
        "tokenizer": tokenizer_sha256(plan.tokenizer),
        "chat_template": template_sha256(plan.tokenizer),
        "haystack": None if plan.haystack is None else plan.haystack.sha256,
        "texts": [hashlib.sha256(np.asarray(t.ids, dtype="<i4").tobytes()).hexdigest() for t in plan.texts],
    }
