"""The thirteen tasks of synthetic chats, each solved from the rendered text alone."""

from __future__ import annotations

import itertools
import json
import pkgutil
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import pytest
from data.test_synthetic import book

from longlora_cli.data import wordings
from longlora_cli.data.chat_template import render_chat
from longlora_cli.data.haystack import Haystack, split_sentences
from longlora_cli.data.overlap import OverlapCheck
from longlora_cli.data.synthetic import TASKS, SyntheticChat, hops, make_training_chat, topic
from longlora_cli.data.synthetic.draw import Fresh, free_form, group_sizes
from longlora_cli.data.synthetic.placing import place
from longlora_cli.data.synthetic.sheet import Line, Request, Sheet, Turn
from longlora_cli.data.synthetic.topic import ordinal
from longlora_cli.errors import DataError
from longlora_cli.evaluation.tasks import passkey
from longlora_cli.evaluation.tasks import synthetic as evaluation_tasks
from longlora_cli.evaluation.tasks.synthetic import babi
from longlora_cli.evaluation.tasks.synthetic import topic as evaluation_topic
from longlora_cli.evaluation.tasks.synthetic.words import new_pair
from longlora_cli.models.tokenizer import load_tokenizer

MODULES = {
    "multi-key": "multi_key",
    "multi-value": "multi_value",
    "multi-query": "multi_query",
    "variables": "variables",
    "key-value": "key_value",
    "topic": "topic",
    "multi-hop": "hops",
    "ordered-events": "events",
    "count": "count",
    "repeat-paragraph": "passage",
    "common-words": "common_words",
    "register": "register",
}
TEXTS = [book(seed) for seed in (1, 2, 3)]
Fields = dict[str, str]


def forms(task: str) -> list[Fields]:
    """Every way to word a task."""
    if task == "needle":
        return [{"line": t.sentence, "question": t.question} for t in wordings.templates("train")]
    return [dict(form) for form in import_module(f"longlora_cli.data.synthetic.{MODULES[task]}").FORMS]


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(TEXTS)


@pytest.fixture(scope="module")
def builtin() -> Any:
    return load_tokenizer("builtin")


def make(haystack: Haystack, tokenizer: Any, task: str, index: int = 0, **changes: Any) -> SyntheticChat:
    settings = {"longest": 2500, "facts": 8, "questions": 4, "seed": 0, "index": index, **changes}
    return make_training_chat(haystack, tokenizer, task=task, **settings)


# --- reading a text without knowing what was hidden in it


def pattern(template: str) -> str:
    """A regular expression with a named group for each field; a field that comes again must be the same."""
    kinds = {
        "value": r"[\w-]+",
        "who": r"[A-Z]\w+ [A-Z]\w+",
        "day": r"\d+",
        "text": r".+?",
        "ordinal": r"\w+",
        "any": ".+",
        "all": ".+",
        "keys": ".+",
        "words": "[a-z ,]+",
    }
    found, seen = "", set()
    for part in re.split(r"(\{\w+\})", template):
        name = part[1:-1]
        if not re.fullmatch(r"\{\w+\}", part):
            found += re.escape(part.replace("{{", "{").replace("}}", "}"))
        elif name in seen:
            found += f"(?P={name})"
        else:
            seen.add(name)
            found += f"(?P<{name}>{kinds.get(name, '[a-zA-Z0-9 -]+?')})"
    return found


def said(task: str, context: str, *kinds: str) -> list[tuple[str, Fields]]:
    """All that the text says in any form of the task, in its order: kind of line, fields."""
    found = []
    for form, kind in itertools.product(forms(task), kinds):
        for match in re.finditer(pattern(form[kind]), context):
            found.append((match.start(), kind, match.groupdict()))
    return [(kind, fields) for _, kind, fields in sorted(found, key=lambda row: row[0])]


