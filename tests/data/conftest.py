"""Tokenizers of three families with their chat templates, trained on a few sentences."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The secret code of the amber falcon is 48213. What is it?",
    "Well, hello there, my friend; how are you today?\n\nI am fine, thank you.",
    "You are a helpful assistant. system user assistant <|im_start|> [INST] </s> 0123456789",
    "One.\n\nTwo?\n\nThree?\n\nFour,\n\nfive!”\n\nsix",
    "Ünïcödé text — with “quotes”, emoji 🙂 and 漢字.",
] * 10

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def chatml_tokenizer() -> Any:
    """Byte-level BPE with GPT-2's splitting, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _finish(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, eos="<|im_end|>")


def llama3_tokenizer() -> Any:
    """Byte-level BPE with Llama 3's splitting; special tokens outside the vocabulary, BOS added by itself."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast = _finish(tokenizer, [], LLAMA3)
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast.add_special_tokens({"bos_token": special[0], "eos_token": special[3]})
    fast.add_tokens([AddedToken(name, special=True) for name in special[1:3]])
    bos = (special[0], fast.convert_tokens_to_ids(special[0]))
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[bos]
    )
    return fast


def mistral_tokenizer() -> Any:
    """Unigram with Metaspace; `</s>` is a piece of its vocabulary, and [INST] is plain text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = MISTRAL
    return fast


def llama2_tokenizer() -> Any:
    """BPE without splitting whose normalizer puts a space before every piece between special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = MISTRAL
    return fast


def _finish(tokenizer: Tokenizer, special: list[str], template: str, eos: str | None = None) -> Any:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast


_MAKERS = {
    "chatml": chatml_tokenizer,
    "llama3": llama3_tokenizer,
    "mistral": mistral_tokenizer,
    "llama2": llama2_tokenizer,
}
_made: dict[str, Any] = {}


def made(name: str) -> Any:
    """The tokenizer of a family, trained once a session."""
    if name not in _made:
        _made[name] = _MAKERS[name]()
    return _made[name]


@pytest.fixture(scope="session", params=list(_MAKERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer(family: str) -> Any:
    """One tokenizer of each family in turn."""
    return made(family)


@pytest.fixture(scope="session")
def families() -> dict[str, Any]:
    """All tokenizers by family, for property tests."""
    return {name: made(name) for name in _MAKERS}


@pytest.fixture(scope="session")
def chatml() -> Any:
    return made("chatml")
