"""Beacon weights on a base, and in a folder of their own that attaches to any base with the same tensors.

The folder holds `beacon.safetensors` (the embedding and the copies) and `beacon.json` (settings, the base's
fingerprint and shape, the hash of the tensors). Nothing of the base is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longlora_cli.beacon.projections import SUBMODULE, BeaconProjections, projections_of, refuse_model
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import IncompatibleError, IntegrityError, NotFoundError, SettingsError
from longlora_cli.storage import sha256_of

WEIGHTS, RECORD = "beacon.safetensors", "beacon.json"
_FORMAT = 1


def attach(
    causal_lm: Any, settings: BeaconSettings, *, eos_token_id: int | None, bos_token_id: int | None
) -> BeaconProjections:
    """Put fresh beacons on a model: copies of its projections, an embedding that starts as a token's.

    The model computes as before until a `BeaconSession` or `window_losses` runs beacons on it. The base is frozen,
    unless an adapter on it has decided what is trained. PEFT freezes what is on a model when it wraps it: attach
    beacons afterwards, or call `requires_grad_` on them.

    Args:
        causal_lm: A transformers causal LM, also quantized, also with adapter layers in it (`LoadedModel.causal_lm`).
        settings: Which projections, which embedding.
        eos_token_id: The tokenizer's.
        bos_token_id: The tokenizer's.

    Returns:
        What is trained; also found as the decoder's submodule `beacon`.

    Raises:
        SettingsError: Settings that cannot be used, or an initial token that the tokenizer does not have.
        IncompatibleError: See `projections.refuse_model`; or there are beacons already.
    """
    try:
        settings.validate()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    refuse_model(causal_lm)
    if projections_of(causal_lm) is not None:
        raise IncompatibleError("the model has beacons already")
    token = {"eos": eos_token_id, "bos": bos_token_id}[settings.embed_init]
    if token is None:
        raise SettingsError(
            f"beacons cannot start from {settings.embed_init}: the tokenizer has no such token",
            hint=f"Use --beacon-embed-init {'bos' if settings.embed_init == 'eos' else 'eos'}.",
        )
    if not hasattr(causal_lm, "peft_config"):
        causal_lm.requires_grad_(False)
    decoder = causal_lm.get_decoder()
    projections = BeaconProjections(decoder, settings, decoder.get_input_embeddings().weight[token])
    decoder.add_module(SUBMODULE, projections)
    projections.bind()
    return projections


def detach(causal_lm: Any) -> None:
    """Take the beacons off a model, hooks and all; without beacons nothing happens."""
    projections = projections_of(causal_lm)
    if projections is not None:
        projections.unbind()
        delattr(causal_lm.get_decoder(), SUBMODULE)


def save(causal_lm: Any, settings: BeaconSettings, folder: Path, *, base: str, base_fingerprint: str) -> None:
    """Write a model's beacons into a folder that the caller makes whole (`storage.atomic_folder`).

    Args:
        causal_lm: A model with beacons.
        settings: What they were trained with.
        folder: Made if it is not there.
        base: The base as the user named it.
        base_fingerprint: `models.source.fingerprint` of it.

    Raises:
        IncompatibleError: The model has no beacons.
    """
    from safetensors.torch import save_file

    projections = projections_of(causal_lm)
    if projections is None:
        raise IncompatibleError("the model has no beacons to save")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in projections.state_dict().items()}
    save_file(state, str(folder / WEIGHTS))
    content = {
        "format": _FORMAT,
        "settings": settings.to_json(),
        "base": base,
        "base_fingerprint": base_fingerprint,
        "family": causal_lm.config.model_type,
        "dtype": str(projections.beacon_embedding.dtype).removeprefix("torch."),
        "sha256": sha256_of(folder / WEIGHTS),
    }
    (folder / RECORD).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[BeaconSettings, dict[str, Any]]:
    """Settings and other facts of saved beacons, without their tensors.

    Raises:
        NotFoundError: The folder has none.
        IntegrityError: The record is damaged or of another format.
    """
    path = folder / RECORD
    if not path.is_file():
        raise NotFoundError(f"{folder} has no {RECORD}", rule="Beacons are saved as two files.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise IntegrityError(f"{path} has format {content['format']}; this version reads {_FORMAT}")
        settings = BeaconSettings.from_json(content["settings"])
        settings.validate()
        return settings, {name: content[name] for name in ("base", "base_fingerprint", "family", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error


def load(causal_lm: Any, folder: Path, *, base_fingerprint: str, trainable: bool) -> BeaconSettings:
    """Put saved beacons on their base.

    Args:
        causal_lm: The base, without beacons.
        folder: From `save`.
        base_fingerprint: `models.source.fingerprint` of this base.
        trainable: Go on training them (float32), or only use them (the base's number format, frozen).

    Returns:
        What they were trained with.

    Raises:
        NotFoundError, IntegrityError: The folder is not whole.
        IncompatibleError: Another base, or one of another shape.
    """
    from safetensors.torch import load_file

    settings, facts = read_record(folder)
    if facts["base_fingerprint"] != base_fingerprint:
        raise IncompatibleError(
            f"{folder} has beacons of another base",
            rule=f"They were trained on {facts['base']} (fingerprint {facts['base_fingerprint'][:12]}, "
            f"found {base_fingerprint[:12]}).",
            hint="Give the base they were trained on.",
        )
    path = folder / WEIGHTS
    if not path.is_file() or sha256_of(path) != facts["sha256"]:
        raise IntegrityError(f"{path} is missing or differs from its record (sha256)")
    placeholder = 0  # any token: the embedding is read from the file
    projections = attach(causal_lm, settings, eos_token_id=placeholder, bos_token_id=placeholder)
    state = load_file(str(path))
    wanted = {name: tuple(tensor.shape) for name, tensor in projections.state_dict().items()}
    if wanted != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        detach(causal_lm)
        raise IncompatibleError(f"{folder} does not fit its base: other layers or widths")
    projections.load_state_dict(state)
    if not trainable:
        dtype: torch.dtype = causal_lm.get_input_embeddings().weight.dtype
        projections.to(dtype).requires_grad_(False)
    return settings
