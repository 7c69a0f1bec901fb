"""The benchmark of 256K: what is held out stays apart, phases go on, rows and aims are those of the folders."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
BOOK = FOLDER.parent / "longlora_cli" / "models" / "builtin" / "book.txt"
ORIGIN = {"machine": "M", "commit": "c", "command": "x"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark's module by its name; modules beside it can be imported by it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def by_name(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six books to learn, three held out, four meetings, six conversations, a manual: all of the embedded book."""
    folder = tmp_path_factory.mktemp("sources")
    text = BOOK.read_text(encoding="utf-8")
    (folder / "books").mkdir()
    names = ["a", "b", "c", "d", "e", "f", "moby-dick", "jane-eyre", "the-wealth-of-nations"]
    for number, name in enumerate(names):
        (folder / "books" / f"{name}.txt").write_text(text[number * 30_000 :][:30_000])
    meetings = [
        {
            "id": f"m{n}",
            "split": "val" if n % 2 else "train",
            "context": f"Ann: {text[300_000 + n * 3000 :][:1500]}",
            "questions": [{"input": "What did they say?", "answers": ["They spoke of it."]}],
        }
        for n in range(4)
    ]
    write_lines(folder / "meetings.jsonl", meetings)
    talk = "USER: Hello {n}, how are you? \n ASSISTANT: I am well. Ask me: anything. \n USER: No. \n ASSISTANT: Good."
    write_lines(folder / "chats.jsonl", [{"conversation": talk.format(n=n)} for n in range(6)])
    (folder / "manuals").mkdir()
    (folder / "manuals" / "x.md").write_text(text[400_000:][:6000])
    return folder


def options(load: Any, sources: Path, work: Path, *more: str) -> argparse.Namespace:
    words = ["builtin", str(sources / "books"), str(work), str(work.parent / "rows.jsonl")]
    words += ["--meetings", str(sources / "meetings.jsonl"), "--chats", str(sources / "chats.jsonl")]
    words += ["--manuals", str(sources / "manuals"), "--commit", "c", "--machine", "M", *more]
    found: argparse.Namespace = load("smollm2_extension").read_options(words)
    found.deadline = float("inf")
    return found


def test_no_text_that_is_asked_about_is_trained_on(load: Any, sources: Path, tmp_path: Path) -> None:
    load("smollm2_extension").make_data(options(load, sources, tmp_path))
    trained = {path.name: path.read_text() for path in (tmp_path / "train").rglob("*.*")}
    assert sorted(name for name in trained if name.endswith(".txt")) == [f"{c}.txt" for c in "abcdef"]
    learnt = "\n".join(trained.values())
    held = list((tmp_path / "held").rglob("*.txt"))
    assert {path.parent.name for path in held} == {"books", "meetings", "manuals", "chats"}
    for path in held:
        assert json.dumps(path.read_text())[1:-1][:300] not in learnt
    rows = [json.loads(line) for line in (tmp_path / "train" / "chats.jsonl").read_text().splitlines()]
    assert len(rows) == 4  # every third conversation is held out
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"] * 2
    assert rows[0]["messages"][1]["content"] == "I am well. Ask me: anything."


def test_the_right_choice_is_the_sentence_that_follows(load: Any) -> None:
    data = load("extension_data")
    text = " ".join(f"This is the sentence number {n} of a long enough row of them." for n in range(40))
    rows = data.choices({"books": [text]}, each=10)
    assert len(rows) == 10
    for row in rows:
        last = int(row["context"].split("number ")[-1].split()[0])
        assert (
            row["choices"][row["answer"]]
            == f"This is the sentence number {last + 1} of a long enough row of them."
        )
        assert len(set(row["choices"])) == 4
    assert len({row["answer"] for row in rows}) > 1


