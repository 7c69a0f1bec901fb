"""The same `longlora prepare` twice: the second one finds what the first one made and says so."""

from __future__ import annotations

import hashlib
import json
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


def made_from(config: PrepareConfig, sources: list[Source], tokenizer: Any) -> dict[str, str] | None:
    """What prepared data depend on, for the manifest: settings, version, tokenizer, template, the files' content.

    Args:
        config: The settings.
        sources: All that is read, evaluation data of `--overlap-check` included.
        tokenizer: The tokenizer.

    Returns:
        A hash or a value by name; None where a source is no file, so that nobody can tell whether it has changed.
    """
    files = [path for source in sources for path in source.files]
    if not all(source.files for source in sources):
        return None
    settings = config.model_dump(mode="json", exclude=_NO_PART)
    return {
        "version": __version__,
        "settings": _sha256(json.dumps(settings, sort_keys=True)),
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat template": template_sha256(tokenizer),
        "inputs": _sha256("".join(sha256_of(path) for path in files)),
    }


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
