"""Tokenizers of every pipeline that people use, small, and texts that meet all of their borders."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from longlora_cli.models.tokenizer import load_tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The secret code of the amber falcon is 48213. What is it?",
    "Well, hello there, my friend; how are you today?\n\nI am fine, thank you. </s> [INST]",
    "One.\n\nTwo?\n\nThree?\n\nFour,\n\nfive!”\n\nsix 0123456789",
    "Ünïcödé text — with “quotes”, emoji 🙂 and 漢字.",
    "def f(x):\n    return x['a'] + 1  # it's,\r\n\tnot \"that\"...\r\n",
    "漢字かな交じり文。「はい、そう」と。中文没有空格。",
    "e\u0301 n\u0303 ﬁ ½ Ⅳ … a.b. c, d.  e\n \n f:  g",
] * 5


def byte_bpe(splitter: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = splitter, normalizer or tokenizer.normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def pattern_bpe(
    pattern: str, normalizer: Any = None, behavior: str = "isolated", invert: bool = False
) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior, invert)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_bpe(pre_tokenizers.Sequence([split, byte_level]), normalizer)


def sentencepiece_bpe(scheme: str, *, by_normalizer: bool, fallback: bool = True) -> Tokenizer:
    """Llama-2's and Mistral's kind: trained on words, used on whole texts; bytes for unknown characters."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{n:02X}>" for n in range(256)] if fallback else []
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False)
    trained.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    state = json.loads(trained.to_str())
    state["added_tokens"] = state["added_tokens"][:1]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if by_normalizer:
        prepend = [normalizers.Prepend("▁")] if scheme == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def unigram(scheme: str, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def t5_normalizer() -> Any:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )


def with_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Added tokens of users: runs of spaces and lines, one in a word, ones that take spaces in or need a border."""
    plain = ["  ", "\n\n", "code is", ". A", AddedToken("[x]", normalized=False)]
    tokenizer.add_tokens([AddedToken(t, normalized=True) if isinstance(t, str) else t for t in plain])
    tokenizer.add_tokens([AddedToken("a.", rstrip=True), AddedToken("fal", lstrip=True)])
    tokenizer.add_tokens([AddedToken("one", single_word=True), AddedToken("E. E", normalized=False)])
    return tokenizer


def words_then_metaspace() -> Tokenizer:
    """XLM-RoBERTa's kind."""
    tokenizer = unigram("always", t5_normalizer())
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


MAKERS: dict[str, Any] = {
    "gpt2": lambda: byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, space before": lambda: byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt2, added tokens": lambda: with_tokens(byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))),
    "gpt2, both": lambda: with_tokens(byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "llama3": lambda: pattern_bpe(CL100K),
    "gpt4, gaps removed": lambda: pattern_bpe(CL100K, behavior="removed", invert=True),
    "qwen": lambda: pattern_bpe(CL100K.replace("{1,3}", ""), normalizers.NFC()),
    "o200k, lower case": lambda: pattern_bpe(O200K, normalizers.Lowercase()),
    "o200k, added tokens": lambda: with_tokens(pattern_bpe(O200K, normalizers.Lowercase())),
    "digits": lambda: byte_bpe(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
        )
    ),
    "llama2": lambda: sentencepiece_bpe("always", by_normalizer=True),
    "llama2, added tokens": lambda: with_tokens(sentencepiece_bpe("always", by_normalizer=True)),
    "gemma": lambda: sentencepiece_bpe("never", by_normalizer=True),
    "mistral": lambda: sentencepiece_bpe("first", by_normalizer=False),
    "mistral, always": lambda: sentencepiece_bpe("always", by_normalizer=False),
    "mistral, unknown fused": lambda: sentencepiece_bpe("first", by_normalizer=False, fallback=False),
    "mistral, added tokens": lambda: with_tokens(sentencepiece_bpe("first", by_normalizer=False)),
    "t5": lambda: unigram("always", t5_normalizer()),
    "unigram, first": lambda: unigram("first"),
    "unigram, added tokens": lambda: with_tokens(unigram("always")),
    "words then metaspace": words_then_metaspace,
    "builtin": lambda: load_tokenizer("builtin").backend_tokenizer,
}
# Characters that tokenizers treat differently, in runs that meet at every kind of border.
SPACES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\r\n",
    "\r",
    "\t",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x1c",
    "E. E",
)
WORDS = """
    a The code is falcon I l one 's ' ’s " ( ) . , ... !? 1 48213 ½ Ⅳ ٣ # _ ▁ ▁the \\ / [x] <unk> <0x0A> Ġ ﬁ ß İ ſ
    é ñ ｶﾞ が 가 漢 字 漢字。 、 「 」 中文 🙂 🇩🇪 क्ष ไทย العربية
"""
MARKS = (
    "e\u0301",
    "\u0301",
    "\u0308",
    "\u200d",
    "\ufe0f",
    "か\u3099",
    "\u1100\u1161",
    "👩\u200d👩\u200d👧",
    "\u0600",
)
PARTS = st.sampled_from([*SPACES, *WORDS.split(), *MARKS])
TEXTS = st.lists(PARTS | st.characters(exclude_categories=["Cs"]), max_size=60).map("".join)
