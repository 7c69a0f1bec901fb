"""The only code that writes artifacts: whole folders and files, or nothing.

A folder is built under a hidden staging name beside its target, every file is hashed and synced, `manifest.json` is
written last, and one rename makes the folder exist. A folder without a manifest is not an artifact and no command
takes it for one; a folder whose bytes differ from its manifest is refused. The method (staging, fsync, manifest,
rename) is the one PyTorch's distributed checkpoints use for their metadata file
(`torch/distributed/checkpoint/filesystem.py`), applied to every artifact and without pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_cli.errors import IntegrityError, NotFoundError, ResourceError, SettingsError

MANIFEST = "manifest.json"
FORMAT = 1
_STAGING, _WORKSPACE, _LOCK = ".staging-", ".unfinished-", ".lock"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What a committed folder says of itself.

    Args:
        kind: `dataset`, `checkpoint`, `adapter`, `model` or `evaluation`.
        files: Relative file name -> `{"bytes": size, "sha256": hex}`, every file but the manifest.
        meta: Facts of the kind (counts, hashes of the tokenizer, settings); plain JSON.
    """

    kind: str
    files: dict[str, dict[str, Any]]
    meta: dict[str, Any]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def atomic_folder(
    target: Path, kind: str, meta: dict[str, Any] | None = None, *, inside: Path | None = None
) -> Iterator[Path]:
    """Build a folder that appears complete, with its manifest, or not at all.

    The body may fill `meta` while it works: the manifest is written after it. A target that exists is refused before
    the body runs.

    Args:
        target: The folder to make; its parents are made too.
        kind: Recorded in the manifest and checked by readers.
        meta: Recorded in the manifest; must be JSON.
        inside: Where the staging folder is made, on the target's file system; by default beside the target.

    Yields:
        The staging folder to write into.

    Raises:
        SettingsError: The target exists and is not an empty folder.
        ResourceError: The disk is full.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = (inside or target.parent) / f"{_STAGING}{target.name}-{os.getpid()}-{time.monotonic_ns()}"
    staging.mkdir()
    try:
        yield staging
        _seal(staging, kind, meta or {})
        if target.exists():
            target.rmdir()  # only ever an empty folder: refuse_existing saw it
        staging.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise_if_disk_full(error, target)
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """Raise `SettingsError` when `target` exists and is anything but an empty folder."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise SettingsError(
        f"{target} exists already",
        rule="An artifact is written once and never overwritten.",
        hint=f"Choose another --out, or remove {target}.",
    )


def raise_if_disk_full(error: OSError, target: Path) -> None:
    """Turn "no space left" and file-size limits into a `ResourceError`; return for any other error."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = next(p for p in [target.absolute(), *target.absolute().parents] if p.exists())
        free = shutil.disk_usage(place).free
        raise ResourceError(
            f"the disk is full while writing {target} ({free / 2**20:.0f} MiB free)",
            rule="Nothing half-written was left.",
            hint="Free some space or choose another --out, then run the same command again.",
        ) from error


def _seal(folder: Path, kind: str, meta: dict[str, Any]) -> None:
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync_file(path)
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
    content = {"format": FORMAT, "kind": kind, "meta": meta, "files": files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _sync_file(manifest)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        sync_folder(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_artifact(folder: Path, kind: str | None = None) -> bool:
    """True when `folder` has a readable manifest (of that kind, if one is named); content is not hashed."""
    try:
        manifest = read_manifest(folder)
    except (IntegrityError, NotFoundError):
        return False
    return kind is None or manifest.kind == kind


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        NotFoundError: There is no manifest, so there is no artifact.
        IntegrityError: The manifest cannot be read or has an unknown format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"{folder} has no {MANIFEST}",
            rule="A folder without a manifest is incomplete or was not made by longlora.",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise IntegrityError(f"{path} has format {content['format']}; this version reads {FORMAT}")
        return Manifest(kind=content["kind"], files=content["files"], meta=content["meta"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error


def verify_folder(folder: Path, kind: str, *, deep: bool = True) -> Manifest:
    """Check a folder against its manifest.

    Args:
        folder: The artifact.
        kind: The kind it must be.
        deep: Hash every file; otherwise only names and sizes are compared.

    Raises:
        NotFoundError: No manifest.
        IntegrityError: Another kind; a file is missing, has another size or another hash. The file is named.
    """
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise IntegrityError(f"{folder} is a {manifest.kind}, not a {kind}")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", rule=f"The manifest of {folder} lists it.")
        if path.stat().st_size != expected["bytes"]:
            raise IntegrityError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
            )
        if deep and sha256_of(path) != expected["sha256"]:
            raise IntegrityError(f"{path} differs from its manifest (sha256)")
    return manifest


def write_text(path: Path, text: str) -> None:
    """Replace one file in one step: written beside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f"{_STAGING}{path.name}-{os.getpid()}"
    try:
        staging.write_text(text, encoding="utf-8")
        _sync_file(staging)
        staging.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise_if_disk_full(error, path)
        raise


