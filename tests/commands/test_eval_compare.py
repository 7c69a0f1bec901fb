"""`longlora eval --compare`: with a model after measuring, without one on two finished folders."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from longlora_cli.cli import main
from longlora_cli.commands import eval as command
from longlora_cli.errors import SettingsError
from longlora_cli.options import resolve

WORDS = [
    "river",
    "mill",
    "wind",
    "stone",
    "quiet",
    "walked",
    "slept",
    "under",
    "bridge",
    "they",
    "time",
    "worst",
]


def run(capsys, *words):
    """Exit code, the JSON object, standard error."""
    measures = ["--beyond"] if "--model" in words else []
    with pytest.raises(SystemExit) as left:
        main(["eval", *map(str, words), *measures, "--json"])
    shown = capsys.readouterr()
    return int(left.value.code or 0), json.loads(shown.out), shown.err


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(
        " ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(200))
    )
    return path


@pytest.fixture
def measuring(tiny_model_folder, book):
    """Words that measure perplexity and a grid of passkeys."""
    words = ["--model", tiny_model_folder, "--tasks", "ppl,passkey", "--data", book, "--haystack", book]
    words += ["--window", 32, "--max-tokens", 200, "--lengths", "96,128", "--depths", 2, "--samples", 3]
    return [*words, "--max-new-tokens", 3, "--device", "cpu"]


@pytest.fixture
def first(measuring, tmp_path, capsys):
    """A finished evaluation."""
    assert run(capsys, *measuring, "--out", tmp_path / "first")[0] == 0
    return tmp_path / "first"


def test_a_fresh_run_compared_with_its_like_differs_by_nothing(measuring, first, tmp_path, capsys):
    code, found, _ = run(capsys, *measuring, "--out", tmp_path / "second", "--compare", first)
    assert code == 0
    cells = found["comparison"]["cells"]
    assert {(c["task"], c["score"], c["length"]) for c in cells} == {
        ("ppl", "nll", None),
        *(("passkey", score, length) for score in ("score", "contains") for length in (None, 96, 128)),
    }
    assert all((c["difference"], c["p"], c["p_holm"]) == (0.0, 1.0, 1.0) for c in cells)
    assert found["comparison"]["tasks"]["passkey"]["pairs"] == 12
    assert found["tasks"]["passkey"]["effective_length"]["ruler"]["threshold"] == 0.856
    stored = json.loads((tmp_path / "second" / "results.json").read_text())
    assert stored == {k: v for k, v in found.items() if k not in ("out", "comparison")}
    # The finished folders say the same without the model.
    assert (
        run(capsys, "--out", tmp_path / "second", "--compare", first)[1]["comparison"] == found["comparison"]
    )


def test_finished_folders_are_compared_without_torch_and_nothing_is_written(first, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys\nfrom longlora_cli.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    words = ["eval", "--out", str(first), "--compare", str(first)]
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "0 False False"
    assert sorted(tmp_path.rglob("*")) == before
    parts = [
        "passkey: score (McNemar; by text",
        "ppl: nll",
        "+0.000",
        "[0.00, 0.00]",
        "ratio 1.0000",
        "12 pairs in 6",
    ]
    for part in [*parts, "0 of 7 differences are below 5 % after Holm's"]:
        assert part in shown.stdout


def test_a_dry_run_checks_and_writes_nothing(measuring, first, tmp_path, capsys):
    code, found, _ = run(capsys, *measuring, "--out", tmp_path / "second", "--compare", first, "--dry-run")
    assert (code, found["tasks"]["passkey"]["samples"]) == (0, 12)
    assert not (tmp_path / "second").exists()
    code, found, _ = run(capsys, "--out", first, "--compare", first, "--dry-run")
    assert (code, found["dry_run"], len(found["comparison"]["cells"])) == (0, True, 7)


def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(
    measuring, first, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    fresh = ["--out", tmp_path / "second"]
    no_folder, damaged = tmp_path / "none", tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    cases = [
        ([*measuring, *fresh, "--compare", no_folder], 3, f"there is no evaluation {no_folder}"),
        ([*measuring, *fresh, "--compare", damaged], 4, "is damaged"),
        (["--out", no_folder, "--compare", first], 3, f"there is no evaluation {no_folder}"),
        (["--out", first, "--compare", no_folder], 3, f"there is no evaluation {no_folder}"),
        (
            ["--out", first, "--compare", first, "--lengths", "96"],
            2,
            "--lengths has no effect here: without --model",
        ),
        ([*measuring[:2], "--tasks", "needle", *fresh, "--compare", first], 4, "needle is not in"),
        (
            [*measuring[:2], "--tasks", "ppl", "--window", "64", *fresh, "--compare", first],
            4,
            "ppl: measured with --window 64 and 32, --stride 32 and 16",
        ),
    ]
    for words, code, message in cases:
        found = run(capsys, *words)
        assert (found[0], found[1]["exit_code"]) == (code, code), words
        assert message in found[1]["error"]
        assert "\n" not in found[1]["error"]
    assert not (tmp_path / "second").exists()


def test_rows_without_a_partner_are_said_in_the_terminal(measuring, first, tmp_path, capsys):
    words = [*measuring[:2], "--tasks", "passkey", *measuring[6:8], "--lengths", "128,160", *measuring[14:]]
    with pytest.raises(SystemExit) as left:
        main(
            ["eval", *map(str, words), "--beyond", "--out", str(tmp_path / "second"), "--compare", str(first)]
        )
    shown = capsys.readouterr()
    assert left.value.code == 0
    assert "passkey: without a partner 6 of A (length 160 depth 1.0 sample 0" in shown.err
    assert "6 of B (length 96 depth 1.0 sample 0" in shown.err
    assert "--lengths 128,160 and 96,128" in shown.err
    assert "ppl is left out: only in" in shown.err
    assert "effective length (85.6 % right): below 128" in shown.out


def test_another_threshold_for_the_effective_length_is_a_setting(measuring, tmp_path, capsys):
    words = [*measuring, "--out", tmp_path / "o", "--effective-score", "0.5"]
    effective = run(capsys, *words)[1]["tasks"]["passkey"]["effective_length"]
    assert effective["ruler"]["threshold"] == 0.005
    with pytest.raises(SettingsError, match="--effective-score has no effect"):
        resolve("eval", {"out": str(tmp_path / "p"), "tasks": ["ppl"], "effective_score": "50"})
