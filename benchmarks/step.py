"""One training step, timed and weighed: tokens/s, peak memory of GPU and host, FLOP/s, beside what the plan predicts.

    python benchmarks/step.py LLAMA8B --make
    python benchmarks/step.py LLAMA8B --seq 32k 128k --rows ROWS.jsonl --commit HASH --machine "1x H100 80GB"
    python benchmarks/step.py LLAMA8B --longest --cap-gb 24 --rows ROWS.jsonl --commit HASH --machine "1x H100 80GB"
    python benchmarks/step.py LLAMA8B --check --layers 4 [--texts 8]
    python benchmarks/step.py SMOLLM2 --model-kind smollm2 --seq 32k 128k --stack longlora hf --rows ...
    python benchmarks/step.py LLAMA8B --peer-log LOG --peer-command "..." --rows ROWS.jsonl --commit HASH --machine ...

LLAMA8B is a folder with the shape of Llama-3.1-8B and random weights (`--make`): memory and time do not depend on
their values; `random` in its place builds the same model in memory, in seconds. It is held in NF4 with double
quantization and trained by LoRA of rank 32 on all seven linear layers, SmolLM2 in bf16; batch 1, random ids as their
own labels, 8-bit paged AdamW. One step warms up; the fastest of the others counts. From 256K on, and for the
longest context of all, one step is timed after a warm-up at 8K. Sizes are GiB; `--cap-gb` is 10^9 bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from random_model import make_llama8b
from results import add_rows
from step_check import check
from step_rig import (
    GIB,
    RANDOM,
    Measured,
    build,
    cap_memory,
    longest,
    measure_or_none,
    release,
    say,
)

from longlora_cli.memory.machine import CONTEXT_BYTES
from longlora_cli.memory.plan import KINDS
from longlora_cli.models.loading import choose_device
from longlora_cli.values import parse_length

STEP_CASE = {"llama8b": "llama8b-qlora-step", "smollm2": "smollm2-step"}
LONGEST_CASE = "llama8b-max-context"
CHECK_LAYERS = 4  # 32 layers in float32 take 32 GiB before the first activation
PLACES = {"gpu": "g", "host": "h", "disk": "d", "recompute": "."}
HEADER = (
    f"{'stack':9} {'tokens':>9} {'s':>8} {'(plan)':>8} {'tok/s':>8} {'peak':>6} {'(plan)':>7} {'resv.':>6} "
    f"{'host':>6} {'(plan)':>7} {'TFLOP/s':>7} {'MFU':>6} {'loss':>7}"
)


def flop_rates(measured: Measured) -> tuple[float, float]:
    """TFLOP/s as run and as the model needs; zeros without a plan."""
    if measured.plan is None:
        return 0.0, 0.0
    predicted = measured.plan.predicted
    unit = 1e12 * measured.seconds
    return predicted.hardware_flops / unit, predicted.model_flops / unit


def report(stack: str, m: Measured, peak_tflops: float) -> None:
    """One line of the table, and the plan under it."""
    hardware, model = flop_rates(m)
    host = (m.host_bytes + m.embedding_bytes) / GIB
    predicted = m.plan.predicted if m.plan else None
    told = [
        f"{v:.2f}" if v is not None else "-"
        for v in (
            predicted and predicted.seconds,
            predicted and (predicted.peak_gpu_bytes - CONTEXT_BYTES) / GIB,  # torch's part
            predicted and (predicted.host_bytes + m.embedding_bytes) / GIB,
        )
    ]
    say(
        f"{stack:9} {m.tokens:>9,} {m.seconds:>8.2f} {told[0]:>8} {m.tokens / m.seconds:>8,.0f} "
        f"{m.peak_bytes / GIB:>6.2f} {told[1]:>7} {m.reserved_bytes / GIB:>6.2f} {host:>6.2f} "
        f"{told[2]:>7} {hardware:>7.1f} {model / peak_tflops:>6.1%} {m.loss:>7.4f}"
    )
    if m.retries:
        say(f"          the allocator gave blocks back {m.retries:,} times to find room")
    if m.plan:
        kept = "  ".join(
            f"{kind} {''.join(PLACES[layer.place(kind)] for layer in m.plan.layers)}" for kind in KINDS
        )
        say(
            f"          groups of {max(len(g) for g in m.plan.groups())}, tile {m.plan.tile_tokens:,}, "
            f"loss tile {m.plan.loss_tile:,}, kv heads a call {m.plan.kv_heads_per_call or 'all'}, "
            f"inner {m.plan.inner_input}/{m.plan.inner_attention}; {kept}"
            f"{'; embedding on the host' if m.plan.embedding_on_host else ''}"
        )


def rows_of(
    options: argparse.Namespace, case: str, stack: str, variant: str | None, m: Measured
) -> list[dict[str, Any]]:
    """Rows of `results.jsonl`."""
    common = {"case": case, "stack": stack, "seq": m.tokens, **origin(options, own_command())}
    if variant:
        common["variant"] = variant
    figures = [
        ("tok_s", round(m.tokens / m.seconds, 1), "tokens/s"),
        ("peak_gib", round(m.peak_bytes / GIB, 2), "GiB"),
    ]
    if m.plan is not None:
        figures.append(("host_gib", round((m.host_bytes + m.embedding_bytes) / GIB, 2), "GiB"))
        figures.append(("tflops", round(flop_rates(m)[0], 1), "TFLOP/s"))
        common["note"] = f"Attention of {stack}: {m.kernel}."
    return [common | {"metric": name, "value": value, "unit": unit} for name, value, unit in figures]


def origin(options: argparse.Namespace, command: str) -> dict[str, str]:
    """Where a figure comes from."""
    return {"machine": options.machine, "commit": options.commit, "command": command}


def own_command() -> str:
    """This command line without the names of one machine's files."""
    words = ["MODEL", *sys.argv[2:]]
    for flag in ("--rows", "--commit", "--machine", "--case"):
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return shlex.join(["python", "benchmarks/step.py", *words])


