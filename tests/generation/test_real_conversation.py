"""SmolLM2-135M-Instruct answers, remembers, and is not read twice."""

from __future__ import annotations

import pytest

from longlora_cli.generation.conversation import Conversation
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection

pytestmark = pytest.mark.real_model


def test_smollm2_answers_and_its_second_turn_runs_only_what_is_new(smollm2_folder, count_tokens):
    loaded = load_model(ModelSection(model=str(smollm2_folder), device="cpu", dtype="fp32"))
    session, conversation, stops = Session(loaded), Conversation(loaded.tokenizer), stop_ids(loaded)
    first = conversation.ask("What is the capital of France?")
    said = session.answer(first.ids, max_new_tokens=20, stop_ids=stops)
    assert (said.finish, "Paris" in said.text) == ("eos", True)
    conversation.keep(first, said.text, said.ids)
    second = conversation.ask("And of Italy?")
    new = len(second.ids) - len(first.ids) - len(said.ids)
    with count_tokens(loaded) as counts:
        warm = session.answer(second.ids, max_new_tokens=4, stop_ids=stops)
    assert counts[0] == new
    assert warm.ids == Session(loaded).answer(second.ids, max_new_tokens=4, stop_ids=stops).ids
