"""lm-evaluation-harness's own scorers as an independent judge, on the known answers and on random rows.

It differs from the published rules in places; our versions `lm-eval` and `2024-08` follow it there.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_cli.evaluation.scorers import find_scorer

lm_eval = pytest.importorskip("lm_eval", reason="in the extra dev")
VECTORS = json.loads(
    (Path(__file__).parent / "known_answers" / "metric_vectors.json").read_text(encoding="utf-8")
)
GROUPS = {group["metric"]: group["cases"] for group in VECTORS["groups"]}
WORDS = [
    "Paris",
    "city of light",
    "71432",
    "kitchen",
    "\x00",
    "\t",
    "paris",
    " ",
    "Final Answer: [",
    "a,b]",
    "\n",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


def ours(name: str, prediction: str, references: list, **extra: Any) -> float:
    choice = find_scorer(name)
    return choice.score(prediction, references, extra)[choice.key] / choice.scorer.scale


@settings(max_examples=200, deadline=None)
@given(
    TEXTS, st.lists(st.sampled_from(["Paris", "71432", "City of Light", "kitchen"]), min_size=1, max_size=4)
)
def test_ruler_rows_get_lm_evals_scores(prediction: str, references: list[str]) -> None:
    from lm_eval.tasks.ruler import common_utils

    row = {"outputs": references, "max_length": 4096}
    assert ours("ruler.all", prediction, references) == pytest.approx(
        common_utils.process_results(row, [prediction])["4096"], abs=1e-12
    )
    assert ours("ruler.part@lm-eval", prediction, references) == pytest.approx(
        common_utils.process_results_part(row, [prediction])["4096"], abs=1e-12
    )


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.sampled_from("abc"), max_size=4))
def test_graph_walks_get_lm_evals_scores(prediction: str, nodes: list[str]) -> None:
    from lm_eval.tasks.graphwalks import utils

    expected = utils.process_results({"answer_nodes": nodes}, [prediction])
    assert find_scorer("graphwalks").score(prediction, nodes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", GROUPS["babilong.compare_answers"], ids=lambda case: case["id"])
def test_babilong_rows_get_lm_evals_scores(case: dict) -> None:
    from lm_eval.tasks.babilong import common_utils

    expected = common_utils.process_results({"target": case["target"]}, [case["prediction"]])["acc"]
    assert ours("babilong@lm-eval", case["prediction"], [case["target"]]) == expected


LM_EVAL_RULES = {
    "passkey": "int_match",
    "number_string": "int_match",
    "kv_retrieval": "kv",
    "math_find": "math",
    "code_run": "code_run",
    "code_debug": "code_debug",
    "longbook_choice_eng": "choice",
    "longbook_qa_eng": "qa_en",
    "longbook_qa_chn": "qa_chn",
    "longbook_sum_eng": "rouge",
    "longdialogue_qa_eng": "",
}
ANSWERS = {
    "passkey": ["71432"],
    "number_string": ["71432"],
    "kv_retrieval": ["Paris"],
    "math_find": ["7"],
    "code_run": ["-7"],
    "code_debug": ["get_x"],
    "longbook_choice_eng": ["the city"],
    "longbook_qa_eng": ["the U.S.A. city", "a pear"],
    "longbook_qa_chn": ["“北京”市"],
    "longbook_sum_eng": ["cats sat on the mats"],
    "longdialogue_qa_eng": ["PARIS", "Rome"],
}
OPTIONS = ["x", "get_x", "the city", "y"]
PIECES = [
    *(
        "A",
        "B",
        "C.",
        "a",
        "b",
        "answer is:",
        "is:",
        "Answer:",
        "option is",
        "Option",
        "get_x",
        "get_xy",
        "the city",
    ),
    *(
        "7",
        "7.0",
        "-7",
        "71432",
        "Paris",
        "paris",
        "U.S.A.",
        "the",
        "“北京”",
        "市",
        "cat",
        "sat",
        "*",
        "-",
        ".",
        "\n",
    ),
]


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(sorted(ANSWERS)),
    st.lists(st.sampled_from(PIECES), max_size=7),
    st.sampled_from(["", " "]),
)
def test_infinitebench_rows_get_lm_evals_scores_by_the_later_rules(
    task: str, parts: list[str], joint: str
) -> None:
    from lm_eval.tasks.infinitebench import utils

    rule = getattr(utils, f"process_results_{LM_EVAL_RULES[task]}".removesuffix("_"))
    prediction, options = joint.join(parts), OPTIONS
    expected = rule({"answer": ANSWERS[task], "options": options}, [prediction])["score"]
    found = ours("infinitebench@2024-08", prediction, ANSWERS[task], task=task, options=options)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def longbench_metrics(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's LongBench scorers. They import fuzzywuzzy, which code similarity alone uses: an empty one will do."""
    fuzzywuzzy = types.ModuleType("fuzzywuzzy")
    fuzzywuzzy.fuzz = types.ModuleType("fuzz")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fuzzywuzzy", fuzzywuzzy)
    find_scorer("longbench.qa_f1_zh").score("北京", ["北京"])  # imports jieba with its warnings off
    from lm_eval.tasks.longbench import metrics

    return metrics


@pytest.mark.filterwarnings("ignore")
def test_longbench_rows_get_lm_evals_scores(longbench_metrics: Any) -> None:
    classes = ["Food", "Date", "Org", "Org of"]
    pairs = [
        (case["prediction"], case["reference"])
        for name in ("longbench.qa_f1_score", "longbench.qa_f1_zh_score", "rouge", "longbench.count_score")
        for case in GROUPS[name]
    ]
    for prediction, reference in pairs:
        row = {"answers": [reference, "Org"], "all_classes": classes}
        for kind in ("qa_f1", "qa_f1_zh", "rouge", "rouge_zh", "classification", "count"):
            version = "@lm-eval" if kind == "rouge" else ""
            expected = getattr(longbench_metrics, f"get_{kind}_score")(row, [prediction])[f"{kind}_score"]
            found = ours(f"longbench.{kind}{version}", prediction, row["answers"], all_classes=classes)
            assert found == pytest.approx(expected, abs=1e-12), (kind, prediction, reference)