def peer_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows from the lines `{"impl", "seq", "s", "tok_s", "peak_gib"}` that another stack's script printed.

    A stack that ran out of memory at the end has its last length as its longest context as well.
    """
    ran: dict[str, dict[str, Any]] = {}
    for line in options.peer_log.read_text(encoding="utf-8").splitlines():
        if not line.startswith("{"):
            continue
        figures, _ = json.JSONDecoder().raw_decode(line)
        stack, cases = figures["impl"], [STEP_CASE["llama8b"]]
        if figures.get("oom"):
            if stack not in ran:
                continue
            figures, cases = ran[stack], [LONGEST_CASE]
        ran[stack] = figures
        for case in cases:
            common = {"case": case, "stack": stack, "seq": figures["seq"]}
            common |= origin(options, options.peer_command)
            for name, unit in (("tok_s", "tokens/s"), ("peak_gib", "GiB")):
                yield common | {"metric": name, "value": figures[name], "unit": unit}


def variant_of(options: argparse.Namespace) -> str | None:
    """What sets a run apart from the plain one of its case."""
    parts = [f"{options.cap_gb:g}gb"] if options.cap_gb else []
    parts += ["s2"] if options.s2_group else []
    parts += [f"{options.layers} layers"] if options.layers else []
    parts += [f"{k}={v}" for k, v in options.plan.items()]
    return ", ".join(parts) or None


def run(options: argparse.Namespace, stack: str, device: torch.device) -> None:
    """All lengths of one stack, each written down as soon as it is known."""
    rig = build(options, stack, device)
    case = options.case or (LONGEST_CASE if options.longest else STEP_CASE[options.model_kind])
    lengths: list[Callable[[], Measured | None]]
    if options.longest:
        lengths = [functools.partial(longest, rig, options.steps)]
    else:
        lengths = [functools.partial(measure_or_none, rig, tokens, options.steps) for tokens in options.seq]
    for take in lengths:
        found = take()
        release(device)
        if found is None:
            continue
        report(stack, found, options.peak_tflops)
        if options.rows:
            variant = variant_of(options) if stack == "longlora" else None
            add_rows(rows_of(options, case, stack, variant, found), options.rows)
    if rig.arena is not None:
        rig.arena.close()


def plan_part(text: str) -> tuple[str, str | int]:
    """KEY=VALUE; a value that is no length stays a word."""
    key, _, value = text.partition("=")
    try:
        return key, parse_length(value)
    except ValueError:
        return key, value


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--make", action="store_true", help="write the model first")
    add("--model-kind", choices=tuple(STEP_CASE), default="llama8b")
    add("--seq", nargs="+", type=parse_length, default=[], metavar="TOKENS")
    add("--stack", nargs="+", choices=("longlora", "hf"), default=["longlora"])
    add("--steps", type=int, help="timed steps a length; default 3, or 1 from 256K on")
    add("--layers", type=int, default=0, help="cut the model to its first layers; 4 with --check")
    add("--kernel", default="auto", help="attention of the engine")
    add("--s2-group", type=parse_length, default=0, help="S2-Attn in groups of this many tokens")
    add("--plan", type=lambda t: dict(map(plan_part, t.split(","))), default={}, metavar="KEY=VALUE,...")
    add("--cap-gb", type=float, default=0.0, help="act as a card of this many 10^9 bytes")
    add("--case", choices=(*STEP_CASE.values(), LONGEST_CASE), help="of the rows; default: by what is run")
    add("--longest", action="store_true", help="find the longest context that runs")
    add("--check", action="store_true", help="compare loss and gradients with a float32 reference")
    add("--slack", type=float, default=1.0, help="with --check: most that our error may be of the plain one")
    add(
        "--texts",
        type=int,
        default=0,
        help="with --check: texts of each length; default 8 of 2K, 4 of 8K and more",
    )
    add("--peer-log", type=Path, help="JSON lines of another stack, to become rows")
    add("--peer-command", default="", help="the command line that printed --peer-log")
    add("--peak-tflops", type=float, default=989.0, help="the chip's dense bf16 peak, for MFU")
    add("--rows", type=Path)
    add("--commit", default="")
    add("--machine", default="")
    options = parser.parse_args(words)
    if options.rows and not (options.commit and options.machine):
        parser.error("--rows needs --commit and --machine")
    if options.peer_log and not (options.rows and options.peer_command):
        parser.error("--peer-log needs --rows and --peer-command")
    if options.texts < 0 or (options.texts and not options.check):
        parser.error("--texts is a number of texts for --check")
    if options.check and not options.layers:
        options.layers = CHECK_LAYERS
    if str(options.model) == RANDOM and (options.check or options.make or options.model_kind != "llama8b"):
        parser.error(
            "'random' is the 8B shape in NF4; --make, --check and --model-kind smollm2 need a folder"
        )
    if options.longest and options.model_kind != "llama8b":
        parser.error("--longest is for llama8b")
    return options


def main() -> None:
    """Make, check, measure: what was asked for."""
    options = parse()
    if options.peer_log:
        add_rows(list(peer_rows(options)), options.rows)
        return
    device = choose_device("auto")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.make:
        make_llama8b(options.model, device, options.layers)
        release(device)
    if options.check:
        raise SystemExit(0 if check(options, device) else 1)
    if options.cap_gb and device.type == "cuda":
        cap_memory(int(options.cap_gb * 1e9), device)
    if options.seq or options.longest:
        say(HEADER)
        for stack in options.stack:
            run(options, stack, device)
            release(device)


if __name__ == "__main__":
    main()
