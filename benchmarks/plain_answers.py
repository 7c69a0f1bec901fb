"""Answer prepared prompts with transformers alone: what a merged model says where no line of longlora runs.

    python benchmarks/plain_answers.py MODEL QUESTIONS.jsonl OUT.jsonl [--dtype bfloat16] [--new-tokens 24]

QUESTIONS.jsonl has rows with `prompt` (token ids), `references` and whatever else; rows about one text follow each
other, so that its tokens are read once and the cache is cropped to what two prompts share. OUT.jsonl has the rows
without `prompt`, with `prediction` and `right`: the answer, stripped, is one of the references. Greedy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class Reader:
    """A model and the tokens that its cache holds."""

    def __init__(self, model: Any, ends: set[int]) -> None:
        self.model, self.ends = model, ends
        self.cache, self.held = DynamicCache(), list[int]()

    @torch.no_grad()
    def read(self, ids: list[int]) -> int:
        """Read what the cache does not hold; the likeliest next token."""
        shared = next(
            (n for n, (a, b) in enumerate(zip(self.held, ids, strict=False)) if a != b), len(self.held)
        )
        shared = min(shared, len(ids) - 1)
        if shared < len(self.held):
            self.cache.crop(shared - len(self.held))  # so many tokens less
        new = torch.tensor([ids[shared:]], device=self.model.device)
        out = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.held = list(ids)
        return int(out.logits[0, -1].argmax())

    def answer(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The greedy answer, without its end."""
        ids, said = list(prompt), list[int]()
        for _ in range(new_tokens):
            token = self.read(ids)
            if token in self.ends:
                break
            said.append(token)
            ids.append(token)
        return said


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """All tokens that end an answer, by the model's own generation settings and its tokenizer."""
    found = model.generation_config.eos_token_id
    ends = set(found) if isinstance(found, list) else {found}
    return {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}


def main() -> None:
    """Answer all prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        .to(device)
        .eval()
    )
    reader = Reader(model, end_tokens(model, tokenizer))
    begin, right, rows = time.monotonic(), 0, []
    for line in options.questions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        said = reader.answer(row.pop("prompt"), options.new_tokens)
        row["prediction"] = tokenizer.decode(said, skip_special_tokens=True).strip()
        row["right"] = row["prediction"] in row["references"]
        right += row["right"]
        rows.append(row)
    options.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    seconds = time.monotonic() - begin
    print(f"{right} of {len(rows)} right in {seconds:.1f} s, plain transformers, {options.dtype} on {device}")


if __name__ == "__main__":
    main()