def asked(task: str, question: str) -> tuple[str, Fields]:
    """Kind and fields of a question, which exactly one template fits."""
    found = [
        (kind, match.groupdict())
        for form in forms(task)
        for kind, template in form.items()
        if kind not in ("line", "start", "copy", "move", "take", "drop", "head", "entry")
        if (match := re.fullmatch(pattern(template), question))
    ]
    assert len(found) == 1, (question, found)
    return found[0]


def things_of(listed: str) -> list[str]:
    return [part.removeprefix("the ") for part in re.split(r", | and | or ", listed)]


def only(answers: list[str]) -> str:
    """The one answer; a second right one would make the question ambiguous."""
    assert len(answers) == 1, answers
    return answers[0]


def solve_pairs(task: str, context: str, question: str) -> str:
    key = asked(task, question)[1]["key"]
    if task == "needle":
        rows = []
        for form in forms(task):
            if re.fullmatch(pattern(form["question"]), question):
                rows += [m.groupdict() for m in re.finditer(pattern(form["line"]), context)]
    else:
        rows = [fields for _, fields in said(task, context, "line")]
    return only([row["value"] for row in rows if row["key"] == key])


def solve_multi_value(task: str, context: str, question: str) -> str:
    key = asked(task, question)[1]["key"]
    return ", ".join(row["value"] for _, row in said(task, context, "line") if row["key"] == key)


def solve_multi_query(task: str, context: str, question: str) -> str:
    rows = [row for _, row in said(task, context, "line")]
    keys = things_of(asked(task, question)[1]["keys"])
    return ", ".join(only([row["value"] for row in rows if row["key"] == key]) for key in keys)


def solve_variables(task: str, context: str, question: str) -> str:
    values: Fields = {}
    for kind, row in said(task, context, "start", "copy"):
        if kind == "copy" or not row["value"].isdecimal():
            continue
        assert row["name"] not in values
        values[row["name"]] = row["value"]
    order = [row["name"] for kind, row in said(task, context, "start") if row["value"].isdecimal()]
    for _, row in said(task, context, "copy"):
        values[row["name"]] = values[row["source"]]  # a source after its copy would be a KeyError
        order.append(row["name"])
    order.sort(key=lambda name: re.search(rf"\b{name}\b", context).start())  # type: ignore[union-attr]
    kind, fields = asked(task, question)
    if kind == "value":
        return values[fields["name"]]
    return ", ".join(name for name in order if values[name] == fields["value"])


def solve_topic(task: str, context: str, question: str) -> str:
    topics = [row["topic"] for _, row in said(task, context, "line")]
    kind, fields = asked(task, question)
    if kind == "after":
        return only([b for a, b in itertools.pairwise(topics) if a == fields["topic"]])
    return only([topic for n, topic in enumerate(topics, start=1) if ordinal(n) == fields["ordinal"]])


def solve_multi_hop(task: str, context: str, question: str) -> str:
    place_of: Fields = {}
    holder: Fields = {}
    trails: dict[str, list[str]] = {}
    for kind, row in said(task, context, "move", "take", "drop"):
        if kind == "move":
            place_of[row["who"]] = row["place"]
        elif kind == "take":
            assert row["thing"] not in holder
            holder[row["thing"]] = row["who"]
        else:
            assert holder.pop(row["thing"]) == row["who"]
        for thing, who in holder.items():
            trail = trails.setdefault(thing, [])
            trail += [place_of[who]] if trail[-1:] != [place_of[who]] else []
    kind, fields = asked(task, question)
    trail = trails[fields["thing"]]
    if kind == "last":
        return f"the {trail[-1]}"
    return "the " + only([a for a, b in itertools.pairwise(trail) if b == fields["place"]])


def solve_events(task: str, context: str, question: str) -> str:
    rows = [(int(row["day"]), row["thing"]) for _, row in said(task, context, "line")]
    assert len({day for day, _ in rows}) == len(rows)
    by_day = [thing for _, thing in sorted(rows)]
    kind, fields = asked(task, question)
    if kind == "next":
        return by_day[by_day.index(fields["thing"]) + 1]
    shown = sorted(things_of(fields["any" if kind == "first" else "all"]), key=by_day.index)
    return shown[0] if kind == "first" else ", ".join(shown)


