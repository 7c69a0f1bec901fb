"""Answers whose question finds spans of the past: they are read at the finer level in a fork, and then forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longlora_cli.beacon.retrieval import RetrievalSettings
from longlora_cli.beacon.retrieval_session import RetrievalSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.answerer import SessionAnswerer
from longlora_cli.evaluation.generation import Question, predict
from longlora_cli.generation.past import Past
from longlora_cli.generation.reader import Query
from longlora_cli.generation.session import Session, refuse_overflow

COARSE = BeaconSettings(window=32, ratios=(8,), sink=1)
FOUND = RetrievalSettings("bm25", topk=2, key_length=16)
PAST = Past(beacon=COARSE, retrieval=FOUND)
FACTS = [
    "The river ran past the mill. ",
    "A falcon slept on the amber stone. ",
    "They walked over the old bridge. ",
    "The wind was quiet under the trees. ",
]


@pytest.fixture(scope="module")
def beacons(make_loaded):
    return make_loaded("beacons")


@pytest.fixture(scope="module")
def ids_of(beacons):
    return lambda text: safe_encoder(beacons.tokenizer).encode_batch([text])[0].tolist()


@pytest.fixture(scope="module")
def text(ids_of):
    return ids_of("".join(FACTS * 6))


def query_of(ids, words):
    return Query(words, len(ids))


def ask(session, text, question, words, **options):
    return session.answer(
        text + question, max_new_tokens=6, stop_ids=(), query=query_of(question, words), **options
    )


def by_hand(loaded, past, text, question, words):
    """The same with the session of the beacon room alone."""
    session = RetrievalSession(loaded, past.beacon, past.retrieval, fine_ratio=past.fine_ratio)
    session.feed(text)
    fork = session.answering(words)
    logits, said = fork.feed(question), []
    for _ in range(6):
        said.append(int(logits.argmax()))
        logits = fork.step(said[-1])
    return said


@pytest.mark.parametrize("fine", [0, 2])
def test_an_answer_is_the_retrieval_sessions_own(beacons, text, ids_of, fine):
    past, question = replace(PAST, fine_ratio=fine), ids_of("Where did the falcon sleep?")
    found = ask(Session(beacons, past=past), text, question, "falcon sleep")
    assert found.ids == by_hand(beacons, past, text, question, "falcon sleep")


def test_another_question_finds_other_spans(beacons, text, ids_of):
    """Else nothing here would need a query: the same prompt, searched by other words."""
    question = ids_of("Where?")
    losses = [
        Session(beacons, past=past).log_likelihoods(
            text + question, [ids_of(" stone")], query=query_of(question, words)
        )[0]
        for past, words in ((PAST, "falcon amber"), (PAST, "river mill"), (PAST, "xyzzy"))
    ]
    coarse = Session(beacons, past=Past(beacon=COARSE)).log_likelihoods(text + question, [ids_of(" stone")])
    assert len({round(loss, 6) for loss in losses}) == 3
    assert losses[2] == pytest.approx(coarse[0], abs=1e-5)  # no word of the past: nothing is brought back


def test_questions_about_one_text_read_it_once_and_leave_nothing_behind(beacons, text, ids_of):
    one, reused = Session(beacons, past=PAST), []
    for words in ("falcon", "river", "bridge", "falcon"):
        question = ids_of(f"Where is the {words}?")
        answer = ask(one, text, question, words)
        assert answer.ids == ask(Session(beacons, past=PAST), text, question, words).ids
        assert one.ids == text
        reused.append(answer.reused_tokens)
    assert reused == [0, *[len(text)] * 3]


def test_a_conversation_goes_on_over_what_was_asked_and_answered(beacons, text, ids_of):
    one, first = Session(beacons, past=PAST), ids_of("Where is the falcon?")
    said = ask(one, text, first, "falcon")
    talk, second = text + first + said.ids, ids_of("And the river?")
    answer = ask(one, talk, second, "river")
    assert answer.ids == ask(Session(beacons, past=PAST), talk, second, "river").ids
    assert answer.reused_tokens == len(text)
    assert one.ids == talk


def test_a_text_of_less_than_a_window_is_answered_without_retrieval(beacons, ids_of):
    text, question = ids_of(FACTS[0]), ids_of("Where?")
    found = ask(Session(beacons, past=PAST), text, question, "river")
    plain = Session(beacons, past=Past(beacon=COARSE)).answer(text + question, max_new_tokens=6, stop_ids=())
    assert (found.ids, found.kv_bytes) == (plain.ids, plain.kv_bytes)


@pytest.mark.parametrize("query", [None, Query("  ", 4)])
def test_retrieval_without_a_query_is_refused(beacons, text, query):
    with pytest.raises(SettingsError, match="no query"):
        Session(beacons, past=PAST).answer(text, max_new_tokens=2, stop_ids=(), query=query)


def test_bytes_are_at_most_those_told_before(beacons, text, ids_of):
    coarse = Session(beacons, past=Past(beacon=COARSE))
    for fine in (0, 2):
        one, question = Session(beacons, past=replace(PAST, fine_ratio=fine)), ids_of("Where is the falcon?")
        answer = ask(one, text, question, "falcon")
        tokens = len(text) + len(question) + 5
        assert coarse.kv_bytes_for(tokens) < answer.kv_bytes <= one.kv_bytes_for(tokens)


def test_room_is_left_for_what_is_brought_back(beacons):
    assert (
        PAST.readable(1024, 1024)
        == Past(beacon=COARSE).readable(1024, 1024 - PAST.fine_rows)
        < Past(beacon=COARSE).readable(1024, 1024)
    )
    assert PAST.fine_rows == 2 * (16 + 2 * 8)
    assert replace(PAST, fine_ratio=2).fine_rows == 16 + 2 * 8


def test_ctrl_c_in_a_question_leaves_the_text_that_was_read(beacons, text, ids_of):
    one, question = Session(beacons, past=PAST), ids_of("Where is the falcon?")

    def strike(token, piece):
        raise KeyboardInterrupt

    stopped = ask(one, text, question, "falcon", on_token=strike)
    assert (stopped.finish, one.ids) == ("interrupted", text)
    assert (
        ask(one, text, question, "falcon").ids
        == ask(Session(beacons, past=PAST), text, question, "falcon").ids
    )


def test_evaluation_searches_by_the_question_without_its_context(beacons, text, ids_of, monkeypatch):
    asked, own = [], RetrievalSession.answering
    monkeypatch.setattr(
        RetrievalSession, "answering", lambda self, query: asked.append(query) or own(self, query)
    )
    bare = ids_of("Where is the falcon?")
    answerer = SessionAnswerer(beacons, prefill_chunk=4096, past=PAST)
    told = Question("needle", text + bare, ["stone"], without_context=bare)
    untold = Question("other", text + bare, ["stone"])
    rows = list(predict(answerer, [told, untold], max_new_tokens=4))
    assert asked[0] == "Where is the falcon?"
    assert asked[1] == beacons.tokenizer.decode((text + bare)[-64:])
    assert len(rows) == 2


def test_a_likelihood_does_not_depend_on_the_ones_before_it(beacons, text, ids_of):
    prompt, query = text + ids_of("Where is the falcon?"), Query("falcon", 8)
    ends = [torch.arange(5, 14).tolist(), [7, 8]]
    together = Session(beacons, past=PAST).log_likelihoods(prompt, [*ends, ends[0]], query=query)
    alone = [Session(beacons, past=PAST).log_likelihoods(prompt, [end], query=query)[0] for end in ends]
    assert together == pytest.approx([*alone, alone[0]], abs=1e-5)


def test_a_text_that_is_too_long_beside_what_is_brought_back_is_told_how_to_bring_less() -> None:
    with pytest.raises(SettingsError) as refused:
        refuse_overflow(300, 12, 128, PAST)
    assert "--retrieval-topk or --retrieval-key-length" in (refused.value.hint or "")
    with pytest.raises(SettingsError) as plain:
        refuse_overflow(300, 12, 128)
    assert "retrieval" not in (plain.value.hint or "")
