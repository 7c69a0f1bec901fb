"""A `prepare` that is killed at any moment and run again gives the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.models.tokenizer import BUILTIN
from longlora_cli.storage import read_manifest, workspace

WORDS = ["river", "mill", "secret", "amber", "falcon", "times", "age", "wisdom", "was", "the", "it", "of"]
Run = Callable[..., dict[str, Any]]


def write_inputs(folder: Path, *, characters: int, chats: int) -> list[str]:
    """Two books and chats; the arguments that prepare them, with a chat made from the books."""
    rng = random.Random(5)
    folder.mkdir(exist_ok=True)
    for name in ("a.txt", "b.txt"):
        words = rng.choices(WORDS, k=characters // 10)
        (folder / name).write_text(
            "".join(f"{word}{n % 97}" + (". " if n % 9 else ".\n\n") for n, word in enumerate(words))
        )
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Who slept {n} times?"},
                {"role": "assistant", "content": "He."},
            ]
        }
        for n in range(chats)
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [
        "--synthetic",
        "needle=2",
        "--synthetic-length",
        "1k",
        "--synthetic-facts",
        "2",
        "--synthetic-questions",
        "1",
    ]
    return ["prepare", *(str(folder / name) for name in ("a.txt", "b.txt", "c.jsonl")), "-o", "data", *made]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`longlora` in forked processes, with small groups of pieces, see `fork_server`."""
    server = str(Path(__file__).parent / "fork_server.py")
    small = ["_GROUP_BYTES=4096", "_PIECE_CHARACTERS=1024"]
    words = [sys.executable, server, str(tmp_path_factory.mktemp("logs")), *small]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    with subprocess.Popen(words, stdin=-1, stdout=-1, text=True, env=environment) as process:

        def answer(folder: Path, arguments: list[str], **when: Any) -> dict[str, Any]:
            assert process.stdin
            assert process.stdout
            folder.mkdir(exist_ok=True)
            request = {"folder": str(folder), "arguments": arguments, **when}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            content: dict[str, Any] = json.loads(process.stdout.readline())
            return content

        yield answer
        assert process.stdin
        process.stdin.close()


def in_new_process(folder: Path, arguments: list[str], *, seconds: float | None = None) -> dict[str, Any]:
    """`longlora` as a user starts it, killed after some seconds."""
    import time

    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    words = [sys.executable, "-m", "longlora_cli", *arguments]
    with subprocess.Popen(words, cwd=folder, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    return {"code": process.returncode, "seconds": time.monotonic() - started, "output": output}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_and_run_again(run: Run, tmp_path: Path, arguments: list[str], moments: list[float]) -> list[str]:
    """Kill at parts of the whole duration; what the runs after it said."""
    whole = run(tmp_path / "whole", arguments)
    assert whole["code"] == 0, whole["output"]
    expected = content(tmp_path / "whole")
    assert set(expected) == {"data/manifest.json", "data/lengths.png", "data/shard-00000.arrow"}
    said = []
    for number, moment in enumerate(moments):
        folder = tmp_path / f"killed-{number}"
        killed = run(folder, arguments, seconds=moment * whole["seconds"])
        assert killed["code"] in (-9, 0), killed["output"]  # 0: it was done before the moment came
        again = run(folder, arguments)
        assert again["code"] == 0, again["output"]
        assert content(folder) == expected, f"killed after {moment:.1%} of {whole['seconds']:.2f} s"
        said.append(again["output"])
    return said


def spread(count: int, seed: int) -> list[float]:
    """Random moments, one in each of equal parts of the whole, the last of them just at its end."""
    rng = random.Random(seed)
    return [*((n + rng.random()) / (count - 1) for n in range(count - 1)), rng.uniform(0.97, 1.0)]


@pytest.mark.parametrize("dedup", [pytest.param("none", marks=pytest.mark.slow), "near"])
def test_killed_at_6_moments_and_run_again_it_gives_the_same_bytes(
    run: Run, tmp_path: Path, dedup: str
) -> None:
    arguments = [*write_inputs(tmp_path / "in", characters=400_000, chats=300), "--dedup", dedup]
    if dedup == "near":
        copy = (tmp_path / "in" / "a.txt").read_text().replace("\n\n", "\n\nAnother line. ", 9)
        (tmp_path / "in" / "copy.txt").write_text(copy)
        arguments.insert(1, str(tmp_path / "in" / "copy.txt"))
    said = kill_and_run_again(run, tmp_path, arguments, spread(6, seed=1))
    if dedup == "near":
        duplicates = read_manifest(tmp_path / "whole" / "data").meta["duplicates"]
        assert [row["near"] for row in duplicates["inputs"]] == [0, 1, 0, 0]
    assert any("continuing: " in output for output in said)


@pytest.mark.slow
def test_killed_at_30_moments_and_run_again_it_gives_the_same_bytes(tmp_path: Path) -> None:
    arguments = write_inputs(tmp_path / "in", characters=8_000_000, chats=3000)
    said = kill_and_run_again(in_new_process, tmp_path, arguments, spread(30, seed=2))
    assert any("continuing: " in output for output in said)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_a_change_on_disk_it_gives_the_same_bytes(run: Run, tmp_path: Path, step: int) -> None:
    arguments = write_inputs(tmp_path / "in", characters=6000, chats=3)
    whole = run(tmp_path / "whole", arguments)
    assert whole["code"] == 0, whole["output"]
    expected = content(tmp_path / "whole")
    for event in range(0, whole["events"], step):
        folder = tmp_path / f"killed-{event}"
        assert run(folder, arguments, event=event)["code"] == -9
        again = run(folder, arguments)
        assert again["code"] == 0, again["output"]
        assert content(folder) == expected, f"killed before change {event} of {whole['events']}"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path / "in", characters=60_000, chats=3)


