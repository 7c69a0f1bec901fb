"""What a user's `--model` means: the embedded model, a model folder, a hub name, a run, a checkpoint, an adapter."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longlora_cli.errors import DataError, IntegrityError, NotFoundError, SecurityError
from longlora_cli.storage import MANIFEST, sha256_of, verify_folder

BUILTIN = "builtin"
RECORD = "longlora.json"
RUN_STATE = "run.json"
BEACONS = "beacon"
"""Folder of beacon weights inside an adapter folder."""
_PEFT_CONFIG = "adapter_config.json"
_BEACON_CONFIG = "beacon.json"
# Keys with which a config.json has made loaders run code from the model folder (CVE-2026-4372, CVE-2026-5241).
_CODE_KEYS = ("_attn_implementation_internal", "trust_remote_code", "custom_pipelines")
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter must not be separated from; `longlora.json` beside PEFT's files.

    Args:
        base: The base as the user named it.
        base_fingerprint: `fingerprint` of the base it was trained on.
        rope: `{"parameters": {...}, "max_position_embeddings": n}` of the trained model.
        quantization: `none`, `nf4` or `int8`: how the base was held in training.
        dtype: `fp32`, `bf16` or `fp16`.
        context_length: Tokens it was trained to read.
    """

    base: str
    base_fingerprint: str
    rope: dict[str, Any]
    quantization: str
    dtype: str
    context_length: int

    def to_json(self) -> str:
        """The content of `longlora.json`."""
        return json.dumps({"format": 1, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> AdapterRecord | None:
        """Read `folder/longlora.json`; None when the adapter was made by another tool."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: content[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError) as error:
            raise IntegrityError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class ModelSource:
    """A base and the adapter to put on it.

    Args:
        base: `builtin`, a folder or a hub name.
        adapter: Adapter or checkpoint folder, verified against its manifest when it has one. It holds low-rank
            matrices, beacons or both.
        record: What was written beside the adapter.
    """

    base: str
    adapter: Path | None = None
    record: AdapterRecord | None = None

    @property
    def low_rank(self) -> Path | None:
        """The adapter folder, if there are PEFT's files in it."""
        return self.adapter if self.adapter and (self.adapter / _PEFT_CONFIG).is_file() else None

    @property
    def beacons(self) -> Path | None:
        """The folder of its beacon weights, if it has any."""
        folder = self.adapter / BEACONS if self.adapter else None
        return folder if folder and (folder / _BEACON_CONFIG).is_file() else None


def resolve(name: str, adapter: Path | None = None) -> ModelSource:
    """Find out what `name` is. With `adapter`, `name` is its base; both may not be adapters.

    Raises:
        NotFoundError: A path that does not exist, or a run without an adapter yet.
        DataError: A folder that is none of the known kinds.
        IntegrityError: An adapter whose bytes differ from its manifest.
    """
    folder = Path(name)
    if adapter is not None:
        base = resolve(name)
        if base.adapter is not None:
            raise DataError(f"--model {name} has an adapter already; --adapter {adapter} cannot be added")
        return ModelSource(base.base, *_read_adapter(adapter))
    if name != BUILTIN and folder.is_dir():
        if (folder / RUN_STATE).is_file():
            return _from_adapter(_adapter_of_run(folder))
        if _is_adapter(folder):
            return _from_adapter(folder)
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{name} is not a model: it has no config.json, {_PEFT_CONFIG} or {RUN_STATE}",
                hint="Give a model folder, a run folder, an adapter folder or 'builtin'.",
            )
    elif name != BUILTIN and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise NotFoundError(f"there is no model folder {name}")
    return ModelSource(name)


def _adapter_of_run(run: Path) -> Path:
    if (run / "adapter").is_dir():
        return run / "adapter"
    raise NotFoundError(
        f"run {run} has no adapter yet",
        rule="The adapter appears when training ends.",
        hint=f"Finish the run with the same longlora train command, or name a folder in {run / 'checkpoints'}.",
    )


def _is_adapter(folder: Path) -> bool:
    return (folder / _PEFT_CONFIG).is_file() or (folder / BEACONS / _BEACON_CONFIG).is_file()


def _from_adapter(folder: Path) -> ModelSource:
    path, record = _read_adapter(folder)
    if record is not None:
        return ModelSource(record.base, path, record)
    if not (folder / _PEFT_CONFIG).is_file():
        raise IntegrityError(
            f"{folder / RECORD} is missing", rule="Beacons belong to one base, which it names."
        )
    base = json.loads((folder / _PEFT_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise DataError(f"{folder} does not name its base model", hint="Give it: --model BASE --adapter ...")
    return ModelSource(str(base), path, None)


def adapter_sha256(folder: Path) -> str:
    """Of the adapter that a training begins from, in hex: its manifest's, or its weights' where it has none."""
    manifest = folder / MANIFEST
    return sha256_of(manifest if manifest.is_file() else folder / "adapter_model.safetensors")


def _read_adapter(folder: Path) -> tuple[Path, AdapterRecord | None]:
    if (folder / RUN_STATE).is_file():
        folder = _adapter_of_run(folder)
    if not _is_adapter(folder):
        raise NotFoundError(f"{folder} is not an adapter: it has no {_PEFT_CONFIG}")
    record = AdapterRecord.read(folder)
    if record is not None:  # ours, so it has a manifest
        kind = "checkpoint" if (folder / "state.json").is_file() else "adapter"
        verify_folder(folder, kind)
    return folder, record


def base_folder(name: str) -> Path:
    """The local folder of a base model: the package's own, a given folder, or the hub's snapshot.

    Raises:
        NotFoundError: A hub name that is neither in the cache nor can be fetched.
        SecurityError: Its config.json could make a loader run code.
    """
    if name == BUILTIN:
        folder = Path(__file__).parent / BUILTIN
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _hub_snapshot(name)
    _refuse_code(folder)
    return folder


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these two
        raise NotFoundError(
            f"there is no folder {name}, and the hub does not give a model of that name",
            rule=str(error).splitlines()[0][:200],
            hint="Check the name, or download the model and give its folder.",
        ) from error


def _refuse_code(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise NotFoundError(f"{folder} has no config.json", hint="Give the folder of a transformers model.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    for key in _CODE_KEYS:
        if key in config:
            raise SecurityError(
                f"{path} has the key {key!r}", rule="It can make a loader run code from a model folder."
            )


def own_length(name: str) -> int:
    """Tokens that a base was made for, by its config.json; a run's length is in its record.

    Raises:
        NotFoundError, SecurityError: From `base_folder`.
        DataError: The config does not say.
    """
    path = base_folder(name) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )
    if not isinstance(length, int):
        raise DataError(f"{path} does not say how many tokens the model reads (max_position_embeddings)")
    return length


def fingerprint(folder: Path) -> str:
    """Identify a base by its tensors: names, shapes, dtypes and the first 4 KiB of each one's bytes.

    The same weights in other shards give the same fingerprint; reading it costs a few milliseconds per GB.

    Raises:
        NotFoundError: No safetensors files.
    """
    digest = hashlib.sha256()
    for name, info, sample in sorted(_tensor_samples(folder), key=lambda item: item[0]):
        digest.update(json.dumps([name, info["dtype"], info["shape"]]).encode())
        digest.update(sample)
    return digest.hexdigest()


def _tensor_samples(folder: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFoundError(
            f"{folder} has no .safetensors weights",
            rule="Weights in pickle files (.bin, .pt) are not read.",
            hint="Save the model with transformers: model.save_pretrained(folder).",
        )
    for path in files:
        with path.open("rb") as file:
            try:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(header_bytes))
            except (struct.error, ValueError, OverflowError, MemoryError) as error:
                raise IntegrityError(f"{path} is not a whole safetensors file: {error}") from error
            for name, info in header.items():
                if name != "__metadata__":
                    start, end = info["data_offsets"]
                    file.seek(8 + header_bytes + start)
                    yield name, info, file.read(min(end - start, _SAMPLE_BYTES))
