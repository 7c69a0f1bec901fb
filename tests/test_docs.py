"""Docs are tested: every command line in them is accepted, results.md is made from its rows, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import write_lines

from longlora_cli.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("accelerate launch -m longlora_cli ", "torchrun --nproc_per_node 2 -m longlora_cli ")
MAKE_TARGETS = ("make ", "python ", "git ", "cd ", "pip ")


def command_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(
            r"```(?:bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").split(" # ")[0].strip()
                for launcher in LAUNCHERS:
                    if line.startswith(launcher):
                        line = "longlora " + line.removeprefix(launcher)
                if line.startswith("longlora "):
                    found.append((page.name, line))
    return found


def run(line: str, *more: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*shlex.split(line)[1:], *more])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder where what the docs name exists: texts, chats, prepared data and runs of the embedded model."""
    import os

    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        text = (ROOT / "longlora_cli" / "models" / "builtin" / "book.txt").read_text(encoding="utf-8")
        Path("book.txt").write_text(text[:60_000])
        Path("note.txt").write_text(text[:600])
        Path("books").mkdir()
        for number in range(3):
            Path(f"books/{number}.txt").write_text(text[60_000 + number * 20_000 :][:20_000])
        chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
        Path("chats.jsonl").write_text((json.dumps(chat) + "\n") * 200)
        Path("questions.jsonl").write_text(
            json.dumps({"input": "What is it?", "outputs": ["A test."]}) + "\n"
        )
        benchmark = {"input": "What is it?", "context": "A test.", "answers": ["It."], "length": 2}
        write_lines(Path("benchmarks/hotpotqa.jsonl"), [benchmark])
        pass_key = {
            "id": 0,
            "context": "The key is 7.",
            "input": "What is it?",
            "answer": ["7"],
            "options": [],
        }
        write_lines(Path("benchmarks/passkey.jsonl"), [pass_key])
        write_lines(Path("choices.jsonl"), [{"question": "Which?", "choices": ["a", "b"], "answer": 1}])
        row = {"prediction": "A test.", "references": ["A test."], "task": "hotpotqa"}
        Path("predictions.jsonl").write_text(json.dumps(row) + "\n")
        shutil.copytree(tiny_model_folder, "smollm2")
        for name in ("data", "held-out"):
            assert run(f"longlora prepare note.txt --max-length 128 --out {name} --json") == 0
        assert run("longlora prepare book.txt --max-length 2k --out long-data --json") == 0
        grid = "--tasks passkey --haystack noise --lengths 256 --depths 1 --samples 1 --max-new-tokens 2"
        assert run(f"longlora eval {grid} --out report --json") == 0
        for name, seed in (("run", 0), ("run-a", 0), ("run-b", 1)):
            assert run(f"longlora train --data data --steps 1 --seed {seed} --out {name} --json") == 0
        beacons = "--beacon-ratio 2,4,8 --beacon-window 64 --adapter none"
        assert run(f"longlora train --data long-data {beacons} --steps 1 --out beacon-run --json") == 0
        measure = "--tasks needle --haystack books --lengths 512 --depths 1 --samples 1 --max-new-tokens 2"
        assert run(f"longlora eval --model builtin {measure} --out before --json") == 0
        shutil.copytree("before", "after")
    finally:
        os.chdir(before)
    return folder


# The model that owns `data` in the workspace is the embedded one; a page may name another for the same folder.
def as_in_workspace(line: str) -> list[str]:
    words = shlex.split(line)
    if words[1] == "train" and "--model" in words:
        words[words.index("--model") + 1] = "builtin"
    if words[1] == "eval" and "--model" in words and "--make" not in words:
        words.append("--beyond")  # the workspace's run reads 128 tokens
    if words[1] == "prepare" and any(word.startswith("smollm2-") for word in words):
        words += ["--synthetic", "needle=4"]  # of the recipe's hundreds, which take 17 seconds
    compares = "--compare" in words and "--model" not in words  # its --out exists already
    if "--out" in words and not compares:
        place = words.index("--out") + 1
        words[place] = "somewhere-new" + Path(words[place]).suffix
    return words


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_line_in_docs_is_accepted(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, page: str, line: str
) -> None:
    monkeypatch.chdir(workspace)
    code = run(shlex.join([*as_in_workspace(line), "--dry-run"]) if "--help" not in line else line)
    assert code == 0
    assert not list(Path().glob("somewhere-new*"))


def test_docs_hold_all_five_commands() -> None:
    assert {line.split()[1] for _, line in command_lines()} >= {"prepare", "train", "eval", "chat", "merge"}


def results_module() -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_page_is_made_from_its_rows() -> None:
    results = results_module()
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results.page(results.read_rows())


def test_a_row_without_its_command_is_refused(tmp_path: Path) -> None:
    results = results_module()
    row = {name: "x" for name in results.NEEDED if name != "command"} | {"value": 1}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:1: missing \['command'\]"):
        results.read_rows(tmp_path / "r.jsonl")


def test_measuring_again_replaces_a_row(tmp_path: Path) -> None:
    results = results_module()
    row = dict.fromkeys(results.NEEDED, "x") | {"value": 1, "seq": 8}
    results.add_rows([row], tmp_path / "r.jsonl")
    results.add_rows([row | {"value": 2}], tmp_path / "r.jsonl")
    assert [r["value"] for r in results.read_rows(tmp_path / "r.jsonl")] == [2]


def test_links_between_pages_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if p.name not in navigation] == []
