"""LongBench v1's scorers and how its tasks use them, as at THUDM/LongBench 2e00731 (MIT).

The score of an answer is the best over its references; the answers of four few-shot tasks are cut to their first line
before. Where the published code swallows an exception (ROUGE on long sentences), the score is computed here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from longlora_cli.evaluation.scorers.base import (
    NOTHING,
    Extra,
    Score,
    Scores,
    UnscorableError,
    bare_task,
    field,
    needed_package,
    task_of,
)
from longlora_cli.evaluation.scorers.overlap import rouge_measures, sentence_union_rouge
from longlora_cli.evaluation.scorers.words import bag_f1, chinese_words, normalize_chinese, word_f1

Rule = Callable[[str, str, Extra], float]
FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum", "lsht")
BUCKETS = ("0-4k", "4-8k", "8k+")
"""LongBench-E's buckets of `length`, in words."""

_DIGITS = re.compile(r"\d+")


def qa_f1(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """Bag-of-words F1 of the normalised words."""
    return word_f1(prediction, reference)


def qa_f1_zh(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """Bag-of-words F1 of jieba's words, each without Chinese and ASCII punctuation; what is then empty is dropped."""
    said, wanted = (
        [word for word in map(normalize_chinese, chinese_words(text)) if word]
        for text in (prediction, reference)
    )
    return bag_f1(said, wanted)


def rouge(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """ROUGE-L F of PyPI's `rouge`; see `sentence_union_rouge`."""
    return sentence_union_rouge(prediction, reference)


def rouge_zh(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """The same on jieba's words with blanks between."""
    return sentence_union_rouge(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def classification(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """1 over the number of class names that the prediction holds, if the reference is one of them, else 0.

    Names that are a part of the reference should not count, but the published loop removes them from the list that it
    walks, so that the name behind a removed one is passed over and counts: a right answer can get 0.5 so.
    That is how the published numbers were made.
    """
    names = field(extra, "all_classes", (list, tuple), "the list of class names")
    held = [name for name in names if name in prediction]
    at = 0
    while at < len(held):
        if held[at] in reference and held[at] != reference:
            held.remove(held[at])
        at += 1  # also after a removal: the published quirk
    return 1.0 / len(held) if reference in held else 0.0


def count(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """The share of digit runs in the prediction that are the reference, as strings (`07` is not `7`)."""
    return _share_of_numbers(prediction, reference)


def retrieval(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """The share of digit runs in the prediction that are the number in the reference `Paragraph N`."""
    return _share_of_numbers(prediction, _number_after("Paragraph ", reference))


def retrieval_zh(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """As `retrieval`, for references `段落N`."""
    return _share_of_numbers(prediction, _number_after("段落", reference))


def _number_after(word: str, reference: str) -> str:
    match = re.search(re.escape(word) + r"(\d+)", reference)
    if match is None:
        raise UnscorableError(f"reference {reference!r} does not name a paragraph as {word}N")
    return match[1]


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers: list[str] = _DIGITS.findall(prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_line(prediction: str, *, skip_blank: bool = False) -> str:
    """The first line, after leading newlines, that holds no back-tick, `#` or `//`; empty if there is none.

    A line of blanks is such a line, unless `skip_blank`.
    """
    for line in prediction.lstrip("\n").split("\n"):
        if skip_blank and not line.strip():
            continue
        if not any(mark in line for mark in ("`", "#", "//")):
            return line
    return ""


def code_sim(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """Edit similarity of `code_line` and the reference in whole per cent, over 100.

    fuzzywuzzy's `ratio` with python-Levenshtein: 2M/T, M the longest common subsequence, T both lengths.
    """
    return edit_percent(code_line(prediction), reference) / 100


def code_sim_difflib(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """What `code_sim` is where python-Levenshtein is not installed: difflib's ratio, lower for moved text."""
    line = code_line(prediction)
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def code_sim_lm_eval(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """As lm-evaluation-harness has it since version 6 of its task: blank lines are passed over."""
    return edit_percent(code_line(prediction, skip_blank=True), reference) / 100


def edit_percent(first: str, second: str) -> int:
    """fuzzywuzzy's `fuzz.ratio`: 100 * 2M/T to the nearest whole number; 100 for two empty texts."""
    indel = needed_package("rapidfuzz.distance.Indel")
    return round(100 * indel.normalized_similarity(first, second))


def rouge_lm_eval(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """As `rouge`, after blanks around the prediction are gone, as lm-evaluation-harness does it."""
    return sentence_union_rouge(prediction.strip(), reference)


def rouge_of_google(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """rouge_score's ROUGE-L F in place of `rouge`'s: not LongBench's number, but what other papers call ROUGE-L."""
    return rouge_measures(prediction, reference, stem=False, kinds=("rougeL",))["rougeL"]["f"]


def no_rouge_zh(prediction: str, reference: str, extra: Extra = NOTHING) -> float:
    """Refuses: rouge_score reads a-z and 0-9 only."""
    raise UnscorableError("rouge_score drops all Chinese characters", hint="Take longbench.rouge_zh.")


RULES: dict[str, Rule] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_sim": code_sim,
}
RULES_NO_LEVENSHTEIN = RULES | {"code_sim": code_sim_difflib}
RULES_ROUGE_SCORE = RULES | {"rouge": rouge_of_google, "rouge_zh": no_rouge_zh}
TASK_RULES = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa"), "qa_f1"),
    **dict.fromkeys(("2wikimqa", "musique", "triviaqa"), "qa_f1"),
    "multifieldqa_zh": "qa_f1_zh",
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge"),
    **dict.fromkeys(("dureader", "vcsum"), "rouge_zh"),
    **dict.fromkeys(("trec", "lsht"), "classification"),
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval_zh",
    "passage_count": "count",
    **dict.fromkeys(("lcc", "repobench-p"), "code_sim"),
}
"""Which rule scores which task."""


def best_of(rule: Rule) -> Score:
    """A scorer of one rule: the first line where the task is one of the four, the best over the references."""

    def score(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
        if _plain_task(extra.get("task")) in FIRST_LINE_TASKS:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return {"score": max(rule(prediction, reference, extra) for reference in references)}

    score.__doc__ = f"`score`: the best over the references. {rule.__doc__}"
    return score


def _plain_task(task: object) -> str:
    return bare_task(str(task), "longbench").removesuffix("_e")


def by_task(rules: Mapping[str, Rule]) -> Score:
    """A scorer that judges each row by the rule of its `task` (`hotpotqa`, `lcc_e` of LongBench-E, ...)."""

    def score(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
        plain = {**extra, "task": _plain_task(field(extra, "task", str, "the task decides the rule"))}
        rule = rules[TASK_RULES[task_of(plain, "longbench", list(TASK_RULES))]]
        return best_of(rule)(prediction, references, plain)

    score.__doc__ = "`score`: by the rule of the row's `task`, the best over the references."
    return score


def bucket_of(length: float) -> str:
    """LongBench-E's bucket of a context of `length` words: below 4,000, below 8,000, or more."""
    return BUCKETS[(length >= 4000) + (length >= 8000)]
