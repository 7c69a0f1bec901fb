"""`longlora merge`: adapters into their base, or checkpoints into one another."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers  # here, so that its bars are off before anything is loaded

from longlora_cli import __version__
from longlora_cli.config import MergeConfig
from longlora_cli.console import Console
from longlora_cli.merging import export, probe
from longlora_cli.merging.methods import METHODS
from longlora_cli.merging.mixing import plan_adapter
from longlora_cli.merging.plan import (
    Ingredient,
    MergePlan,
    check_together,
    choose_base,
    plan_model,
    read_ingredients,
)
from longlora_cli.merging.tensors import write_model
from longlora_cli.models.adapter_tensors import ADAPTER_FILE
from longlora_cli.models.tensors import DTYPES, MODEL_FILE
from longlora_cli.storage import atomic_folder, refuse_existing

_METHOD = "linear"


def run(config: MergeConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Merge as the settings say.

    Args:
        config: The settings.
        console: Where progress and the summary are shown.
        dry_run: Check everything, say what would be done, write nothing.

    Returns:
        Folder, bytes, tensors, weights, the base's kind, probe figures and hashes of the inputs.

    Raises:
        SettingsError: `--out` exists, `--model` is another base, or a setting has no effect.
        IncompatibleError: Sources do not belong together.
        ResourceError: The disk is too small.
        IntegrityError: A source is damaged, or the result does not compute what its sources compute.
    """
    refuse_existing(config.out)
    ingredients = read_ingredients(config.sources, config.model)
    check_together(ingredients, any_dtype=config.dtype != "auto")
    notes = export.check_tokenizers(ingredients)
    plan = _plan(config, ingredients, _weights(config))
    export.require_space(config.out, plan.nbytes)
    for note in [*notes, *plan.notes]:
        console.warn(note)
    recipe = _recipe(config, plan, [*notes, *plan.notes])
    if dry_run:
        _show(console, recipe, "would be written to")
        return recipe | {"dry_run": True}
    total = sum(path.stat().st_size for path in export.input_files(ingredients))
    with console.progress("hashing inputs (bytes)", total) as advance:
        recipe["inputs"] = export.input_hashes(ingredients, advance)
    with atomic_folder(config.out, "adapter" if config.keep_adapter else "model") as staging:
        with console.progress("writing (bytes)", plan.nbytes) as advance:
            write_model(staging, plan.outputs, advance=advance, file=_file(config))
        export.write_companions(plan, config.dtype, staging)
        recipe |= _prove(plan, staging)
        export.write_record(recipe, staging, adapter=config.keep_adapter)
        export.write_card(recipe, plan.rope, staging)
    _show(console, recipe, "written to")
    return recipe


def _weights(config: MergeConfig) -> list[float]:
    shares = len(config.sources)
    return list(config.weights) or [1.0 / shares] * shares


def _plan(config: MergeConfig, ingredients: list[Ingredient], weights: list[float]) -> MergePlan:
    if config.keep_adapter:
        # Factors take little room, and float32 keeps their sum exact to 1e-6.
        plan = plan_adapter(ingredients, weights, DTYPES["fp32" if config.dtype == "auto" else config.dtype])
    else:
        seen, notes = choose_base(ingredients, config.base_weights, given=config.given("base_weights"))
        plan = plan_model(ingredients, weights, METHODS[_METHOD], seen, config.dtype)
        plan.notes.extend(notes)
    total = math.fsum(weights)
    if not math.isclose(total, 1.0, rel_tol=1e-9):
        plan.notes.append(f"the weights sum to {total:g}, not to 1")
    return plan


def _file(config: MergeConfig) -> str:
    return ADAPTER_FILE if config.keep_adapter else MODEL_FILE


def _recipe(config: MergeConfig, plan: MergePlan, notes: list[str]) -> dict[str, Any]:
    """What is done, as the result of the command and the record in the folder; plain JSON."""
    adapters = [i.adapter for i in plan.ingredients]
    quantized = plan.seen.quantization
    return {
        "out": str(config.out),
        "adapter": config.keep_adapter,
        "method": _METHOD,
        "sources": [
            {"name": i.name, "base": i.base.name, "kind": i.adapter.kind if i.adapter else "model"}
            for i in plan.ingredients
        ],
        "weights": list(plan.weights),
        "base_weights": "none"
        if not any(adapters)
        else "original"
        if quantized == "none"
        else f"dequantized {quantized}",
        "dtype": sorted({str(o.dtype).removeprefix("torch.") for o in plan.outputs}),
        "tied_embeddings": plan.tied,
        "rope": plan.rope.to_json() if plan.rope else None,
        "context_length": plan.context_length,
        "tensors": len(plan.outputs),
        "bytes": plan.nbytes,
        "notes": notes,
        "versions": {
            "longlora": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "bitsandbytes": version("bitsandbytes"),
        },
    }


def _prove(plan: MergePlan, staging: Path) -> dict[str, Any]:
    """Reload what was written; the figures, or why there are none."""
    verified = plan.peft_config is not None or probe.verify_positions(staging, plan.rope)
    reason = probe.reason_to_leave_out(plan.base.layout, probe.available_memory())
    if reason is not None:
        return {"positions_verified": verified, "probe": None, "probe_summary": f"left out: {reason}"}
    result = probe.run_probe(plan, staging)
    return {"positions_verified": verified, "probe": result.to_json(), "probe_summary": result.describe()}


def _show(console: Console, recipe: dict[str, Any], done: str) -> None:
    rows = [
        [s["name"], s["kind"], f"{w:g}"] for s, w in zip(recipe["sources"], recipe["weights"], strict=True)
    ]
    console.table("Sources", ["source", "kind", "weight"], rows)
    what = "adapter" if recipe["adapter"] else "model"
    size = f"{recipe['tensors']:,} tensors, {recipe['bytes'] / 2**20:,.1f} MiB"
    console.print(f"{what}: {size}, {'/'.join(recipe['dtype'])}, base weights {recipe['base_weights']}")
    if recipe["context_length"]:
        console.print(f"reads {recipe['context_length']:,} tokens")
    if "probe_summary" in recipe:
        console.print(f"probe: {recipe['probe_summary']}")
    console.print(f"{done} {recipe['out']}")
