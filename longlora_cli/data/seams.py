"""Where a text can be cut so that its pieces encode to exactly the whole text's ids.

A tokenizer works in four steps, and a cut between the characters `before` and `after` is exact if each of them gives
the same on both sides of the cut as on the whole. This module reads the steps from the tokenizer's own description
and decides for a pair of neighbours:

1. *Added tokens* are searched in the raw (or normalized) text, leftmost and longest first. No search is disturbed
   where no added token holds the pair; tokens that take in spaces around them, or need a word's end, must not touch it.
2. *Normalizers*. Unicode forms never reach over `after` when it is a starter that does not compose with what stands
   before it (Unicode Standard Annex 15); SentencePiece's character map works on grapheme clusters (Annex 29), and both
   neighbours begin one; replacements by pattern are matches (`split_pattern`). Only ASCII and some East Asian
   characters are taken, of which all this is known.
3. *Pre-tokenizers* split the text, and the model sees each split alone. A regular expression splits both sides as it
   splits the whole if no match can hold the pair (`split_pattern`); Metaspace splits before each space. Where one
   certainly splits between the two, the model cannot matter, be it BPE or Unigram.
4. *The model*, where nothing splits there. BPE only ever joins neighbours into entries of its vocabulary. If no entry
   holds the pair, no merge reaches over the cut, and merges on one side do not change the other's. Unigram's best path
   would have a border there too, but sums of rounded scores could decide a tie otherwise, so it is not cut.

Many tokenizers put a space before a text (normalizer Prepend, Metaspace's `prepend_scheme`, ByteLevel's
`add_prefix_space`). Pieces after the first are encoded by a copy that does not (`inner`). Those that do it again after
each added token have texts with such tokens left whole. Whatever else is met, nothing is cut.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Callable
from itertools import product
from typing import Any

from tokenizers import Tokenizer

from longlora_cli.data.split_pattern import SplitPattern, Unprovable

# For one pair of neighbours: whether this step certainly splits between them, and what characters may then stand
# before and after the place; None where the step may differ with a cut.
Step = Callable[[str, str], tuple[bool, str, str] | None]

# ByteLevel's own pattern (GPT-2's, Radford et al. 2019), as in tokenizers/src/pre_tokenizers/byte_level.rs.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Starters that compose with nothing before them and begin a grapheme cluster: printable ASCII and the line feed;
# quotes; ideographic comma, full stop and brackets; kana; ideographs.
_KNOWN = re.compile("[ -~\n«»—‘’“”、。「-】ぁ-ゖァ-ヺ一-龥]")
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


class Seams:
    """The places where one tokenizer's texts can be cut.

    Args:
        state: The tokenizer as JSON (`Tokenizer.to_str`), without truncation and post-processor. Its special tokens
            must have names that no text holds.
        backend: The same tokenizer.
    """

    def __init__(self, state: dict[str, Any], backend: Tokenizer) -> None:
        self.inner: str | None = None
        """The tokenizer of pieces after the first, as JSON; None if it is the same."""
        self.prefixes_again = False
        """Whether the tokenizer puts something before each stretch of text between added tokens."""
        self._exact: dict[str, bool] = {}
        model = state["model"]
        self._model = (
            {key: model[key] for key in model if key != "merges"} if model.get("type") == "BPE" else {}
        )
        self._vocabulary = ""
        self._tokens = [token for token in state["added_tokens"] if not token["special"]]
        self._names = re.compile("|".join(re.escape(t["content"]) for t in self._tokens) or r"(?!)")
        self._steps: list[Step] | None
        try:
            normalizers = _flat(state["normalizer"], "normalizers")
            splitters = _flat(state["pre_tokenizer"], "pretokenizers")
            self._normalize = [_normalizer(n) for n in normalizers]
            self._steps = [_splitter(s, first=i == 0) for i, s in enumerate(splitters)]
        except (Unprovable, KeyError, TypeError):  # a step of another version is one that is not known
            self._steps = None
            return
        self.inner = _without_prefix(state)
        self.prefixes_again = any(map(_prefixes_again, [*normalizers, *splitters[:1]]))
        if state["normalizer"] is not None:
            if self.prefixes_again and any(token["normalized"] for token in self._tokens):
                self._steps = None
            normal = backend.normalizer.normalize_str
            self._tokens += [token | {"content": normal(token["content"])} for token in self._tokens]

    @property
    def are_known(self) -> bool:
        """Whether there are places to cut at all; else the tokenizer has a step of which nothing is proven."""
        return self._steps is not None

    def cuts(self, text: str, characters: int) -> list[int]:
        """Places to cut, rising: each the first exact one at least so many characters after the one before."""
        places: list[int] = []
        if (
            len(text) < 2 * characters
            or self._steps is None
            or (self.prefixes_again and self._names.search(text))
        ):
            return places
        place = characters
        while (found := self._next(text, place)) is not None:
            places.append(found)
            place = found + characters
        return places

    def _next(self, text: str, place: int) -> int | None:
        known = self._exact
        for number in range(place, len(text)):
            pair = text[number - 1 : number + 1]
            exact = known.get(pair)
            if exact is None:
                exact = self.exact(*pair)
            if exact:
                return number
        return None

    def exact(self, before: str, after: str) -> bool:
        """Whether every text can be cut between these two characters."""
        if (known := self._exact.get(before + after)) is None:
            self._exact[before + after] = known = self._decide(before, after)
        return known

    def _decide(self, before: str, after: str) -> bool:
        # After a space, patterns look ahead and runs are joined: no tokenizer is known that can be cut there.
        if self._steps is None or before.isspace() or not (_KNOWN.match(before) and _KNOWN.match(after)):
            return False
        if self._touches_token(before, after):
            return False
        pairs = {(before, after)}
        for step in self._normalize:
            if (found := _through(step, pairs)) is None:
                return False
            pairs = found[1]
        if any(self._touches_token(*pair) for pair in pairs):
            return False
        for step in self._steps:
            if (found := _through(step, pairs)) is None:
                return False
            split, pairs = found
            if split:
                return True
        return all(self._model_borders(*pair) for pair in pairs)

    def _touches_token(self, before: str, after: str) -> bool:
        for token in self._tokens:
            content = token["content"]
            ends, begins = content.endswith(before), content.startswith(after)
            if before + after in content or (ends and token["rstrip"]) or (begins and token["lstrip"]):
                return True
            if token["single_word"] and (ends or begins):
                return True
        return False

    def _model_borders(self, before: str, after: str) -> bool:
        model = self._model
        changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if model.get("type") != "BPE" or any(model.get(name) for name in changes):
            return False
        if not self._vocabulary:
            self._vocabulary = "\0".join(model["vocab"])
        # Unknown characters next to each other may become one unknown token, so both must be known.
        known = before in model["vocab"] and after in model["vocab"]
        return known and before + after not in self._vocabulary


def _through(step: Step, pairs: set[tuple[str, str]]) -> tuple[bool, set[tuple[str, str]]] | None:
    """One step on every pair that may stand at the place."""
    splits, after = True, set[tuple[str, str]]()
    for pair in pairs:
        if (found := step(*pair)) is None:
            return None
        splits &= found[0]
        after.update(product(found[1], found[2]))
    return splits, after


def _flat(step: Any, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[name] for inner in _flat(part, name)]
    return [step]


def _normalizer(state: dict[str, Any]) -> Step:
    kind = state["type"]
    if kind in _FORMS:
        return _by_character(lambda c: unicodedata.normalize(kind, c))
    if kind == "Lowercase":
        return _by_character(str.lower)
    if kind == "Prepend":  # at the start only, which `inner` leaves out
        return lambda before, after: (False, before, after)
    if kind == "Strip":
        left, right = state["strip_left"], state["strip_right"]
        return lambda before, after: (
            None if (right and before.isspace()) or (left and after.isspace()) else (False, before, after)
        )
    if kind == "Precompiled":
        alone = json.loads(Tokenizer.from_str(_EMPTY).to_str()) | {"normalizer": state}
        return _by_character(Tokenizer.from_str(json.dumps(alone)).normalizer.normalize_str)
    if kind == "Replace":
        return _replacement(state)
    raise Unprovable(kind)


_EMPTY = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
)


def _by_character(change: Callable[[str], str]) -> Step:
    def step(before: str, after: str) -> tuple[bool, str, str] | None:
        changed = change(before), change(after)
        return (False, *changed) if all(len(c) == 1 for c in changed) else None

    return step


def _pattern(state: dict[str, Any]) -> SplitPattern:
    [(kind, pattern)] = state["pattern"].items()
    return SplitPattern(re.escape(pattern) if kind == "String" else pattern)


def _replacement(state: dict[str, Any]) -> Step:
    pattern, content = _pattern(state), state["content"]

    def step(before: str, after: str) -> tuple[bool, str, str] | None:
        touched = pattern.can_touch(before), pattern.can_touch(after)
        if pattern.can_hold(before, after) or (any(touched) and not content):
            return None
        ends = {content[-1]} if touched[0] else set[str]()
        begins = {content[0]} if touched[1] else set[str]()
        if not pattern.always_matches(before):
            ends.add(before)
        if not pattern.always_matches(after):
            begins.add(after)
        return False, "".join(ends), "".join(begins)

    return step


def _splitter(state: dict[str, Any], *, first: bool) -> Step:
    """The step of a pre-tokenizer; `first` if it sees whole texts, so that `inner` leaves its prefix out."""
    kind = state["type"]
    if kind == "Metaspace":
        return _metaspace(state, first=first)
    if kind == "ByteLevel":
        return _byte_level(state, first=first)
    if kind == "Split":
        return _split(_pattern(state), state["behavior"], inverted=state["invert"])
    if kind == "Whitespace":
        return _split(SplitPattern(r"\w+|[^\w\s]+"), "Removed", inverted=True)
    if kind == "WhitespaceSplit":
        return _split(SplitPattern(r"\s"), "Removed", inverted=False)
    if kind == "Digits":
        each = state["individual_digits"]

        def digits(before: str, after: str) -> tuple[bool, str, str]:
            kinds = [unicodedata.category(c).startswith("N") for c in (before, after)]
            return kinds[0] != kinds[1] or (each and kinds[0]), before, after

        return digits
    raise Unprovable(kind)


def _metaspace(state: dict[str, Any], *, first: bool) -> Step:
    mark, splits, always = state["replacement"], state["split"], state["prepend_scheme"] == "always"

    def step(before: str, after: str) -> tuple[bool, str, str] | None:
        before, after = (mark if c == " " else c for c in (before, after))
        if always and not first and after != mark:
            return None
        return splits and after == mark, before, after

    return step


def _byte_level(state: dict[str, Any], *, first: bool) -> Step:
    splits = _split(SplitPattern(_GPT2), "Isolated", inverted=False)
    prefixes, by_pattern = state["add_prefix_space"] and not first, state.get("use_regex", True)

    def step(before: str, after: str) -> tuple[bool, str, str] | None:
        if (prefixes and after != " ") or not by_pattern:
            return None
        return splits(before, after)

    return step


def _split(pattern: SplitPattern, behaviour: str, *, inverted: bool) -> Step:
    merges = behaviour in ("MergedWithPrevious", "MergedWithNext")
    if behaviour not in ("Isolated", "Removed") and not (merges and not inverted):
        raise Unprovable(behaviour)

    def step(before: str, after: str) -> tuple[bool, str, str] | None:
        if pattern.can_hold(before, after):
            return None
        ended, begun = pattern.always_matches(before), pattern.always_matches(after)
        if behaviour == "MergedWithPrevious":
            return None if pattern.can_begin(after) else (ended, before, after)
        if behaviour == "MergedWithNext":
            return None if pattern.can_end(before) else (begun, before, after)
        return ended or begun, before, after

    return step


def _prefixes_again(step: dict[str, Any]) -> bool:
    """Whether the step puts something before each stretch of text between added tokens."""
    return (
        step["type"] == "Prepend"
        or step.get("prepend_scheme") == "always"
        or (step["type"] == "ByteLevel" and step["add_prefix_space"])
    )


def _without_prefix(state: dict[str, Any]) -> str | None:
    """The tokenizer that puts nothing before a text, as JSON; None if this one does not either."""
    inner = copy.deepcopy({key: state[key] for key in ("normalizer", "pre_tokenizer")})
    normalizers = _flat(inner["normalizer"], "normalizers")
    splitters = _flat(inner["pre_tokenizer"], "pretokenizers")
    for number, step in enumerate(splitters):
        if step.get("prepend_scheme") == "first" or (number == 0 and "prepend_scheme" in step):
            step["prepend_scheme"] = "never"
        if number == 0 and step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    if len(kept) < len(normalizers):
        inner["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    if all(inner[key] == state[key] for key in inner):
        return None
    return json.dumps(state | inner)
