"""Reuse never changes an answer, and nothing is ever dropped."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import SettingsError
from longlora_cli.generation.conversation import Conversation
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.generation.sampling import make_sampler
from longlora_cli.generation.session import Session, refuse_overflow, stop_ids

KINDS = ["tied", "untied", "sliding", "adapter", "nf4"]


def random_ids(count, seed=0):
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(session, ids, new=8, **options):
    return session.answer(ids, max_new_tokens=new, stop_ids=options.pop("stop_ids", ()), **options)


def interrupt_after(count):
    left = [count]

    def on_token(token, piece):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return on_token


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_librarys_generate(make_loaded, kind):
    loaded, ids = make_loaded(kind), random_ids(30)
    with torch.no_grad():
        expected = loaded.causal_lm.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=True
        )[0, 30:]
    assert ask(Session(loaded, prefill_chunk=7), ids).ids == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_prefix_gives_the_logits_of_a_cold_prefill(make_loaded, kind):
    loaded, first, second = make_loaded(kind), random_ids(60), random_ids(60)[:45] + random_ids(20, seed=1)
    seen = {}

    def record(name):
        def sampler(logits):
            seen.setdefault(name, logits)
            return 5

        return sampler

    warm = Session(loaded, prefill_chunk=16)
    ask(warm, first)
    answer = ask(warm, second, sampler=record("warm"))
    ask(Session(loaded, prefill_chunk=16), second, sampler=record("cold"))
    assert answer.reused_tokens == 45
    torch.testing.assert_close(seen["warm"], seen["cold"], rtol=0, atol=1e-5)


def test_the_second_turn_runs_its_new_tokens_and_the_last_answer_token(tiny, count_tokens):
    session, first = Session(tiny, prefill_chunk=16), random_ids(100)
    answer = ask(session, first)
    second = first + answer.ids + random_ids(10, seed=1)
    with count_tokens(tiny) as counts:
        ask(session, second, new=1)
    assert sum(counts) == 10 + 1


def test_the_same_prompt_again_runs_one_token(tiny, count_tokens):
    session, ids = Session(tiny, prefill_chunk=16), random_ids(100)
    first = ask(session, ids)
    with count_tokens(tiny) as counts:
        again = ask(session, ids)
    assert counts == [1] * 8  # the prompt's last token, then the answer but its last
    assert again.ids == first.ids
    assert again.reused_tokens == 99


def test_an_answer_ends_at_a_stop_token_which_is_not_part_of_it(tiny):
    ids = random_ids(30)
    free = ask(Session(tiny), ids)
    stop = free.ids[5]
    answer = ask(Session(tiny), ids, stop_ids={stop})
    assert answer.finish == "eos"
    assert answer.ids == free.ids[: free.ids.index(stop)]
    assert free.finish == "length"


def test_the_pieces_told_are_the_text(tiny):
    pieces, ids = [], []
    answer = ask(
        Session(tiny), random_ids(30), new=60, on_token=lambda i, piece: (ids.append(i), pieces.append(piece))
    )
    assert ids[:60] == answer.ids
    assert "".join(pieces).replace("\ufffd", "") == answer.text.replace("\ufffd", "")
    assert answer.text == tiny.tokenizer.decode(answer.ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["tied", "bf16", "nf4"])
def test_kv_bytes_are_known_before_they_are_held(make_loaded, kind):
    session = Session(make_loaded(kind))
    answer = ask(session, random_ids(50), new=8)
    assert answer.kv_bytes == session.kv_bytes == session.kv_bytes_for(50 + 8 - 1)


def test_ctrl_c_while_answering_keeps_what_was_said_and_a_valid_cache(tiny):
    session, ids = Session(tiny, prefill_chunk=16), random_ids(40)
    whole = ask(Session(tiny), ids)
    stopped = ask(session, ids, on_token=interrupt_after(4))
    assert (stopped.finish, stopped.ids) == ("interrupted", whole.ids[:4])
    assert session.ids == ids + whole.ids[:3]
    assert ask(session, ids + stopped.ids, new=4).ids == whole.ids[4:]


def test_ctrl_c_while_reading_keeps_the_chunks_that_were_read(tiny):
    session, ids = Session(tiny, prefill_chunk=16), random_ids(100)
    stopped = ask(session, ids, advance=interrupt_after_chunks(3))
    assert (stopped.finish, stopped.ids, session.ids) == ("interrupted", [], ids[:48])
    resumed = ask(session, ids)
    assert resumed.reused_tokens == 48
    assert resumed.ids == ask(Session(tiny), ids).ids


def interrupt_after_chunks(count):
    left = [count]

    def advance(tokens):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return advance


def test_ctrl_c_inside_a_decode_step_leaves_a_cache_that_is_used_rightly(tiny):
    """Layer 0 has run the token and layer 1 has not: the next answer cuts both to what they share."""
    session, ids, calls = Session(tiny), random_ids(40), [0]

    def strike(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt

    hook = tiny.causal_lm.model.layers[1].register_forward_pre_hook(strike)
    stopped = ask(session, ids)
    hook.remove()
    assert stopped.finish == "interrupted"
    again = ids + stopped.ids + random_ids(5, seed=2)
    assert ask(session, again).ids == ask(Session(tiny), again).ids


def test_200_random_overflows_are_refused_before_a_token_is_run(tiny, count_tokens):
    rng, session = random.Random(0), Session(tiny)
    limit = session.context_length
    with count_tokens(tiny) as counts:
        for _ in range(200):
            prompt = rng.randint(1, 2 * limit)
            new = rng.randint(max(limit - prompt + 1, 1), 2 * limit)
            with pytest.raises(SettingsError) as caught:
                ask(session, [5] * prompt, new=new)
            told = " ".join(caught.value.lines())
            assert all(f"{number:,}" in told for number in (prompt, limit, prompt + new))
    assert counts == []
    assert session.ids == []


def test_a_context_filled_to_its_last_token_is_accepted():
    refuse_overflow(100, 28, 128)
    with pytest.raises(SettingsError, match="129 are needed"):
        refuse_overflow(101, 28, 128)


def test_an_overflow_is_told_with_three_remedies():
    with pytest.raises(SettingsError) as caught:
        refuse_overflow(100, 50, 128)
    assert "22 tokens less" in caught.value.hint
    assert "--max-new-tokens 28" in caught.value.hint
    assert "--rope" in caught.value.hint


def test_a_model_can_be_read_beyond_its_context_on_purpose(tiny):
    session = Session(tiny, context_length=32)
    assert len(ask(session, random_ids(40), new=4, allow_beyond=True).ids) == 4


def test_a_session_can_be_given_a_shorter_context(tiny):
    with pytest.raises(SettingsError, match="the context has 32"):
        ask(Session(tiny, context_length=32), random_ids(30), new=4)


def test_dynamic_positions_give_the_same_answer_whatever_was_read_before(make_loaded):
    loaded = make_loaded("dynamic")
    session, short = Session(loaded, prefill_chunk=16), random_ids(50)
    alone = ask(Session(loaded, prefill_chunk=16), short, allow_beyond=True)
    ask(session, short + random_ids(100, seed=1), allow_beyond=True)
    after = ask(session, short, allow_beyond=True)
    assert after.ids == alone.ids
    assert after.reused_tokens == 0


def test_dynamic_positions_answer_as_the_librarys_generate(make_loaded):
    loaded, ids = make_loaded("dynamic"), random_ids(50)
    with torch.no_grad():
        loaded.causal_lm(input_ids=torch.tensor([[5]]))  # a short text sets its positions back
        expected = loaded.causal_lm.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=True
        )[0, 50:]
    answer = ask(Session(loaded, prefill_chunk=16), ids, allow_beyond=True)
    assert answer.ids == expected.tolist()


def test_the_same_seed_gives_the_same_answer(tiny):
    def sampled(seed):
        return ask(Session(tiny), random_ids(20), sampler=make_sampler(temperature=1.0, seed=seed)).ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_stop_tokens_come_from_tokenizer_config_and_template(tiny):
    config = tiny.causal_lm.generation_config
    saved = config.eos_token_id
    try:
        config.eos_token_id = [7, 9]
        tiny.tokenizer.eos_token = "<|endoftext|>"
        assert stop_ids(tiny) == {0, 2, 7, 9}  # tokenizer, template's <|im_end|>, and the two
    finally:
        config.eos_token_id = saved
        tiny.tokenizer.eos_token = "<|im_end|>"


QUESTIONS = st.text(alphabet="abc é😀<|im_end|>\n", min_size=1, max_size=12)


class Talk(RuleBasedStateMachine):
    """A conversation with undo, retry, edits and interruptions; every answer is compared with a cold one."""

    loaded = None
    past = PLAIN

    @initialize()
    def begin(self):
        self.session = Session(self.loaded, prefill_chunk=16, past=self.past)
        self.conversation = Conversation(self.loaded.tokenizer)

    def answer(self, question, **options):
        prompt = self.conversation.ask(question)
        if len(prompt.ids) > 400:
            return
        answer = ask(self.session, prompt.ids, new=6, **options)
        cold = ask(Session(self.loaded, prefill_chunk=50, past=self.past), prompt.ids, new=6)
        assert answer.ids == cold.ids[: len(answer.ids)]
        if answer.finish != "interrupted":
            assert len(answer.ids) == 6
        spoken = prompt.ids + answer.ids
        assert self.session.ids == spoken[: len(self.session.ids)]
        if answer.ids:
            assert len(self.session.ids) == len(spoken) - 1
            self.conversation.keep(prompt, answer.text, answer.ids)

    @rule(question=QUESTIONS)
    def say(self, question):
        self.answer(question)

    @rule(question=QUESTIONS, after=st.integers(1, 5))
    def say_and_stop(self, question, after):
        self.answer(question, on_token=interrupt_after(after))

    @rule(question=QUESTIONS)
    def stop_while_reading(self, question):
        self.answer(question, advance=interrupt_after_chunks(1))

    @precondition(lambda self: self.conversation.turns)
    @rule()
    def undo(self):
        self.conversation.undo()

    @precondition(lambda self: self.conversation.turns)
    @rule()
    def retry(self):
        self.answer(self.conversation.undo().question)

    @rule(system=st.sampled_from([None, "be brief", "be long"]))
    def edit_system(self, system):
        self.conversation.system = system

    @rule(text=QUESTIONS)
    def attach(self, text):
        self.conversation.attach("notes.txt", text)


PASTS = {
    "tied": PLAIN,
    "adapter": PLAIN,
    "untied": Past(kv_bits=8),
    "beacons": Past(beacon=BeaconSettings(window=32, ratios=(4,), sink=1)),
}


@pytest.mark.parametrize("kind", PASTS)
def test_random_conversations_are_answered_as_if_read_anew(make_loaded, kind):
    machine = type("TalkWithModel", (Talk,), {"loaded": make_loaded(kind), "past": PASTS[kind]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
