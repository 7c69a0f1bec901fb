"""Every known answer of the published scorers, and InfiniteBench's published row from GPT-4's own answers."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.evaluation.scorers.choices import extract_answer
from longlora_cli.evaluation.scorers.helmet import parse_output
from longlora_cli.evaluation.scorers.longbench import code_line
from longlora_cli.evaluation.scorers.overlap import ROUGE_TYPES, rouge_measures
from longlora_cli.evaluation.scorers.words import bag_f1, normalize_chinese

FOLDER = Path(__file__).parent / "known_answers"
VECTORS = json.loads((FOLDER / "metric_vectors.json").read_text(encoding="utf-8"))
GROUPS = {group["metric"]: group["cases"] for group in VECTORS["groups"]}
PERPLEXITY = {"perplexity.windows", "perplexity.lm_eval_rolling_windows"}  # no scorers; see test_windows
CLASSES = ["Abbreviation", "Animal", "Food", "Other animal"]
CLASSES += ["Definition of something", "Description of something", "Date"]
NESTED = ["Org", "Org of", "Org of body", "Other"]

Check = tuple[str, str, list, dict, float]  # scorer, prediction, references, extra, value


def qa_f1(case: dict) -> Iterator[Check]:
    pair = case["prediction"], [case["reference"]], {}
    book = case["prediction"], [case["reference"]], {"task": "longbook_qa_eng"}
    yield "longbench.qa_f1_score", *pair, case["score"]
    yield "longbench.qa_f1", *pair, case["lm_eval_longbench"]
    yield "f1", *pair, case["leval"]
    yield "helmet.raw.f1", *pair, case["helmet_f1"]
    yield "infinitebench@2024-06", *book, case["infinitebench"]
    yield "infinitebench@2024-08", *book, case["lm_eval_infinitebench"]


def qa_f1_zh(case: dict) -> Iterator[Check]:
    pair = case["prediction"], [case["reference"]], {"task": "longbook_qa_chn"}
    yield "longbench.qa_f1_zh", *pair, case["score"]
    yield "infinitebench@2024-06", *pair, case["infinitebench_char_f1"]
    yield "infinitebench@2024-08", *pair, case["lm_eval_infinitebench"]


def rouge(case: dict) -> Iterator[Check]:
    pair = case["prediction"], [case["reference"]], {"task": "longbook_sum_eng"}
    for kind in ROUGE_TYPES:
        yield f"rouge.{kind}", *pair, case["rouge_score"][kind]["f"]
        yield f"rouge.{kind}@rouge_score-0.1.2-stemmer", *pair, case["rouge_score_stem"][kind]["f"]
    yield "longbench.rouge", *pair, case["longbench_rouge_score"]
    yield "longbench.rouge@lm-eval", *pair, case["lm_eval_longbench_rouge"]
    yield "infinitebench@2024-06", *pair, case["hf_evaluate_rougeLsum_f_no_aggregator"]
    yield "infinitebench@2024-08", *pair, case["lm_eval_infinitebench_rouge"]


def words_of(description: str) -> str:
    """`w0 … w399 (...)` -> those 400 words."""
    match = re.match(r"(\w)0 … \w(\d+)", description)
    assert match is not None
    return " ".join(f"{match[1]}{n}" for n in range(int(match[2]) + 1))


def recursion(case: dict) -> Iterator[Check]:
    prediction = words_of(case["prediction"])
    is_same = case["reference"] == "identical"
    reference = prediction if is_same else words_of(case["reference"])
    assert case["raw_library_outcome"] == "ok"  # where it is not, see test_a_long_sentence_has_its_score
    yield "longbench.rouge", prediction, [reference], {}, case["longbench_rouge_score"]
    yield "rouge.rougeL", prediction, [reference], {}, case["rouge_score_rougeL_f"]


def code_sim(case: dict) -> Iterator[Check]:
    pair = case["prediction"], [case["reference"]], {"task": "lcc"}
    for name in ("longbench.code_sim", "longbench"):
        yield name, *pair, case["score_with_python_Levenshtein"]
        yield f"{name}@no-levenshtein", *pair, case["score_with_difflib_only"]
    yield "longbench.code_sim@lm-eval-v6", *pair, case["lm_eval_v6"]


def classification(case: dict) -> Iterator[Check]:
    extra = {"all_classes": CLASSES}
    yield "longbench.classification", case["prediction"], [case["reference"]], extra, case["score"]
    for name in ("longbench", "longbench.classification"):
        line = {**extra, "task": "trec"}
        yield name, case["prediction"], [case["reference"]], line, case["score_after_eval_py_first_line"]


def infinitebench(case: dict) -> Iterator[Check]:
    label = case["label"] if isinstance(case["label"], list) else [case["label"]]
    row = case["prediction"], label, {"task": case["task"]}
    yield "infinitebench", *row, case["score"]
    if "lm_eval" in case:
        yield "infinitebench@2024-08", *row, case["lm_eval"]


def ruler(case: dict) -> Iterator[Check]:
    row = case["prediction"], case["references"], {}
    yield "ruler.all", *row, case["all"]
    yield "ruler.part", *row, case["part"]
    yield "ruler.all", *row, case["lm_eval_all"]
    yield "ruler.part@lm-eval", *row, case["lm_eval_part"]


def helmet(case: dict) -> Iterator[Check]:
    for kind in ("raw", "parsed"):
        for key, value in case[f"{kind}_metrics"].items():
            yield f"helmet.{kind}.{key}", case["prediction"], case["references"], {}, value
    for key, value in case["raw_metrics"].items():
        best = max(value, case["parsed_metrics"][key])
        yield f"helmet.{key}", case["prediction"], case["references"], {}, best


def babilong(case: dict) -> Iterator[Check]:
    row = case["prediction"], [case["target"]], {"task": case["task"], "question": case["question"]}
    yield "babilong", *row, float(case["score"])
    yield "babilong@lm-eval", *row, case["lm_eval"]


def graphwalks(case: dict) -> Iterator[Check]:
    for key in ("f1", "flexible_f1"):
        yield f"graphwalks.{key}", case["prediction"], case["answer_nodes"], {}, case[key]


def pair_of(name: str, **extra: object) -> object:
    """The checks of a group that has one reference and one score."""

    def checks(case: dict) -> Iterator[Check]:
        yield name, case["prediction"], [case["reference"]], extra, case["score"]

    return checks


CHECKS = {
    "longbench.qa_f1_score": qa_f1,
    "longbench.max_over_references(qa_f1)": lambda c: [
        ("longbench.qa_f1", c["prediction"], c["references"], {}, c["score"])
    ],
    "longbench.qa_f1_zh_score": qa_f1_zh,
    "rouge": rouge,
    "rouge.against_perl_1_5_5": lambda c: [
        (f"rouge.{c['type']}", c["prediction"], [c["reference"]], {}, c["f"])
    ],
    "longbench.rouge_score.recursion_trap": recursion,
    "longbench.code_sim_score": code_sim,
    "longbench.classification_score.nested_names": pair_of("longbench.classification", all_classes=NESTED),
    "longbench.classification_score": classification,
    "longbench.count_score": pair_of("longbench.count"),
    "longbench.retrieval_score": pair_of("longbench.retrieval"),
    "longbench2.extract_answer": lambda c: [
        ("longbench2", c["prediction"], [letter], {}, float(letter == c["extracted"])) for letter in "ABCD"
    ],
    "infinitebench": infinitebench,
    "ruler.string_match": ruler,
    "helmet.calculate_metrics": helmet,
    "babilong.compare_answers": babilong,
    "nolima": lambda c: [
        (f"nolima.{key}", c["prediction"], c["gold"], {}, c[key])
        for key in ("EM", "contains", "lastline_EM", "lastline_contains")
    ],
    "leval.exact_match": pair_of("leval.exact_match"),
    "graphwalks": graphwalks,
    "mrcr": lambda c: [
        ("mrcr", c["prediction"], [c["answer"]], {"random_string_to_prepend": c["prefix"]}, c["score"])
    ],
}
ALL_CASES = [(metric, case) for metric in CHECKS for case in GROUPS[metric]]


def test_every_group_of_vectors_is_checked() -> None:
    assert set(GROUPS) == set(CHECKS) | PERPLEXITY


@pytest.mark.parametrize(("metric", "case"), ALL_CASES, ids=[f"{m}-{c['id']}" for m, c in ALL_CASES])
def test_a_known_answer_comes_out_to_1e_9(metric: str, case: dict) -> None:
    checks = list(CHECKS[metric](case))
    assert checks
    for name, prediction, references, extra, value in checks:
        choice = find_scorer(name)
        found = choice.score(prediction, references, extra)[choice.key]
        assert found == pytest.approx(value, rel=0, abs=1e-9), name


@pytest.mark.parametrize("case", GROUPS["rouge"] + GROUPS["rouge.against_perl_1_5_5"], ids=lambda c: c["id"])
def test_rouge_gives_the_known_precision_and_recall(case: dict) -> None:
    plain = {case["type"]: case} if "type" in case else case["rouge_score"]
    for stem, expected in ((False, plain), (True, case.get("rouge_score_stem", {}))):
        found = rouge_measures(case["prediction"], case["reference"], stem=stem)
        for kind, measures in expected.items():
            for key in "prf":
                assert found[kind][key] == pytest.approx(measures[key], rel=0, abs=1e-9)


def test_the_steps_inside_scorers_have_their_known_results() -> None:
    for case in GROUPS["longbench.code_sim_score"]:
        assert code_line(case["prediction"]) == case["selected_line"]
    for case in GROUPS["longbench2.extract_answer"]:
        assert extract_answer(case["prediction"]) == case["extracted"]
    for case in GROUPS["helmet.calculate_metrics"]:
        assert parse_output(case["prediction"]) == case["parsed"]
    for case in GROUPS["longbench.qa_f1_zh_score"]:
        characters = map(normalize_chinese, (case["prediction"], case["reference"]))
        assert bag_f1(*characters) == pytest.approx(case["infinitebench_char_f1"], abs=1e-9)


def read_answers(task: str) -> tuple[bytes, list[dict]]:
    packed = (FOLDER / "infinitebench_gpt4" / f"preds_{task}.jsonl.xz").read_bytes()
    content = lzma.decompress(packed)
    return content, [json.loads(line) for line in content.decode().splitlines()]


def mean_score(name: str, task: str, rows: list[dict]) -> float:
    scorer = find_scorer(name)
    labels = [r["ground_truth"] if isinstance(r["ground_truth"], list) else [r["ground_truth"]] for r in rows]
    scores = [
        scorer.score(row["prediction"], label, {"task": task})["score"]
        for row, label in zip(rows, labels, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


PUBLISHED = [
    row
    for row in VECTORS["corpus_level"]["rows"]
    if (FOLDER / "infinitebench_gpt4" / f"preds_{row['task']}.jsonl.xz").is_file()
]


def test_ten_of_twelve_tasks_have_their_answers_here() -> None:
    assert len(PUBLISHED) == 10


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["task"])
def test_gpt4s_answers_get_the_published_score(row: dict) -> None:
    content, answers = read_answers(row["task"])
    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert len(answers) == row["n"]
    assert round(mean_score("infinitebench@2024-06", row["task"], answers), 2) == row["mean_x100"]


# What lm-evaluation-harness gives for the same answers.
@pytest.mark.parametrize(
    ("task", "value"), [("code_debug", 51.02), ("longbook_choice_eng", 64.19), ("longbook_sum_eng", 13.96)]
)
def test_the_later_rules_give_the_later_scores(task: str, value: float) -> None:
    assert round(mean_score("infinitebench@2024-08", task, read_answers(task)[1]), 2) == value
