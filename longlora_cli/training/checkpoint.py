"""Checkpoints: all that a resumed run needs to continue as if it had never stopped, without pickle.

A checkpoint is an adapter folder (so `merge`, `eval` and `chat` read it too) plus `state.json` and
`state.safetensors`: optimizer, schedule, gradient scaler and the random state of every process; `trainer_state.json`
is transformers' own JSON. It appears by one rename with a manifest, and only one whose bytes verify is resumed.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longlora_cli.errors import IncompatibleError, IntegrityError, NotFoundError
from longlora_cli.storage import atomic_folder, verify_folder

KIND = "checkpoint"
_STATE, _TENSORS = "state.json", "state.safetensors"


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Turn nested state into JSON, moving tensors aside.

    Args:
        tree: dicts, lists, tuples, numbers, strings, None, tensors and numpy arrays, nested.
        tensors: Filled with the tensors found, by their path.
        path: Where in the whole this `tree` is.

    Raises:
        TypeError: Anything else is in it.
    """
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(tree, np.ndarray):
        return {"array": tree.tolist(), "dtype": str(tree.dtype)}
    if isinstance(tree, dict):
        return {"dict": [[k, pack(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"state at {path} is a {type(tree).__name__}, which has no place in a checkpoint")


def unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    ((kind, content), *rest) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return np.array(content, dtype=rest[0][1])
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        items = [unpack(v, tensors) for v in content]
        return tuple(items) if kind == "tuple" else items
    return content


def random_state() -> dict[str, Any]:
    """The state of every generator this process draws from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def folder_of(run: Path, step: int) -> Path:
    """`run/checkpoints/step-000500`."""
    return run / "checkpoints" / f"step-{step:06d}"


def steps_of(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first; their content is not looked at."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((int(f.name.removeprefix("step-")) for f in folders if f.name[5:].isdigit()), reverse=True)


def write(target: Path, state: dict[str, Any], save_model: Any, meta: dict[str, Any]) -> None:
    """Commit a checkpoint.

    Args:
        target: Its folder.
        state: Nested state for `pack`.
        save_model: Called with the staging folder to write the adapter and the trainer's JSON.
        meta: For the manifest.
    """
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors)
    with atomic_folder(target, KIND, meta) as staging:
        save_model(staging)
        (staging / _STATE).write_text(json.dumps(packed), encoding="utf-8")
        save_file(tensors, staging / _TENSORS)


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `write` was given."""
    packed = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    state: dict[str, Any] = unpack(packed, load_file(folder / _TENSORS))
    return state


def own_random_state(states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """This process's random state out of a checkpoint's.

    Raises:
        IncompatibleError: The checkpoint was written by fewer processes.
    """
    if rank >= len(states):
        raise IncompatibleError(
            f"the checkpoint has the random state of {len(states)} processes, this is number {rank + 1}",
            hint=f"Resume with {len(states)} processes or fewer.",
        )
    return states[rank]


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte verifies. Newer damaged ones are removed.

    Returns:
        The folder, or None; and one line per damaged checkpoint, saying what was wrong.
    """
    faults = []
    for step in steps_of(run):
        folder = folder_of(run, step)
        try:
            verify_folder(folder, KIND)
        except (IntegrityError, NotFoundError) as error:
            faults.append(f"{folder.name} is not used and was removed: {error.message}")
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return folder, faults
    return None, faults


def remove_old(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; call only after a newer one was committed."""
    for step in steps_of(run)[keep:]:
        folder = folder_of(run, step)
        (folder / "manifest.json").unlink(missing_ok=True)  # first, so that a half-deleted one does not exist
        shutil.rmtree(folder, ignore_errors=True)