def solve_count(task: str, context: str, question: str) -> str:
    thing = asked(task, question)[1]["thing"]
    return str(sum(row["thing"] == thing for _, row in said(task, context, "line")))


def solve_passage(task: str, context: str, question: str) -> str:
    name = asked(task, question)[1]["name"]
    return only([row["text"] for _, row in said(task, context, "line") if row["name"] == name])


def solve_common_words(task: str, context: str, question: str) -> str:
    kind, fields = asked(task, question)
    counts: Counter[str] = Counter()
    for _, row in said(task, context, "line"):
        if row["thing"] == fields["thing"]:
            counts.update(row["words"].replace(",", "").split())
    ranked = counts.most_common()
    number = {"one": 1, "two": 2, "three": 3}[fields.get("number", kind)]
    times = [count for _, count in ranked[: number + 1]]
    assert len(set(times)) == number + 1  # no two of these come equally often
    return ", ".join(word for word, _ in ranked[:number])


def solve_register(task: str, context: str, question: str) -> str:
    key = asked(task, question)[1]["key"]
    form = next(form for form in forms(task) if re.fullmatch(pattern(form["question"]), question))
    heads = list(re.finditer(pattern(form["head"]) + r" (?P<entries>.+)\.", context))
    assert [int(head["page"]) for head in heads] == list(range(1, len(heads) + 1))
    entries = [entry for head in heads for entry in head["entries"].split("; ")]
    rows = [re.fullmatch(pattern(form["entry"]), entry) for entry in entries]
    return only([row["value"] for row in rows if row is not None and row["key"] == key])


SOLVERS: dict[str, Callable[[str, str, str], str]] = {
    "needle": solve_pairs,
    "multi-key": solve_pairs,
    "multi-value": solve_multi_value,
    "multi-query": solve_multi_query,
    "variables": solve_variables,
    "key-value": solve_pairs,
    "topic": solve_topic,
    "multi-hop": solve_multi_hop,
    "ordered-events": solve_events,
    "count": solve_count,
    "repeat-paragraph": solve_passage,
    "common-words": solve_common_words,
    "register": solve_register,
}


def context_of(chat: SyntheticChat) -> str:
    content = chat.messages[0]["content"]
    assert content.endswith(f"\n\n{chat.turns[0].question}")
    return content.removesuffix(f"\n\n{chat.turns[0].question}")


def questions_and_answers(chat: SyntheticChat) -> Iterator[tuple[str, str]]:
    users, assistants = chat.messages[::2], chat.messages[1::2]
    assert {m["role"] for m in users} == {"user"}
    assert {m["role"] for m in assistants} == {"assistant"}
    for number, (user, assistant) in enumerate(zip(users, assistants, strict=True)):
        question = user["content"] if number else user["content"].rpartition("\n\n")[2]
        yield question, assistant["content"]


# --- the claims


def test_every_task_has_a_solver() -> None:
    assert SOLVERS.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("facts", "questions"), [(8, 4), (1, 1), (2, 2), (12, 12), (23, 5)])
def test_a_reader_of_the_text_alone_finds_every_answer(
    task: str, facts: int, questions: int, haystack: Haystack, builtin: Any
) -> None:
    for index in range(12):
        chat = make(haystack, builtin, task, index, facts=facts, questions=questions, longest=6000)
        context, rows = context_of(chat), list(questions_and_answers(chat))
        assert 1 <= len(rows) <= questions
        assert len({question for question, _ in rows}) == len(rows)
        for question, answer in rows:
            assert SOLVERS[task](task, context, question) == answer


@pytest.mark.parametrize("task", TASKS)
def test_as_many_lines_as_asked_for_are_hidden_each_in_the_text(
    task: str, haystack: Haystack, builtin: Any
) -> None:
    chat = make(haystack, builtin, task, facts=9)
    context = context_of(chat)
    assert len(chat.lines) == len(chat.depths) == 9
    for text in {line.text for line in chat.lines}:
        assert context.count(text) == sum(line.text == text for line in chat.lines)
    assert all(set(turn.lines) <= set(range(9)) and turn.lines for turn in chat.turns)


