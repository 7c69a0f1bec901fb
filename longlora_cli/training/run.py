"""The run folder: settings, state, metrics, checkpoints and the adapter at its end.

    run/recipe.yaml  run.json  metrics.jsonl  checkpoints/step-000500/  adapter/

The same command on the same folder resumes; another command is refused with the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from longlora_cli.config import TrainConfig
from longlora_cli.errors import IntegrityError, SettingsError
from longlora_cli.models.source import RUN_STATE
from longlora_cli.storage import (
    append_json_line,
    is_artifact,
    read_json_lines,
    remove_staging,
    verify_folder,
    write_json,
    write_text,
)

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
# Settings that may change when a run is resumed: they do not touch what is learnt.
_FREE = {
    *("out", "log_every", "save_every", "keep_checkpoints", "report_to", "eval_every", "eval_samples"),
    *("eval_beacon_ratio", "beacon_parallel_window"),
    # Where activations wait, and which code computes the same gradients: a run may move to another machine.
    *("engine", "plan", "gpu_memory", "host_memory", "disk_offload", "loss_tile", "probe", "attention"),
}


class Run:
    """One training run on disk.

    Args:
        folder: The run folder.
        facts: What must not change under a run: hashes of data and base.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts

    @classmethod
    def open(cls, config: TrainConfig, recipe: str, facts: dict[str, Any]) -> Run:
        """Start a run, or take up the one in the folder when settings, data and base are the same.

        Args:
            config: The settings.
            recipe: Their YAML, stored as `recipe.yaml`.
            facts: Hashes of data and base.

        Raises:
            SettingsError: The folder holds another run.
            IntegrityError: The data or the base changed under the run.
        """
        folder, run = config.out, cls(config.out, facts)
        if not (folder / RUN_STATE).is_file():
            write_text(folder / RECIPE, recipe)
            run.note(status="started", step=0)
            return run
        remove_staging(folder)
        remove_staging(folder / "checkpoints")
        run._refuse_other_settings(config)
        before = run.state()["facts"]
        for name, value in facts.items():
            if name in before and before[name] != value:  # a run of an older version may not have noted it
                raise IntegrityError(
                    f"{folder} was started with another {name.replace('_', ' ')}",
                    rule=f"Then {before.get(name)}, now {value}.",
                    hint="Put it back, or start a new run in another --out.",
                )
        return run

    @staticmethod
    def refuse_strangers(folder: Path) -> None:
        """Raise `SettingsError` when the folder holds files and no run."""
        if not folder.is_dir() or (folder / RUN_STATE).is_file():
            return
        for path in folder.iterdir():
            if path.name not in (".lock", RECIPE):  # a run that was killed before its first note has these
                raise SettingsError(
                    f"{folder} is not empty and holds no run ({path.name})", hint="Choose another --out."
                )

    def _refuse_other_settings(self, config: TrainConfig) -> None:
        stored = yaml.safe_load((self.folder / RECIPE).read_text(encoding="utf-8"))["train"]
        before = TrainConfig(**stored).model_dump(mode="json")
        now = config.model_dump(mode="json")
        changed = [k for k in now if k not in _FREE and before[k] != now[k]]
        if changed:
            first = changed[0]
            raise SettingsError(
                f"{self.folder} holds another run: {first} was {before[first]}, now {now[first]}",
                rule=f"Also different: {', '.join(changed[1:])}." if changed[1:] else None,
                hint="Use the same settings to resume it, or choose another --out.",
            )

    def state(self) -> dict[str, Any]:
        """The content of `run.json`."""
        import json

        content: dict[str, Any] = json.loads((self.folder / RUN_STATE).read_text(encoding="utf-8"))
        return content

    def note(self, *, status: str, step: int, **more: Any) -> None:
        """Write `run.json`: `started`, `running`, `finished`, `stopped` or `failed`, and what belongs to it."""
        write_json(
            self.folder / RUN_STATE,
            {"format": 1, "status": status, "step": step, "facts": self.facts, **more},
        )

    @property
    def adapter(self) -> Path:
        """Where the trained adapter appears."""
        return self.folder / "adapter"

    def is_finished(self) -> bool:
        """True when the adapter is there, whole.

        Raises:
            IntegrityError: It is there, but differs from its manifest.
        """
        if not is_artifact(self.adapter, "adapter"):
            return False
        verify_folder(self.adapter, "adapter")
        return True

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        append_json_line(self.folder / METRICS, row)

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which are about to be written again."""
        path = self.folder / METRICS
        rows = [row for row in read_json_lines(path) if row.get("step", 0) <= step]
        if path.exists():
            import json

            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


LogRow = Callable[[dict[str, Any]], None]
