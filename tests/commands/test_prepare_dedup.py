"""`longlora prepare --dedup` as a user runs it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.cli import main
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.storage import read_manifest

WORDS = [
    f"{a}{b}" for a in ("ri", "mo", "ta", "le", "shu", "fen") for b in ("ver", "ss", "ble", "nt", "d", "x")
]


def text(seed: int, paragraphs: int = 20) -> str:
    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=40)) + "." for _ in range(paragraphs))


def with_another_paragraph(whole: str, number: int) -> str:
    parts = whole.split("\n\n")
    parts[number] = text(999 + number, 1)
    return "\n\n".join(parts)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Three texts, one of them again with other line ends, one again with a changed paragraph."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name, content in {
        "a": text(1),
        "b": text(2),
        "c": text(1).replace("\n", "\r\n"),
        "d": with_another_paragraph(text(2), 5),
        "e": text(3),
    }.items():
        (folder / f"{name}.txt").write_bytes(content.encode())
    return folder


def prepare(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *map(str, arguments)])
    return int(caught.value.code or 0)


def prepared(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    code = prepare(*arguments, "--json")
    output = capsys.readouterr()
    assert code == 0, output.err
    content: dict[str, Any] = json.loads(output.out)
    return content


def rows(path: Path, *content: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize(("mode", "stay"), [("none", 5), ("exact", 4), ("near", 3)])
def test_what_is_left_out_is_not_in_the_chunks(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, stay: int
) -> None:
    summary = prepared(capsys, books, "--dedup", mode, "-o", tmp_path / "data")
    assert summary["documents"] == stay
    assert summary["tokens"] == sum(len(chunk.input_ids) for chunk in ChunkDataset.open(tmp_path / "data"))
    if mode == "near":
        (books / "c.txt").unlink()
        (books / "d.txt").unlink()
        alone = prepared(capsys, books, "-o", tmp_path / "alone")
        shard = "shard-00000.arrow"
        assert (tmp_path / "data" / shard).read_bytes() == (tmp_path / "alone" / shard).read_bytes()
        assert "duplicates" not in alone


def test_summary_and_manifest_say_how_much_was_left_out_of_which_input(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(text(3))
    summary = prepared(capsys, books, copy, "--dedup", "near", "-o", tmp_path / "data")
    sizes = {name: len((books / f"{name}.txt").read_text()) for name in "acde"}
    found = summary["duplicates"]
    assert found["inputs"] == [
        {
            "input": str(books),
            "documents": 2,
            "of_documents": 5,
            "exact": 1,
            "near": 1,
            "characters": sizes["a"] + sizes["d"],
        },
        {
            "input": str(copy),
            "documents": 1,
            "of_documents": 1,
            "exact": 1,
            "near": 0,
            "characters": sizes["e"],
        },
    ]
    assert {name: found[name] for name in ("mode", "threshold", "documents", "exact", "near")} == {
        "mode": "near",
        "threshold": 0.8,
        "documents": 3,
        "exact": 2,
        "near": 1,
    }
    assert found["characters"] == sizes["a"] + sizes["d"] + sizes["e"]
    assert read_manifest(tmp_path / "data").meta["duplicates"] == found


def test_a_person_reads_what_was_left_out_also_in_a_dry_run(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(books, "--dedup", "near", "-o", tmp_path / "data", "--dry-run") == 0
    output = " ".join(capsys.readouterr().out.split())
    said = "2 of 5 documents are left out as duplicates of earlier ones (1 exact, 1 near; "
    assert said in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books"]
    (books / "c.txt").unlink()
    assert prepare(books, "--dedup", "exact", "-o", tmp_path / "data", "--dry-run") == 0
    assert "No document is a duplicate of an earlier one." in capsys.readouterr().out


def test_the_same_command_twice_is_a_no_op_and_another_threshold_is_not(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (books, "--dedup", "near", "-o", tmp_path / "data")
    first = prepared(capsys, *arguments)
    again = prepared(capsys, *arguments)
    assert again["unchanged"]
    assert again["duplicates"] == first["duplicates"]
    assert prepare(*arguments, "--dedup-threshold", "0.9") == 2
    assert "made with other settings" in capsys.readouterr().err


def test_data_of_another_version_of_the_library_are_not_taken_for_the_commands_own(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode, code in (("near", 2), ("exact", 0)):
        arguments = (books, "--dedup", mode, "-o", tmp_path / mode)
        prepared(capsys, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr("longlora_cli.commands.prepare_again.version", lambda name: "0.4.1")
            assert prepare(*arguments) == code
        assert ("rensa" in capsys.readouterr().err) == (code == 2)


def test_nothing_depends_on_threads_or_the_hash_seed(books: Path, tmp_path: Path) -> None:
    made = []
    for threads in ("1", "3"):
        folder = tmp_path / threads
        folder.mkdir()
        words = [sys.executable, "-m", "longlora_cli", "prepare", books, "--dedup", "near", "--out", "data"]
        own = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([*map(str, words)], check=True, capture_output=True, env=os.environ | own, cwd=folder)
        made.append({path.name: path.read_bytes() for path in (folder / "data").iterdir()})
    assert made[0] == made[1]


def test_shares_of_a_mixture_are_of_what_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    often = rows(tmp_path / "often.jsonl", *[{"text": text(n % 10, 2)} for n in range(100)])
    once = rows(tmp_path / "once.jsonl", *[{"text": text(100 + n, 2)} for n in range(100)])
    plain = prepared(capsys, f"{often}=0.5", f"{once}=0.5", "-o", tmp_path / "plain")
    assert [part["documents"] for part in plain["mixture"]] == [100, 100]
    summary = prepared(capsys, f"{often}=0.5", f"{once}=0.5", "--dedup", "exact", "-o", tmp_path / "data")
    assert [part["of_documents"] for part in summary["mixture"]] == [10, 100]
    assert [part["documents"] for part in summary["mixture"]] == [10, 10]
    assert summary["mixture"][0]["share"] == pytest.approx(0.5, abs=0.02)


def test_a_chat_with_another_question_about_the_same_text_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(question: int, answer: str) -> dict[str, Any]:
        return {"context": text(1), "input": f"Who was at mill {question}?", "answers": answer}

    path = rows(tmp_path / "a.jsonl", row(1, "He."), row(2, "She."), row(1, "He."), row(3, "he"))
    summary = prepared(capsys, path, "--dedup", "near", "-o", tmp_path / "data")
    assert summary["chats"] == 2
    assert summary["duplicates"]["exact"] == summary["duplicates"]["near"] == 1


def test_lines_are_hidden_in_texts_that_stay_only(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("--synthetic", "needle=3", "--synthetic-length", "1k")
    with_copies = prepared(capsys, books, "--dedup", "near", *made, "-o", tmp_path / "data")
    for name in "cd":
        (books / f"{name}.txt").unlink()
    without = prepared(capsys, books, *made, "-o", tmp_path / "alone")
    assert with_copies["synthetic_chats"] == without["synthetic_chats"] == 3
    shard = "shard-00000.arrow"
    assert (tmp_path / "data" / shard).read_bytes() == (tmp_path / "alone" / shard).read_bytes()


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_a_threshold_without_near_duplicates_is_refused(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    assert prepare(books, "--dedup", mode, "--dedup-threshold", "0.9", "-o", tmp_path / "data") == 2
    assert (
        "--dedup-threshold has no effect here: only --dedup near compares by degree"
        in capsys.readouterr().err
    )


def test_faults_are_told_while_duplicates_are_looked_for_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "a.jsonl", *[{"text": text(n, 1)} for n in range(30)])
    path.write_text(path.read_text() + '{"text": \n')
    assert prepare(path, "--dedup", "near", "-o", tmp_path / "new" / "data") == 2
    assert "a.jsonl:31: column 10: not JSON" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
