from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longlora_cli.data import counting
from longlora_cli.data.counting import TokenCounter
from longlora_cli.data.encoding import safe_encoder

PARTS = st.sampled_from(
    [
        "One.",
        "Two!",
        "three?”",
        "(four.)",
        "“Well,”",
        "he said.",
        " ",
        " ",
        "  ",
        "\n\n",
        "five",
        "6.5",
        "é",
        "漢字。",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(PARTS | st.none(), max_size=60))
def test_counts_are_those_of_whole_texts_special_tokens_included(
    families: dict[str, Any], parts: list[str | None]
) -> None:
    for tokenizer in families.values():
        encoder = safe_encoder(tokenizer)
        special = encoder.secret(tokenizer.eos_token)
        text = "".join(special if part is None else part for part in parts)
        counter = TokenCounter(encoder)
        expected = len(encoder.encode_batch([text])[0])
        assert [counter.count(text), counter.count(text), *counter.count_each([text])] == [expected] * 3


def sentences(encoded: list[str]) -> list[str]:
    return [text for text in encoded if "mill" in text]


def test_a_sentence_is_encoded_once_until_it_is_forgotten(
    chatml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = safe_encoder(chatml)
    seen: list[str] = []
    real = encoder.encode_pieces
    monkeypatch.setattr(encoder, "encode_pieces", lambda p: (seen.extend(t for t, _ in p), real(p))[1])
    counter = TokenCounter(encoder)
    counter.count("A first one. The river ran past the mill. It slept.")
    counter.count("Another. The river ran past the mill. And so on.")
    assert sentences(seen) == [" The river ran past the mill."]
    monkeypatch.setattr(counting, "_MOST_CHARACTERS", 10)
    counter.count("The end. The river ran past the mill.")
    assert len(sentences(seen)) == 2
