"""What a training of beacons is about to do: which documents, in how many windows, and what they become."""

from __future__ import annotations

import math
from typing import Any

import torch

from longlora_cli.beacon.arithmetic import held_rows, trained_positions
from longlora_cli.beacon.choice import settings_of
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import trains_first_window
from longlora_cli.commands.train_plan import PlannedTraining
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.long_documents import LongDocuments
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import ModelSource, base_folder
from longlora_cli.parallel.mesh import Mesh
from longlora_cli.training.window_sampler import steps_of_a_pass


def plan_beacons(
    config: TrainConfig, prepared: ChunkDataset, source: ModelSource, mesh: Mesh, console: Console
) -> PlannedTraining:
    """Find the documents that windows can be made of, and say what is left out, before any weight is read.

    Raises:
        SettingsError: Beacon settings that cannot work, a `--max-length` below the data's longest document, or steps of
            more documents than have equally many windows.
        DataError: No document is longer than a window.
    """
    settings = settings_of(config)
    assert settings is not None
    documents = LongDocuments(
        prepared, settings.window, settings.hop, learn_first=trains_first_window(settings)
    )
    if not len(documents):
        longest = max(int(n) for index in range(len(prepared)) for n in prepared.document_lengths(index))
        raise DataError(
            f"no document is longer than --beacon-window {settings.window:,}; the longest has {longest:,} tokens",
            rule="A document of one window is never compressed, so beacons learn nothing from it.",
            hint="Prepare longer documents, or give a smaller --beacon-window.",
        )
    per_step = config.batch_size * config.accumulate * mesh.world
    if not steps_of_a_pass(documents.windows, per_step):
        raise SettingsError(
            f"no step can be made: it takes {per_step} documents with equally many windows, and there are fewer",
            hint="Lower --batch-size or --accumulate, or prepare more documents of one length.",
        )
    context_length = int(config.max_length or documents.longest_chunk)  # `auto` is refused with the settings
    if context_length < documents.longest_chunk:
        raise SettingsError(
            f"--max-length {context_length:,} is below the longest document, {documents.longest_chunk:,} tokens",
            hint="Prepare the data with this --max-length, or give a larger one.",
        )
    _warn(config, settings, documents, context_length, source, per_step, console)
    longest = int(documents.windows.argmax())
    return PlannedTraining(
        documents, context_length, longest, documents.longest_chunk, None, "beacons", beacons=settings
    )


def _warn(
    config: TrainConfig,
    settings: BeaconSettings,
    documents: LongDocuments,
    context_length: int,
    source: ModelSource,
    per_step: int,
    console: Console,
) -> None:
    """Say what is left out, and positions that the model was not made for."""
    if documents.short_documents:
        console.print(
            f"{documents.short_documents:,} of {documents.short_documents + len(documents):,} documents are not longer "
            f"than a window of {settings.window:,} tokens and are left out"
        )
    left = len(documents) - steps_of_a_pass(documents.windows, per_step) * per_step
    if left:
        console.print(
            f"{left:,} of {len(documents):,} documents are left over in each pass, others each time: a step takes "
            f"{per_step} with equally many windows"
        )
    if source.record is not None:
        limit = RopeRecord.from_json(source.record.rope).max_position_embeddings
    elif config.rope != "keep":
        limit = context_length
    else:
        limit = RopeRecord.of(_model_config(source)).max_position_embeddings
    farthest = trained_positions(settings, int(documents.windows.max()))
    if farthest > limit and settings.reserve is None:
        console.warn(
            f"positions go to {farthest:,} at ratio {min(r for r in settings.ratios if r)}, and the model was made for "
            f"{limit:,}: give a larger ratio, shorter documents, or --rope"
        )


def _model_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base_folder(source.base), trust_remote_code=False)


def describe_beacons(
    config: TrainConfig, planned: PlannedTraining, source: ModelSource, mesh: Mesh, console: Console
) -> dict[str, Any]:
    """Say what training would do."""
    documents, settings = planned.data, planned.beacons
    assert isinstance(documents, LongDocuments)
    assert settings is not None
    per_step = config.batch_size * config.accumulate * mesh.world
    a_pass = steps_of_a_pass(documents.windows, per_step)
    facts: dict[str, Any] = {
        "documents": len(documents),
        "short_documents": documents.short_documents,
        "context_length": planned.context_length,
        "windows": [int(documents.windows.min()), int(documents.windows.max())],
        "window_tokens": settings.window,
        "ratios": list(settings.ratios),
        "ratio_mix": settings.ratio_mix if len(settings.ratios) > 1 else None,
        "steps": config.steps or math.ceil(config.epochs * a_pass),
        "documents_per_step": per_step,
        "adapter": "as it is" if source.low_rank else config.adapter,
        "beacon_parameters": _beacon_parameters(source, settings),
        "kv_rows": {str(r): held_rows(settings, r, documents.longest_chunk) for r in settings.ratios},
    }
    shown = facts | {
        "windows": "{} to {}".format(*facts["windows"]),
        "ratios": ", ".join(map(str, settings.ratios)),
        "beacon_parameters": f"{facts['beacon_parameters']:,}",
        "kv_rows": ", ".join(f"{rows:,} at ratio {ratio}" for ratio, rows in facts["kv_rows"].items()),
    }
    titles = {"kv_rows": f"keys held of {documents.longest_chunk:,} tokens"}
    console.table(
        "would train beacons",
        ["", ""],
        [
            (titles.get(name, name.replace("_", " ")), value)
            for name, value in shown.items()
            if value is not None
        ],
    )
    return {"dry_run": True, **facts}


def _beacon_parameters(source: ModelSource, settings: BeaconSettings) -> int:
    """Numbers that are trained in beacons: an embedding and the copies of each layer's projections."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_model_config(source))
    names = tuple(f"self_attn.{name}_proj" for name in settings.projections)
    copies = [p.numel() for name, p in model.named_parameters() if name.rsplit(".", 1)[0].endswith(names)]
    return int(sum(copies) + model.config.hidden_size)
