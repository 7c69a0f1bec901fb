from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.rows import RowFault, read_row
from longlora_cli.errors import DataError, NotFoundError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(*inputs: Path | str, seed: int = 0, split: str = "train") -> list[Document]:
    return list(read_documents(find_sources([str(i) for i in inputs], split=split), seed=seed))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": CHAT},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "completion": "hello"},
        {"input": "hi", "outputs": ["hello", "hey"]},
        {"input": "hi", "outputs": "hello"},
        {"id": 3, "text": None, "messages": CHAT},
        {"messages": [{**CHAT[0], "tool_calls": None}, CHAT[1]]},
    ],
)
def test_each_kind_of_chat_row_is_known_by_its_keys(row: dict[str, Any]) -> None:
    assert read_row(row).content == CHAT


def test_a_system_message_may_come_first() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert read_row({"messages": [system, *CHAT]}).content == [system, *CHAT]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row is a JSON object, not a list"),
        ({}, "the row is empty"),
        ({"txet": "a"}, "unknown key 'txet'; did you mean text?"),
        ({"mesages": CHAT}, "did you mean messages?"),
        ({"prompt": "a"}, "'prompt' without 'completion'"),
        ({"id": 1, "body": "a"}, "this one has id, body"),
        ({"text": None}, "text is null, a text is needed"),
        ({"text": 3}, "text is a number"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "a\0b"}, "text has a NUL character at position 1"),
        ({"text": "ab\ud800"}, r"half a surrogate pair \(U\+D800\) at position 2"),
        ({"messages": {}}, "messages is an object, a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "message 1 is a text, an object"),
        ({"messages": [CHAT[1]]}, "message 1 is by assistant, user must speak here"),
        ({"messages": [CHAT[0], CHAT[0]]}, "message 2 is by user, assistant must speak here"),
        ({"messages": [CHAT[0]]}, "does not end with the assistant"),
        ({"messages": [{"role": "user", "contnet": "a"}]}, "'contnet'; did you mean content?"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "unknown role 'usr'; did you mean user?"),
        ({"messages": [{"role": "user", "content": None}]}, "content of message 1 is null"),
        ({"messages": [{"role": "user", "content": [1]}]}, "content of message 1 is a list"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
        ({"input": "a", "outputs": []}, "outputs is empty"),
    ],
)
def test_each_unusable_row_is_told_why(row: Any, reason: str) -> None:
    with pytest.raises(RowFault, match=reason):
        read_row(row)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufeffOne.\r\n\r\nTwö.".encode())
    [document] = read(tmp_path / "a.md")
    assert document.content == "One.\n\nTwö."
    assert document.source == str(tmp_path / "a.md")


def test_a_json_lines_file_is_a_document_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one"}, {"messages": CHAT})
    path.write_text(path.read_text() + "\n  \n" + json.dumps({"text": "three"}))
    assert [d.content for d in read(path)] == ["one", CHAT, "three"]
    assert [d.source for d in read(path)] == [f"{path}:{n}" for n in (1, 2, 5)]


def test_folders_are_read_whole_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.md", "b/c/3.TXT", ".git/x.txt", ".hidden.txt", "b/z.docx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.content for d in read(tmp_path)] == ["a.txt", "b/1.md", "b/2.txt", "b/c/3.TXT"]
    [source] = find_sources([str(tmp_path)], split="train")
    assert source.left_out == (str(tmp_path / "b/z.docx"),)


def test_a_sample_is_the_seeds_and_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"t{n}"} for n in range(100)))
    first = [d.content for d in read(f"{path}[10]", seed=1)]
    assert first == [d.content for d in read(f"{path}[10]", seed=1)]
    assert first != [d.content for d in read(f"{path}[10]", seed=2)]
    assert len(set(first)) == 10
    assert first == sorted(first, key=lambda text: int(str(text)[1:]))


def test_a_sample_larger_than_its_source_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="there are only 1 documents"):
        read(f"{path}[2]")


def test_a_file_whose_name_ends_in_brackets_is_that_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"t{n}"} for n in range(3)))
    path.rename(tmp_path / "a[2].txt")
    assert len(read(tmp_path / "a[2].txt")) == 1


def test_saved_datasets_are_read_by_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "split"))
    assert [d.content for d in read(tmp_path / "plain")] == ["one", "two"]
    assert [d.content for d in read(tmp_path / "split", split="test")] == ["two"]
    with pytest.raises(DataError, match="has no split 'dev'"):
        read(tmp_path / "split", split="dev")


def test_a_faulty_row_of_a_saved_dataset_is_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": " "}])
    rows.save_to_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match="data:2: text is empty"):
        read(tmp_path / "data")


def test_a_hub_dataset_offline_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="hf:no/such-data"):
        find_sources(["hf:no/such-data"], split="train")


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}, {"txet": "c"}, {"text": 3}, {"text": None}]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message == f"{path}:2: text is null, a text is needed"
    assert caught.value.rule == (
        f"the same on line 6\n{path}:4: unknown key 'txet'; did you mean text?\n"
        f"{path}:5: text is a number, a text is needed"
    )


def test_at_most_twenty_faults_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": None} for _ in range(100)))
    with pytest.raises(DataError) as caught:
        read(path)
    others = ", ".join(str(number) for number in range(2, 21))
    assert caught.value.rule == f"the same on line {others}\nreading stopped after 20 faults"


def test_documents_come_before_the_whole_file_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": None})
    stream = read_documents(find_sources([str(path)], split="train"), seed=0)
    assert next(stream).content == "a"
    with pytest.raises(DataError):
        next(stream)
