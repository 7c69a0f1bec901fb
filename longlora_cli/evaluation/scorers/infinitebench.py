"""InfiniteBench's rules by task, in the two forms that published numbers come from.

`@2024-06` is OpenBMB/InfiniteBench at 88b3daa (MIT): its README's table. `@2024-08` is what lm-evaluation-harness has
(`tasks/infinitebench` at 4e7e0d47f, MIT), after a later change of the rules for letters, function names and
speakers. The same answers of GPT-4 get 37.06 and 51.02 on Code.Debug.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores, UnscorableError, field, task_of
from longlora_cli.evaluation.scorers.overlap import best_measures
from longlora_cli.evaluation.scorers.words import (
    bag_f1,
    normalize_chinese,
    without_articles,
    without_punctuation,
    word_f1,
)

Rule = Callable[[str, Sequence[Any], Extra], float]
_LETTERS = "ABCD"
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_CONTROL = re.compile(r"[\x00-\x1f]")
_LAST_CHOICE = re.compile(r"\b([A-D])\b(?!.*\b[A-D]\b)")
_LAST_OPTION = re.compile(r"\b([A-J])\b(?!.*\b[A-J]\b)")
_SENTENCE_MARKS = "\n:\"'.,?!{}"
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")


def infinitebench_2024_06(prediction: str, references: Sequence[Any], extra: Extra = NOTHING) -> Scores:
    """`score` by the rule of the row's `task`; source: OpenBMB/InfiniteBench `src/compute_scores.py` at 88b3daa.

    References are the file's label; for choices the right text and its letter, or the text alone with `options`.
    """
    return {"score": float(_RULES_06[_task(extra)](prediction, references, extra))}


def infinitebench_2024_08(prediction: str, references: Sequence[Any], extra: Extra = NOTHING) -> Scores:
    """`score` by the rule of the row's `task`; source: lm-evaluation-harness `tasks/infinitebench` at 4e7e0d47f."""
    said = _CONTROL.sub(" ", prediction.strip()).strip()
    return {"score": float(_RULES_08[_task(extra)](said, references, extra))}


def _task(extra: Extra) -> str:
    return task_of(extra, "infinitebench", list(_RULES_06))


