"""Encode text that comes from users so that it can never become control tokens.

A tokenizer finds its special tokens by their text, wherever that text comes from: a document with
`<|im_end|>` in it would end a turn. Here a second copy of the tokenizer is made in which every special token
goes by a secret name. Text encodes to exactly the ids that the plain tokenizer gives it, except that the
special tokens' usual names are ordinary characters; only who knows the secret names (the chat template's
renderer) can write a special token.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from longlora_cli.data.seams import Seams
from longlora_cli.data.word_cache import WordCache
from longlora_cli.errors import DataError
from longlora_cli.models.tokenizer import collector_paused

# What makes a special token take in, or look at, the characters beside it.
_REACHING = ("lstrip", "rstrip", "single_word", "normalized")


class SafeEncoder:
    """The copy of a tokenizer in which special tokens go by secret names.

    Args:
        tokenizer: A fast tokenizer; it is not changed.

    Raises:
        DataError: A special token would get another id in the copy.

    Attributes:
        backend: The copy.
        seams: Where texts can be cut.
        border: Secret name and id of a special token that keeps what stands beside it apart; None without one.
        words: Ids of words; None where words have none of their own, or nothing keeps them apart.
        special_ids: Ids of all special tokens.
        begin: Ids that the tokenizer itself puts before a text.
        end: Ids that it puts behind a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        with collector_paused():
            self._build(tokenizer)

    def _build(self, tokenizer: Any) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        special = [token for token in state["added_tokens"] if token["special"]]
        # Drawn anew in each process: text written beforehand cannot contain it. Ids do not depend on it.
        # Lower-case hexadecimal digits between private-use characters pass every normalizer unchanged.
        nonce = secrets.token_hex(8)
        self._secret = {t["content"]: f"\ue0f0{nonce}{t['id']:x}\ue0f1" for t in special}
        self._names = re.compile(
            "|".join(re.escape(name) for name in sorted(self._secret, key=len, reverse=True)) or r"(?!)"
        )
        self._special = {t["content"]: int(t["id"]) for t in special}
        for token in special:
            token["content"] = self._secret[token["content"]]
        _rename_in_model(state["model"], self._secret)
        state["post_processor"] = (
            None  # it trims offsets, and its tokens are added by `begin` and `end` instead
        )
        state["padding"] = state["truncation"] = None
        # The library's cache of 10,000 words stays: with 50,000 of them 46 MB of novels took two threads 30 % longer.
        self.backend = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
        moved = [n for n, i in self._special.items() if self.backend.token_to_id(self._secret[n]) != i]
        if moved:
            raise DataError(f"the tokenizer gives its special token {moved[0]} another id when it is copied")
        self.seams = Seams(state, self.backend)
        inner = self.seams.inner
        self._inner = Tokenizer.from_str(inner) if inner else self.backend
        unknown = (state["model"].get("unk_token"), state["model"].get("unk_id"))
        apart = (
            token
            for token in special
            if not any(token[name] for name in _REACHING)
            and token["content"] not in unknown
            and token["id"] not in unknown
        )
        self.border = next(((str(token["content"]), int(token["id"])) for token in apart), None)
        # A model with dropout makes other ids of a word each time.
        self.words: WordCache | None = None
        if self.border and self.seams.are_known and not state["model"].get("dropout"):
            self.words = WordCache(self._encode_inner, self.seams, self.border)
        self.special_ids = frozenset(self._special.values())
        self.begin, self.end = _frame(tokenizer)

    def secret(self, text: str) -> str:
        """Trusted text (a template's) with each special token written by its secret name."""
        return self._names.sub(lambda match: self._secret[match[0]], text)

    def special_name_at_start(self, text: str) -> str:
        """The usual name of the special token that trusted text begins with; empty when it begins with none."""
        match = self._names.match(text)
        return match[0] if match else ""

    def special_at_start(self, text: str) -> int | None:
        """The id of the special token whose usual name trusted text begins with, if it does."""
        name = self.special_name_at_start(text)
        return self._special[name] if name else None

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text, int32 `[tokens]`, without begin and end tokens; all cores work on it."""
        return [self.ids(e) for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    @property
    def has_inner(self) -> bool:
        """Whether pieces after a text's first are encoded otherwise than whole texts."""
        return self._inner is not self.backend

    def encode_pieces(self, pieces: list[tuple[str, bool]]) -> list[npt.NDArray[np.int32]]:
        """Ids of pieces that texts were cut into at `seams`, int32 `[tokens]` each; all cores work on them.

        Args:
            pieces: Text, and whether it begins its text.
        """
        starts = iter(self.encode_batch([text for text, begins in pieces if begins and self.has_inner]))
        inner = [text for text, begins in pieces if not (begins and self.has_inner)]
        found = self.words.encode(inner) if self.words else None
        later = iter(self._encode_inner(inner) if found is None else found)
        return [next(starts if begins and self.has_inner else later) for _, begins in pieces]

    def _encode_inner(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of texts that do not begin their document."""
        return [self.ids(e) for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, pieces: list[tuple[str, bool]]) -> list[Encoding]:
        """Encodings with character offsets into pieces that texts were cut into at `seams`; take ids through `ids`.

        Args:
            pieces: Text, and whether it begins its text.
        """
        starts = [text for text, begins in pieces if begins or not self.has_inner]
        first = iter(self.backend.encode_batch(starts, add_special_tokens=False))
        inner = [text for text, begins in pieces if not begins and self.has_inner]
        later = iter(self._inner.encode_batch(inner, add_special_tokens=False))
        return [next(first if begins or not self.has_inner else later) for _, begins in pieces]

    @staticmethod
    def ids(encoding: Encoding) -> npt.NDArray[np.int32]:
        """The ids of an encoding, int32 `[tokens]`."""
        return np.array(encoding.ids, dtype=np.int32)


def _rename_in_model(model: dict[str, Any], secret: dict[str, str]) -> None:
    """Take the special tokens out of the model's reach, keeping their ids.

    A Unigram or WordLevel model, or a BPE model with `ignore_merges`, finds an entry of its vocabulary by its
    text even when the tokenizer does not split it off first; a BPE model also when merges lead to it.
    """
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
        model["vocab"] = [[secret.get(piece, piece), score] for piece, score in vocabulary]
    elif isinstance(vocabulary, dict):
        model["vocab"] = {secret.get(piece, piece): number for piece, number in vocabulary.items()}
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in secret]


def _merged(merge: Any) -> str:
    return "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text."""
    backend = tokenizer.backend_tokenizer
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


_ENCODERS: WeakKeyDictionary[Any, tuple[int, SafeEncoder]] = WeakKeyDictionary()


def safe_encoder(tokenizer: Any) -> SafeEncoder:
    """The tokenizer's `SafeEncoder`, made once (0.2 s for 49,152 tokens) and again when tokens were added."""
    known = _ENCODERS.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = (len(tokenizer), SafeEncoder(tokenizer))
        _ENCODERS[tokenizer] = known
    return known[1]
