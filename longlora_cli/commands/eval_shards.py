"""An evaluation that is answered in shares: by `--shard`, or by the processes of a launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.sharding import Shard
from longlora_cli.parallel.mesh import Mesh

# Shares take as long as they take: the fastest process waits for the slowest.
_PATIENCE = timedelta(days=30)


@contextmanager
def processes(config: EvalConfig) -> Iterator[tuple[Mesh, Shard | None]]:
    """This process among the launcher's, and its share of the evaluation; None: all of it.

    Nothing is computed together, so that the processes only wait for each other, over gloo.

    Raises:
        SettingsError: `--shard` beside several processes, which are shares themselves.
    """
    mesh = Mesh.start(torch.device("cpu"), patience=_PATIENCE)
    try:
        if config.shard is not None and mesh.world > 1:
            raise SettingsError(
                f"--shard {config.shard} and {mesh.world} processes",
                rule="Each process of a launcher answers a share by itself.",
                hint="Leave --shard out, or start one process.",
            )
        if config.shard is not None:
            yield mesh, Shard.parse(config.shard)
        else:
            yield mesh, Shard(mesh.rank + 1, mesh.world) if mesh.world > 1 else None
    finally:
        mesh.stop()


def show_share(config: EvalConfig, shard: Shard, counts: dict[str, int], console: Console) -> dict[str, Any]:
    """Say what a share has answered, and how shares are put together; the command's result.

    Args:
        config: The settings.
        shard: The share.
        counts: Answers by task.
        console: Prints.
    """
    answered = sum(counts.values())
    console.print(
        f"share {shard}: {answered:,} answered and kept beside {config.out}; when all shares are there, "
        "the same command without --shard puts them together"
    )
    return {"out": str(config.out), "shard": str(shard), "answered": counts}