@pytest.mark.parametrize("task", TASKS)
def test_the_users_text_is_unaltered_between_the_lines(task: str, haystack: Haystack, builtin: Any) -> None:
    ring = " ".join(" ".join(text.split()) for text in [*TEXTS, TEXTS[0]])
    for index in range(4):
        chat = make(haystack, builtin, task, index)
        context = context_of(chat)
        for line in sorted(chat.lines, key=lambda line: -len(line.text)):
            context = context.replace(line.text, "", 1)
        assert " ".join(context.split()).removesuffix("...") in ring


def test_paragraph_breaks_stay_and_lines_that_stand_apart_stand_between_blank_lines(builtin: Any) -> None:
    text = "One went in.\n\nTwo went out. Three stayed. Four slept. Five woke.\n\nSix sang."
    sheet = Sheet([Line("HERE", is_paragraph=True), Line("THERE.")], [0.6, 0.6], [Turn("Q?", "A", (0,))])
    chat = place(
        Haystack([text]), builtin, length=200, window=random.Random(1), sheet_for=lambda context: sheet
    )
    assert re.search(r"\S\n\nHERE\n\nTHERE\. \S", context_of(chat))
    plain = context_of(chat).replace("HERE\n\nTHERE. ", "").removesuffix("...")
    assert "One went in.\n\nTwo went out." in plain


def test_no_line_stands_between_a_title_and_its_name(builtin: Any) -> None:
    text = " ".join(f"Then Mr. Hill met Mrs. Lake {n} times." for n in range(300))
    for task, index in itertools.product([task for task in TASKS if task != "needle"], range(5)):
        chat = make(Haystack([text]), builtin, task, index)
        assert not re.search(r"\bMrs?\.\s+(?!Hill|Lake)\S", context_of(chat))


@pytest.mark.parametrize("task", TASKS)
def test_depths_are_uniform(task: str, haystack: Haystack, builtin: Any) -> None:
    depths = [
        depth
        for index in range(300)
        for depth in make(haystack, builtin, task, index, facts=3, questions=1, longest=4000).depths
    ]
    tenths = [sum(n / 10 <= min(depth, 0.999) < (n + 1) / 10 for depth in depths) for n in range(10)]
    expected = len(depths) / 10
    # Nine degrees of freedom pass 27.9 once in a thousand; depths in equal parts vary less than free ones.
    assert sum((found - expected) ** 2 / expected for found in tenths) < 27.9


@pytest.mark.parametrize("task", ["needle", "multi-key", "key-value", "topic", "repeat-paragraph"])
def test_what_is_asked_for_is_as_likely_at_every_depth(task: str, haystack: Haystack, builtin: Any) -> None:
    depths = []
    for index in range(300):
        chat = make(haystack, builtin, task, index, facts=4, questions=1, longest=4000)
        depths.append(chat.depths[chat.turns[0].lines[-1]])
    fifths = [sum(n / 5 <= min(depth, 0.999) < (n + 1) / 5 for depth in depths) for n in range(5)]
    # Four degrees of freedom pass 18.5 once in a thousand.
    assert sum((found - 60) ** 2 / 60 for found in fifths) < 18.5


@pytest.mark.parametrize("task", TASKS)
def test_chats_have_97_percent_of_their_length_and_never_more(
    task: str, haystack: Haystack, builtin: Any, families: dict[str, Any]
) -> None:
    for tokenizer in (builtin, families["mistral"]):
        for length, index in itertools.product((1000, 1500, 4000), range(4)):
            request = {"facts": 3, "questions": 2, "key": f"{task}:{index}", "haystack": haystack}
            chat = place(
                haystack,
                tokenizer,
                length=length,
                window=random.Random(index),
                sheet_for=lambda context, r=request: TASKS[task](Request(context=context, **r)),
            )
            assert chat.tokens == len(render_chat(tokenizer, chat.messages).ids)
            assert 0.97 * length <= chat.tokens <= length


