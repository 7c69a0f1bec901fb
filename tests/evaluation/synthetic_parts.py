"""Tokenizers and samples for the tests of synthetic tasks: three kinds of tokenizer, each trained or loaded once."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longlora_cli.data.haystack import Haystack
from longlora_cli.evaluation.tasks.registry import make_sample, requests
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.texts import read_haystack
from longlora_cli.models.tokenizer import load_tokenizer

BUILTIN = Path(__file__).parents[2] / "longlora_cli" / "models" / "builtin"
_LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@cache
def haystack() -> Haystack:
    """The embedded book."""
    return read_haystack([], split="test")


@cache
def tokenizer(name: str) -> Any:
    """`embedded` (ChatML), `sentencepiece` (BOS and Llama 2's turns), `base` (bytes, no template), or `smollm2`."""
    return {"embedded": _embedded, "sentencepiece": _sentencepiece, "base": _base, "smollm2": _smollm2}[
        name
    ]()


def samples(
    task: str, kind: str, length: int, *, number: int = 3, depths: int = 3, seed: int = 0
) -> list[Sample]:
    """The first samples of a task, made once for all tests."""
    return list(_samples(task, kind, length, number, depths, seed))


@cache
def _samples(task: str, kind: str, length: int, number: int, depths: int, seed: int) -> tuple[Sample, ...]:
    asked = requests(
        task, haystack(), tokenizer(kind), lengths=[length], depths=depths, samples=number, seed=seed
    )
    return tuple(make_sample(request) for request in list(asked)[:number])


def _embedded() -> Any:
    return load_tokenizer(str(BUILTIN))


def _smollm2() -> Any:
    name = os.environ.get("TEST_SMOLLM2")
    if not name:
        pytest.fail("this test needs the real model: set TEST_SMOLLM2 to a folder with SmolLM2-135M-Instruct")
    return load_tokenizer(name)


def _text() -> list[str]:
    return (BUILTIN / "book.txt").read_text("utf-8")[:120_000].split("\n\n")


def _sentencepiece() -> Any:
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=2500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator(_text(), trainer)
    # Bytes are pieces of the model like any other, not control tokens.
    state = json.loads(made.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if not token["content"].startswith("<0x")
    ]
    made = Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = _LLAMA_2
    return fast


def _base() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
