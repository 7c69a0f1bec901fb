"""A base with its adapter and its beacons, loaded and saved as one: what a run with beacons is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longlora_cli.beacon import weights
from longlora_cli.beacon.projections import projections_of
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.models import adapter as adapters
from longlora_cli.models import loading
from longlora_cli.models.loading import LoadedModel
from longlora_cli.models.source import BEACONS, AdapterRecord, base_folder, fingerprint
from longlora_cli.sections import ModelSection, RopeSection


def load_model(
    section: ModelSection,
    rope: RopeSection | None = None,
    *,
    adapter: Path | None = None,
    context_length: int | None = None,
    training: bool = False,
) -> LoadedModel:
    """`models.loading.load_model`, and the source's beacons on the model if it has any.

    Args:
        section: Which model and how its numbers are held.
        rope: How positions are stretched.
        adapter: Adapter, with beacons or without, to put on the base that `section` names.
        context_length: Tokens to read.
        training: Low-rank matrices and beacons stay trainable.

    Returns:
        The model; `beacons` are the settings that its beacons were trained with, None where it has none.

    Raises:
        IncompatibleError: Beacons of another base, or that do not fit.
        IntegrityError: Their folder is not whole. And what `models.loading.load_model` raises.
    """
    loaded = loading.load_model(
        section, rope, adapter=adapter, context_length=context_length, training=training, with_beacons=True
    )
    if loaded.source.beacons is not None:
        found = fingerprint(base_folder(loaded.source.base))
        loaded.beacons = weights.load(
            loaded.causal_lm, loaded.source.beacons, base_fingerprint=found, trainable=training
        )
    return loaded


def train_beacons(loaded: LoadedModel, settings: BeaconSettings) -> BeaconSettings:
    """Let a model's beacons be trained, fresh ones if it has none; without an adapter nothing else is.

    Args:
        loaded: A model, its adapter on it.
        settings: How they are trained.

    Returns:
        The settings, with the projections of the beacons that the model had.

    Raises:
        SettingsError, IncompatibleError: From `weights.attach`.
    """
    model, tokenizer, held = loaded.causal_lm, loaded.tokenizer, loaded.beacons
    if held is not None:
        settings = replace(settings, projections=held.projections, embed_init=held.embed_init)
    else:
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        weights.attach(model, settings, **ids)
    if not loaded.source_has_adapter:
        model.requires_grad_(False)
    projections = projections_of(model)
    assert projections is not None  # loaded or attached above
    projections.requires_grad_(True)
    loaded.beacons = settings
    return settings


def save_trained(loaded: LoadedModel, record: AdapterRecord, folder: Path) -> None:
    """Write what a training has changed into a staging folder: PEFT's files, beacons, tokenizer and record."""
    if loaded.source_has_adapter:
        adapters.save(loaded.model, loaded.tokenizer, record, folder)
    else:
        adapters.save_companions(loaded.tokenizer, record, folder)
    if loaded.beacons is not None:
        weights.save(
            loaded.causal_lm,
            loaded.beacons,
            folder / BEACONS,
            base=record.base,
            base_fingerprint=record.base_fingerprint,
        )
