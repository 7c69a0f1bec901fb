"""Small files in the shape of each benchmark, and what a model that knows everything says to their questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora_cli.evaluation.generation import Question

LONG = "The mill stood by the river and the wind was old. " * 3


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def longbench_row(dataset: str, answers: list[str], **more: Any) -> dict[str, Any]:
    row = {
        "input": f"What of {dataset}?",
        "context": f"{dataset}: {LONG}",
        "answers": answers,
        "length": 3000,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": f"{dataset}-1",
    }
    return row | more


LONGBENCH = {
    "narrativeqa": longbench_row("narrativeqa", ["the mill"]),
    "hotpotqa": longbench_row("hotpotqa", ["Paris", "City of Light"]),
    "multifieldqa_zh": longbench_row("multifieldqa_zh", ["北京"]),
    "gov_report": longbench_row("gov_report", ["Costs rose in all years. Audits help."], input=""),
    "trec": longbench_row("trec", ["Food"], all_classes=["Food", "Date", "Number of something"]),
    "triviaqa": longbench_row("triviaqa", ["Thames"]),
    "samsum": longbench_row("samsum", ["Ann meets Bob at noon."]),
    "passage_count": longbench_row("passage_count", ["7"]),
    "passage_retrieval_en": longbench_row("passage_retrieval_en", ["Paragraph 12"]),
    "lcc": longbench_row("lcc", ["    return total + value"]),
    "repobench-p": longbench_row("repobench-p", ["x = load(path)"]),
}


def make_longbench(folder: Path) -> Path:
    for task, row in LONGBENCH.items():
        write_lines(folder / f"{task}.jsonl", [row, row | {"_id": f"{task}-2", "input": "And what else?"}])
    return folder


def make_longbench_e(folder: Path) -> Path:
    for task in ("hotpotqa", "trec", "lcc", "gov_report"):
        rows = [
            LONGBENCH[task] | {"_id": f"{task}-{length}", "length": length, "input": f"For {length}?"}
            for length in (100, 3999, 4000, 8000, 12000)
        ]
        write_lines(folder / f"{task}_e.jsonl", rows)
    return folder


V2_ROW = {
    "_id": "a1",
    "domain": "Single-Document QA",
    "sub_domain": "Academic",
    "difficulty": "easy",
    "length": "short",
    "question": "What costs $Q$?",
    "choice_A": "bread",
    "choice_B": "wine, $C_A$",
    "choice_C": "oil",
    "choice_D": "salt",
    "answer": "B",
    "context": LONG + "$C_D$ ",
}


def make_longbench_v2(folder: Path) -> Path:
    rows = [
        V2_ROW,
        V2_ROW | {"_id": "a2", "difficulty": "hard", "length": "long", "answer": "D", "question": "When?"},
        V2_ROW | {"_id": "a3", "difficulty": "hard", "length": "medium", "answer": "A", "question": "Who?"},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(rows, indent=1))
    return folder


def _infinite(context: str, input: str, answer: Any, options: Sequence[str] = ()) -> dict[str, Any]:
    return {"id": 0, "context": context, "input": input, "answer": answer, "options": list(options)}


OPTIONS = ["get_w", "get_x", "get_y", "get_z"]
INFINITEBENCH = {
    "passkey": _infinite(LONG, "What is the pass key?", ["71432"]),
    "number_string": _infinite(LONG, "What is the sequence of digits?", ["1144"]),
    "kv_retrieval": _infinite('{"a1": "b2"}', 'Key: "a1"\nThe value is', ["b2"]),
    "longbook_sum_eng": _infinite(LONG, "", ["An old mill by a river."]),
    "longbook_qa_eng": _infinite(LONG, "Where did the mill stand?", ["by the river"]),
    "longbook_qa_chn": _infinite(LONG, "谁？", ["北京"]),
    "longbook_choice_eng": _infinite(LONG, "Who?", ["Bob"], ["Ann", "Bob", "Cid", "Dee"]),
    "longdialogue_qa_eng": _infinite(LONG, "Who is it?", ["MARY"]),
    "math_find": _infinite("[1, 7, 3]", "The largest number of the list is:", [7]),
    "math_calc": _infinite("1 + 2 + 4", "", [1, 3, 7]),
    "code_run": _infinite("def func_1(x): ...", "Please give me the value of func_1(-3).", [12]),
    "code_debug": _infinite("def get_x(): ...", "Which function?", ["get_x"], OPTIONS),
}


def make_infinitebench(folder: Path) -> Path:
    for task, row in INFINITEBENCH.items():
        write_lines(folder / f"{task}.jsonl", [row])
    return folder


def ruler_row(**more: Any) -> dict[str, Any]:
    row = {
        "index": 0,
        "input": f"Some special magic numbers are hidden. {LONG} What are they?",
        "outputs": ["1234567", "7654321"],
        "length": 100,
        "answer_prefix": " The special magic numbers are",
    }
    return row | more


def make_ruler(folder: Path) -> Path:
    for length in (256, 512):
        write_lines(folder / str(length) / "niah_multivalue" / "validation.jsonl", [ruler_row()])
        write_lines(
            folder / str(length) / "qa_1" / "validation.jsonl",
            [ruler_row(outputs=["Paris", "France"], input="Which?")],
        )
    write_lines(
        folder / "512" / "lines" / "validation.jsonl",
        [
            ruler_row(
                outputs=["24169"], input="The line?", task="lines", scorer="synthetic.number", max_length=512
            )
        ],
    )
    return folder


def make_babilong(folder: Path) -> Path:
    row = {"input": f"Mary went to the kitchen. {LONG}", "question": "Where is Mary? ", "target": "kitchen"}
    for length in ("0k", "1k"):
        (folder / length).mkdir(parents=True, exist_ok=True)
        (folder / length / "qa1.json").write_text(
            json.dumps([row, row | {"target": "office", "question": "Where was she?"}])
        )
    (folder / "qa12_0k.csv").write_text('input,question,target\n"Bill is, in the park.",Where?,garden\n')
    return folder


LONGMEMEVAL_ROW = {
    "question_id": "q1",
    "question_type": "multi-session",
    "question": "How many cats have I?",
    "answer": 3,
    "question_date": "2023/05/30",
    "haystack_dates": ["2023/05/20", "2023/05/10"],
    "haystack_session_ids": ["s2", "s1"],
    "haystack_sessions": [
        [{"role": "user", "content": "Now I have 3 cats."}, {"role": "assistant", "content": "Nice. "}],
        [{"role": "user", "content": "I have 2 cats.", "has_answer": True}],
    ],
}


def make_longmemeval(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        LONGMEMEVAL_ROW,
        LONGMEMEVAL_ROW | {"question_id": "q2_abs", "answer": "You did not say.", "question": "And dogs?"},
    ]
    (folder / "longmemeval_s.json").write_text(json.dumps(rows))
    return folder


def make_graphwalks(folder: Path) -> Path:
    row = {"prompt": f"Edges: a -> b. {LONG}", "answer_nodes": ["b", "c"], "problem_type": "bfs"}
    write_lines(
        folder / "walks.jsonl",
        [row, row | {"problem_type": "parents", "answer_nodes": ["d"], "prompt": "Edges: d -> a."}],
    )
    return folder


def make_mrcr(folder: Path) -> Path:
    chat = [
        {"role": "user", "content": "Write a poem about mills."},
        {"role": "assistant", "content": "The mill is old."},
        {"role": "user", "content": "Give the first poem about mills after x7q."},
    ]
    row = {
        "prompt": json.dumps(chat),
        "answer": "x7qThe mill is old.",
        "random_string_to_prepend": "x7q",
        "n_needles": 2,
    }
    write_lines(folder / "2needle.jsonl", [row, row | {"n_needles": 4}])
    return folder


def make_qmsum(folder: Path) -> Path:
    questions = [
        {"input": "Sum it up.", "answers": ["They spoke of the mill.", "A mill was spoken of."]},
        {"input": "Who spoke?", "answers": ["Ann did, for long."]},
    ]
    rows = [
        {"id": "m1", "split": "test", "context": f"Ann: {LONG}", "questions": questions},
        {"id": "m2", "split": "train", "context": "Bob: no.", "questions": questions},
    ]
    write_lines(folder / "meetings.jsonl", rows)
    repository = {
        "topic_list": [],
        "general_query_list": [{"query": "Summarize.", "answer": "A short talk."}],
        "specific_query_list": [{"query": "Why?", "answer": "Because of costs."}],
        "meeting_transcripts": [{"speaker": "Cid", "content": "Costs rose."}],
    }
    (folder / "test").mkdir()
    (folder / "test" / "es1.json").write_text(json.dumps(repository))
    return folder


def make_longchat(folder: Path) -> Path:
    topic = {"test_id": 0, "prompt": f"A record. {LONG}", "topics": ["The psychology of cats", "Mills"]}
    write_lines(
        folder / "5_topics.jsonl", [topic, topic | {"test_id": 1, "topics": ["Rivers"], "prompt": "Another."}]
    )
    line = {"prompt": f"Lines. {LONG}", "expected_number": 24169, "random_idx": ["x", 3], "correct_line": "l"}
    write_lines(folder / "200_lines.jsonl", [line])
    (folder / "conversations.jsonl").write_text('{"topic_id": 1, "topic": "x", "conversation": "y"}\n')
    return folder


def make_squality(folder: Path) -> Path:
    def asked(question: str, *summaries: str) -> dict[str, Any]:
        responses = [{"worker_id": "1", "uid": "u", "response_text": text} for text in summaries]
        return {"question_text": question, "question_number": 1, "responses": responses}

    questions = [
        asked("What is the plot of the story?", "Ann goes to the mill.", "A mill is visited by Ann."),
        asked("Who is Bob?", "Bob is the miller.", "He mills."),
    ]
    row = {"metadata": {"passage_id": "61", "uid": "x"}, "document": LONG, "questions": questions}
    write_lines(folder / "test.jsonl", [row])
    write_lines(
        folder / "dev.jsonl", [row | {"questions": [asked("Why?", "For costs."), asked("How?", "So.")]}]
    )
    return folder


def make_leval(folder: Path) -> Path:
    def row(kind: str, *pairs: tuple[str, str]) -> dict[str, Any]:
        asked, wanted = [list(part) for part in zip(*pairs, strict=True)]
        return {"input": LONG, "instructions": asked, "outputs": wanted, "source": "s", "evaluation": kind}

    write_lines(folder / "coursera.jsonl", [row("exam", ("Which?", "AC"), ("And which one?", "B"))])
    write_lines(folder / "gsm100.jsonl", [row("exam", ("How many?", "1250"))])
    write_lines(folder / "narrative_qa.jsonl", [row("f1", ("Where stood the mill?", "by the river"))])
    write_lines(folder / "news_summ.jsonl", [row("rouge", ("Sum it up.", "An old mill by a river."))])
    return folder


def make_choices(folder: Path) -> Path:
    row = {
        "question": "Which is a fruit?",
        "choices": ["stone", "a ripe apple", "wind", "sea"],
        "subject": "food",
    }
    rows = [
        row | {"answer": 1},
        row | {"answer": "B", "subject": "other"},
        row | {"answer": "a ripe apple", "context": LONG},
    ]
    write_lines(folder / "test.jsonl", rows)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "longbench": make_longbench,
    "longbench_e": make_longbench_e,
    "longbench_v2": make_longbench_v2,
    "longbench_v2_cot": make_longbench_v2,
    "infinitebench": make_infinitebench,
    "ruler_files": make_ruler,
    "babilong": make_babilong,
    "longmemeval": make_longmemeval,
    "graphwalks": make_graphwalks,
    "mrcr_files": make_mrcr,
    "qmsum": make_qmsum,
    "longchat": make_longchat,
    "squality": make_squality,
    "leval": make_leval,
    "multiple_choice": make_choices,
    "multiple_choice_cloze": make_choices,
}


def right_answer(question: Question) -> str:
    """What one says who knows the answer, in the form that the task asks for."""
    family, _, task = question.task.partition(".")
    references = question.references
    if family in ("longbench_v2", "longbench_v2_cot"):
        return f"The correct answer is ({references[0]})"
    if family == "ruler_files":
        return " and ".join(references)
    if family == "graphwalks":
        return f"It is.\nFinal Answer: [{', '.join(references)}]"
    if task == "math_calc":
        return f"[{', '.join(references)}]"
    if task in ("longbook_choice_eng", "code_debug"):
        return f"{references[-1]}."
    return references[0]
