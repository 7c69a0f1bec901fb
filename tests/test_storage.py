"""Whole artifacts, or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longlora_cli.errors import IntegrityError, NotFoundError, ResourceError, SettingsError
from longlora_cli.storage import (
    append_json_line,
    atomic_folder,
    folder_lock,
    is_artifact,
    read_json_lines,
    remove_staging,
    verify_folder,
    write_json,
)


def make(folder: Path) -> Path:
    with atomic_folder(folder, "dataset", {"rows": 2}) as staging:
        (staging / "a.txt").write_text("alpha")
        (staging / "deep").mkdir()
        (staging / "deep" / "b.txt").write_text("beta")
    return folder


def test_a_committed_folder_verifies_and_keeps_its_facts(tmp_path: Path) -> None:
    manifest = verify_folder(make(tmp_path / "x"), "dataset")
    assert manifest.meta == {"rows": 2}
    assert sorted(manifest.files) == ["a.txt", "deep/b.txt"]


def test_a_failure_inside_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "x", "dataset") as staging:
            (staging / "a.txt").write_text("alpha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(SettingsError, match="exists already"), atomic_folder(tmp_path / "x", "dataset"):
        pytest.fail("the body ran")


def test_a_folder_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    (make(tmp_path / "x") / "manifest.json").unlink()
    assert not is_artifact(tmp_path / "x")
    with pytest.raises(NotFoundError):
        verify_folder(tmp_path / "x", "dataset")


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "grown"])
def test_damage_is_found_and_the_file_is_named(tmp_path: Path, damage: str) -> None:
    victim = make(tmp_path / "x") / "deep" / "b.txt"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_text({"truncated": "bet", "flipped": "betA", "grown": "beta!"}[damage])
    with pytest.raises(IntegrityError, match=r"deep/b\.txt"):
        verify_folder(tmp_path / "x", "dataset")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is a dataset, not a adapter"):
        verify_folder(make(tmp_path / "x"), "adapter")


def test_a_damaged_manifest_is_an_error_not_a_crash(tmp_path: Path) -> None:
    (make(tmp_path / "x") / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        verify_folder(tmp_path / "x", "dataset")


KILLED = """
import sys, time
from pathlib import Path
from longlora_cli.storage import atomic_folder
with atomic_folder(Path(sys.argv[1]) / "x", "dataset") as staging:
    (staging / "a.txt").write_text("alpha")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "x").exists()
    assert len(list(tmp_path.iterdir())) == 1  # the staging folder, until the next owner cleans up
    remove_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from longlora_cli.errors import ResourceError
from longlora_cli.storage import atomic_folder
try:
    with atomic_folder(Path(sys.argv[1]) / "x", "dataset") as staging:
        (staging / "a.txt").write_bytes(b"0" * 5000)
except ResourceError as error:
    print(error.message)
"""


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert "the disk is full" in out.stdout
    assert list(tmp_path.iterdir()) == []
    assert issubclass(ResourceError, Exception)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"a": 1})
    write_json(tmp_path / "f.json", {"a": 2})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["f.json"]


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "f.json", {"a": float("nan")})
    assert not (tmp_path / "f.json").exists()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"a": 1})
    append_json_line(path, {"a": 2}, sync=True)
    with path.open("ab") as file:
        file.write(b'{"a": 3')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]


HOLDER = """
import sys, time
from pathlib import Path
from longlora_cli.storage import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(SettingsError, match="in use"), folder_lock(tmp_path):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    time.sleep(0.05)
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").exists()
