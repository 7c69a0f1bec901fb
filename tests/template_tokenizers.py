"""Tokenizers that have the control tokens of each named template, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from longlora_cli.models.template_choice import choose_template
from longlora_cli.models.tokenizer import load_tokenizer

SENTENCES = [
    "The secret code of the amber falcon is 48213. What is it?\n\nWell, hello there, my friend!",
    "You are a helpful assistant. system user assistant model question answer [INST] 0123456789",
] * 10


def byte_level(special: list[str], *, bos: str | None, eos: str, adds_bos: bool = False) -> Any:
    """Byte-level BPE with GPT-2's splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return _fast(tokenizer, bos, eos, adds_bos)


def sentencepiece(
    special: list[str], *, bos: str, eos: str, prepend: str, strips: bool = False, adds_bos: bool = False
) -> Any:
    """BPE over whole texts with bytes to fall back on, as SentencePiece's.

    Args:
        prepend: Where a space is put: `all` (before each piece between special tokens, Llama 2), `first` (at the
            beginning only, Mistral v3), `never` (Gemma).
        strips: Special tokens take the white space behind them (Phi-3).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if prepend == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        parts = [normalizers.Prepend("▁")] if prepend == "all" else []
        tokenizer.normalizer = normalizers.Sequence([*parts, replace])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([s.replace("\n", " ") for s in SENTENCES], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    added = [AddedToken(name, special=True, normalized=False, rstrip=strips) for name in special]
    tokenizer.add_special_tokens(added)
    return _fast(tokenizer, bos, eos, adds_bos)


def _fast(tokenizer: Tokenizer, bos: str | None, eos: str, adds_bos: bool) -> Any:
    if adds_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def _llama_3() -> Any:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(special, bos=special[0], eos=special[3], adds_bos=True)


_MAKERS = {
    "llama-2": lambda: sentencepiece(["<s>", "</s>"], bos="<s>", eos="</s>", prepend="all", adds_bos=True),
    "llama-3": _llama_3,
    "mistral": lambda: sentencepiece(
        ["<s>", "</s>", "[INST]", "[/INST]"], bos="<s>", eos="</s>", prepend="first", adds_bos=True
    ),
    "qwen": lambda: load_tokenizer("builtin"),
    "chatml": lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>"),
    "gemma": lambda: sentencepiece(
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        bos="<bos>",
        eos="<eos>",
        prepend="never",
        adds_bos=True,
    ),
    "phi": lambda: sentencepiece(
        ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        bos="<s>",
        eos="<|endoftext|>",
        prepend="all",
        strips=True,
    ),
    "none": lambda: sentencepiece(["<s>", "</s>"], bos="<s>", eos="</s>", prepend="all", adds_bos=True),
}
NAMES = list(_MAKERS)


@cache
def bare_tokenizer(name: str) -> Any:
    """The tokenizer of a family, with whatever template it came with."""
    return _MAKERS[name]()


@cache
def templated(name: str) -> Any:
    """The tokenizer of a family with the template of its name."""
    tokenizer = _MAKERS[name]()
    choose_template(tokenizer, name)
    return tokenizer
