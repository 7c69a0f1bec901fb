"""The first thing a newcomer runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longlora_cli import quickstart
from longlora_cli.console import Console
from longlora_cli.errors import SettingsError


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="is not empty"):
        quickstart.run(tmp_path, Console())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_libraries_say_nothing_before_its_first_line(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from longlora_cli import quickstart
from longlora_cli.console import Console
quickstart._split_book = lambda out: sys.exit()
quickstart.run(Path(sys.argv[1]), Console())
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "q")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_quickstart_makes_the_embedded_model_read_further(tmp_path: Path) -> None:
    quickstart.run(tmp_path / "q", Console())
    folders = [tmp_path / "q" / name for name in ("before", "after")]
    before, after = (json.loads((folder / "results.json").read_text())["tasks"] for folder in folders)
    beyond = [bucket["perplexity"] for bucket in before["ppl"]["by_position"] if bucket["from"] >= 512]
    reached = [bucket["perplexity"] for bucket in after["ppl"]["by_position"] if bucket["from"] >= 512]
    assert all(b < a / 5 for a, b in zip(beyond, reached, strict=True))
    found = {cell["length"]: cell["score"] for cell in after["needle"]["lengths"]}
    assert found[4096] > 0.2
    assert (tmp_path / "q" / "after" / "plots" / "needle.png").is_file()