def write_json(path: Path, content: Any, *, sort_keys: bool = True) -> None:
    """`write_text` of indented JSON; keys are sorted, or as they come. NaN and infinity are refused by `json`."""
    write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n")


def commit_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Make one file in one step: written beside, renamed.

    It survives the death of the process. It is not synced, so after a power loss it may hold anything: for content that
    carries its own checksum. From several threads at once, also under the same name.

    Raises:
        ResourceError: The disk is full.
    """
    staging = path.parent / f"{_STAGING}{path.name}-{os.getpid()}-{threading.get_ident()}"
    try:
        with staging.open("wb") as file:
            file.writelines(parts)
        staging.rename(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise_if_disk_full(error, path)
        raise


def append_json_line(path: Path, row: dict[str, Any], *, sync: bool = False) -> None:
    """Append one JSON object as one line, in a single write; `sync` makes it survive a power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab") as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise_if_disk_full(error, path)
        raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file written by `append_json_line`; a torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for line in lines[:-1]:  # what follows the last newline was cut off by a crash
        rows.append(json.loads(line))
    return rows


def remove_staging(parent: Path) -> None:
    """Delete what crashed writers left in `parent`; call only while holding the folder's lock."""
    if parent.is_dir():
        for path in parent.glob(f"{_STAGING}*"):
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def workspace_of(target: Path) -> Path:
    """The hidden folder beside `target` in which unfinished work on it is kept, see `workspace`."""
    return target.parent / f"{_WORKSPACE}{target.name}"


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Hold the folder in which finished parts of the work on `target` outlive this process, without half-written ones.

    Yields:
        The folder. It stays until `remove_workspace`.

    Raises:
        SettingsError: Another live process holds it.
    """
    folder = workspace_of(target)
    with ExitStack() as stack:
        while not _lock_for_good(folder, stack):
            pass
        remove_staging(folder)
        yield folder


def _lock_for_good(folder: Path, stack: ExitStack) -> bool:
    """Lock the folder; False if who held it before has removed it, and the lock with it, while the lock was opened."""
    try:
        lock = stack.enter_context(folder_lock(folder))
        return (folder / _LOCK).stat().st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False


def remove_workspace(target: Path) -> None:
    """Remove what `workspace` holds; the lock goes last, so that nobody else begins meanwhile."""
    folder = workspace_of(target)
    if not folder.is_dir():
        return
    for path in [path for path in folder.iterdir() if path.name != _LOCK]:
        _remove(path)
    (folder / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # another process may have made its lock in it just now
        folder.rmdir()


@contextmanager
def folder_lock(folder: Path) -> Iterator[int]:
    """Hold `folder` for this process; the lock ends with the process, however it ends.

    Yields:
        The descriptor of the lock's file.

    Raises:
        SettingsError: Another live process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(
                f"{folder} is in use by another longlora process",
                hint="Wait for it to end, or choose another --out.",
            ) from error
        yield file.fileno()
