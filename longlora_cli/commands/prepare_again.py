"""The same `longlora prepare` twice: the second one finds what the first one made and says so."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longlora_cli import __version__
from longlora_cli.config import PrepareConfig
from longlora_cli.data.document import Source
from longlora_cli.errors import SettingsError
from longlora_cli.models.tokenizer import template_sha256, tokenizer_sha256
from longlora_cli.storage import read_manifest, sha256_of, verify_folder

MADE_FROM = "made_from"
# These say where the data go and what is printed, not what they are.
_NO_PART = {"out", "show"}


def identity(config: PrepareConfig, tokenizer: Any) -> dict[str, str]:
    """What prepared data depend on beside the inputs, a hash or value by name."""
    settings = config.model_dump(mode="json", exclude=_NO_PART)
    # Another version of the library may find others: 0.5 did.
    finder = {"rensa, which finds near duplicates": version("rensa")} if config.dedup == "near" else {}
    return finder | {
        "version": __version__,
        "settings": _sha256(json.dumps(settings, sort_keys=True)),
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat template": template_sha256(tokenizer),
    }


def with_content(identity: dict[str, str], sources: list[Source]) -> dict[str, str] | None:
    """What prepared data depend on, for the manifest: the `identity` and the files' content.

    Args:
        identity: From `identity`.
        sources: All that is read, evaluation data of `--overlap-check` included.

    Returns:
        None where a source is no file, so that nobody can tell whether it has changed.
    """
    if not all(source.files for source in sources):
        return None
    files = [path for source in sources for path in source.files]
    return identity | {"inputs": _sha256("".join(sha256_of(path) for path in files))}


def with_dates(identity: dict[str, str], sources: list[Source]) -> dict[str, str]:
    """The `identity` and the files' names, sizes and times of change: what an interrupted `prepare` began with.

    Nothing rests on the times alone: tokens are found again by the content of their text.
    """
    files = [(source.name, path) for source in sources for path in source.files or (None,)]
    stats = [(name, str(path), path.stat() if path else None) for name, path in files]
    rows = [[name, path, stat and stat.st_size, stat and stat.st_mtime_ns] for name, path, stat in stats]
    return identity | {"inputs": _sha256(json.dumps(rows))}


def made_before(out: Path, now: dict[str, str] | None) -> dict[str, Any]:
    """The summary of the data at `out`, if the same command made them from the same files.

    Raises:
        SettingsError: It did not; the message says in what they differ, where that is known.
        IntegrityError: The data there are damaged.
    """
    before = read_manifest(out).meta.get(MADE_FROM)
    differing = [name for name in now if now[name] != before.get(name)] if now and before else []
    if now and before and not differing:
        return dict(verify_folder(out, "dataset").meta)
    raise SettingsError(
        f"{out} exists already" + (f", made with other {', '.join(differing)}" if differing else ""),
        rule="An artifact is written once and never overwritten.",
        hint=f"Choose another --out, or remove {out}.",
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
