"""Settings: lengths, checks, and combinations that would have no effect."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from longlora_cli.config import ChatConfig, EvalConfig, MergeConfig, PrepareConfig, TrainConfig
from longlora_cli.values import parse_length

TRAIN = {"data": ["d"], "out": "o"}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        ("32k", 32_768),
        ("1m", 1_048_576),
        ("1.5K", 1536),
        ("131,072", 131_072),
        (" 8k ", 8192),
    ],
)
def test_lengths_read_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "32kb", "-1", "1.0001k", "many", "1e5"])
def test_what_is_not_a_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_length(text)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TrainConfig, {"rope_factor": 4}, "--rope-factor has no effect here"),
        (TrainConfig, {"rope": "yarn", "rope_theta": 1e6}, "--rope-theta has no effect here"),
        (TrainConfig, {"rope": "theta", "rope_theta": 1e6, "rope_factor": 2}, "give one"),
        (TrainConfig, {"steps": 5, "epochs": 2}, "--epochs has no effect here"),
        (TrainConfig, {"eval_every": 5}, "--eval-every has no effect here"),
        (TrainConfig, {"eval_data": "x", "eval_new_tokens": 5}, "--eval-new-tokens has no effect here"),
    ],
)
def test_a_training_setting_without_effect_is_refused(
    config: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**TRAIN, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap": "4k"}, "is not below --max-length"),
        ({"min_length": "5k"}, "is above --max-length"),
        ({"overlap": 8, "on_long": "drop"}, "--overlap has no effect here"),
        ({"stride": 8, "on_long": "truncate"}, "--stride has no effect here"),
        ({"stride": 8, "overlap": 8}, "--stride and --overlap say the same"),
        ({"stride": "5k"}, "--stride 5120 is above --max-length 4096: tokens would be skipped"),
        ({"stride": 8, "split_at": "chapter"}, "--stride has no effect here: .* use --overlap"),
        ({"split_at": "chapter", "on_long": "truncate-middle"}, "--split-at has no effect here"),
        ({"learn_overlap": True}, "--learn-overlap has no effect here"),
        ({"learn_overlap": True, "stride": "4k"}, "--learn-overlap has no effect here"),
        ({"synthetic_facts": 3}, "--synthetic-facts has no effect here"),
        ({"synthetic": ["needle=3"], "synthetic_facts": 3}, "cannot be above --synthetic-facts"),
        ({"max_length": 0}, "greater than or equal to 8"),
    ],
)
def test_a_preparing_setting_that_cannot_be_used_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PrepareConfig(inputs=["x"], out="o", **values)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (EvalConfig, {"out": "o", "tasks": "ppl", "lengths": ["4k"]}, "--lengths has no effect here"),
        (EvalConfig, {"out": "o", "tasks": "needle", "window": 9}, "--window has no effect here"),
        (EvalConfig, {"out": "o", "tasks": "ppl", "truncate": "skip"}, "--truncate has no effect here"),
        (EvalConfig, {"out": "o", "tasks": "ppl", "batch_size": 8}, "--batch-size has no effect here"),
        (
            EvalConfig,
            {"out": "o", "tasks": "multiple_choice", "data": ["d"], "batch_size": 8},
            "--batch-size has no effect here: it belongs to answers that are generated",
        ),
        (
            EvalConfig,
            {"out": "o", "tasks": "lines", "make": True, "batch_size": 8},
            "--batch-size has no effect",
        ),
        (EvalConfig, {"out": "o", "tasks": "lines", "batch_size": 0}, "not a number from 1"),
        (EvalConfig, {"out": "o", "tasks": "lines", "batch_size": "many"}, "not a number from 1"),
        (
            EvalConfig,
            {"out": "o", "tasks": "lines", "rope": "dynamic", "batch_size": 8},
            "--batch-size 8 with --rope dynamic",
        ),
        (EvalConfig, {"out": "o", "tasks": "longbench"}, "--tasks longbench needs --data FOLDER"),
        (EvalConfig, {"out": "o", "tasks": "nedle"}, "--tasks nedle: unknown task; did you mean needle"),
        (EvalConfig, {"out": "o", "tasks": "generate"}, "needs --data"),
        (EvalConfig, {"out": "o", "window": 64, "stride": 65}, "tokens would be skipped"),
        (ChatConfig, {"seed": 1}, "--seed has no effect here"),
        (MergeConfig, {"sources": ["a", "b"], "out": "o", "weights": [1]}, "1 --weights for 2 sources"),
        (MergeConfig, {"sources": ["a"], "out": "o", "weights": [1]}, "one source is not mixed"),
    ],
)
def test_other_settings_without_effect_are_refused(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**values)


def test_lists_are_given_by_commas_or_words() -> None:
    assert (
        EvalConfig(out="o", tasks=["ppl,needle"]).tasks == EvalConfig(out="o", tasks=["ppl", "needle"]).tasks
    )
    assert EvalConfig(out="o", lengths="1k,2k").lengths == [1024, 2048]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig(**TRAIN).steps = 3
