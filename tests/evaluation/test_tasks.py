from __future__ import annotations

import copy
import json
import lzma
import math
from itertools import pairwise

import pytest
from tool_templates import TEMPLATES, tool, tool_chat
from transformers import AutoTokenizer

from longlora_cli.data.haystack import Haystack
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.tasks.needle import needle_questions
from longlora_cli.evaluation.tasks.passkey import NOISE, depth_shares, passkey_questions
from longlora_cli.evaluation.tasks.rows import read_questions, read_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def bare_tokenizer(tiny_tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def haystack(book):
    return Haystack([book.read_text()])


def passkeys(haystack, tokenizer, **changes):
    settings = {"length": 512, "depths": 5, "samples": 2, "seed": 0, "answer_tokens": 16}
    return list(passkey_questions(haystack, tokenizer, **{**settings, **changes}))


def needles(haystack, tokenizer, **changes):
    settings = {"length": 700, "depths": 3, "samples": 2, "facts": 4, "seed": 0, "answer_tokens": 16}
    return list(needle_questions(haystack, tokenizer, **{**settings, **changes}))


MAKERS = pytest.mark.parametrize("make", [passkeys, needles], ids=["passkey", "needle"])


@MAKERS
@pytest.mark.parametrize("length", [700, 1500])
def test_prompt_and_answer_fill_the_length_and_never_pass_it(haystack, tokenizer, make, length):
    longest: dict[int, int] = {}
    for question in make(haystack, tokenizer, length=length):
        needed = len(question.prompt) + 16
        assert needed <= length
        longest[question.facts["sample"]] = max(needed, longest.get(question.facts["sample"], 0))
    # The questions of one text differ in length; the longest one fills it.
    assert len(longest) == 2
    assert all(needed >= 0.95 * length for needed in longest.values())


@MAKERS
def test_the_answer_stands_only_in_its_own_sentence(haystack, tokenizer, make):
    for question in make(haystack, tokenizer):
        text = tokenizer.decode(question.prompt)
        assert text.count(question.references[0]) == (2 if make is passkeys else 1)


@MAKERS
def test_the_answer_stands_at_its_depth(haystack, tokenizer, make):
    for question in make(haystack, tokenizer, length=1500):
        text = tokenizer.decode(question.prompt)
        place = text.index(question.references[0]) / len(text)
        # Facts of the other depths and the question shift a place in the whole prompt a little.
        assert place == pytest.approx(question.facts["actual_depth"], abs=0.12)
        nearby = 0.05 if make is passkeys else 1 / 6 + 0.05
        assert question.facts["actual_depth"] == pytest.approx(question.facts["depth"], abs=nearby)


@MAKERS
def test_a_seed_repeats_its_samples_and_another_makes_others(haystack, tokenizer, make):
    first, again, other = (make(haystack, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert [q.prompt for q in first] == [q.prompt for q in again]
    assert not {q.references[0] for q in first} & {
        q.references[0] for q in other if q.references[0].isdigit()
    }
    late = make(haystack, tokenizer, samples=1, first_sample=1)
    assert [q.prompt for q in late] == [q.prompt for q in first if q.facts["sample"] == 1]


@MAKERS
def test_questions_of_one_sample_follow_each_other_and_share_what_can_be_kept(haystack, tokenizer, make):
    questions = make(haystack, tokenizer, samples=1, length=1500)
    for before, after in pairwise(questions):
        common = next(i for i, (a, b) in enumerate(zip(before.prompt, after.prompt, strict=False)) if a != b)
        needed = 0.95 if make is needles else after.facts["actual_depth"] * 0.9
        assert common >= needed * len(after.prompt)
    if make is passkeys:
        assert [q.facts["depth"] for q in questions] == depth_shares(5)[::-1]


@MAKERS
def test_a_length_that_holds_no_sample_is_refused(haystack, tokenizer, make):
    with pytest.raises(SettingsError, match="--lengths 40"):
        make(haystack, tokenizer, length=40)


def test_noise_can_be_the_haystack(tokenizer):
    questions = passkeys(Haystack([NOISE]), tokenizer)
    assert "The meadow is wide." in tokenizer.decode(questions[0].prompt)
    assert all(len(q.prompt) + 16 >= 0.95 * 512 for q in questions)


def test_without_a_template_passkey_is_a_text_to_continue_and_needle_is_refused(haystack, bare_tokenizer):
    question = passkeys(haystack, bare_tokenizer)[0]
    assert bare_tokenizer.decode(question.prompt).endswith("Answer: The pass key is")
    assert question.facts["first_word"] is True
    with pytest.raises(DataError, match="chat template"):
        needles(haystack, bare_tokenizer)


def test_other_wordings_make_other_sentences(haystack, tokenizer):
    for question in needles(haystack, tokenizer, wording="eval"):
        assert question.facts["question"].startswith(("Under what", "In which city"))


def test_a_single_depth_is_the_middle():
    assert depth_shares(1) == [0.5]
    assert math.fsum(depth_shares(5)) == 2.5


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_give_prompts_and_all_their_references(tmp_path, tokenizer):
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    path = write(
        tmp_path / "rows.jsonl",
        {"input": "q1", "outputs": ["a", "b"]},
        "\n",
        {"input": "q2", "outputs": "c"},
        {"prompt": "q3", "completion": "d"},
        {"messages": chat},
    )
    questions = read_questions(path, tokenizer)
    assert [q.references for q in questions] == [["a", "b"], ["c"], ["d"], ["Hello"]]
    assert [q.facts["row"] for q in questions] == [f"rows.jsonl:{n}" for n in (1, 3, 4, 5)]
    assert tokenizer.decode(questions[0].prompt) == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert "Be short." in tokenizer.decode(questions[3].prompt)
    assert "Hello" not in tokenizer.decode(questions[3].prompt)
    assert len(read_rows(path, max_samples=2)) == 2


def test_each_of_several_questions_is_asked_alone(tmp_path, tokenizer):
    questions = [{"input": f"q{n}", "answers": [f"a{n}", "x"]} for n in (1, 2, 3)]
    path = write(
        tmp_path / "rows.jsonl",
        {"context": "Once.", "questions": questions},
        {"context": "Twice.", "input": "", "answers": "b"},
        {"instruction": "i", "input": "j", "output": "c", "text": "all of it"},
    )
    asked = read_questions(path, tokenizer)
    assert [q.facts["row"] for q in asked] == [f"rows.jsonl:{n}" for n in ("1.1", "1.2", "1.3", 2, 3)]
    assert [q.references for q in asked] == [["a1", "x"], ["a2", "x"], ["a3", "x"], ["b"], ["c"]]
    assert "Once.\n\nq2<|im_end|>" in tokenizer.decode(asked[1].prompt)
    assert not any(word in tokenizer.decode(asked[1].prompt) for word in ("q1", "a1", "q3"))
    assert "Twice.<|im_end|>" in tokenizer.decode(asked[3].prompt)
    assert "i\n\nj<|im_end|>" in tokenizer.decode(asked[4].prompt)
    assert [row.place for row in read_rows(path, max_samples=2)] == ["1.1", "1.2"]


def test_questions_about_one_text_say_so_and_their_hash_holds_no_tokenizer(
    tmp_path, tokenizer, bare_tokenizer
):
    questions = [{"input": f"q{n}", "answers": [f"a{n}"]} for n in (1, 2)]
    path = write(
        tmp_path / "rows.jsonl", {"context": "Once.", "questions": questions}, {"input": "q", "outputs": "a"}
    )
    asked = read_questions(path, tokenizer)
    assert [q.facts.get("document") for q in asked] == ["rows.jsonl:1", "rows.jsonl:1", None]
    assert len({q.sample_hash for q in asked}) == 3
    assert [q.sample_hash for q in read_questions(path, bare_tokenizer)] == [q.sample_hash for q in asked]
    other = write(tmp_path / "other.jsonl", {"input": "q", "outputs": "b"})
    assert read_questions(other, tokenizer)[0].sample_hash != asked[2].sample_hash


@MAKERS
def test_equal_samples_have_equal_hashes_and_no_others_have(haystack, tokenizer, make):
    once, again = make(haystack, tokenizer), make(haystack, tokenizer)
    assert [q.sample_hash for q in once] == [q.sample_hash for q in again]
    assert len({q.sample_hash for q in once}) == len(once)
    other = make(haystack, tokenizer, seed=1)
    assert not {q.sample_hash for q in once} & {q.sample_hash for q in other}


def test_the_hash_of_a_haystack_knows_its_texts_and_where_they_end():
    whole = Haystack(["One two. Three."])
    assert whole.sha256 == Haystack(["One two. Three."]).sha256
    assert len({h.sha256 for h in (whole, Haystack(["One two. ", "Three."]), Haystack(["One two."]))}) == 3


def test_rows_may_be_compressed(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"input": "q", "outputs": "a"})
    packed = tmp_path / "rows.jsonl.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert read_rows(packed) == read_rows(path)


def test_rows_with_tools_are_asked_with_them_or_refused(tmp_path, tokenizer):
    row = {"messages": tool_chat(), "tools": [tool("weather")]}
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template does not show the tool 'weather'"):
        read_questions(path, tokenizer)
    shows = copy.deepcopy(tokenizer)
    shows.chat_template = TEMPLATES["chatml"]
    [question] = read_questions(path, shows)
    assert question.references == ["No."]
    text = shows.decode(question.prompt)
    assert '<tool_call>\n{"name": "weather"' in text
    assert "Tells the weather." in text
    shows.chat_template = None
    with pytest.raises(DataError, match="without a chat template tools cannot be shown"):
        read_questions(path, shows)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"input": "q", "input": "q", "outputs": "a"}\n', ":2: the key 'input' is there twice"),
        ('{"input": "q", "outputs": "a", "score": NaN}\n', ":2: NaN is no JSON value"),
        ('{"input": "q\\u0000", "outputs": "a"}\n', ":2: input has a NUL character"),
        (
            {"prompt": "q", "completion": "a", "input": "q", "outputs": "a"},
            ":2: the row has the keys of 2 formats",
        ),
        ({"messages": tool_chat()[:2]}, ":2: the last turn calls a tool"),
        ("{oops\n", ":2: column 2: not JSON"),
        ({"input": "q"}, ":2: 'input' without 'outputs'"),
        ({"input": "q", "outputs": []}, ":2: outputs is empty"),
        ({"input": "q", "outputs": ["a", ""]}, ":2: outputs is empty"),
        ({"text": "only a text"}, ":2: a row with only a text has no answer"),
        ([1], ":2: a row is a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, fault):
    path = write(tmp_path / "rows.jsonl", {"input": "q", "outputs": "a"}, row)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert f"rows.jsonl{fault}" in caught.value.message


def test_missing_and_empty_files_are_faults_of_the_input(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="the file is empty"):
        read_rows(write(tmp_path / "empty.jsonl", "\n"))