def test_parts_of_an_adapter_put_together_are_the_adapter_and_a_damaged_one_is_refused(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("extension_data")
    monkeypatch.setattr(data, "_PART_BYTES", 7000)
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    content = bytes(range(256)) * 90
    (adapter / "weights").write_bytes(content)
    parts = data.pack([adapter], tmp_path / "packed")
    assert len(parts) > 3
    assert max(path.stat().st_size for path in parts) == 7000
    data.unpack(tmp_path / "packed", tmp_path / "there")
    assert (tmp_path / "there" / "adapter" / "weights").read_bytes() == content
    parts[1].write_bytes(b"x")
    with pytest.raises(ValueError, match="part01 is missing or damaged"):
        data.unpack(tmp_path / "packed", tmp_path / "again")


def test_transformers_alone_answer_as_without_a_cache(
    load: Any, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    text, generator = list(range(3, 60)), torch.Generator().manual_seed(0)
    asked = [torch.randint(3, 300, (5,), generator=generator).tolist() for _ in range(3)]
    rows = [{"prompt": text + ids, "references": ["x"], "depth": n} for n, ids in enumerate(asked)]
    questions, out = write_lines(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    words = ["plain_answers.py", str(tiny_model_folder), str(questions), str(out), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [*words, "--new-tokens", "6"])
    plain = load("plain_answers")
    plain.main()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    reader = plain.Reader(model, set())
    for row in rows:
        ids = list(row["prompt"])
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert reader.answer(row["prompt"], 6) == ids[-6:]
    assert [json.loads(line)["depth"] for line in out.read_text().splitlines()] == [0, 1, 2]


def test_stages_and_the_evaluation_after_them_fit_their_minutes(
    load: Any, sources: Path, tmp_path: Path
) -> None:
    found = load("smollm2_extension").estimate(options(load, sources, tmp_path))
    assert sum(found[f"train-{stage}"][0] for stage in ("64k", "128k", "256k")) < 25 * 60
    assert sum(found[kind][0] for kind in ("grid", "tasks", "short")) < 15 * 60


def test_the_estimate_gives_the_figures_that_it_was_made_from(load: Any) -> None:
    rows = load("extension_rows")
    assert rows.read_seconds(131_072) == pytest.approx(3.46)
    assert rows.step_seconds(131_072, 131_072) == pytest.approx(4.54)
    # 88,283 tokens a second at 32K were measured, 0.371 s; attention as the square of 128K's gives 0.38.
    assert rows.step_seconds(32_768, 32_768) == pytest.approx(0.371, rel=0.05)


STAGES = {"64k": 768, "128k": 1024, "256k": 1280}
TRAIN = {"64k": "  rope: theta\n  rope_theta: 400000\n  lora_rank: 4\n  also_train: norms\n"}
EVAL = """eval:
  tasks: [ppl, needle]
  window: 1280
  stride: 1280
  max_tokens: 2560
  short_context: 256
  lengths: [512, 1k]
  depths: 2
  samples: 2
  needle_facts: 4
  needle_wording: eval
  max_new_tokens: 8
  beyond: true
"""
CHATS = "  synthetic_facts: 4\n  synthetic_questions: 2\n"


def write_recipes(folder: Path) -> None:
    """The shipped recipes' shape at lengths of the embedded model."""
    folder.mkdir()
    for stage, length in STAGES.items():
        prepare = f"prepare:\n  max_length: {length}\n  synthetic: [needle=3, common-words=1]\n{CHATS}"
        train = f"train:\n  max_length: {length}\n{TRAIN.get(stage, '')}  steps: 2\n  save_every: 1\n"
        ending = EVAL if stage == "256k" else ""
        (folder / f"smollm2-135m-{stage}.yaml").write_text(prepare + train + ending)
    short = "prepare:\n  max_length: 768\n  on_long: drop\n  synthetic: [needle=3, register=1]\n"
    (folder / "smollm2-135m-short.yaml").write_text(f"{short}  synthetic_length: 640\n{CHATS}")


@pytest.mark.slow
def test_three_stages_reach_their_length_and_the_merged_model_answers_alike_without_longlora(
    load: Any, sources: Path, tmp_path: Path
) -> None:
    write_recipes(tmp_path / "recipes")
    module, work = load("smollm2_extension"), tmp_path / "work"
    words = ["builtin", str(sources / "books"), str(work), str(tmp_path / "rows.jsonl")]
    words += ["--meetings", str(sources / "meetings.jsonl"), "--chats", str(sources / "chats.jsonl")]
    words += ["--manuals", str(sources / "manuals"), "--commit", "c", "--machine", "M"]
    words += ["--recipes", str(tmp_path / "recipes"), "--plain-length", "1024", "--plain-samples", "2"]
    words += ["--dtype", "float32", "--only"]
    trained = [f"train-{stage}" for stage in STAGES]
    module.main([*words, "data", "prepare", "base-grid", *trained, "merge", "grid", "plain", "report"])
    for stage, length in STAGES.items():
        record = json.loads((work / f"run-{stage}" / "adapter" / "longlora.json").read_text())
        assert record["base"] == "builtin"
        assert record["context_length"] == record["rope"]["max_position_embeddings"] == length
    merged = json.loads((work / "merged" / "config.json").read_text())
    assert merged["max_position_embeddings"] == STAGES["256k"]
    assert merged["rope_theta"] == 400_000.0
    rows = {
        (r["stack"], r["metric"], r.get("variant"), r["seq"]): r
        for r in load("results").read_rows(tmp_path / "rows.jsonl")
    }
    plain = rows["longlora", "same_answers", "merged, plain transformers", 1024]
    assert plain["n"] == 4
    assert (
        plain["value"] >= 0.75
    )  # merged weights are bf16 here and fp32 in the run: a near-tie may fall otherwise
    assert {("longlora", "needle", None, 512), ("base", "needle", None, 1024)} <= rows.keys()
    assert rows["longlora", "train_seconds", "all stages", None]["value"] > 0
    assert "per cent right before → after" in (work / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    module.main([*words, *trained, "merge", "pack", "unpack"])
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())  # nothing was made again
    assert (work / "adapter" / "longlora.json").is_file()


def finished(folder: Path, tasks: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"tasks": tasks}))


def cell(length: int, score: float, n: int = 20) -> dict[str, Any]:
    return {"length": length, "score": score, "n": n, "ci95": [max(0.0, score - 0.1), min(1.0, score + 0.1)]}


def bucket(begin: int, end: int, perplexity: float) -> dict[str, Any]:
    more = {"gain": 0.1, "gain_ci95": [0.0, 0.2]} if begin >= 2048 else {}
    return {"from": begin, "to": end, "perplexity": perplexity, "n": 9, "ci95": [1.0, 99.0]} | more


def test_rows_and_aims_are_those_of_the_folders(load: Any, sources: Path, tmp_path: Path) -> None:
    module, results = load("smollm2_extension"), load("results")
    work = tmp_path / "work"
    for ending, score, near in (("", 0.99, 20.2), ("-base", 0.1, 20.0)):
        curve = [bucket(1024, 2048, 21.0), bucket(2048, 4096, 20.0), bucket(4096, 8192, 20.5)]
        ppl = {"by_position": curve, "short_context": 2048}
        finished(
            work / f"grid{ending}",
            {"needle": {"lengths": [cell(4096, score), cell(262_144, score)]}, "ppl": ppl},
        )
        finished(
            work / f"ruler-0{ending}",
            {
                "vt": {"lengths": [cell(4096, 0.5), cell(32_768, score / 2)]},
                "niah_multikey_1": {"lengths": [cell(131_072, 0.5, n=2)]},
                "cwe": {"lengths": [cell(262_144, 0.3, n=1) | {"ci95": None}]},
            },
        )
        ppl = {"perplexity": near, "ci95": [19.0, 21.0], "n": 5, "window": 2048}
        finished(work / f"short-manuals{ending}", {"ppl": ppl})
        finished(work / f"qmsum{ending}", {"qmsum.all": {"score": 0.2, "n": 64, "ci95": [0.1, 0.3]}})
    finished(work / "multikey-0", {"niah_multikey_1": {"lengths": [cell(131_072, 0.9, n=7)]}})
    rows = module.collect(options(load, sources, work))
    results.add_rows(rows, tmp_path / "rows.jsonl")
    assert results.read_rows(tmp_path / "rows.jsonl") == rows
    keys = [(r["stack"], r["metric"], r.get("variant"), r["seq"]) for r in rows]
    assert len(keys) == len(set(keys))
    value = {key: row["value"] for key, row in zip(keys, rows, strict=True)}
    assert value["longlora", "ruler", "niah_multikey_1", 131_072] == 0.9  # of the more questions
    assert value["base", "ruler", "niah_multikey_1", 131_072] == 0.5
    assert value["longlora", "ruler", None, 32_768] == pytest.approx(0.495)
    assert value["longlora", "gain", None, 4096] == 0.1
    assert ("longlora", "gain", None, 2048) not in value
    assert value["base", "qmsum_rouge_l", None, None] == 0.2
    assert value["base", "ruler", "cwe", 262_144] == 0.3
    said = load("extension_rows").aims(rows)
    assert "needle: at least 99.0%, at 4,096 (aim 99 % at every length)" in said
    assert "niah_multikey_1 at 131,072: 90.0% (aim 90 %)" in said
    assert "perplexity by position: rises up to 8,192 (aim: never)" in said
    assert "perplexity of the first 2K, manuals: +1.0 % (aim within 2 %)" in said
    assert "RULER-style at 32K: 49.5%, base at 4K 50.0% (aim above)" in said


def test_plain_answers_to_other_questions_are_refused(load: Any, tmp_path: Path) -> None:
    (tmp_path / "grid" / "samples").mkdir(parents=True)
    row = {"sample_hash": "a", "depth": 0.5, "prediction": " 7", "length": 64}
    write_lines(tmp_path / "grid" / "samples" / "needle.jsonl", [row])
    answer = row | {"prediction": "7", "right": True}
    rows = load("extension_rows").plain_rows(write_lines(tmp_path / "p", [answer]), tmp_path / "grid", {})
    assert [(r["metric"], r["value"], r["seq"]) for r in rows] == [
        ("needle", 1.0, 64),
        ("same_answers", 1.0, 64),
    ]
    write_lines(tmp_path / "p", [answer, answer | {"sample_hash": "b"}])
    with pytest.raises(ValueError, match="1 of 2 questions"):
        load("extension_rows").plain_rows(tmp_path / "p", tmp_path / "grid", {})


def test_what_runs_when_the_minutes_are_over_is_asked_to_save_and_the_rest_is_not_begun(
    load: Any, sources: Path, tmp_path: Path
) -> None:
    module = load("smollm2_extension")
    saves = (
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n    pathlib.Path('{out}').write_text('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('{out}.begun').touch()\ntime.sleep(60)\n"
    )
    jobs = {name: [sys.executable, "-c", saves.format(out=tmp_path / name)] for name in ("first", "second")}
    asked = options(load, sources, tmp_path)
    asked.deadline = 0.0
    original = module.time.sleep

    def until_it_has_begun(seconds: float) -> None:
        while not (tmp_path / "first.begun").exists():
            original(0.05)

    module.time = argparse.Namespace(sleep=until_it_has_begun, monotonic=module.time.monotonic)
    with pytest.raises(module.Stopped, match="first, second to go on"):
        module.run_all(asked, jobs, most=1)
    assert (tmp_path / "first").read_text() == "saved"
    assert not (tmp_path / "second.begun").exists()


def test_every_method_has_flags_that_train_accepts_and_a_folder_of_its_own(load: Any, tmp_path: Path) -> None:
    from longlora_cli.config import TrainConfig

    module = load("extension_methods")
    asked = module.read_options(["builtin", "b", str(tmp_path), "rows", "--commit", "c", "--machine", "M"])
    found = module.methods(asked)
    assert len({module.folder_name(name) for name in found}) == len(found) == 9
    for name in found:
        words = module.train_flags(asked, name)
        values = {
            flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        config = TrainConfig(**{**values, "data": [values["data"]], "out": "o"})
        assert config.max_length == 32_768
        assert (config.lora_rank, config.learning_rate) == (64, 8e-4)


def test_a_method_gets_the_steps_that_its_own_step_time_allows(load: Any, tmp_path: Path) -> None:
    rows = [{"tokens_per_second": 1, "seconds": 9.0}] * 3 + [
        {"tokens_per_second": 1, "seconds": s} for s in (1, 3)
    ]
    write_lines(tmp_path / "metrics.jsonl", [{"epoch": 1}, *rows])
    module = load("extension_methods")
    assert module.affordable_steps(tmp_path, 20) == 10
    assert module.affordable_steps(tmp_path, 0.1) == 1


def test_methods_stand_in_one_table(load: Any, tmp_path: Path) -> None:
    module, results = load("extension_methods"), load("results")
    curve = [{"to": 8192, "perplexity": 30.0, "n": 5}, {"to": 32_768, "perplexity": 26.5, "n": 9}]
    for name, score in (("theta", 0.75), ("LoRA alone", 0.5)):
        folder = tmp_path / module.folder_name(name)
        folder.mkdir()
        write_lines(folder / "metrics.jsonl", [{"tokens_per_second": 1, "seconds": 2.0}] * 7)
        tasks = {
            "needle": {"lengths": [cell(8192, score), cell(32_768, score / 2)]},
            "ppl": {"by_position": curve},
        }
        finished(tmp_path / f"{module.folder_name(name)}-eval", tasks)
    rows = [row for name in ("theta", "LoRA alone") for row in module.rows_of(tmp_path, name, ORIGIN)]
    results.add_rows(rows, tmp_path / "rows.jsonl")
    assert results.read_rows(tmp_path / "rows.jsonl") == rows
    assert module.table(rows) == [
        "| method | steps | 8,192 | 32,768 | perplexity at the end |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| theta | 7 | 75% | 38% | 26.50 |",
        "| LoRA alone | 7 | 50% | 25% | 26.50 |",
    ]
