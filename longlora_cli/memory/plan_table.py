"""A memory plan as rows of a table: what waits where, and what the step is predicted to take."""

from __future__ import annotations

from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import STAGING_BYTES, MemoryPlan, ModelShape, Place

_NAMES = {
    "input": "layer inputs",
    "attention": "attention outputs",
    "qkv": "queries, keys, values",
    "gate_up": "gate and up outputs",
}
_WHERE: tuple[tuple[Place, str], ...] = (("gpu", "GPU"), ("host", "host"), ("disk", "disk"))


def size(count: float) -> str:
    """Bytes for people, in GiB, or in MiB below one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def describe(plan: MemoryPlan, shape: ModelShape, machine: Machine) -> list[tuple[str, str]]:
    """Name and value of each row: groups, what is kept where in how many layers, tiles, and the prediction."""
    rows = [("tokens in a step", f"{plan.tokens:,}"), ("layer groups", _groups(plan))]
    rows += [(f"{name} kept", _kept(plan, shape, kind)) for kind, name in _NAMES.items()]
    if any(len(group) > 1 for group in plan.groups()):
        rows.append(
            ("inside a group", f"inputs {plan.inner_input}, attention outputs {plan.inner_attention}")
        )
    heads = plan.kv_heads_per_call
    rows += [
        ("tiles", f"{plan.tile_tokens:,} tokens; loss {plan.loss_tile:,}"),
        ("attention", f"{f'{heads} of {shape.kv_heads}' if heads else 'all'} key-value heads in a call"),
    ]
    if plan.shifted_group:
        rows.append(("shifted sparse attention", f"groups of {plan.shifted_group:,} tokens"))
    predicted = plan.predicted
    host_bytes = predicted.host_bytes
    if plan.embedding_on_host:
        host_bytes += shape.embedding_bytes + STAGING_BYTES
        rows.append(("input embedding", f"host ({size(shape.embedding_bytes)}), rows are looked up there"))
    elif shape.embedding_bytes:
        rows.append(("input embedding", f"GPU ({size(shape.embedding_bytes)})"))
    rows += [
        ("peak GPU memory", f"{size(predicted.peak_gpu_bytes)} of {size(machine.gpu_bytes_for_step)}"),
        ("host memory", f"{size(host_bytes)} of {size(machine.host_bytes_for_activations)}"),
    ]
    if machine.disk_bytes:
        rows.append(("disk", f"{size(predicted.disk_bytes)} of {size(machine.disk_bytes)}"))
    seconds = predicted.seconds
    rows += [
        ("time of a step", f"{seconds:,.3g} s" if seconds < 100 else f"{seconds:,.0f} s"),
        ("speed", f"{plan.tokens / seconds:,.0f} tokens/s"),
        ("computation", f"{predicted.hardware_flops / seconds / 1e12:,.3g} TFLOP/s"),
        ("without recomputation", f"{predicted.model_flops / seconds / 1e12:,.3g} TFLOP/s"),
    ]
    return rows


def _groups(plan: MemoryPlan) -> str:
    lengths = [len(group) for group in plan.groups()]
    runs: list[list[int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1][0] += 1
        else:
            runs.append([1, length])
    return ", ".join(f"{count} of {length}" for count, length in runs)


def _kept(plan: MemoryPlan, shape: ModelShape, kind: str) -> str:
    each = plan.tokens * shape.kept_bytes(kind)
    parts = [
        f"{where} {plan.kept(kind, place)} ({size(each * plan.kept(kind, place))})"
        for place, where in _WHERE
        if plan.kept(kind, place)
    ]
    return ", ".join(parts) or "none"
