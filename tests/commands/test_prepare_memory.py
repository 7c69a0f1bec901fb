"""Memory of the whole of `prepare` over its imports, in processes of their own; mapped pages of files count too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import json, sys, threading, time
from pathlib import Path
import matplotlib.backends.backend_agg
from longlora_cli.commands import prepare
from longlora_cli.config import PrepareConfig
from longlora_cli.console import Console

def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM")}

def run(source, out):
    config = PrepareConfig(inputs=[source], out=Path(out), max_length=8192)
    return prepare.run(config, Console(json_mode=True), dry_run=False)

folder, source = sys.argv[1:]
Path(folder, "warm.txt").write_text("A first text imports what is imported when it is needed.")
run(f"{folder}/warm.txt", f"{folder}/warm")
before, most, done = status(), status(), False

def watch():
    while not done:
        for name, size in status().items():
            most[name] = max(most[name], size)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
tokens = run(source, f"{folder}/data")["tokens"]
done = True
watcher.join()
print(json.dumps({"tokens": tokens} | {name: most[name] - before[name] for name in most}))
"""
ROW = (json.dumps({"text": "".join(f"word{n % 9} " for n in range(400))}) + "\n").encode()
MB = 1_000_000


def memory_of(folder: Path, size_bytes: int) -> dict[str, int]:
    """Tokens, and the most bytes over imports: anonymous, of files, and of both at once (VmHWM)."""
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(ROW * (size_bytes // len(ROW)))
    words = [sys.executable, "-c", PREPARE, str(folder), str(folder / "rows.jsonl")]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_tokens_on_their_way_into_chunks_are_not_mapped_into_memory(tmp_path: Path) -> None:
    found = memory_of(tmp_path / "small", 16 * MB)
    assert found["tokens"] > 4 * MB  # 32 MB with their labels, all of which a map would hold
    assert found["RssFile"] < 8 * MB
    assert found["VmHWM"] < 400 * MB


@pytest.mark.slow
def test_a_corpus_30_times_as_large_takes_hardly_more(tmp_path: Path) -> None:
    found = memory_of(tmp_path / "large", 480 * MB)
    assert found["tokens"] > 120 * MB
    assert found["RssFile"] < 8 * MB
    # Measured: 101 MB, and 78 MB for 16 MB of rows. Twice that for other allocators and moments, and still a sixth
    # of the tokens' 1.3 GB with their labels.
    assert found["VmHWM"] < 200 * MB


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_100_million_emoji_in_one_document_take_less_than_a_gigabyte(tmp_path: Path, suffix: str) -> None:
    # 400 MB as bytes and as text, and 400 million tokens; every 10,000 of them a word, so that there are places to cut.
    line = "🙂🚀🌍🎉🔥" * 2000 + " a "
    path = tmp_path / f"one{suffix}"
    with path.open("w", encoding="utf-8") as file:
        file.write('{"text": "' * (suffix == ".jsonl"))
        for _ in range(100 * MB // len(line)):
            file.write(line)
        file.write('"}\n' * (suffix == ".jsonl"))
    words = [sys.executable, "-c", PREPARE, str(tmp_path), str(path)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] > 300 * MB
    # Measured: 808 MB for the file and 816 MB for the row, twice the text; the ids in a file and not in memory.
    assert found["VmHWM"] < 1000 * MB
