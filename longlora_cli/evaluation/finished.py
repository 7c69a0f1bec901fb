"""Finished evaluations, read back from their folders. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.errors import IntegrityError, NotFoundError
from longlora_cli.storage import read_json_lines, verify_folder


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation folder holds.

    Args:
        folder: Where it is.
        results: `results.json`.
        rows: Task -> its samples, with their `scores`; perplexity's are its texts.
        nll: Perplexity's losses in nats, for each text.
    """

    folder: Path
    results: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    nll: list[npt.NDArray[np.float32]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was made with."""
        return dict(self.results["settings"])

    @property
    def inputs(self) -> dict[str, Any]:
        """Hashes of what it read; empty for folders that did not keep them."""
        return dict(self.results.get("inputs", {}))

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.results["model"]["name"])


def read_evaluation(folder: Path) -> Evaluation:
    """Read and verify a folder made by `longlora eval`.

    Raises:
        NotFoundError: No such folder, or one that is not finished.
        IntegrityError: Another kind of folder, or bytes that its manifest does not know.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no evaluation {folder}", hint="Name a folder made by longlora eval.")
    verify_folder(folder, "evaluation")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows = {task: read_json_lines(folder / "samples" / f"{task}.jsonl") for task in results["tasks"]}
        return Evaluation(folder, results, rows, _read_losses(folder))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise IntegrityError(f"{folder} is not an evaluation this version can read: {error}") from error


def _read_losses(folder: Path) -> list[npt.NDArray[np.float32]]:
    path = folder / "nll.npy"
    if not path.is_file():
        return []
    losses = np.load(path, allow_pickle=False)
    ends = np.load(folder / "nll_offsets.npy", allow_pickle=False)[1:-1]
    return list(np.split(losses, ends))