def test_a_text_without_spaces_fills_its_length_too_and_gets_no_spaces(builtin: Any) -> None:
    text = "\n\n".join("".join(chr(0x4E00 + (n * 37 + k * 11) % 2000) for k in range(900)) for n in range(8))
    chat = make(Haystack([text]), builtin, "count", longest=4096, facts=2, questions=1)
    whole = context_of(chat)
    for line in chat.lines:
        whole = whole.replace(line.text, "", 1)
    # Around a line stands white space; elsewhere there is none but between paragraphs.
    assert len(whole.split()) <= 2 * len(chat.lines) + whole.count("\n\n") + 1
    long = split_sentences("x" * 1000)
    assert [(len(s.text), s.joint) for s in long] == [(400, ""), (400, ""), (200, "\n\n")]
    made = place(
        Haystack([text]),
        builtin,
        length=3000,
        window=random.Random(0),
        sheet_for=lambda context: Sheet([Line("A line.")], [0.5], [Turn("Q?", "A", (0,))]),
    )
    assert 2910 <= made.tokens <= 3000


def _made(job: tuple[str, int]) -> str:
    task, index = job
    chat = make(Haystack(TEXTS), load_tokenizer("builtin"), task, index)
    return json.dumps([chat.messages, chat.tokens, chat.depths])


def test_a_chat_is_the_same_whatever_was_made_before_it_and_in_whichever_process(
    haystack: Haystack, builtin: Any
) -> None:
    jobs = [(task, index) for task in TASKS for index in (0, 3)]
    forwards = [
        json.dumps([chat.messages, chat.tokens, chat.depths])
        for chat in (make(haystack, builtin, task, index) for task, index in jobs)
    ]
    # Fresh processes hash strings by other seeds, and make the jobs in another order.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        elsewhere = list(pool.map(_made, jobs[::-1], chunksize=5))
    assert forwards == elsewhere[::-1]
    assert len(set(forwards)) == len(jobs)


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task: str, haystack: Haystack, builtin: Any) -> None:
    assert make(haystack, builtin, task).messages != make(haystack, builtin, task, seed=1).messages


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from strings(part)


def evaluation_texts() -> list[str]:
    """Every sentence and question that evaluation's own tasks have: the strings of several words in its modules."""
    modules = [passkey] + [
        import_module(f"{evaluation_tasks.__name__}.{found.name}")
        for found in pkgutil.iter_modules(evaluation_tasks.__path__)
    ]
    constants = [value for module in modules for name, value in vars(module).items() if name.upper() == name]
    found = [text for value in constants for text in strings(value) if " " in text and text[0] != "/"]
    return found + [text for t in wordings.templates("eval") for text in (t.sentence, t.question)]


def runs(text: str, words: int) -> set[tuple[str, ...]]:
    """Runs of so many words; a field ends one."""
    found = set()
    for part in re.sub(r"\{\w+\}", "|", text.lower()).split("|"):
        said = re.findall(r"\w+", part)
        found |= {tuple(said[n : n + words]) for n in range(len(said) - words + 1)}
    return found


def test_no_wording_of_training_is_one_of_evaluation() -> None:
    ours = [text for task in TASKS for form in forms(task) for text in form.values()]
    theirs = evaluation_texts()
    assert len(theirs) > 80  # every task of evaluation says something
    for words, known in ((4, set[str]()), (3, SMALL_WORDS)):
        shared = set().union(*(runs(t, words) for t in ours)) & set().union(*(runs(t, words) for t in theirs))
        assert {" ".join(run) for run in shared} <= known
    assert len(ours) == len(set(ours))


# Three words in a row that ask for nothing by themselves.
SMALL_WORDS = {"what is the", "the numbers in", "belongs to the", "one of the", "of the text", "the price of"}


