from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tool_templates import TEMPLATES, tool, tool_chat

from longlora_cli.cli import main
from longlora_cli.config import PrepareConfig
from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.ordering import cost_balance
from longlora_cli.data.synthetic import TASKS
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import read_manifest

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The miller slept."}]
WORDS = ["river", "mill", "secret", "amber", "falcon", "times", "age", "wisdom", "was", "the", "it", "of"]


@pytest.fixture
def model(tiny_tokenizer_folder: Path) -> str:
    return str(tiny_tokenizer_folder)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    rng = random.Random(0)
    joints = [" ", " ", " ", " ", "\n\n"]
    sentences = [f"The {' '.join(rng.choices(WORDS, k=8))}.{joints[n % 5]}" for n in range(300)]
    path = tmp_path / "book.txt"
    path.write_text("".join(sentences))
    return path


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


def left_behind(folder: Path, *expected: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path not in expected]


def test_a_books_chunks_put_together_are_the_book(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    summary = prepared(capsys, book, "-m", model, "-o", out, "--max-length", 128, "--no-pack")
    tokenizer = load_tokenizer(model)
    whole = [*tokenizer(book.read_text())["input_ids"], tokenizer.eos_token_id]
    data = ChunkDataset.open(out, verify=True)
    assert summary["tokens"] == sum(len(data[n]) for n in range(len(data))) == len(whole)
    # The order is shuffled: every piece must be there once, and their tokens are all of the book's.
    pieces = sorted(tuple(data[n].input_ids.tolist()) for n in range(len(data)))
    assert pieces == sorted(tuple(whole[i : i + 128]) for i in range(0, len(whole), 128))


def test_packing_keeps_every_document_whole_and_apart(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"The river {n} ran past the mill{' and past the mill' * (n % 7)}." for n in range(60)]
    source = rows(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    summary = prepared(capsys, source, "-m", model, "-o", tmp_path / "data", "--max-length", 128)
    data = ChunkDataset.open(tmp_path / "data")
    assert len(data) == summary["chunks"] < 60
    assert summary["fill"] > 0.9
    found = []
    for number in range(len(data)):
        chunk = data[number]
        starts = np.cumsum(chunk.document_lengths) - chunk.document_lengths
        assert (chunk.labels[starts] == IGNORE).all()
        assert (chunk.position_ids[starts] == 0).all()
        found += [ids.tolist() for ids in np.split(chunk.input_ids, starts[1:])]
    tokenizer = load_tokenizer(model)
    assert sorted(found) == sorted([*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts)


def test_the_same_command_gives_the_same_bytes(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = rows(tmp_path / "c.jsonl", *({"messages": CHAT} for _ in range(5)))
    common = [book, chats, "-m", model, "--max-length", 512]
    common += ["--synthetic", "needle=4", "--synthetic-facts", 2, "--synthetic-questions", 1]
    for name in ("one", "two"):
        prepared(capsys, *common, "-o", tmp_path / name)
    first, second = [(tmp_path / name / "shard-00000.arrow").read_bytes() for name in ("one", "two")]
    assert first == second
    prepared(capsys, *common, "-o", tmp_path / "three", "--seed", 1)
    assert (tmp_path / "three" / "shard-00000.arrow").read_bytes() != first


def test_only_the_assistants_tokens_of_chats_are_learnt(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "c.jsonl", {"messages": CHAT})
    prepared(capsys, source, "-m", model, "-o", tmp_path / "assistant")
    prepared(capsys, source, "-m", model, "-o", tmp_path / "all", "--labels", "all")
    tokenizer = load_tokenizer(model)
    chunk = ChunkDataset.open(tmp_path / "assistant")[0]
    assert tokenizer.decode(chunk.labels[chunk.labels != IGNORE]) == "The miller slept.<|im_end|>"
    every = ChunkDataset.open(tmp_path / "all")[0]
    assert every.labels.tolist() == [IGNORE, *every.input_ids.tolist()[1:]]


def test_synthetic_chats_are_added_and_counted(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [book, "-m", model, "--max-length", 512, "--no-pack", "--on-long", "drop"]
    options = ["--synthetic-length", 300, "--synthetic-facts", 2, "--synthetic-questions", 1]
    out = tmp_path / "data"
    summary = prepared(capsys, *common, "-o", out, "--synthetic", "needle=12", *options)
    assert (summary["chats"], summary["synthetic_chats"], summary["documents_dropped"]) == (12, 12, 1)
    assert summary["longest_chunk"] <= 300
    data, tokenizer = ChunkDataset.open(out), load_tokenizer(model)
    for number in range(12):
        answer = tokenizer.decode(data[number].labels[data[number].labels != IGNORE])
        assert answer.removesuffix("<|im_end|>") in tokenizer.decode(data[number].input_ids)


def test_the_summary_says_what_was_cut(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = prepared(capsys, book, "-m", model, "-o", tmp_path / "a", "--max-length", 64, "--overlap", 16)
    assert whole["documents_split"] == 1
    assert whole["tokens"] == whole["tokens_read"] + whole["tokens_repeated"]
    common = [book, "-m", model, "--max-length", 64]
    cut = prepared(capsys, *common, "-o", tmp_path / "b", "--on-long", "truncate")
    assert (cut["tokens"], cut["tokens_dropped"]) == (64, cut["tokens_read"] - 64)
    assert sum(bar["pieces"] for bar in cut["histogram"]) == 1


@pytest.mark.parametrize(
    ("setting", "kept"), [("truncate", "[:64]"), ("truncate-left", "[-64:]"), ("truncate-middle", "ends")]
)
def test_truncation_keeps_the_part_that_was_asked_for(
    setting: str, kept: str, book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    prepared(capsys, book, "-m", model, "-o", out, "--max-length", 64, "--on-long", setting)
    tokenizer = load_tokenizer(model)
    whole = [*tokenizer(book.read_text())["input_ids"], tokenizer.eos_token_id]
    expected = {"[:64]": whole[:64], "[-64:]": whole[-64:], "ends": whole[:32] + whole[-32:]}[kept]
    assert ChunkDataset.open(out)[0].input_ids.tolist() == expected


def test_a_stride_is_the_length_less_the_overlap(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [book, "-m", model, "--max-length", 128]
    overlapping = prepared(capsys, *common, "-o", tmp_path / "a", "--overlap", 28)
    striding = prepared(capsys, *common, "-o", tmp_path / "b", "--stride", 100)
    timed = {"out", "seconds", "tokens_per_second"}
    assert {k: v for k, v in striding.items() if k not in timed} == {
        k: v for k, v in overlapping.items() if k not in timed
    }
    assert striding["tokens_repeated"] > 0
    files = [(tmp_path / name / "shard-00000.arrow").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_overlap_is_learnt_once_or_each_time(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [book, "-m", model, "--max-length", 128, "--overlap", 28]
    once = prepared(capsys, *common, "-o", tmp_path / "a")
    again = prepared(capsys, *common, "-o", tmp_path / "b", "--learn-overlap")
    cuts = once["cuts_at_token"]
    assert once["trained_tokens"] == once["tokens_read"] - 1
    # The first token of a piece has nothing before it in either case.
    assert again["trained_tokens"] == once["trained_tokens"] + cuts * (28 - 1)


def test_pieces_end_at_paragraphs_when_asked_for_and_every_cut_is_shown(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [book, "-m", model, "--max-length", 512, "--no-pack"]
    summary = prepared(capsys, *common, "-o", tmp_path / "a", "--split-at", "paragraph")
    assert summary["cuts_at_paragraph"] == summary["chunks"] - 1 > 5
    assert summary["cuts_at_sentence"] == summary["cuts_at_token"] == 0
    data, tokenizer = ChunkDataset.open(tmp_path / "a"), load_tokenizer(model)
    text = book.read_text()
    for number in range(len(data)):
        piece = tokenizer.decode(data[number].input_ids, skip_special_tokens=True)
        assert text.endswith(piece) or text[text.index(piece) + len(piece) - 2 :].startswith("\n\n")
    narrow = prepared(capsys, *common[:-2], 40, "-o", tmp_path / "b", "--split-at", "chapter")
    assert narrow["cuts_at_chapter"] == 0
    assert narrow["cuts_at_sentence"] > 0
    assert prepare(*common, "-o", tmp_path / "c", "--split-at", "paragraph") == 0
    assert f"cuts before a paragraph │ {summary['cuts_at_paragraph']}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_fill_and_balance_are_shown_and_kept(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "a.jsonl", *({"text": "river " * (1 + n % 50)} for n in range(200)))
    summary = prepared(capsys, source, "-m", model, "-o", tmp_path / "data", "--max-length", 256)
    data = ChunkDataset.open(tmp_path / "data")
    assert summary["fill"] == sum(map(len, (data[n] for n in range(len(data))))) / (256 * len(data))
    costs = np.array([data.cost.of(data.document_lengths(n)).sum() for n in range(len(data))])
    assert summary["balance"] == pytest.approx(cost_balance(costs))
    assert data.manifests[0].meta["cost"]["model"] == "Llama-3.1-8B"  # the folder holds a tokenizer alone
    assert data.manifests[0].meta["balance"] == summary["balance"] > 0.9
    assert prepare(source, "-m", model, "-o", tmp_path / "b", "--max-length", 256) == 0
    assert f"Cost balance {summary['balance']:.1%}" in capsys.readouterr().out


def test_a_dry_run_counts_the_same_and_writes_nothing(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [book, "-m", model, "-o", tmp_path / "data", "--max-length", 100]
    dry = prepared(capsys, *common, "--dry-run")
    assert left_behind(tmp_path, book) == []
    real = prepared(capsys, *common)
    times = ("seconds", "tokens_per_second")
    counted = [{k: v for k, v in summary.items() if k not in (*times, "dry_run")} for summary in (dry, real)]
    assert counted[0] == counted[1]


def test_the_manifest_holds_the_summary_and_the_settings(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = prepared(capsys, book, "-m", model, "-o", tmp_path / "data", "--max-length", "1k")
    data = ChunkDataset.open(tmp_path / "data")
    meta = data.manifests[0].meta
    assert meta["settings"] == {
        "inputs": [str(book)],
        "out": str(tmp_path / "data"),
        "model": model,
        "max_length": 1024,
    }
    for name in ("documents", "chunks", "tokens", "trained_tokens", "longest_chunk", "max_length"):
        assert meta[name] == summary[name]
    data.require_tokenizer(load_tokenizer(model))


def test_a_person_sees_the_counts_and_a_histogram(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(book, "-m", model, "-o", tmp_path / "data", "--max-length", 128) == 0
    shown = capsys.readouterr().out
    assert "texts split" in shown
    assert "up to         128" in shown
    assert "████" in shown
    assert f"Wrote {tmp_path / 'data'}." in shown


def test_a_mixture_has_its_shares_of_the_tokens_and_shows_them(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = rows(
        tmp_path / "texts.jsonl", *({"text": "The river ran past the mill. " * 8} for _ in range(400))
    )
    chats = rows(tmp_path / "chats.jsonl", *({"messages": CHAT} for _ in range(400)))
    inputs = [f"{texts}=3", f"{chats}=1", "-m", model]
    summary = prepared(capsys, *inputs, "-o", tmp_path / "data")
    first, second = summary["mixture"]
    assert first["weight"] == 0.75
    assert first["share"] == pytest.approx(0.75, abs=0.005)
    assert first["tokens"] + second["tokens"] == summary["tokens_read"]
    assert (second["documents"], second["of_documents"]) == (400, 400) or first["documents"] == 400
    assert summary["documents"] == first["documents"]
    assert summary["chats"] == second["documents"]
    assert prepare(*inputs, "-o", tmp_path / "again") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"chats.jsonl: {second['share']:.1%} of the tokens read (wanted 25.0%)" in shown


def test_streaming_files_is_refused(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(book, "-m", model, "-o", tmp_path / "data", "--stream") == 2
    assert "--stream has no effect" in capsys.readouterr().err


def test_the_speed_is_told_and_not_kept_in_the_manifest(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = prepared(capsys, book, "-m", model, "-o", tmp_path / "data", "--max-length", 128)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens_read"] / summary["seconds"])
    assert not {"seconds", "tokens_per_second"} & set(ChunkDataset.open(tmp_path / "data").manifests[0].meta)
    assert prepare(book, "-m", model, "-o", tmp_path / "again", "--max-length", 128) == 0
    assert re.search(r"Read, tokenized and written in [\d.]+ s, [\d,]+ tokens/s\.", capsys.readouterr().out)


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "missing": ("gone.txt", b"", "gone.txt: no such file or folder"),
    "empty text": ("a.txt", b"", "a.txt:1: the file is empty"),
    "empty rows": ("a.jsonl", b"\n\n", "a.jsonl:1: the file is empty"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n' * 6 + b'{"text": "b"\n', "a.jsonl:7: column 13: not JSON"),
    "cut off": ("a.jsonl", b'{"text": "a"}\n{"tex', "a.jsonl:2: column"),
    "deep": ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON that can be read: nested too deeply"),
    "long number": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl:1: not JSON that can be read"),
    "role order": (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a"}]}\n',
        "a.jsonl:1: message 1 is by assistant, user must speak here",
    ),
    "misspelt key": ("a.jsonl", b'{"txt": "a"}\n', "a.jsonl:1: unknown key 'txt'; did you mean text?"),
    "not UTF-8 text": ("a.txt", b"ab\ncd\xffe", "a.txt:2: byte 5 is not UTF-8"),
    "not UTF-8 rows": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', "a.jsonl:2: byte 24 is not UTF-8"),
    "NUL": ("a.txt", b"one\ntw\0o", "a.txt:2: byte 6 is NUL"),
    "null content": ("a.jsonl", b'{"text": null}', "a.jsonl:1: text is null"),
    "mistyped content": ("a.jsonl", b'{"prompt": ["a"], "completion": "b"}', "a.jsonl:1: prompt is a list"),
    "lone surrogate": ("a.jsonl", b'{"text": "a\\ud83d"}', "a.jsonl:1: text has half a surrogate pair"),
    "unknown kind": ("a.docx", b"PK", "a.docx: .docx is not a kind of document"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_line_with_its_place_and_exit_code_2(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, expected = BAD_FILES[name]
    path = tmp_path / file
    if name != "missing":
        path.write_bytes(content)
    assert prepare(path, "-m", model, "-o", tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"longlora: error: {tmp_path}/{expected}")
    assert "Traceback" not in error
    assert left_behind(tmp_path, path) == []


def test_a_folder_without_documents_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    assert prepare(tmp_path / "in", "-m", model, "-o", tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'in'}: no .txt, .md, .jsonl," in error
    assert ".pdf file in this folder" in error


def test_prepared_data_is_not_prepared_again(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(capsys, book, "-m", model, "-o", tmp_path / "data")
    assert prepare(tmp_path / "data", "-m", model, "-o", tmp_path / "again") == 2
    assert f"{tmp_path / 'data'} is prepared data already" in capsys.readouterr().err


def test_an_output_that_exists_is_refused_before_any_work(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert prepare(tmp_path / "gone.txt", "-m", model, "-o", out) == 2
    assert "data exists already" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep"


def test_a_fault_after_many_good_rows_leaves_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "a.jsonl", *({"text": f"row {n}"} for n in range(6000)), {"text": None})
    assert prepare(source, "-m", model, "-o", tmp_path / "deep" / "data") == 2
    assert "a.jsonl:6001: text is null" in capsys.readouterr().err
    assert left_behind(tmp_path / "deep") == []


def test_every_synthetic_task_can_be_asked_for_and_shared_out(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [book, "-m", model, "--max-length", 4096, "--synthetic-facts", 2, "--synthetic-questions", 1]
    out = tmp_path / "data"
    summary = prepared(capsys, *common, "-o", out, "--synthetic", "all=15,count=2", "--synthetic", "topic=1")
    wanted = dict.fromkeys(TASKS, 1) | {"needle": 2, "multi-key": 2, "count": 3, "topic": 2}
    assert summary["synthetic_tasks"] == wanted
    assert (summary["chats"], summary["synthetic_chats"]) == (18, 18)
    assert ChunkDataset.open(out).manifests[0].meta["synthetic_tasks"] == wanted


def test_help_names_every_synthetic_task() -> None:
    described = PrepareConfig.model_fields["synthetic"].description or ""
    assert re.search(r"tasks: (.*), or all\.$", described).group(1).split(", ") == list(TASKS)  # type: ignore[union-attr]


def test_nothing_left_to_write_is_an_error(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "a.jsonl", {"text": "short"})
    assert prepare(source, "-m", model, "-o", tmp_path / "data", "--min-length", 100) == 2
    assert "nothing is left: texts read 1, chats 0" in capsys.readouterr().err
    assert left_behind(tmp_path, source) == []


@pytest.mark.parametrize(
    "request_", ["needle", "needle=0", "needle=x", "hay=3", "all", "count=-1", "count=²"]
)
def test_an_unreadable_synthetic_request_is_refused(
    request_: str, book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(book, "-m", model, "-o", tmp_path / "data", "--synthetic", request_) == 2
    assert f"--synthetic {request_!r} cannot be read" in capsys.readouterr().err


def test_synthetic_chats_need_a_text(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = rows(tmp_path / "c.jsonl", {"messages": CHAT})
    assert prepare(source, "-m", model, "-o", tmp_path / "data", "--synthetic", "needle=2") == 2
    assert "--synthetic needs texts" in capsys.readouterr().err


def test_chats_and_a_model_without_a_template_are_refused(
    tmp_path: Path, tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    source = rows(tmp_path / "c.jsonl", {"messages": CHAT})
    assert prepare(source, "-m", tmp_path / "base", "-o", tmp_path / "data") == 2
    assert "no chat template" in capsys.readouterr().err


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from longlora_cli.cli import main
main(sys.argv[1:])
"""


def test_a_full_disk_is_told_and_leaves_nothing(book: Path, model: str, tmp_path: Path) -> None:
    book.write_text(book.read_text() * 20)
    arguments = ["prepare", str(book), "-m", model, "-o", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "the disk is full" in done.stderr
    assert left_behind(tmp_path, book) == []


def test_show_sets_what_the_assistant_says_off_from_what_is_only_read(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "a.jsonl", {"messages": CHAT})
    assert prepare(source, "-m", model, "-o", tmp_path / "data", "--show", 1) == 0
    shown = capsys.readouterr().out
    assert "chunk 1 of 1" in shown
    assert "⟦The miller slept." in shown
    assert "Who?" in shown[shown.index("document 1:") : shown.index("⟦The")]


def test_show_shortens_a_long_run_and_says_by_how_much(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(book, "-m", model, "-o", tmp_path / "data", "--max-length", 512, "--show", 1) == 0
    # 512 tokens, the first of them masked, 60 shown at each end.
    assert "[... 391 tokens ...]" in capsys.readouterr().out


def test_show_leaves_out_documents_beyond_the_eighth_of_a_chunk_and_says_how_many(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "a.jsonl", *({"text": f"Story {number}."} for number in range(20)))
    assert prepare(source, "-m", model, "-o", tmp_path / "data", "--max-length", 512, "--show", 1) == 0
    shown = capsys.readouterr().out
    assert "document 8:" in shown
    assert "document 9:" not in shown
    assert "-- and 12 more documents" in shown


def test_a_dry_run_shows_what_would_be_written_and_writes_nothing(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for more in (["--dry-run"], []):
        arguments = (book, "-m", model, "-o", tmp_path / "data", "--max-length", 128, "--show", 2, *more)
        assert prepare(*arguments) == 0
        out = capsys.readouterr().out
        shown.append(out[out.index("Learnt tokens are") :])
        assert (tmp_path / "data").exists() != bool(more)
    assert shown[0] == shown[1]
    assert left_behind(tmp_path, book, tmp_path / "data") == []


def test_a_prepared_folder_has_a_picture_that_its_manifest_covers(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(capsys, book, "-m", model, "-o", tmp_path / "data", "--max-length", 512)
    assert "lengths.png" in ChunkDataset.open(tmp_path / "data", verify=True).manifests[0].files


RUN = "The river ran past the old mill and the amber falcon watched it."


@pytest.mark.parametrize(("action", "texts"), [("report", 3), ("drop", 2)])
def test_documents_that_overlap_with_evaluation_data_are_told_or_left_out(
    action: str, texts: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "Nothing of the kind was ever said by anyone here, as far as anybody knows of it."
    source = rows(
        tmp_path / "a.jsonl", {"text": other}, {"text": f"Once. {RUN} So it was."}, {"messages": CHAT}
    )
    asked = rows(tmp_path / "eval.jsonl", {"text": RUN.upper()})
    more = ["--overlap-check", asked, "--on-overlap", action]
    summary = prepared(capsys, source, "-m", model, "-o", tmp_path / "data", *more)
    assert summary["overlap"]["documents"] == 1
    assert summary["overlap"]["most"] == [{"source": f"{source}:2", "shared": 1, "of": 5}]
    assert summary["documents"] + summary["chats"] == texts


def test_data_of_which_overlap_leaves_nothing_are_told_so(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--overlap-check", book, "--on-overlap", "drop"]
    assert prepare(book, "-m", model, "-o", tmp_path / "data", *more) == 2
    told = "nothing is left: texts read 0, chats 0; left out by --on-overlap drop: 1"
    assert told in capsys.readouterr().err


def test_an_overlap_can_be_an_error_that_names_the_document(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(tmp_path / "a.jsonl", {"text": "One."}, {"text": RUN})
    more = ["--overlap-check", source, "--on-overlap", "error"]
    assert prepare(source, "-m", model, "-o", tmp_path / "data", *more) == 2
    assert "a.jsonl:2: 1 of 1 runs of 13 words are in the evaluation data" in capsys.readouterr().err
    assert left_behind(tmp_path, source) == []


def test_what_to_do_with_overlaps_needs_something_to_compare_with(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(book, "-m", model, "-o", tmp_path / "data", "--on-overlap", "drop") == 2
    assert "--overlap-check" in capsys.readouterr().err


def test_the_same_command_twice_is_told_and_changes_nothing(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [book, "-m", model, "-o", tmp_path / "data", "--max-length", 128]
    first = prepared(capsys, *arguments)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert prepare(*arguments, "--show", 1) == 0
    shown = capsys.readouterr().out
    assert "made by this command from these files: nothing to do" in shown
    assert "chunk " in shown
    again = prepared(capsys, *arguments)
    assert (first["unchanged"], again["unchanged"]) == (False, True)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == made
    told = set(first) - {"seconds", "tokens_per_second", "unchanged"}
    assert {name: again[name] for name in told} == {name: first[name] for name in told}


@pytest.mark.parametrize("change", ["settings", "inputs"])
def test_data_of_other_settings_or_files_are_not_taken_for_the_commands_own(
    change: str, book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [book, "-m", model, "-o", tmp_path / "data"]
    prepared(capsys, *arguments)
    if change == "inputs":
        text = book.read_text()
        book.write_text(text[:-2] + "!" + text[-1:])  # as many bytes
    assert prepare(*arguments, *(["--min-length", 9] if change == "settings" else [])) == 2
    assert f"data exists already, made with other {change}" in capsys.readouterr().err


def test_damaged_data_of_the_same_command_are_told(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [book, "-m", model, "-o", tmp_path / "data"]
    prepared(capsys, *arguments)
    shard = tmp_path / "data" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" * 9)
    assert prepare(*arguments) == 4
    assert "shard-00000.arrow differs from its manifest" in capsys.readouterr().err


# --- formats of rows


ALPACA = {"instruction": "Who slept?", "output": "The miller."}
MEETING = {
    "id": "m1",
    "context": "The miller slept.",
    "questions": [{"input": f"Who {n}?", "answers": [f"He {n}."]} for n in range(3)],
}


def test_the_summary_and_the_manifest_say_how_many_rows_have_which_format(
    book: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "a.jsonl", {"messages": CHAT}, ALPACA, MEETING, ALPACA)
    out = tmp_path / "data"
    expected = {"alpaca": 2, "messages": 1, "questions": 1}
    assert prepared(capsys, book, path, "-m", model, "-o", out)["formats"] == expected
    assert read_manifest(out).meta["formats"] == expected
    assert prepare(book, path, "-m", model, "-o", tmp_path / "dry", "--dry-run") == 0
    output = capsys.readouterr()
    lines = [line.split() for line in (output.out + output.err).splitlines()]
    assert ["rows", "of", "format", "alpaca", "│", "2"] in lines
    assert not any("format" in line and "text" in line for line in lines)


def test_questions_about_a_context_are_learnt_in_one_chat(model: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", MEETING)
    assert prepare(path, "-m", model, "-o", tmp_path / "data") == 0
    [chunk] = ChunkDataset.open(tmp_path / "data")
    tokenizer = load_tokenizer(model)
    text = tokenizer.decode(chunk.input_ids)
    assert text.count("The miller slept.") == 1
    assert text.index("The miller slept.\n\nWho 0?") < text.index("He 0.") < text.index("Who 1?")
    learnt = tokenizer.decode(chunk.labels[chunk.labels != IGNORE])
    assert learnt == "".join(f"He {n}.<|im_end|>" for n in range(3))


def test_a_format_that_is_named_is_read(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "a.jsonl", ALPACA | {"text": "the whole"})
    assert prepare(path, "-m", model, "-o", tmp_path / "a") == 2
    error = capsys.readouterr().err
    assert f"{path}:1: the row has the keys of 2 formats: alpaca and text" in error
    assert "--format alpaca or --format text" in error
    for name in ("alpaca", "text"):
        summary = prepared(capsys, path, "-m", model, "-o", tmp_path / name, "--format", name)
        assert summary["formats"] == {name: 1}
        assert summary["chats"] == (name == "alpaca")
    assert prepare(path, "-m", model, "-o", tmp_path / "b", "--format", "chatml") == 2
    assert "--format chatml" in capsys.readouterr().err
    assert left_behind(tmp_path, path, tmp_path / "alpaca", tmp_path / "text") == []


def test_chats_with_tools_are_prepared_by_a_template_that_shows_them_and_else_refused(
    tiny_tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(
        tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": tool_chat(), "tools": [tool("weather")]}
    )
    out = tmp_path / "data"
    assert prepare(path, "-m", tiny_tokenizer_folder, "-o", out) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: the chat template does not show the tool 'weather'" in error
    assert "nothing of them is left out" in error
    assert not out.exists()
    shows = load_tokenizer(str(tiny_tokenizer_folder))
    shows.chat_template = TEMPLATES["chatml"]
    shows.save_pretrained(tmp_path / "shows")
    assert prepare(path, "-m", tmp_path / "shows", "-o", out, "--no-pack") == 0
    chunk = max(ChunkDataset.open(out), key=len)
    learnt = shows.decode(chunk.labels[chunk.labels != IGNORE])
    assert learnt.startswith('<tool_call>\n{"name": "weather", "arguments"')
    assert learnt.endswith("</tool_call><|im_end|>It rains.<|im_end|>No.<|im_end|>")
    assert "Tells the weather." in shows.decode(chunk.input_ids)


@pytest.mark.parametrize("dry_run", [True, False])
def test_no_torch_and_no_pandas_are_imported(model: str, tmp_path: Path, book: Path, dry_run: bool) -> None:
    chats = rows(tmp_path / "chats.jsonl", {"messages": CHAT})
    words = ["prepare", str(book), str(chats), "--model", model, "--out", str(tmp_path / "data")]
    code = (
        f"import sys\nfrom longlora_cli.cli import main\ntry:\n    main({words + ['--dry-run'] * dry_run})\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'pandas' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "0 False False"
