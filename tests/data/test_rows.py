"""Formats of rows: what each becomes, how it is found, and what happens where that is not clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tool_templates import call, tool, tool_chat

from longlora_cli.config import PrepareConfig
from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.rows import FORMATS, RowFault, keys_of, read_row, unknown_keys
from longlora_cli.errors import DataError, SettingsError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "prompt": {"prompt": "hi", "completion": "hello"},
    "outputs": {"input": "hi", "outputs": ["hello", "hey"]},
    "alpaca": {"instruction": "hi", "output": "hello"},
    "longbench": {"context": "hi", "input": "", "answers": ["hello", "hey"]},
    "questions": {"context": "hi", "questions": [{"input": "you", "answers": ["hello"]}]},
    "text": {"text": "hi"},
}


def read(*inputs: Path | str, format: str | None = None) -> list[Document]:
    sources = find_sources([str(i) for i in inputs], split="train", format=format)
    return list(read_documents(sources, seed=0))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def test_every_format_has_a_row_here_and_a_choice_of_the_setting() -> None:
    names = [form.name for form in FORMATS]
    choices = PrepareConfig.model_fields["format"].annotation.__args__  # type: ignore[union-attr]
    assert sorted(ROWS) == sorted(names) == sorted(set(choices) - {"auto"})


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_found_by_its_keys(name: str) -> None:
    assert read_row({"id": 7, **ROWS[name]}).format == name
    assert read_row({"id": 7, **ROWS[name]}, name).content == read_row(ROWS[name]).content


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt", "outputs", "alpaca", "longbench"])
def test_a_question_and_its_first_answer_are_a_chat(name: str) -> None:
    assert read_row(ROWS[name]).content == CHAT


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": " \n"}, {"input": None}])
def test_an_alpaca_row_asks_its_instruction_and_then_its_input(blank: dict[str, Any]) -> None:
    row = {"instruction": "Sum it up.", "input": "A long text.", "output": "A text."}
    assert read_row(row).content == turns("Sum it up.\n\nA long text.", "A text.")
    assert read_row(
        {**row, **blank} if blank else {k: row[k] for k in ("instruction", "output")}
    ).content == (turns("Sum it up.", "A text."))


@pytest.mark.parametrize("answers", ["x", ["x"], ["x", "y"]])
def test_a_longbench_row_asks_after_its_context(answers: Any) -> None:
    row = {"context": "Once.", "input": "Who?", "answers": answers, "length": 5, "all_classes": None}
    assert read_row(row).content == turns("Once.\n\nWho?", "x")
    assert read_row(row | {"input": ""}).content == turns("Once.", "x")


def test_several_questions_are_one_chat_with_the_context_before_the_first() -> None:
    questions = [{"input": f"q{n}", "answers": [f"a{n}", "other"]} for n in range(3)]
    row = read_row({"context": "Once.", "questions": questions})
    assert row.content == turns("Once.\n\nq0", "a0", "q1", "a1", "q2", "a2")


def test_evaluation_asks_each_of_several_questions_for_itself() -> None:
    questions = [{"input": f"q{n}", "answers": [f"a{n}", "other"]} for n in range(2)]
    exchanges = read_row({"context": "Once.", "questions": questions}).exchanges()
    assert [e.asked for e in exchanges] == [turns("Once.\n\nq0"), turns("Once.\n\nq1")]
    assert [e.answers for e in exchanges] == [["a0", "other"], ["a1", "other"]]


PAIRS = [(a, b) for a in ROWS for b in ROWS if a < b and not {*ROWS[a]} & {*ROWS[b]}]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_row_of_two_formats_is_a_fault_that_says_how_to_choose(one: str, other: str) -> None:
    row = ROWS[one] | ROWS[other]
    with pytest.raises(RowFault, match=r"the keys of \d formats") as caught:
        read_row(row)
    assert one in str(caught.value)
    assert other in str(caught.value)
    assert f"--format {one}" in str(caught.value.hint)
    for name in (one, other):
        alone = {key: value for key, value in row.items() if key in keys_of(name)}
        assert read_row(row, name).content == read_row(alone).content


def test_the_fault_of_an_ambiguous_file_names_its_line_and_the_setting(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ROWS["text"], ROWS["text"] | ROWS["alpaca"])
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: the row has the keys of 2 formats: alpaca and text"
    ) as c:
        read(path)
    assert "--format alpaca or --format text" in str(c.value.hint)
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: a row of the format alpaca has 'instruction' and 'output'"
    ):
        read(path, format="alpaca")
    assert [d.content for d in read(path, format="text")] == ["hi", "hi"]


def test_a_null_is_what_a_row_of_a_table_lacks(tmp_path: Path) -> None:
    rows = [{"text": "one", "messages": None}, {"text": None, "messages": CHAT}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        found = read(tmp_path / name)
        assert [(d.content, d.format) for d in found] == [("one", "text"), (CHAT, "messages")]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".csv", "saved"])
def test_a_format_is_asked_of_every_kind_of_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "one", "instruction": "ask", "output": "told"}]
    path = tmp_path / f"a{kind}"
    if kind == ".jsonl":
        lines(path, *rows)
    elif kind == ".csv":
        path.write_text("text,instruction,output\none,ask,told\n")
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    assert [d.content for d in read(path, format="alpaca")] == [turns("ask", "told")]
    assert [d.content for d in read(path, format="text")] == ["one"]
    place = 1 if kind != ".csv" else 2
    with pytest.raises(DataError, match=rf":{place}: the row has the keys of 2 formats"):
        read(path)
    with pytest.raises(
        DataError, match=":1: a row of the format questions has 'context' and 'questions'; this"
    ):
        read(path, format="questions")


def test_a_format_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SettingsError, match="--format alpaca has no effect: no input has rows"):
        read(tmp_path / "a.txt", format="alpaca")
    assert len(read(tmp_path / "a.txt", lines(tmp_path / "b.jsonl", ROWS["alpaca"]), format="alpaca")) == 2


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["instruction", "imput", "output"], "unknown key 'imput'; did you mean input?"),
        (["messages", "toolz"], "unknown key 'toolz'; did you mean tools?"),
        (["context", "qestions"], "unknown key 'qestions'; did you mean questions?"),
        (["instruction", "index", "output"], None),
        (["messages", "topics", "source"], None),
    ],
)
def test_misspelt_keys_are_told_and_other_keys_left_alone(keys: list[str], reason: str | None) -> None:
    assert unknown_keys(keys) == reason


# --- tools


def test_messages_with_tools_are_read_as_openai_writes_them() -> None:
    tools = [tool("weather")]
    messages = tool_chat()
    written = json.loads(json.dumps(messages))
    written[1]["content"] = None
    written[1]["tool_calls"][0] |= {"id": "c1", "index": 0}
    written[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln", "days": 0}'
    written[2] |= {"tool_call_id": "c1", "name": "weather"}
    row = read_row({"messages": written, "tools": json.dumps(tools)})
    messages[1]["tool_calls"][0]["id"] = "c1"
    messages[2] |= {"tool_call_id": "c1", "name": "weather"}
    assert row.content == messages
    assert row.tools == tools


def test_flat_calls_and_tools_become_functions() -> None:
    flat = {"name": "weather", "arguments": {"city": "Köln", "days": 0}}
    messages = tool_chat()
    messages[1] = {"role": "assistant", "tool_calls": [flat]}
    row = read_row({"messages": messages, "tools": [tool("weather")["function"]]})
    assert row.content == tool_chat()
    assert row.tools == [tool("weather")]


def test_sharegpt_calls_and_observations_are_calls_and_answers_of_tools() -> None:
    called = json.dumps({"name": "weather", "arguments": {"city": "Köln"}})
    told = [("human", "Rain?"), ("function_call", called), ("observation", "3 mm"), ("gpt", "A little.")]
    row = read_row({"conversations": [{"from": who, "value": text} for who, text in told], "tools": "[]"})
    assert row.tools is None
    assert row.content == [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Köln")]},
        {"role": "tool", "content": "3 mm"},
        {"role": "assistant", "content": "A little."},
    ]


def test_tables_give_calls_no_keys_that_only_other_calls_have(tmp_path: Path) -> None:
    def chat(name: str, **arguments: Any) -> list[dict[str, Any]]:
        called = {"role": "assistant", "content": "", "tool_calls": [call(name, **arguments)]}
        return [{"role": "user", "content": "go"}, called]

    chats = [chat("weather", city="Köln"), chat("snow", depth=3)]
    rows = [{"messages": messages, "tools": [tool("weather")]} for messages in chats]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "snow"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        found = read(tmp_path / name)
        assert [d.content for d in found] == chats
        assert [d.tools for d in found] == [row["tools"] for row in rows]


def test_calls_are_answered_in_any_order_by_their_ids() -> None:
    calls = [call(name) | {"id": name} for name in "ab"]
    answers = [{"role": "tool", "content": name, "tool_call_id": name} for name in "ba"]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = [CHAT[0], called, *answers, CHAT[1]]
    assert read_row({"messages": messages}).content == messages
    with pytest.raises(RowFault, match="message 4 answers the tool call 'b', which was not made"):
        read_row({"messages": [CHAT[0], called, answers[0], answers[0], CHAT[1]]})
