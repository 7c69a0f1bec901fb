from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from input_files import json_lines, save

from longlora_cli.data.documents import Document, find_sources, mix, read_documents
from longlora_cli.data.readers.tables import read_dataset
from longlora_cli.data.sources import Source
from longlora_cli.errors import DataError, NotFoundError, SettingsError


def find(*inputs: Path | str, stream: bool = False) -> list[Source]:
    return find_sources([str(i) for i in inputs], split="train", stream=stream)


def read(*inputs: Path | str, seed: int = 0) -> list[str]:
    return [str(d.content) for d in read_documents(find(*inputs), seed=seed)]


def texts(path: Path, *content: str) -> Path:
    return save(path, json_lines([{"text": text} for text in content]))


# --- globs


def test_a_glob_is_its_files_in_name_order_through_all_folders(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/c/1.txt", "b/3.md", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(f"{tmp_path}/**/*.txt") == ["a.txt", "b/2.txt", "b/c/1.txt"]
    assert read(f"{tmp_path}/*/[23].*") == ["b/2.txt", "b/3.md"]
    assert len(read(f"{tmp_path}/**/*.txt[2]")) == 2


def test_what_a_glob_finds_and_cannot_be_read_is_left_out_by_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.docx"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    [source] = find(f"{tmp_path}/*")
    assert source.left_out == (str(tmp_path / "b.docx"),)
    assert read(f"{tmp_path}/*") == ["a.txt"]


def test_a_glob_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.txt: no .* file of this name"):
        find(f"{tmp_path}/*.txt")


def test_a_file_whose_name_is_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.txt").write_text("this")
    (tmp_path / "a1b.txt").write_text("not this")
    assert read(tmp_path / "a[1]*.txt") == ["this"]


# --- mixtures


def test_shares_are_of_the_tokens_and_no_document_is_taken_twice(tmp_path: Path) -> None:
    long = texts(tmp_path / "long.jsonl", *(f"{n:04}" * 250 for n in range(300)))
    short = texts(tmp_path / "short.jsonl", *(f"{n:04}" * 10 for n in range(3000)))
    found = read(f"{long}=3", f"{short}=1")
    assert len(set(found)) == len(found)
    # All 300,000 characters of the long ones are three quarters of 400,000; the short ones give 100,000 of 120,000.
    assert sum(len(t) for t in found if len(t) == 1000) == 300_000
    assert sum(len(t) for t in found if len(t) == 40) == 100_000


def test_shares_are_of_the_tokenizers_tokens_not_of_bytes(tmp_path: Path) -> None:
    dense = texts(tmp_path / "dense.jsonl", *("ab" * 50 for _ in range(1000)))
    loose = texts(tmp_path / "loose.jsonl", *("xyzw" * 25 for _ in range(1000)))

    def count(documents: list[Document]) -> list[int]:
        return [len(str(d.content)) // (2 if "ab" in str(d.content) else 4) for d in documents]

    parts = mix(find(f"{dense}=0.5", f"{loose}=0.5"), seed=0, count_tokens=count)
    assert [(p.documents, p.available, p.weight) for p in parts] == [(500, 1000, 0.5), (1000, 1000, 0.5)]


def test_a_mixture_is_the_seeds_and_keeps_the_order(tmp_path: Path) -> None:
    first = texts(tmp_path / "a.jsonl", *(f"a{n:03}" for n in range(200)))
    second = texts(tmp_path / "b.jsonl", *(f"b{n:03}" for n in range(200)))
    mixture = (f"{first}=.25", f"{second}=.75")
    found = read(*mixture, seed=1)
    assert found == read(*mixture, seed=1)
    assert found != read(*mixture, seed=2)
    assert found == sorted(found)
    assert [sum(t[0] == name for t in found) for name in "ab"] == [67, 200]


def test_samples_can_be_mixed(tmp_path: Path) -> None:
    first = texts(tmp_path / "a.jsonl", *(f"a{n:03}" for n in range(200)))
    second = texts(tmp_path / "b.jsonl", *(f"b{n:03}" for n in range(200)))
    found = read(f"{first}[10]=0.5", f"{second}=0.5")
    assert [sum(t[0] == name for t in found) for name in "ab"] == [10, 10]


def test_equal_shares_of_equal_sources_take_everything(tmp_path: Path) -> None:
    paths = [texts(tmp_path / f"{name}.jsonl", *(f"{name}{n:03}" for n in range(97))) for name in "abc"]
    assert len(read(*(f"{path}=0.1" for path in paths))) == 3 * 97


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a=0.5").mkdir()
    (tmp_path / "a=0.5" / "x.txt").write_text("whole name")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("weighted")
    assert read(tmp_path / "a=0.5") == ["whole name"]
    assert read(f"{tmp_path / 'a'}=0.7") == ["weighted"]


def test_a_mixture_needs_all_weights(tmp_path: Path) -> None:
    first, second = texts(tmp_path / "a.jsonl", "a"), texts(tmp_path / "b.jsonl", "b")
    with pytest.raises(SettingsError, match=r"b\.jsonl has no weight"):
        find(f"{first}=0.5", second)
    with pytest.raises(SettingsError, match="a weight of nothing"):
        find(f"{first}=0.0", f"{second}=1")


def test_a_share_smaller_than_a_document_is_refused(tmp_path: Path) -> None:
    book, chats = texts(tmp_path / "a.jsonl", "x" * 10_000), texts(tmp_path / "b.jsonl", *["y" * 100] * 10)
    with pytest.raises(DataError, match=r"a\.jsonl: a share of 10\.0% is 111 tokens, less than half"):
        read(f"{book}=1", f"{chats}=9")


# --- datasets


def hub(folder: Path, *rows: dict[str, Any]) -> str:
    """A folder that `datasets` loads as it does a hub repository."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("stream", [False, True])
def test_hub_datasets_are_read_with_and_without_a_copy(tmp_path: Path, stream: bool) -> None:
    name = hub(tmp_path / "data", {"text": "one", "id": 1}, {"text": "two", "id": 2})
    [source] = find(name, stream=stream)
    assert [d.content for d in source.read()] == ["one", "two"]
    assert [d.content for d in source.read()] == ["one", "two"]
    assert any((tmp_path / "cache").rglob("*.arrow")) is not stream


@pytest.mark.parametrize("stream", [False, True])
def test_a_faulty_row_of_a_hub_dataset_has_its_number(tmp_path: Path, stream: bool) -> None:
    name = hub(tmp_path / "data", {"text": "one"}, {"text": None}, {"text": " "})
    with pytest.raises(DataError, match="data:2: text is null, a text is needed") as caught:
        [list(source.read()) for source in find(name, stream=stream)]
    assert caught.value.rule == f"{name}:3: text is empty"


def test_a_stream_that_breaks_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "one"}
        raise ConnectionError("the network is gone")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(NotFoundError, match="cannot be had: the network is gone"):
        [list(source.read()) for source in find("hf:some/data", stream=True)]


def test_streaming_without_a_hub_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--stream has no effect"):
        find(texts(tmp_path / "a.jsonl", "a"), stream=True)


def test_a_dataset_without_a_column_of_text_is_told_by_its_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"txet": "a"}]).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"data:1: unknown key 'txet'; did you mean text\?"):
        [list(source.read()) for source in find(tmp_path / "data")]


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    empty = datasets.Dataset.from_dict({"text": []})
    with pytest.raises(DataError, match="name:1: the dataset is empty"):
        list(read_dataset("name", empty))
    empty.save_to_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match="data: not a dataset that can be read"):
        find(tmp_path / "data")


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    for name in ("state.json", "data-00000-of-00001.arrow"):
        datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / name))
        (tmp_path / name / name).write_bytes(b"{")
        with pytest.raises(DataError, match="not a dataset that can be read"):
            find(tmp_path / name)
