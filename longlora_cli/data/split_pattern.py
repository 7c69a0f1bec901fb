"""Which neighbouring characters can a match of a pre-tokenizer's regular expression never hold together?

The question behind every cut: if no match of the pattern holds the character `before` directly followed by `after`,
then splitting a text between the two and matching each side alone gives the matches of the whole text. A matching
engine walks through the pattern's characters one by one; each step goes from one character class of the pattern to a
class that can follow it (Glushkov 1961, The abstract theory of automata). Where no such step takes `before` and then
`after`, every attempt that starts on the left behaves as if the text ended at the cut, so it consumes the same
characters and fails or succeeds alike; the next attempt on the right starts at the cut in both cases. Two things
could still look across: an assertion evaluated at the cut, and a look behind. Patterns where `before` can stand just
before an assertion are not cut there; patterns that look behind, at anchors, or further than one character ahead, or
that match the empty text, are never cut.

Everything undecided counts against the cut: an unknown `\\p{...}` may hold any character, letters match both cases.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parse  # type: ignore[attr-defined]
from typing import Any

# Character -> (may be matched, must be matched); they differ where this module does not know.
Class = Callable[[str], tuple[bool, bool]]

_PROPERTY = re.compile(r"\\(p|P)\{(\^?)([\w ]+)\}")
# Private-use characters that stand for properties while Python's parser reads the pattern.
_FIRST_MARK = 0xF0000
_SCRIPTS = {"Han": (("㐀", "䶿"), ("一", "鿿"))}
_CATEGORIES = {
    sre.CATEGORY_SPACE: (str.isspace, False),
    sre.CATEGORY_NOT_SPACE: (str.isspace, True),
    sre.CATEGORY_DIGIT: (str.isdecimal, False),
    sre.CATEGORY_NOT_DIGIT: (str.isdecimal, True),
    sre.CATEGORY_WORD: (lambda c: c.isalnum() or c == "_", False),
    sre.CATEGORY_NOT_WORD: (lambda c: c.isalnum() or c == "_", True),
}
_MOST_POSITIONS = 2000


class Unprovable(Exception):
    """The pattern has a construct that this analysis does not cover."""


@dataclass
class _Part:
    """A part of the pattern.

    Args:
        nullable: It may match nothing.
        skippable: It certainly can match nothing, whatever stands there.
        first: Positions that a match may begin with.
        last: Positions that it may end with.
        alone: Positions of which one is certainly a whole match.
    """

    nullable: bool
    skippable: bool
    first: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    alone: set[int] = field(default_factory=set)


class SplitPattern:
    """A regular expression's character classes and which can follow which.

    Args:
        pattern: In Oniguruma's Ruby syntax, as `tokenizers` reads it.

    Raises:
        Unprovable: It looks behind, uses anchors, can match nothing, or is not understood.
    """

    def __init__(self, pattern: str) -> None:
        self._classes: list[Class | None] = []  # None is an assertion
        self._follow: list[set[int]] = []
        self._marks: dict[str, Class] = {}
        if re.search(r"&&|\[:|\[\[|\\\\[pP]", pattern):
            raise Unprovable("class arithmetic")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tree = sre_parse.parse(_PROPERTY.sub(self._mark, pattern))
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise Unprovable(str(error)) from error
        if tree.state.flags & ~(re.UNICODE | re.IGNORECASE):
            raise Unprovable("flags")
        whole = self._sequence(tree)
        if whole.nullable:
            raise Unprovable("it can match nothing")
        self._first, self._last, self._alone = (self._only(n) for n in (whole.first, whole.last, whole.alone))

    def can_hold(self, before: str, after: str) -> bool:
        """Whether a match may hold `before` directly followed by `after`, or look over the place between."""
        for number, this in enumerate(self._classes):
            if this is None or not this(before)[0]:
                continue
            for n in self._follow[number]:
                next_class = self._classes[n]
                if next_class is None or next_class(after)[0]:
                    return True
        return False

    def can_begin(self, character: str) -> bool:
        """Whether a match may begin with the character."""
        return any(this(character)[0] for this in self._first)

    def can_end(self, character: str) -> bool:
        """Whether a match may end with the character."""
        return any(this(character)[0] for this in self._last)

    def can_touch(self, character: str) -> bool:
        """Whether a match may hold the character."""
        return any(this(character)[0] for this in self._classes if this is not None)

    def always_matches(self, character: str) -> bool:
        """Whether each occurrence of the character lies in a match, because it alone is one."""
        return any(this(character)[1] for this in self._alone)

    def _only(self, positions: set[int]) -> list[Class]:
        return [this for number in positions if (this := self._classes[number]) is not None]

    def _mark(self, match: re.Match[str]) -> str:
        mark = chr(_FIRST_MARK + len(self._marks))
        self._marks[mark] = _property(match[3].strip(), negated=(match[1] == "P") != bool(match[2]))
        return mark

    def _position(self, this: Class | None) -> _Part:
        if len(self._classes) >= _MOST_POSITIONS:
            raise Unprovable("it is too long")
        self._classes.append(this)
        self._follow.append(set())
        here = {len(self._classes) - 1}
        if this is None:  # consumes nothing: what follows it also follows what stands before it
            return _Part(True, False, here)
        return _Part(False, False, here, here, here)

    def _sequence(self, items: Iterable[tuple[Any, Any]]) -> _Part:
        whole = _Part(True, True)
        for item in items:
            whole = self._joined(whole, self._item(*item))
        return whole

    def _joined(self, left: _Part, right: _Part) -> _Part:
        for number in left.last:
            self._follow[number] |= right.first
        first = left.first | right.first if left.nullable else left.first
        last = right.last | left.last if right.nullable else right.last
        alone = (left.alone if right.skippable else set()) | (right.alone if left.skippable else set())
        return _Part(left.nullable and right.nullable, left.skippable and right.skippable, first, last, alone)

    def _item(self, kind: Any, value: Any) -> _Part:
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            return self._position(self._class(kind, value))
        if kind is sre.BRANCH:
            whole = _Part(False, False)
            for part in (self._sequence(branch) for branch in value[1]):
                whole.nullable |= part.nullable
                whole.skippable |= part.skippable
                whole.first |= part.first
                whole.last |= part.last
                whole.alone |= part.alone
            return whole
        if kind is sre.SUBPATTERN:
            if (value[1] | value[2]) & ~re.IGNORECASE:
                raise Unprovable("flags")
            return self._sequence(value[3])
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            return self._repeat(kind, *value)
        if kind in (sre.ASSERT, sre.ASSERT_NOT):
            direction, body = value
            if (
                direction != 1
                or body.getwidth() != (1, 1)
                or body[0][0] not in (sre.LITERAL, sre.NOT_LITERAL, sre.IN)
            ):
                raise Unprovable("it looks behind, or further than one character ahead")
            return self._position(None)
        raise Unprovable(str(kind))

    def _repeat(self, kind: Any, least: int, most: Any, body: Any) -> _Part:
        part = self._sequence(body)
        # In Ruby's syntax `x{2}?` may be absent and `x{2}+` repeats: both are allowed for, whatever is meant.
        if most == sre.MAXREPEAT or most > 1 or kind is sre.POSSESSIVE_REPEAT:
            for number in part.last:
                self._follow[number] |= part.first
        nullable = part.nullable or least == 0 or kind is sre.MIN_REPEAT
        # A possessive repeat takes what the rest needs, so nothing is certain of it.
        certain = kind is not sre.POSSESSIVE_REPEAT
        skippable = certain and (part.skippable or least == 0)
        return _Part(
            nullable, skippable, part.first, part.last, part.alone if certain and least <= 1 else set()
        )

    def _class(self, kind: Any, value: Any) -> Class:
        if kind is sre.ANY:
            return lambda character: (True, character != "\n")
        if kind is sre.NOT_LITERAL:
            return _negated(self._member(sre.LITERAL, value))
        if kind is sre.LITERAL:
            return self._member(kind, value)
        negated = value[0][0] is sre.NEGATE
        members = [self._member(*item) for item in value[negated:]]

        def either(character: str) -> tuple[bool, bool]:
            found = [member(character) for member in members]
            return any(may for may, _ in found), any(must for _, must in found)

        return _negated(either) if negated else either

    def _member(self, kind: Any, value: Any) -> Class:
        if kind is sre.LITERAL:
            literal = chr(value)
            if literal in self._marks:
                return self._marks[literal]
            return lambda character: (character.casefold() == literal.casefold(), character == literal)
        if kind is sre.RANGE:
            low, high = map(chr, value)
            return lambda character: (
                any(low <= form <= high for form in {character, character.lower(), character.upper()}),
                low <= character <= high,
            )
        if kind is sre.CATEGORY:
            test, negated = _CATEGORIES[value]
            return lambda character: (test(character) != negated,) * 2
        raise Unprovable(str(kind))


def _negated(this: Class) -> Class:
    def inverse(character: str) -> tuple[bool, bool]:
        may, must = this(character)
        return not must, not may

    return inverse


def _property(name: str, *, negated: bool) -> Class:
    """The class of a general category (`L`, `Lu`) or script; of unknown names nothing is claimed."""
    if name in _SCRIPTS:
        ranges = _SCRIPTS[name]
        return lambda character: (any(low <= character <= high for low, high in ranges) != negated,) * 2
    if not re.fullmatch(r"[LMNPSZC][a-z]?", name):
        return lambda character: (True, False)
    return lambda character: (unicodedata.category(character).startswith(name) != negated,) * 2