@pytest.fixture
def expected(run: Run, tmp_path: Path, arguments: list[str]) -> dict[str, bytes]:
    """What it makes when nothing happens."""
    assert run(tmp_path / "whole", arguments)["code"] == 0
    return content(tmp_path / "whole")


def test_ctrl_c_says_what_is_kept_and_the_same_command_continues(
    run: Run, tmp_path: Path, arguments: list[str], expected: dict[str, bytes]
) -> None:
    stopped = run(tmp_path / "stopped", arguments, event=30, interrupt=True)
    assert stopped["code"] == 130
    assert "% of the text is tokenized already\n  The same command continues from there" in stopped["output"]
    assert list((tmp_path / "stopped").iterdir()) == [tmp_path / "stopped" / ".unfinished-data"]
    again = run(tmp_path / "stopped", arguments)
    assert again["output"].startswith("continuing: ")
    assert content(tmp_path / "stopped") == expected


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    run: Run, tmp_path: Path, arguments: list[str], expected: dict[str, bytes]
) -> None:
    told = []
    for _ in range(4):
        killed = run(tmp_path / "killed", arguments, event=16)
        assert killed["code"] == -9
        told.append(re.findall(r"continuing: (\d+)%", killed["output"]))
    assert told[0] == []
    shares = [int(share) for [share] in told[1:]]
    assert shares == sorted(set(shares))  # each goes on where the one before it was
    assert run(tmp_path / "killed", arguments)["code"] == 0
    assert content(tmp_path / "killed") == expected


@pytest.mark.parametrize("damage", ["flipped", "cut off", "empty", "of another text"])
def test_damaged_tokens_are_made_again(
    run: Run, tmp_path: Path, arguments: list[str], expected: dict[str, bytes], damage: str
) -> None:
    run(tmp_path / "killed", arguments, event=30)
    first, second, *_ = sorted((tmp_path / "killed" / ".unfinished-data").glob("*.tokens"))
    data = bytearray(first.read_bytes())
    data[-5] ^= 1
    made = {"flipped": data, "cut off": data[:-1], "empty": b"", "of another text": second.read_bytes()}
    first.write_bytes(made[damage])
    again = run(tmp_path / "killed", arguments)
    assert "1 damaged file of the interrupted prepare was made again" in again["output"]
    assert content(tmp_path / "killed") == expected


def test_tokens_of_other_settings_are_removed_and_it_says_so(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    run(tmp_path / "killed", arguments, event=30)
    other = [*arguments, "--max-length", "2k"]
    again = run(tmp_path / "killed", other)
    assert "left for data is removed: it was begun with other settings" in again["output"]
    assert "continuing" not in again["output"]
    run(tmp_path / "other", other)
    assert content(tmp_path / "killed") == content(tmp_path / "other")


def test_tokens_of_another_tokenizer_are_removed_and_it_says_so(
    run: Run, tmp_path: Path, arguments: list[str], tiny_tokenizer_folder: Path
) -> None:
    model = shutil.copytree(tiny_tokenizer_folder, tmp_path / "model")
    arguments = [*arguments, "--model", str(model)]
    run(tmp_path / "killed", arguments, event=30)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, model / name)
    again = run(tmp_path / "killed", arguments)
    assert "left for data is removed: it was begun with other tokenizer" in again["output"]
    run(tmp_path / "other", arguments)
    assert content(tmp_path / "killed") == content(tmp_path / "other")


def test_tokens_of_another_input_are_removed_and_it_says_so(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    run(tmp_path / "killed", arguments, event=30)
    (tmp_path / "in" / "b.txt").write_text("Another book.")
    again = run(tmp_path / "killed", arguments)
    assert "left for data is removed: it was begun with other inputs" in again["output"]
    run(tmp_path / "other", arguments)
    assert content(tmp_path / "killed") == content(tmp_path / "other")


def test_a_text_changed_without_a_trace_in_size_and_time_is_tokenized_again(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    run(tmp_path / "killed", arguments, event=60)
    book = tmp_path / "in" / "a.txt"
    before = book.stat()
    book.write_text(book.read_text().replace("river", "RIVER"))
    os.utime(book, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(tmp_path / "killed", arguments)["output"].startswith("continuing: ")
    run(tmp_path / "other", arguments)
    assert content(tmp_path / "killed") == content(tmp_path / "other")


def test_faulty_inputs_leave_nothing_even_after_a_kill(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    with (tmp_path / "in" / "c.jsonl").open("a") as file:
        file.write("{\n")
    assert run(tmp_path / "killed", arguments, event=20)["code"] == -9
    assert run(tmp_path / "killed", arguments)["code"] == 2
    assert list((tmp_path / "killed").iterdir()) == []


def test_a_second_process_for_the_same_folder_is_refused(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    with workspace(tmp_path / "held" / "data"):
        refused = run(tmp_path / "held", arguments)
    assert refused["code"] == 2
    assert "in use by another longlora process" in refused["output"]