def _blank_out(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def _single_blanks(text: str) -> str:
    return re.sub(" +", " ", text)


def _first_digits(text: str) -> str:
    match = re.search("[0-9]+", text)
    return match[0] if match else ""


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UnscorableError(f"reference {value!r} is not a whole number") from error


def _labels(references: Sequence[Any], extra: Extra) -> list[str]:
    """The right text and its letter, from a label that has both or from `options`."""
    labels = [str(reference) for reference in references]
    if len(labels) == 1 and labels[0] not in tuple(_LETTERS):
        options = [
            str(o) for o in field(extra, "options", list, "the choices, to find the right one's letter")
        ]
        if labels[0] not in options:
            raise UnscorableError(f"reference {labels[0]!r} is none of the options")
        labels.append("ABCDEFGHIJ"[options.index(labels[0])])
    return labels


# Rules that both forms share ------------------------------------------------------------------------------------


def _first_number_is_label(said: str, references: Sequence[Any], extra: Extra) -> float:
    # An answer without a digit gives "", which no label is.
    return _first_digits(said) == str(references[0]).strip()


def _key_value(said: str, references: Sequence[Any], extra: Extra) -> float:
    words = _blank_out(said, _SENTENCE_MARKS).split()
    return any(str(reference).strip() in words for reference in references)


def _code_run(said: str, references: Sequence[Any], extra: Extra) -> float:
    wanted = [_whole(reference) for reference in references]
    words = _blank_out(said, "\n.`'\":").split()
    try:
        value = int(words[-1])
    except (IndexError, ValueError):
        return 0.0  # by rule: an answer whose last word is no whole number is wrong
    return value in wanted


def _math_find(said: str, references: Sequence[Any], extra: Extra) -> float:
    # Published code reads the number as the label's type and stops the run at "17.5" for 17; by value that is wrong, 0.
    match = _NUMBER.search(said)
    label = str(references[0]).strip()
    try:
        value = float(label)
    except ValueError as error:
        raise UnscorableError(f"reference {label!r} is not a number") from error
    if match is None:
        return 0.0
    if "." in match[0] or not label.isdecimal():
        return float(match[0]) == value
    return _same_digits(match[0], label)


def _math_calc(said: str, references: Sequence[Any], extra: Extra) -> float:
    """The length of the right beginning over the length of the whole; signs are not read."""
    nested = isinstance(references[0], list)
    wanted = [_whole(number) for number in (references[0] if nested else references)]
    numbers = re.findall("[0-9]+", said)
    if extra.get("model") == "gpt4":
        numbers = numbers[1:]  # its prompt made it repeat the expression's first number: published so
    right = 0
    while right < min(len(wanted), len(numbers)) and _same_digits(numbers[right], str(wanted[right])):
        right += 1
    return right / len(wanted)


def _same_digits(first: str, second: str) -> bool:
    # Not by int(), which refuses more than 4,300 digits: a model that repeats a digit may write more.
    return (first.lstrip("0") or "0") == (second.lstrip("0") or "0")


# 2024-06 --------------------------------------------------------------------------------------------------------


def _after_prefix(said: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first prefix that occurs, past one character; None where none occurs."""
    for prefix in prefixes:
        at = said.find(prefix)
        if at >= 0:
            return said[at + len(prefix) + 1 :]
    return None


def _choice_06(said: str, references: Sequence[Any], extra: Extra) -> float:
    labels, said = _labels(references, extra), said.strip()
    if not said:
        return 0.0
    if said[0] in _LETTERS:
        return said[0] in labels
    if said in labels:
        return 1.0
    said = _single_blanks(_blank_out(said, "\n\"'.,?!{}"))
    after = _after_prefix(said, _CHOICE_PREFIXES)
    if after is not None:
        return after != "" and any(after.startswith(label) for label in labels)
    # Published as a test for a part of "ABCD", so that "AB" ends the search too.
    letter = next((word for word in said.split() if word in _LETTERS), None)
    return letter in labels


def _code_debug_06(said: str, references: Sequence[Any], extra: Extra) -> float:
    labels, said = _labels(references, extra), said.strip()
    letter = labels[-1]
    if said[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    said = _single_blanks(_blank_out(said, ("\n", "`", "'", '"', "-", "*", "Option", "option")))
    after = _after_prefix(said, _DEBUG_PREFIXES)
    return bool(after) and any(str(after).startswith(label) for label in labels)


def _dialogue_06(said: str, references: Sequence[Any], extra: Extra) -> float:
    return str(references[0]) in _blank_out(said, _SENTENCE_MARKS).upper().split()


def _qa_english_06(said: str, references: Sequence[Any], extra: Extra) -> float:
    return max(word_f1(said, str(reference)) for reference in references)


def _qa_chinese_06(said: str, references: Sequence[Any], extra: Extra) -> float:
    return max(bag_f1(normalize_chinese(said), normalize_chinese(str(r))) for r in references)


def _summary_06(said: str, references: Sequence[Any], extra: Extra) -> float:
    texts = [str(reference) for reference in references]
    return best_measures(said, texts, stem=False, kinds=("rougeLsum",))["rougeLsum"]


# 2024-08 --------------------------------------------------------------------------------------------------------


def _choice_08(said: str, references: Sequence[Any], extra: Extra) -> float:
    letter = _labels(references, extra)[-1]
    if (match := _LAST_CHOICE.search(said)) is not None:
        return match[1] == letter
    if not said:
        return 0.0
    if said[0] in _LETTERS or said.upper() == letter:
        return said[0].upper() == letter
    said = _blank_out(said, "\n\"'.,?!{}")
    for prefix in _CHOICE_PREFIXES:
        at = said.lower().find(prefix)
        after = said[at + len(prefix) :].strip()[:1].upper() if at >= 0 else ""
        if after and after in _LETTERS:
            return after == letter
    # Any case: an "a" is read as the choice A.
    choice = next((word.upper() for word in said.split() if word.upper() in tuple(_LETTERS)), None)
    return choice == letter


def _code_debug_08(said: str, references: Sequence[Any], extra: Extra) -> float:
    labels = _labels(references, extra)
    letter, function = labels[-1], labels[0] if len(labels) > 1 else ""
    if (match := _LAST_OPTION.search(said)) is not None:
        return match[1] == letter
    said = _single_blanks(_blank_out(said, ("-", "*", "Option", "option"))).strip()
    if said.upper().startswith(letter) or (function and said.startswith(function)):
        return 1.0
    for prefix in _DEBUG_PREFIXES:
        at = said.lower().find(prefix)
        if at >= 0:
            after = said[at + len(prefix) :].strip()
            is_function = bool(function) and after.startswith(function)
            return bool(after) and (after[0].upper() == letter or is_function)
    return 0.0


def _dialogue_08(said: str, references: Sequence[Any], extra: Extra) -> float:
    return any(str(reference).strip().upper() in said.upper() for reference in references)


def _qa_english_08(said: str, references: Sequence[Any], extra: Extra) -> float:
    def words(text: str) -> list[str]:  # articles before punctuation: "U.S.A." keeps no "a" here
        return without_punctuation(without_articles(text.lower())).split()

    return max(bag_f1(words(said), words(str(reference))) for reference in references)


def _qa_chinese_08(said: str, references: Sequence[Any], extra: Extra) -> float:
    # The list there has ASCII quotation marks where the curly ones were, so that those stay.
    normal = [normalize_chinese(str(text), kept="‘’“”") for text in (said, *references)]
    return max(bag_f1(normal[0], reference) for reference in normal[1:])


def _summary_08(said: str, references: Sequence[Any], extra: Extra) -> float:
    return best_measures(said, [str(references[0])], stem=True, kinds=("rougeLsum",))["rougeLsum"]


_SHARED: dict[str, Rule] = {
    "passkey": _first_number_is_label,
    "number_string": _first_number_is_label,
    "kv_retrieval": _key_value,
    "code_run": _code_run,
    "math_find": _math_find,
    "math_calc": _math_calc,
}
_RULES_06: dict[str, Rule] = {
    **_SHARED,
    "code_debug": _code_debug_06,
    "longbook_choice_eng": _choice_06,
    "longdialogue_qa_eng": _dialogue_06,
    "longbook_qa_eng": _qa_english_06,
    "longbook_qa_chn": _qa_chinese_06,
    "longbook_sum_eng": _summary_06,
}
_RULES_08: dict[str, Rule] = {
    **_SHARED,
    "code_debug": _code_debug_08,
    "longbook_choice_eng": _choice_08,
    "longdialogue_qa_eng": _dialogue_08,
    "longbook_qa_eng": _qa_english_08,
    "longbook_qa_chn": _qa_chinese_08,
    "longbook_sum_eng": _summary_08,
}
TASKS = tuple(_RULES_06)
"""The twelve tasks."""
