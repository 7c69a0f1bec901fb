from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

from longlora_cli.data import wordings
from longlora_cli.data.chat_template import render_chat
from longlora_cli.data.haystack import Haystack, split_sentences
from longlora_cli.data.synthetic import make_retrieval_chat, make_training_chat
from longlora_cli.data.wordings import draw_keys, templates
from longlora_cli.errors import DataError
from longlora_cli.models.tokenizer import load_tokenizer

WORDS = ("river", "mill", "stone", "lamp", "bread", "letter", "winter", "hill", "door", "garden", "boat")


def book(seed: int, sentences: int = 400) -> str:
    rng = random.Random(seed)
    paragraphs, paragraph = [], []
    for number in range(sentences):
        words = rng.choices(WORDS, k=rng.randint(4, 14))
        paragraph.append(f"The {' '.join(words)} of {number} and {seed}.")
        if rng.random() < 0.3:
            paragraphs.append("\n".join(paragraph))
            paragraph = []
    return "\n\n".join([*paragraphs, "\n".join(paragraph)])


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack([book(1), book(2), book(3)])


def make(haystack: Haystack, tokenizer: Any, **changes: Any) -> Any:
    settings = {"length": 900, "facts": 4, "questions": 2, "seed": 0, "index": 0, **changes}
    return make_retrieval_chat(haystack, tokenizer, **settings)


@pytest.mark.parametrize("length", [512, 1000, 4096])
def test_chats_fill_their_length_and_never_pass_it(
    haystack: Haystack, families: dict[str, Any], length: int
) -> None:
    for tokenizer in (families["chatml"], families["mistral"]):
        for index in range(10):
            chat = make(haystack, tokenizer, length=length, facts=3, index=index)
            assert chat.tokens == len(render_chat(tokenizer, chat.messages).ids)
            assert 0.97 * length <= chat.tokens <= length


def test_answers_and_keys_stand_in_the_context_exactly_once(haystack: Haystack, chatml: Any) -> None:
    for index in range(20):
        chat = make(haystack, chatml, length=2000, facts=8, questions=4, index=index)
        context = chat.messages[0]["content"].rpartition("\n\n")[0]
        for fact in chat.facts:
            assert context.count(fact.answer) == 1
            assert context.count(fact.key) == 1
            assert context.count(fact.sentence) == 1


