"""What holds for every scorer: its range, equal texts, several references, and the packages that published them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.scorers import ALL, Scorer, UnscorableError, find_scorer, overlap, words
from longlora_cli.evaluation.scorers.babilong import TASK_LABELS
from longlora_cli.evaluation.scorers.longbench import TASK_RULES, bucket_of, classification, edit_percent
from longlora_cli.evaluation.scorers.overlap import sentence_union_rouge

# Whatever a model may write, and mostly what the rules look for.
PIECES = [
    *("the", "a", "U.S.A.", "no", "yes", "none", "one", "Paragraph 3", "段落3", "北京", "是", "首都", "答案"),
    *("7", "12", "3.5", "kitchen", "office", "apple", "milk", ".", ",", " ", "\n", "`", "#", "//", "A", "B."),
    *(
        "Final Answer: [",
        "]",
        "Answer:",
        "answer is:",
        "is:",
        "The correct answer is (",
        "C",
        ")",
        "KEY",
        "\x00",
    ),
    *("“curly”", "naïve", "option", "x = 1", "'", '"', "**", "e,n", "\ud83d"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda joint: joint.join(parts))
)
WORDS = st.lists(st.sampled_from(["cat", "dog", "Sat", "on", "mats", "seven"]), min_size=1, max_size=8)
SENTENCES = WORDS.map(" ".join)
OPTIONS = ["get_x", "get_y", "x = 1", "the one"]
INFINITEBENCH = {
    "passkey": ["71432"],
    "number_string": ["6884477777"],
    "kv_retrieval": ["c14cb8ba"],
    "code_run": [7],
    "math_find": [3.5],
    "math_calc": [7, 12, 3],
    "code_debug": ["get_x", "A"],
    "longbook_choice_eng": ["the one"],
    "longdialogue_qa_eng": ["KEY", "THE KEY"],
    "longbook_qa_eng": ["the one", "seven"],
    "longbook_qa_chn": ["北京"],
    "longbook_sum_eng": ["seven cats sat on mats"],
}
CLASSES = ["no", "none", "kitchen", "office", "apple"]
OF_NUMBERS = ("synthetic.number", "longchat.lines")


@st.composite
def rows(draw: Callable, scorer: Scorer) -> tuple[str, list, dict]:
    """A prediction, references and extra fields that a scorer can judge."""
    prediction = draw(TEXTS)
    extra: dict = {"all_classes": CLASSES, "question": draw(TEXTS), "options": OPTIONS, "prefix": "KEY"}
    references: list = draw(st.lists(SENTENCES, min_size=1, max_size=3))
    if scorer.name == "infinitebench":
        extra["task"] = draw(st.sampled_from(sorted(INFINITEBENCH)))
        references = INFINITEBENCH[extra["task"]]
    elif scorer.name == "leval":
        extra["evaluation"] = draw(st.sampled_from(["exam", "f1", "rouge"]))
    elif scorer.name == "longbench2":
        references = [draw(st.sampled_from("ABCD"))]
    elif scorer.name == "babilong":
        extra["task"] = draw(st.sampled_from(sorted(TASK_LABELS)))
        references = [draw(st.sampled_from(TASK_LABELS[extra["task"]]))]
    elif scorer.name == "ruler":
        extra["task"] = draw(st.sampled_from(["qa_1", "niah_single_1"]))
    elif scorer.name in OF_NUMBERS:
        references = ["7", "12"]
    elif scorer.name == "synthetic.order":
        references = ["kitchen, office, apple"]
    elif scorer.name == "longbench":
        known = [task for task, rule in TASK_RULES.items() if rule != "rouge_zh"]
        extra["task"] = draw(st.sampled_from(known))
    if "passage_retrieval_en" in str(extra.get("task")) or scorer.name == "longbench.retrieval":
        references = ["Paragraph 3"]
    if "passage_retrieval_zh" in str(extra.get("task")) or scorer.name == "longbench.retrieval_zh":
        references = ["段落3"]
    return prediction, references, extra


@pytest.mark.parametrize("scorer", ALL, ids=lambda scorer: scorer.version)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_score_lies_between_0_and_1_and_a_binary_one_is_either(scorer: Scorer, data: st.DataObject) -> None:
    found = scorer.score(*data.draw(rows(scorer)))
    assert tuple(found) == scorer.keys or set(found) == set(scorer.keys)
    for value in found.values():
        assert isinstance(value, float)
        assert 0 <= value / scorer.scale <= 1
        assert not scorer.binary or value in (0, scorer.scale)


# What each scorer's own text is; all others take words.
OWN_TEXTS = {
    "longbench.qa_f1_zh": st.just("北京是中国的首都"),
    "longbench.rouge_zh": st.just("北京是中国的首都"),
    "longbench.count": st.integers(0, 99).map(str),
    "longbench.retrieval": st.integers(0, 99).map("Paragraph {}".format),
    "longbench.retrieval_zh": st.integers(0, 99).map("段落{}".format),
    "longbench.classification": st.sampled_from(CLASSES[1:]),
    "synthetic.order": st.permutations(["cat", "dog", "seven"]).map(", ".join),
    **dict.fromkeys(OF_NUMBERS, st.integers(0, 9999).map(str)),
}
OF_ANY_TEXT = [
    scorer
    for scorer in ALL
    if scorer.name
    not in ("longbench", "longbench2", "infinitebench", "ruler", "babilong", "graphwalks", "mrcr", "leval")
]


@pytest.mark.parametrize("scorer", OF_ANY_TEXT, ids=lambda scorer: scorer.version)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_with_a_word_scores_1_against_itself(scorer: Scorer, data: st.DataObject) -> None:
    text = data.draw(OWN_TEXTS.get(scorer.name, SENTENCES))
    extra = {"all_classes": [text]}
    found = scorer.score(text, [text], extra)
    # LongBench's F has 1e-8 under the line, and rouge_score's 2 has none to find in one word.
    kept = {key: value for key, value in found.items() if not key.startswith("rouge2") or " " in text}
    assert kept == pytest.approx(dict.fromkeys(kept, scorer.scale), abs=1e-8 * scorer.scale)


# ruler.all is a share of the references, so it is not among them.
BEST_OF_REFERENCES = [s for s in OF_ANY_TEXT if s.name != "ruler.all" and s.version != "ruler.part@lm-eval"]


@pytest.mark.parametrize("scorer", BEST_OF_REFERENCES, ids=lambda scorer: scorer.version)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_another_reference_never_lowers_the_score(scorer: Scorer, data: st.DataObject) -> None:
    prediction, references, extra = data.draw(rows(scorer))
    more = [*references, data.draw(OWN_TEXTS.get(scorer.name, SENTENCES))]
    few, many = scorer.score(prediction, references, extra), scorer.score(prediction, more, extra)
    assert all(many[key] >= few[key] for key in few)


LINES = st.lists(st.sampled_from(["a", "b", "c", "dd", ".", " ", "\n", "a b c", "c b a", "A"]), max_size=30)


@settings(max_examples=400, deadline=None)
@given(LINES.map(" ".join) | LINES.map("".join), LINES.map(" ".join) | LINES.map("".join))
def test_sentence_union_rouge_is_that_of_the_package_rouge(prediction: str, reference: str) -> None:
    package = pytest.importorskip("rouge", reason="in the extra dev")
    try:
        found = package.Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:  # no sentence; LongBench makes it 0
        found = 0.0
    assert sentence_union_rouge(prediction, reference) == pytest.approx(found, rel=0, abs=1e-12)


def test_a_long_sentence_has_its_score_where_the_package_dies() -> None:
    package = pytest.importorskip("rouge", reason="in the extra dev")
    words = " ".join(f"w{n}" for n in range(1200))
    with pytest.raises(RecursionError):
        package.Rouge().get_scores([words], [words])
    # 2PR / (P + R + 1e-8) with P = R = 1.
    assert sentence_union_rouge(words, words) == pytest.approx(2 / (2 + 1e-8), rel=0, abs=1e-15)
    half = " ".join(f"w{n}" for n in range(0, 1200, 2))
    assert sentence_union_rouge(half, words) == pytest.approx(2 * 0.5 / (1.5 + 1e-8), rel=0, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.sampled_from(["no", "none", "one", "a", "kitchen", "th", "the"]), max_size=7))
def test_classification_passes_over_the_name_behind_a_removed_one(text: str, names: list[str]) -> None:
    for reference in ("none", "the kitchen", "kitchen"):
        held = [name for name in names if name in text]
        for name in held:  # as published: the list shrinks under the loop
            if name in reference and name != reference:
                held.remove(name)
        expected = 1 / len(held) if reference in held else 0.0
        assert classification(text, reference, {"all_classes": names}) == expected


@settings(max_examples=300, deadline=None)
@given(st.text("ab x", max_size=12), st.text("ab x", max_size=12))
def test_edit_percent_is_twice_the_common_subsequence_over_both_lengths(first: str, second: str) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, two in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == two else max(table[i][j + 1], table[i + 1][j])
    both = len(first) + len(second)
    expected = 100 * 2 * table[-1][-1] / both if both else 100
    assert edit_percent(first, second) == pytest.approx(expected, abs=0.5 + 1e-9)


def test_equal_texts_are_100_per_cent_and_an_empty_one_is_0() -> None:
    assert [edit_percent("", ""), edit_percent("a", ""), edit_percent("", "a")] == [100, 0, 0]


def test_longbench_e_has_three_buckets() -> None:
    assert [bucket_of(n) for n in (0, 3999, 4000, 7999, 8000, 90000)] == [
        *("0-4k", "0-4k"),
        *("4-8k", "4-8k"),
        *("8k+", "8k+"),
    ]


def test_a_numeral_of_any_length_is_read() -> None:
    digits = "7" * 10_000  # int() refuses more than 4,300
    for task, wrong in (("math_calc", [7, 1]), ("math_find", [7]), ("passkey", ["7"]), ("code_run", [7])):
        for version in ("2024-06", "2024-08"):
            scorer = find_scorer(f"infinitebench@{version}")
            assert scorer.score(digits, wrong, {"task": task}) == {"score": 0.0}
    assert find_scorer("infinitebench").score("007 1", [7, 1], {"task": "math_calc"}) == {"score": 1.0}


def test_a_number_that_is_not_whole_is_wrong_for_a_whole_one_and_no_fault() -> None:
    score = find_scorer("infinitebench").score
    assert score("17.5", [17], {"task": "math_find"}) == {"score": 0.0}
    assert score("about 17.0", [17], {"task": "math_find"}) == {"score": 1.0}


@pytest.mark.parametrize(
    ("name", "references", "extra", "fault"),
    [
        ("infinitebench", ["x"], {}, "task is missing"),
        ("infinitebench", ["x"], {"task": "passkye"}, "'passkye' is not of infinitebench"),
        ("infinitebench", ["seven"], {"task": "code_run"}, "'seven' is not a whole number"),
        ("infinitebench", ["x"], {"task": "math_find"}, "'x' is not a number"),
        ("infinitebench", ["get_x"], {"task": "code_debug"}, "options is missing"),
        ("infinitebench", ["y"], {"task": "code_debug", "options": ["x"]}, "'y' is none of the options"),
        ("longbench", ["x"], {"task": "trek"}, "'trek' is not of longbench"),
        ("longbench.classification", ["x"], {}, "all_classes is missing"),
        ("longbench.classification", ["x"], {"all_classes": "x"}, "all_classes is 'x'"),
        ("longbench.retrieval", ["3"], {}, "does not name a paragraph"),
        ("longbench@rouge_score", ["x"], {"task": "vcsum"}, "drops all Chinese"),
        ("longbench2", ["E"], {}, "'E' is none of A, B, C, D"),
        ("babilong", ["x"], {"question": "?"}, "task is missing"),
        ("babilong", ["x"], {"task": "qa21", "question": "?"}, "'qa21' is none of qa1 to qa20"),
        ("babilong", ["x"], {"task": "qa1"}, "question is missing"),
        ("ruler.all", [""], {}, "empty reference"),
        ("ruler", ["x"], {}, "task is missing"),
        ("accuracy", [" "], {}, "empty reference"),
        ("mrcr", ["x"], {}, "prefix is missing"),
        ("mrcr", ["x"], {"prefix": ""}, "prefix is empty"),
    ],
)
def test_a_row_that_cannot_be_judged_is_an_error_and_never_0(
    name: str, references: list, extra: dict, fault: str
) -> None:
    with pytest.raises(UnscorableError, match=fault):
        find_scorer(name).score("7", references, extra)


@pytest.mark.parametrize("scorer", ALL, ids=lambda scorer: scorer.version)
def test_a_prediction_that_is_no_text_is_an_error_and_never_0(scorer: Scorer) -> None:
    extra = {"all_classes": ["a"], "question": "?", "prefix": "x", "evaluation": "exam"}
    tasks = {"babilong": "qa1", "infinitebench": "passkey", "ruler": "qa_1", "longbench": "lcc"}
    extra["task"] = tasks.get(scorer.name, "own")
    own = {"longbench.retrieval": "Paragraph 1", "longbench.retrieval_zh": "段落1", "longchat.lines": "1"}
    references = [own.get(scorer.name, "A")]
    with pytest.raises((TypeError, AttributeError)):
        scorer.score(None, references, extra)


@pytest.mark.parametrize(
    ("package", "name", "install"),
    [
        ("jieba", "longbench.qa_f1_zh", "pip install 'longlora-cli[chinese]'"),
        ("rapidfuzz", "longbench.code_sim", "pip install 'rapidfuzz'"),
        ("rouge_score", "rouge", "pip install 'rouge-score'"),
    ],
)
def test_a_missing_package_is_named_and_nothing_takes_its_place(
    package: str, name: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached in (words._segmenter, overlap._rouge_scorer):
        cached.cache_clear()

    def missing(module: str) -> object:
        assert module.split(".")[0] == package
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(SettingsError, match=f"needs the package {package}") as raised:
        find_scorer(name).score("a", ["b"])
    assert raised.value.rule == "No other metric is used in its place."
    assert raised.value.hint == install


def test_the_segmenter_reads_its_dictionary_and_no_cache_of_others(tmp_path, monkeypatch) -> None:
    (tmp_path / "jieba.cache").write_bytes(b"not marshal")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    segmenter = words._segmenter.__wrapped__()
    assert list(segmenter.cut("北京是中国的首都")) == ["北京", "是", "中国", "的", "首都"]
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"not marshal"


# By the rules as published, where no known answer lies: partial letters, numbers, blank ends, prefixes.
RULES = [
    ("leval.exact_match", "A", "ACD", {}, 0.25),
    ("leval.exact_match", "AB", "ACD", {}, 0.0),
    ("leval.exact_match", "A, C", "AC", {}, 0.0),
    ("leval.exact_match", "3.0", "3", {}, 1.0),
    ("leval.exact_match", "4", "3", {}, 0.0),
    ("leval.exact_match", "\nThe Cat sat\nno", "thecat", {}, 1.0),
    ("leval.exact_match", "no\nThe Cat sat", "thecat", {}, 0.0),
    ("graphwalks.f1", "Final Answer: ['a', \"b\"]\n\n", "a", {}, 2 / 3),
    ("graphwalks.f1", "Final Answer: [a]\nthat is it", "a", {}, 0.0),
    ("graphwalks.flexible_f1", "Final Answer: [b]\nFinal Answer: [a]\nthat is it", "a", {}, 1.0),
    ("mrcr", "KEYabcd", "KEYabcx", {"prefix": "KEY"}, 0.75),
    ("longbench2@compensated", "I do not know", "B", {}, 0.25),
    ("longbench2", "The correct answer is C, no: The correct answer is (B)", "B", {}, 1.0),
    ("helmet.f1", "Yes, it is", "yes", {}, 0.0),
    ("helmet.exact_match", "I think\nanswer: Answer: the Paris.\nx", "Paris", {}, 1.0),
    (
        "babilong",
        "kitchen, not the office",
        "kitchen",
        {"task": "qa1", "question": "Who is in the Office?"},
        1.0,
    ),
    ("babilong", "milk and apple", "apple,milk", {"task": "qa8", "question": "?"}, 1.0),
    ("babilong", "milk", "apple,milk", {"task": "qa8", "question": "?"}, 0.0),
    ("babilong", "n,e", "n,e", {"task": "babilong_qa19", "question": "?"}, 1.0),
    ("babilong", "none", "none", {"task": "qa7", "question": "?"}, 0.0),  # "one" is in it: published so
    ("ruler", "paris", "Paris", {"task": "qa_2"}, 100.0),
    ("nolima.EM", " Yuki\n", "Yuki", {}, 1.0),
    ("nolima.contains", "yuki", "Yuki", {}, 0.0),
    ("infinitebench", "B. the one", "B", {"task": "longbook_choice_eng"}, 1.0),
    ("longbench.code_sim", "#\n", "", {}, 1.0),
    ("longbench.code_sim@no-levenshtein", "#\n", "", {}, 1.0),
    ("longbench.code_sim@no-levenshtein", "#\n", "a", {}, 0.0),
    ("infinitebench", "AB C", "C", {"task": "longbook_choice_eng"}, 0.0),
    ("infinitebench", "so AB then C", "C", {"task": "longbook_choice_eng"}, 0.0),
    ("infinitebench", "so then C", "C", {"task": "longbook_choice_eng"}, 1.0),
    ("infinitebench@2024-08", "it was a mistake", "A", {"task": "longbook_choice_eng"}, 1.0),
]


@pytest.mark.parametrize(("name", "prediction", "reference", "extra", "value"), RULES)
def test_a_rule_holds_where_no_known_answer_lies(
    name: str, prediction: str, reference: str, extra: dict, value: float
) -> None:
    choice = find_scorer(name)
    assert choice.score(prediction, [reference], extra)[choice.key] == pytest.approx(value, abs=1e-12)


def test_ruler_takes_all_references_but_for_questions() -> None:
    choice = find_scorer("ruler")
    for task, value in (("niah_multivalue", 50.0), ("vt", 50.0), ("qa_1", 100.0), ("ruler_qa_hotpot", 100.0)):
        assert choice.score("Paris", ["paris", "Rome"], {"task": task}) == {"score": value}


def test_names_lead_to_scorers_and_versions() -> None:
    assert find_scorer("longbench.qa_f1_score").scorer.version == "longbench.qa_f1@2e00731"
    assert find_scorer("infinitebench").scorer.version == "infinitebench@2024-06"
    assert find_scorer("infinitebench@2024-08").scorer.version == "infinitebench@2024-08"
    assert find_scorer("rouge.rougeL@rouge_score-0.1.2-stemmer").key == "rougeL"
    assert find_scorer("helmet.parsed.f1").scorer.name == "helmet.parsed"
    assert find_scorer("babilong.compare_answers").scorer.name == "babilong"
    for name, fault in (
        ("longbench.qaf1", r"unknown scorer; did you mean longbench\.qa_f1\?"),
        ("helmet.f2", "unknown scorer"),
        ("", "unknown scorer"),
        ("infinitebench@2025", "unknown version"),
    ):
        with pytest.raises(SettingsError, match=fault):
            find_scorer(name)


def test_no_two_scorers_share_a_version() -> None:
    versions = [scorer.version for scorer in ALL]
    assert len(set(versions)) == len(versions)
    assert all(scorer.version.startswith(f"{scorer.name}@") for scorer in ALL)


def test_the_docs_name_every_scorer_and_version() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "eval.md").read_text(encoding="utf-8")
    table = page.split("| scorer | versions |")[1]
    for scorer in ALL:
        name, version = scorer.version.split("@")
        rule = name.partition(".")[2]
        assert f"`{name}`" in table or f"`.{rule}`" in table
        assert f"`{version}`" in table