def test_no_key_or_city_of_evaluation_is_one_of_training() -> None:
    assert not set(wordings.ADJECTIVES) & set(wordings._EVAL_ADJECTIVES)
    assert not set(wordings.training_nouns()) & set(wordings._EVAL_NOUNS)
    assert not set(wordings._CITIES) & set(wordings._EVAL_CITIES)
    rng = random.Random(0)
    for wording in ("train", "eval"):
        for key in wordings.draw_keys(rng, 64, wording):
            assert wordings.may_be_trained_on(*key.split()) == (wording == "train")


def test_a_key_that_training_may_have_is_drawn_again_in_evaluation() -> None:
    trained, others = ["amber", "plain"], ["falcon", "summit"]
    rng = random.Random(0)
    drawn = {new_pair(rng, trained, others) for _ in range(200)}
    assert drawn == {("amber", "summit"), ("plain", "summit")}


def test_no_place_of_training_is_a_label_of_evaluation() -> None:
    assert not set(hops._ROOMS) & set(babi.ROOMS)
    assert not set(topic._ASPECTS) & set(evaluation_topic._SIDES)


def test_chats_pass_the_overlap_check_against_chats_of_evaluation(haystack: Haystack, builtin: Any) -> None:
    from longlora_cli.evaluation.tasks.needle import needle_questions

    other = Haystack(
        [" ".join(f"{a} walks by {b}." for a, b in itertools.permutations("abcdefghijkl", 2))] * 4
    )
    questions = needle_questions(
        other, builtin, length=900, depths=4, samples=4, facts=8, seed=0, answer_tokens=16, wording="eval"
    )
    check = OverlapCheck([builtin.decode(q.prompt) for q in questions])
    for task in TASKS:
        messages = make(haystack, builtin, task).messages
        assert check.shared(message["content"] for message in messages)[0] == 0


def test_nouns_of_evaluation_are_in_no_chat(haystack: Haystack, builtin: Any) -> None:
    for task, index in itertools.product(TASKS, range(10)):
        lines = " ".join(line.text for line in make(haystack, builtin, task, index).lines)
        assert not set(re.findall(r"\w+", lines)) & set(wordings._EVAL_NOUNS)


def test_what_the_text_holds_already_is_not_invented() -> None:
    request = Request(1, 1, "k", "the 10001 and 10002", Haystack(["a"]))
    draws = iter(["10001", "0001", "10003", "1000", "100033", "x"])
    fresh = Fresh(request)
    assert [fresh.draw(lambda: next(draws)) for _ in range(2)] == ["10003", "x"]
    with pytest.raises(DataError, match="nearly every name and number"):
        fresh.draw(lambda: "10001")


def test_a_form_that_the_text_uses_itself_is_passed_over() -> None:
    ways = forms("topic")
    text = "Let us now turn to Plato. Next topic: none."
    request = Request(1, 1, "k", text, Haystack(["a"]))
    assert {free_form(request, random.Random(n), ways)["line"] for n in range(20)} == {ways[2]["line"]}
    everything = Request(1, 1, "k", " ".join(form["line"] for form in ways), Haystack(["a"]))
    with pytest.raises(DataError, match="has 'Next topic: ' and the like already"):
        free_form(everything, random.Random(0), ways)


def test_groups_add_up_and_keep_their_least_size() -> None:
    rng = random.Random(0)
    for lines, questions, least in itertools.product(range(1, 30), (1, 3, 12), (1, 2)):
        sizes = group_sizes(rng, lines, questions, least=least)
        assert sum(sizes) == lines
        assert 1 <= len(sizes) <= questions
        assert min(sizes) >= min(least, lines)


def test_counts_vary(haystack: Haystack, builtin: Any) -> None:
    answers = {t.answer for i in range(40) for t in make(haystack, builtin, "count", i, facts=12).turns}
    assert answers >= {"1", "2", "3", "4", "5", "6"}


def test_lines_that_do_not_fit_are_refused(haystack: Haystack, builtin: Any) -> None:
    with pytest.raises(DataError, match=r"8 facts and 4 questions need \d+ tokens, more than 300"):
        make(haystack, builtin, "key-value", longest=300)
    with pytest.raises(ValueError, match="9 questions, 8 facts"):
        make(haystack, builtin, "topic", questions=9)
