"""Each synthetic task solved from its text alone, and the oracle, the null and the parrot on all of them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import synthetic_parts as parts

from longlora_cli.errors import DataError
from longlora_cli.evaluation.generation import Answer, predict
from longlora_cli.evaluation.task_scores import score_task
from longlora_cli.evaluation.tasks.prompts import plain_text, prompt_ids, question_of
from longlora_cli.evaluation.tasks.registry import TASKS, make_sample, requests
from longlora_cli.evaluation.tasks.synthetic.babi import ROOMS
from longlora_cli.evaluation.tasks.synthetic.latent import FACTS
from longlora_cli.evaluation.texts import read_haystack
from longlora_cli.task_names import GROUPS, RULER, SYNTHETIC

every_task = pytest.mark.parametrize("task", SYNTHETIC)


def text_of(sample) -> str:
    return sample.messages[-1]["content"]


def solve_needles(sample):
    question = text_of(sample).rpartition("\n")[2]
    pairs = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text_of(sample))
    asked = re.split(r", and |, ", re.search(r" for (.*) mentioned", question)[1])
    found = [value for key in asked for name, value in pairs if name == key]
    return set(found) if sample.task == "niah_multivalue" else found


def solve_vt(sample):
    text = text_of(sample).rpartition("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+) in", text)[1]
    names = []
    for name, is_copy, source in re.findall(r"VAR (\w+) = (VAR )?(\w+)", text):
        if (is_copy and source in names) or (not is_copy and source == value):
            names.append(name)
    return names


def solve_cwe(sample):
    words = Counter(re.findall(r"\d+\. (\w+)", text_of(sample).rpartition("Below is a numbered")[2]))
    return {word for word, _ in words.most_common(10)}


def solve_fwe(sample):
    text = text_of(sample).partition("coded words. ")[2].rpartition("\nQuestion")[0]
    words = Counter(word for word in text.split() if word != "...")
    assert [count for _, count in words.most_common(4)] == sorted(set(words.values()))[:-5:-1]
    return [word for word, _ in words.most_common(3)]


def solve_latent(sample):
    needle = next(needle for needle, question in FACTS if question in text_of(sample))
    return [re.search(re.escape(needle).replace(r"\{name\}", r"(\w+)"), text_of(sample))[1]]


def solve_topic(sample):
    return [re.findall(r"New subject: (.*?)\.", text_of(sample))[sample.facts["asked"] - 1]]


def solve_lines(sample):
    key = re.search(r"in line (\S+)\?", text_of(sample))[1]
    return re.findall(rf"line {key}: REGISTER_CONTENT is <(\d+)>", text_of(sample))


def solve_kv(sample):
    text = text_of(sample)
    pairs = json.loads(text[text.index("{") : text.index("}") + 1])
    return [pairs[re.search(r'to the key "(.*)"', text)[1]]]


def solve_qa(sample):
    text, question = text_of(sample), text_of(sample).rpartition("\n\n")[2]
    thing = re.search(r"whom (?:did )?the ([\w ]+?) (?:go|went) ", question)[1]
    person = re.search(rf"At the auction the {thing} went to (\w+)\.", text)[1]
    town = re.search(rf"{person} has a house in (\w+)\.", text)[1]
    river = re.search(rf"runs past {town} is the (\w+)\.", text)[1]
    return [(person, town, river)[sample.facts["hops"] - 1]]


def solve_babi(sample):
    text, question = text_of(sample), sample.extra["question"]
    people = re.search(r"about where (\w+), (\w+) and (\w+) are", text).groups()
    fact = rf"({'|'.join(people)}) (?:(?:went|walked|moved) to the (\w+)|(picked up|took|dropped|put down) the (\w+))\."
    where, carries, seen = {}, defaultdict(set), defaultdict(list)
    for who, room, act, thing in re.findall(fact, text):
        if room:
            where[who] = room
            for held in carries[who]:
                seen[held].append(room)
        elif act in ("picked up", "took"):
            carries[who].add(thing)
            if seen[thing][-1:] != [where[who]]:
                seen[thing].append(where[who])
        else:
            carries[who].remove(thing)
    if sample.facts["kind"] == "qa1":
        return [where[re.search(r"Where is (\w+)", question)[1]]]
    places = seen[re.search(r"the (\w+)", question)[1]]
    if sample.facts["kind"] == "qa2":
        return [places[-1]]
    return [places[places.index(re.search(r"before the (\w+)", question)[1]) - 1]]


def solve_graph(sample):
    text, node = text_of(sample), sample.facts["node"]
    edges = re.findall(r"^(\w+) -> (\w+)$", text, re.MULTILINE)
    if sample.facts["kind"] == "parents":
        return sorted({first for first, second in edges if second == node})
    near = {second for first, second in edges if first == node}
    return sorted({second for first, second in edges if first in near} - near - {node})


def solve_mrcr(sample):
    last = text_of(sample)
    prefix, place, wanted = re.search(r"Prepend (\w+) to the (\w+) (.*) that you wrote", last).groups()
    turns = sample.messages[:-1]
    same = [
        answer["content"]
        for asked, answer in zip(turns[::2], turns[1::2], strict=True)
        if asked["content"] == f"Write a {wanted}."
    ]
    places = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    assert len(same) == sample.facts["same"]
    return [prefix + same[places.index(place)]]


def solve_icl(sample):
    word = text_of(sample).rpartition("word: ")[2]
    labels = {
        label
        for known, label in re.findall(r"word: (\w+)\nlabel: (\d+)", text_of(sample))
        if known[-3:] == word[-3:]
    }
    return sorted(labels)


def solve_count(sample):
    thing = re.search(r"text say that (the .*) knocked at the gate\?", text_of(sample))[1]
    return [str(text_of(sample).count(f"{thing[0].upper()}{thing[1:]} knocked at the gate."))]


def solve_sort(sample):
    years = re.findall(r"In the year (\d+) the ([\w ]+) was repaired\.", text_of(sample))
    return [", ".join(thing for _, thing in sorted(years))]


def module_of(sample):
    namespace = {}
    code = text_of(sample).partition("\n\n")[2]
    exec(re.split(r"\n\nWh", code)[0], namespace)
    return namespace


def solve_code_run(sample):
    return [str(eval(re.search(r"What does (\w+\(\d+\)) return", text_of(sample))[1], module_of(sample)))]


def solve_code_debug(sample):
    failing = []
    for name, function in module_of(sample).items():
        try:
            if not name.startswith("__"):
                function([3, 1, 2], 2)
        except (NameError, TypeError):
            failing.append(name)
    [name] = failing
    return [name, re.search(rf"([A-D])\. {name}", text_of(sample))[1]]


def solve_repeat(sample):
    number = re.search(r"Repeat the text of paragraph (\d+) word", text_of(sample))[1]
    return [re.search(rf"^Paragraph {number}: (.*)$", text_of(sample), re.MULTILINE)[1]]


SOLVERS = {
    **dict.fromkeys(GROUPS["niah"], solve_needles),
    "vt": solve_vt,
    "cwe": solve_cwe,
    "fwe": solve_fwe,
    "niah_latent": solve_latent,
    "topic": solve_topic,
    "lines": solve_lines,
    "kv": solve_kv,
    "qa_needle": solve_qa,
    "babi_long": solve_babi,
    "graphwalk": solve_graph,
    "mrcr": solve_mrcr,
    "icl_many": solve_icl,
    "count": solve_count,
    "sort": solve_sort,
    "code_run": solve_code_run,
    "code_debug": solve_code_debug,
    "repeat": solve_repeat,
}


@every_task
@pytest.mark.parametrize("length", [512, 4096])
def test_the_references_follow_from_the_text_alone(task, length):
    for sample in parts.samples(task, "embedded", length, number=6):
        solved = SOLVERS[task](sample)
        assert solved == (set(sample.outputs) if isinstance(solved, set) else sample.outputs)


def said_by_oracle(sample) -> str:
    if sample.scorer == "graphwalks":
        return f"Final Answer: [{', '.join(sample.outputs)}]"
    if sample.scorer.startswith("ruler"):
        return ", ".join(sample.outputs)
    return sample.outputs[-1]


class Fixed:
    """Says what a function of the sample says."""

    def __init__(self, tokenizer, samples, say):
        self._said = {tuple(prompt_ids(tokenizer, sample)): say(sample) for sample in samples}

    def answer(self, ids, max_new_tokens, stop=()):
        return Answer([1], self._said[tuple(ids)], "eos")


def scores_of(task, say):
    tokenizer, samples = parts.tokenizer("embedded"), parts.samples(task, "embedded", 512)
    questions = [question_of(tokenizer, sample) for sample in samples]
    rows = list(predict(Fixed(tokenizer, samples, say), questions, max_new_tokens=1))
    return score_task(rows)


@every_task
def test_an_oracle_scores_one_on_every_task(task):
    summary, rows = scores_of(task, said_by_oracle)
    assert summary["score"] == 1.0
    assert [row["scores"]["score"] for row in rows] == [1.0] * 3
    assert summary["long"] == 0


@every_task
def test_silence_scores_nothing_on_every_task(task):
    assert scores_of(task, lambda sample: "")[0]["score"] == 0.0


@every_task
def test_a_parrot_is_told_by_the_length_of_its_answers(task):
    summary, _ = scores_of(task, plain_text)
    assert 0 <= summary["score"] <= 1
    # Where rules look for a reference anywhere, repeating the text is right: the share of long answers gives it away.
    if task in (*RULER, "niah_latent", "topic", "kv"):
        assert summary["score"] > 0.99
    stops = bool(parts.samples(task, "embedded", 512)[0].stop)
    assert stops or summary["long"] == 1.0


@every_task
def test_the_table_of_tasks_says_how_samples_are_judged(task):
    for sample in parts.samples(task, "embedded", 4096):
        assert sample.task == task
        assert sample.scorer == TASKS[task].scorer
        assert sample.max_new_tokens >= TASKS[task].max_new_tokens
        assert ("depth" in sample.facts) is TASKS[task].has_depth
    assert tuple(TASKS) == SYNTHETIC
    assert "synthetic" in TASKS[task].groups


@pytest.mark.parametrize(("needle", "question"), FACTS)
def test_a_latent_needle_and_its_question_share_no_word(needle, question):
    words = [set(re.findall(r"[a-z]+", text.lower())) - {"name"} for text in (needle, question)]
    assert not words[0] & words[1]


def test_rulers_words_are_those_of_rulers_files():
    sample = parts.samples("niah_single_1", "embedded", 4096)[1]
    text = text_of(sample)
    assert text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
        "again.\n"
    )
    key = re.search(r"What is the special magic number for (\S+) mentioned in the provided text\?$", text)[1]
    assert f"One of the special magic numbers for {key} is: {sample.outputs[0]}." in text
    assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    several = parts.samples("niah_multiquery", "embedded", 4096)[0]
    assert re.search(
        r"magic numbers for \S+, \S+, \S+, and \S+ mentioned in the provided text\?$", text_of(several)
    )
    assert len(several.outputs) == 4
    assert re.fullmatch(r"[1-9]\d{6}", several.outputs[0])


def test_variable_tracking_shows_one_solved_example_with_other_names():
    text = text_of(parts.samples("vt", "embedded", 4096)[0])
    example, _, question = text.partition("\n\n\n\n")
    assert "5 variables are assigned the value" in example
    assert re.search(r"they are: ( ?[A-Z]{3}){5}$", example)
    assert question.startswith(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    assert "again.\n VAR " in question or "again.\n The" in question


def test_common_words_stand_thirty_times_and_the_others_three_from_4096_tokens_on():
    samples = parts.samples("cwe", "base", 8192)
    words = Counter(re.findall(r"\d+\. (\w+)", text_of(samples[0]).rpartition("Below is a numbered")[2]))
    assert set(words.values()) == {30, 3}
    short = parts.samples("cwe", "base", 2048)[0]
    words = Counter(re.findall(r"\d+\. (\w+)", text_of(short).rpartition("Below is a numbered")[2]))
    assert set(words.values()) == {6, 1}
    assert text_of(short).count("Answer: The top 10 words") == 1


def test_stories_have_no_rooms_but_babis():
    assert all(
        sample.outputs[0] in ROOMS for sample in parts.samples("babi_long", "embedded", 4096, number=6)
    )


@every_task
def test_noise_as_the_haystack_holds_every_task_but_the_copying_of_a_paragraph(task):
    noise = read_haystack([Path("noise")], split="test")
    asked = requests(task, noise, parts.tokenizer("embedded"), lengths=[800], depths=1, samples=1, seed=0)
    if task == "repeat":
        with pytest.raises(DataError, match="every paragraph of the haystack is in another one"):
            make_sample(next(asked))
        return
    sample = make_sample(next(asked))
    assert sample.facts["tokens"] + sample.max_new_tokens >= 0.95 * 800
    solved = SOLVERS[task](sample)
    assert solved == (set(sample.outputs) if isinstance(solved, set) else sample.outputs)
