"""Pieces cut at seams against whole texts, by tokenizers of every pipeline that people use."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from tokenizer_kinds import MAKERS, TEXTS, byte_bpe
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.seams import Seams
from longlora_cli.data.split_pattern import SplitPattern, Unprovable
from longlora_cli.models.tokenizer import load_tokenizer

_kept: dict[str, Any] = {}


def encoder_of(name: str) -> Any:
    if name not in _kept:
        fast = PreTrainedTokenizerFast(tokenizer_object=MAKERS[name]())
        _kept[name] = (fast, safe_encoder(fast))
    return _kept[name][1]


def pieces_of(seams: Seams, text: str, characters: int = 1) -> list[tuple[str, bool]]:
    bounds = [0, *seams.cuts(text, characters), len(text)]
    return [(text[a:b], a == 0) for a, b in pairwise(bounds)]


def joined(encoder: Any, text: str, characters: int = 1) -> list[int]:
    return [
        n for ids in encoder.encode_pieces(pieces_of(encoder.seams, text, characters)) for n in ids.tolist()
    ]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
@example(text="a. The one falcon a.  fal\n\none.\n \n The code is 1. A")
@example(text="One. E. E. e. e. E code is.")
@example(text="[x] The code is. [x]the code. ▁the")
def test_every_seam_of_any_text_is_exact(name: str, text: str) -> None:
    encoder = encoder_of(name)
    [whole] = encoder.encode_batch([text])
    assert joined(encoder, text) == whole.tolist()


PROSE = (
    "The secret code of the amber falcon is 48213. What is it, my friend?\n\nWell, hello there; six.\n" * 40
)


# A space comes after each of their added tokens, of which the prose has some, so that pieces cannot do without it.
WHOLE = ("gpt2, both", "llama2, added tokens", "unigram, added tokens")


@pytest.mark.parametrize("name", MAKERS)
def test_prose_is_cut_by_every_tokenizer_that_prefixes_a_text_only_once(name: str) -> None:
    encoder = encoder_of(name)
    pieces = len(pieces_of(encoder.seams, PROSE, 100))
    assert pieces == 1 if name in WHOLE else pieces > len(PROSE) / 200
    assert joined(encoder, PROSE, 100) == encoder.encode_batch([PROSE])[0].tolist()


UNBROKEN = {
    "one line of code": "x={'a':1,'b':[2,3]};f(x,'a');" * 40_000,
    "Chinese": "漢字かな交じり文。「はい、そう」と。中文没有空格。" * 5_000,
    "lines": "one\ntwo\nthree\r\n" * 5_000,
}


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "llama2", "mistral", "gemma", "builtin"])
@pytest.mark.parametrize("kind", UNBROKEN)
def test_texts_without_blank_lines_or_spaces_are_cut(name: str, kind: str) -> None:
    encoder, text = encoder_of(name), UNBROKEN[kind]
    assert len(pieces_of(encoder.seams, text, 4096)) > len(text) / 8192
    assert joined(encoder, text, 4096) == encoder.encode_batch([text])[0].tolist()


def test_a_text_with_nothing_to_cut_at_stays_whole() -> None:
    assert [pieces_of(encoder_of(name).seams, "a" * 5000) for name in ("gpt2", "llama3", "t5")] == [
        [("a" * 5000, True)]
    ] * 3


def unprovable(change: Any) -> Seams:
    tokenizer = byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    change(tokenizer)
    return Seams(json.loads(tokenizer.to_str()), tokenizer)


def test_a_step_that_is_not_known_is_never_cut_at() -> None:
    def word(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?<=a) |\s+"), "isolated")

    def ahead(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?= t)|\W+"), "isolated")

    def accents(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.StripAccents()

    def sentences(tokenizer: Tokenizer) -> None:  # one split from full stop to full stop, no model of merges
        tokenizer.pre_tokenizer = pre_tokenizers.Split(".", "merged_with_previous")
        tokenizer.model = models.WordLevel({"a": 0}, unk_token="a")

    assert all(not unprovable(change).exact("a", " ") for change in (word, ahead, accents, sentences))
    assert unprovable(lambda tokenizer: None).exact("a", " ")
    assert unprovable(sentences).exact(".", " ")


@pytest.mark.parametrize(
    ("pattern", "pair", "held"),
    [
        (r"\s+(?!\S)|\s", " a", True),  # looked over
        (r"\s+(?!\S)|\s", "a ", False),
        (r"[^\s\p{L}]", "ab", False),
        (r"(?i:q)u+|x", "Qu", True),
        (r"(?i:q)u+|x", "uQ", False),
        (r"a{2}?b", "ab", True),
        (r"(?:ab?)+", "ba", True),
        (r"\p{Unheard_of}+", "ab", True),
        (r"[^a-c]d", "bd", False),
        (r"[\p{Lu}\p{N}]\P{L}|b", "A1", True),
        (r"[\p{Lu}\p{N}]\P{L}|b", "Ab", False),
    ],
)
def test_a_pattern_tells_which_neighbours_a_match_may_hold(pattern: str, pair: str, held: bool) -> None:
    assert SplitPattern(pattern).can_hold(*pair) == held


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<=a)b",
        r"^a",
        r"a\b",
        r"a*",
        r"(?!ab)c",
        r"[a&&b]",
        r"(?m:a.)",
        r"(a)\1",
        r"\h",
        r"[[:alpha:]]",
        r"(?>a)",
        "(a",
    ],
)
def test_a_pattern_that_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(Unprovable):
        SplitPattern(pattern)


def test_what_needs_two_of_a_character_does_not_always_match_one() -> None:
    assert not SplitPattern(" {2,}").always_matches(" ")
    assert not SplitPattern(r" (?!\S)").always_matches(" ")
    assert not SplitPattern(r" ?+ ").always_matches(" ")
    assert SplitPattern(r" ?\p{L}+| ").always_matches(" ")


@pytest.mark.real_model
@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_every_seam_of_any_text_is_exact_for_smollm2(smollm2_folder: Path, text: str) -> None:
    if "smollm2" not in _kept:
        fast = load_tokenizer(smollm2_folder)
        _kept["smollm2"] = (fast, safe_encoder(fast))
    encoder = _kept["smollm2"][1]
    assert joined(encoder, text) == encoder.encode_batch([text])[0].tolist()
