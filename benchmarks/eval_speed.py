"""What evaluation costs: a grid of depths on one cache against separate prompts, and the memory of a long prompt.

    python benchmarks/eval_speed.py MODEL_DIR --length 32k --depths 11 --prefill 128k --rows results.jsonl \
        --commit HASH --machine "1x H100 80GB"

`needle` hides all facts in one text, which is read once for the questions about every depth; `passkey` has one key a
prompt, so that only the text before the next key is read once. Both are timed as `longlora eval` asks them, questions
about one text in a batch where there is memory, and with a fresh cache for every question. How many answers are
the same text is written beside: in 16-bit formats other chunks and batches round otherwise.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import add_rows

from longlora_cli.config import EvalConfig
from longlora_cli.evaluation.answerer import SessionAnswerer, choose_batching
from longlora_cli.evaluation.generation import Question, predict
from longlora_cli.evaluation.plan import EvalPlan, make_plan
from longlora_cli.generation.session import Session
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.values import parse_length

CASE = "eval-speed"
NEW_TOKENS = 8


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def make(options: argparse.Namespace) -> tuple[EvalPlan, LoadedModel]:
    """The questions of both grids, and the model that answers them."""
    config = EvalConfig(
        beyond=True,
        model=str(options.model),
        tasks=["needle", "passkey"],
        out=Path("unused"),
        lengths=[options.length],
        depths=options.depths,
        samples=1,
        needle_facts=max(16, options.depths),
        max_new_tokens=NEW_TOKENS,
        haystack=options.haystack,
    )
    plan = make_plan(config, load_tokenizer(config.model))
    return plan, load_model(config, config, context_length=max(options.length, options.prefill))


def answers(
    loaded: LoadedModel, questions: Sequence[Question], *, one_cache: bool
) -> tuple[list[str], float]:
    """Texts, and the seconds of all of them."""
    cuda = loaded.device.type == "cuda"
    batching = choose_batching("auto", loaded) if one_cache else None
    answerer = SessionAnswerer(loaded, prefill_chunk=4096, batching=batching)
    if cuda:
        torch.cuda.synchronize()
    begin, said = time.perf_counter(), []
    if one_cache:
        said = [row["prediction"] for row in predict(answerer, questions, max_new_tokens=NEW_TOKENS)]
    for question in () if one_cache else questions:
        answerer = SessionAnswerer(loaded, prefill_chunk=4096)
        said.append(answerer.answer(question.prompt, NEW_TOKENS).text)
    if cuda:
        torch.cuda.synchronize()
    return said, time.perf_counter() - begin


def grid_rows(plan: EvalPlan, loaded: LoadedModel) -> list[dict[str, Any]]:
    """A row for each grid: time on one cache over time of separate prompts."""
    rows = []
    for task in ("needle", "passkey"):
        questions = list(plan.grid_questions(task))
        answers(
            loaded, questions[:2], one_cache=True
        )  # kernels are made once, those of a batch and of one question
        answers(loaded, questions[:1], one_cache=False)
        one, shared = answers(loaded, questions, one_cache=True)
        many, separate = answers(loaded, questions, one_cache=False)
        same = sum(a == b for a, b in zip(one, many, strict=True))
        say(
            f"{task}: {len(questions)} depths in {shared:.2f} s on one cache, {separate:.2f} s apart: "
            f"{shared / separate:.3f}; {same} of {len(questions)} answers the same text"
        )
        seq = plan.config.lengths[0]
        rows.append(
            {
                "variant": task,
                "seq": seq,
                "metric": "time_ratio",
                "value": round(shared / separate, 3),
                "unit": "ratio",
            }
        )
        share = {"metric": "same_answers", "value": round(same / len(questions), 3), "n": len(questions)}
        rows.append({"variant": task, "seq": seq, "unit": "share"} | share)
        rows.append(
            {"variant": task, "seq": seq, "metric": "seconds", "value": round(shared, 2), "unit": "s"}
        )
    return rows


def prefill_rows(loaded: LoadedModel, tokens: int) -> list[dict[str, Any]]:
    """Peak memory of reading one long prompt, over that of weights and cache; none on a CPU."""
    if loaded.device.type != "cuda":
        return []
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    session = Session(loaded, prefill_chunk=4096)
    ids = [(7919 * place) % loaded.facts.vocabulary for place in range(tokens - NEW_TOKENS)]
    said = session.answer(ids, max_new_tokens=NEW_TOKENS, stop_ids=(), allow_beyond=True)
    peak, needed = torch.cuda.max_memory_allocated(), weights + session.kv_bytes
    say(
        f"prompt of {tokens:,} tokens: {said.prefill_seconds:.2f} s, peak {peak / 2**30:.2f} GiB, weights and cache "
        f"{needed / 2**30:.2f} GiB: {peak / needed:.3f}"
    )
    return [
        {"seq": tokens, "metric": "peak_ratio", "value": round(peak / needed, 3), "unit": "ratio"},
        {"seq": tokens, "metric": "prefill_seconds", "value": round(said.prefill_seconds, 2), "unit": "s"},
    ]


def main() -> None:
    """Measure, say, and write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=parse_length, default=32768)
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--prefill", type=parse_length, default=131072)
    parser.add_argument("--haystack", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--machine", default="")
    options = parser.parse_args()
    if options.rows and not (options.commit and options.machine):
        parser.error("--rows needs --commit and --machine")
    plan, loaded = make(options)
    rows = [*grid_rows(plan, loaded), *prefill_rows(loaded, options.prefill)]
    if options.rows:
        command = f"python benchmarks/eval_speed.py MODEL --length {options.length} --depths {options.depths}"
        facts = {"case": CASE, "stack": "longlora", "machine": options.machine, "commit": options.commit}
        add_rows([{**facts, "command": command, **row} for row in rows], options.rows)


if __name__ == "__main__":
    main()