def test_a_value_that_the_text_holds_already_is_drawn_again(
    chatml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cities = " ".join(wordings._CITIES[1:])
    haystack = Haystack([f"They went to {cities} and came back."] * 3)
    monkeypatch.setattr(wordings, "_TRAIN", [t for t in templates("train") if t.kind == "city"])
    chat = make(haystack, chatml, facts=1, questions=1, length=900)
    assert chat.facts[0].answer == wordings._CITIES[0]


def test_a_text_of_every_number_is_refused() -> None:
    taken = " ".join(str(number) for number in range(10_000, 100_000))
    with pytest.raises(DataError, match="nearly every five-digit number"):
        wordings.draw_value(random.Random(0), templates("train")[0], "train", taken)


def test_questions_and_bare_answers_take_turns(haystack: Haystack, chatml: Any) -> None:
    chat = make(haystack, chatml, facts=6, questions=3, length=1500)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
    assert chat.messages[0]["content"].endswith("\n\n" + chat.facts[chat.asked[0]].question)
    assert [m["content"] for m in chat.messages[2::2]] == [chat.facts[n].question for n in chat.asked[1:]]
    assert [m["content"] for m in chat.messages[1::2]] == [chat.facts[n].value for n in chat.asked]


def test_a_sample_depends_on_seed_and_index_alone(haystack: Haystack, chatml: Any) -> None:
    forwards = [make(haystack, chatml, index=index) for index in range(6)]
    fresh = Haystack([book(1), book(2), book(3)])
    backwards = [make(fresh, chatml, index=index) for index in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert len({chat.messages[0]["content"] for chat in forwards}) == 6
    assert make(haystack, chatml, seed=1) != forwards[0]


def test_what_is_trained_on_is_not_what_is_tested_with_the_same_seed(haystack: Haystack, chatml: Any) -> None:
    trained = make_training_chat(haystack, chatml, longest=900, facts=8, questions=2, seed=0, index=0)
    tested = make(haystack, chatml, facts=8, index=0, length=1500)
    assert not {line.text for line in trained.lines} & {fact.sentence for fact in tested.facts}


def test_depths_are_spread_over_the_whole_context(haystack: Haystack, chatml: Any) -> None:
    chat = make(haystack, chatml, length=4000, facts=8)
    for number, fact in enumerate(chat.facts):
        assert number / 8 - 0.02 <= fact.depth <= (number + 1) / 8 + 0.02


def test_given_depths_are_met_and_their_first_facts_asked(haystack: Haystack, chatml: Any) -> None:
    chat = make(haystack, chatml, length=4000, facts=4, depths=[1.0, 0.5, 0.0, 0.25])
    assert chat.asked == [0, 1]
    assert [fact.depth for fact in chat.facts] == pytest.approx([1.0, 0.5, 0.0, 0.25], abs=0.02)
    context = chat.messages[0]["content"].rpartition("\n\n")[0]
    assert context.startswith(chat.facts[2].sentence)
    assert context.endswith(chat.facts[0].sentence)


def test_the_context_is_consecutive_text_of_the_haystack(haystack: Haystack, chatml: Any) -> None:
    chat = make(haystack, chatml, facts=2, length=2000)
    context = chat.messages[0]["content"].rpartition("\n\n")[0]
    for fact in chat.facts:
        context = context.replace(fact.sentence + " ", "").replace(" " + fact.sentence, "")
    ring = " ".join(" ".join(book(n).split()) for n in (1, 2, 3, 1))
    assert " ".join(context.split()).removesuffix("...") in ring


def test_text_is_repeated_only_when_all_of_it_was_used(chatml: Any) -> None:
    short = Haystack([book(1, sentences=60), book(2, sentences=60)])
    rng = random.Random(0)
    stream = short.sentences(rng)
    assert len({next(stream).text for _ in range(120)}) == 120
    chat = make(short, chatml, length=20_000, facts=2, questions=1)
    assert chat.tokens > 19_000


def test_every_training_length_from_an_eighth_on_is_as_likely(haystack: Haystack, chatml: Any) -> None:
    lengths = sorted(
        make_training_chat(haystack, chatml, longest=4096, facts=2, questions=1, seed=0, index=index).tokens
        for index in range(60)
    )
    assert 480 < lengths[0] < 800
    assert 3800 < lengths[-1] <= 4096
    # The quartiles of what is uniform from 512 to 4,096 are 1,408, 2,304 and 3,200; of 60 draws they vary by 230.
    assert all(abs(lengths[15 * n] - (512 + 896 * n)) < 500 for n in (1, 2, 3))


def test_facts_that_do_not_fit_are_refused(haystack: Haystack, chatml: Any) -> None:
    with pytest.raises(DataError, match=r"8 facts and 4 questions need \d+ tokens, more than 100"):
        make(haystack, chatml, length=100, facts=8, questions=4)


def test_evaluation_wordings_share_nothing_with_training() -> None:
    train, held_out = templates("train"), templates("eval")
    assert not {t.sentence for t in train} & {t.sentence for t in held_out}
    assert not {t.question for t in train} & {t.question for t in held_out}
    rng = random.Random(0)
    nouns = {key.split()[1] for _ in range(20) for key in draw_keys(rng, 60, "train")}
    assert not nouns & {key.split()[1] for _ in range(20) for key in draw_keys(rng, 60, "eval")}


def test_keys_of_one_chat_differ() -> None:
    for seed in range(50):
        keys = draw_keys(random.Random(seed), 64, "train")
        assert len(set(keys)) == 64


def test_sentences_keep_every_word_and_know_their_paragraphs() -> None:
    text = "One two. “Three!” four\nfive?\n\nSix (seven.) Eight"
    found = split_sentences(text)
    assert [s.text for s in found] == ["One two.", "“Three!”", "four five?", "Six (seven.)", "Eight"]
    assert [s.joint for s in found] == [" ", " ", "\n\n", " ", "\n\n"]
    long = " ".join(["word"] * 500) + " " + "x" * 1000
    pieces = split_sentences(long)
    assert max(len(s.text) for s in pieces) <= 400
    assert "".join(s.text for s in pieces).replace(" ", "") == long.replace(" ", "")


def test_an_empty_haystack_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a text"):
        Haystack(["  \n"])


def test_a_chat_is_the_same_bytes_whatever_makes_it_faster(haystack: Haystack) -> None:
    tokenizer = load_tokenizer("builtin")
    chats = [
        make_training_chat(haystack, tokenizer, longest=4096, facts=8, questions=4, seed=3, index=n)
        for n in range(8)
    ]
    content = json.dumps([[chat.messages, chat.tokens, chat.depths] for chat in chats])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "c8b76a1a83e4cd1d"
