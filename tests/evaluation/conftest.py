"""A tiny model that is loaded as users load one, texts to read, and answerers whose score is known."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from longlora_cli.evaluation.generation import Answer, Question
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.sections import ModelSection

WORDS = [
    "river",
    "mill",
    "wind",
    "stone",
    "old",
    "quiet",
    "walked",
    "slept",
    "under",
    "over",
    "bridge",
    "they",
    "time",
    "wisdom",
    "age",
    "worst",
    "best",
]


def make_text(sentences: int, seed: int = 0) -> str:
    """Different sentences of random words."""
    rng = random.Random(seed)
    return " ".join(
        " ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(sentences)
    )


class Oracle:
    """Answers every prompt with its first reference."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._answers = {tuple(q.prompt): q.references[0] for q in questions}
        self.asked = 0

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> Answer:
        self.asked += 1
        return Answer([1], self._answers[tuple(ids)], "eos")


class Null:
    """Says nothing."""

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> Answer:
        return Answer([], "", "eos")


class Parrot:
    """Repeats its prompt."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> Answer:
        return Answer(list(ids), self._decode(list(ids)), "length")


@pytest.fixture(scope="session")
def tiny_loaded(tiny_model_folder: Path) -> LoadedModel:
    """The tiny model in float32 on the CPU."""
    return load_model(
        ModelSection(model=str(tiny_model_folder), dtype="fp32", device="cpu"), context_length=512
    )


@pytest.fixture(scope="session")
def bos_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer that puts a BOS (token 0) in front of a text."""
    folder = tmp_path_factory.mktemp("with-bos") / "model"
    shutil.copytree(tiny_model_folder, folder)
    path, bos = folder / "tokenizer.json", "<|endoftext|>"
    state = json.loads(path.read_text())
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    path.write_text(json.dumps(state))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": bos}))
    return folder


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 400 sentences."""
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(make_text(400), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def answerers() -> Callable[..., Oracle | Null | Parrot]:
    """`answerers(kind, questions, decode)` for the kinds oracle, null and parrot."""

    def make(
        kind: str, questions: Sequence[Question], decode: Callable[[list[int]], str]
    ) -> Oracle | Null | Parrot:
        return {"oracle": lambda: Oracle(questions), "null": Null, "parrot": lambda: Parrot(decode)}[kind]()

    return make
