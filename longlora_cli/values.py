"""How values are written in flags, recipes and environment: lengths, sizes, lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_UNIT = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(value: Any) -> Any:
    """Read a number of tokens: `4096`, `32k` (32,768), `1m` (1,048,576), `1.5k` (1,536).

    Raises:
        ValueError: The text is not a length, or is not a whole number of tokens.
    """
    if not isinstance(value, str):
        return value
    match = _LENGTH.fullmatch(value.strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ValueError("not a length; write 4096, 32k or 1m")
    tokens = float(match[1]) * _UNIT[match[2].lower()]
    if tokens != int(tokens):
        raise ValueError("not a whole number of tokens")
    return int(tokens)


def parse_length_or_auto(value: Any) -> Any:
    """Read a number of tokens, or the word `auto`."""
    return value if value == "auto" else parse_length(value)


def parse_count_or_auto(value: Any) -> Any:
    """Read a number from 1, or the word `auto`.

    Raises:
        ValueError: It is neither.
    """
    text = str(value).strip()
    if text == "auto":
        return text
    if isinstance(value, bool) or not text.isdecimal() or int(text) < 1:
        raise ValueError("not a number from 1, and not auto")
    return int(text)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """A whole number that may be written as text, for settings that take a few numbers only."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def parse_size(value: Any) -> Any:
    """Read a number of bytes: `24GiB` (2^30 each), `24GB` (10^9 each), `512MiB`, `1.5TiB`, or plain bytes.

    Raises:
        ValueError: The text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ValueError("not a size; write 24GiB, 24GB or 512MiB")
    power = "kmgt".find(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def split_commas(value: Any) -> Any:
    """Let a list be given as `a,b`, as well as by repeating values."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        return [
            part.strip() if isinstance(part, str) else part
            for item in value
            for part in (item.split(",") if isinstance(item, str) else [item])
        ]
    return value


def parse_share(value: object) -> str:
    """A share of a whole, `2/4`: the second of four.

    Raises:
        ValueError: Not two whole numbers from 1, or the first is above the second.
    """
    number, _, count = str(value).replace(" ", "").partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError("not a share; 2/4 is the second of four, and numbers begin at 1")
    return f"{int(number)}/{int(count)}"


Length = Annotated[int, BeforeValidator(parse_length)]
LengthOrAuto = Annotated[int | Literal["auto"], BeforeValidator(parse_length_or_auto)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(parse_count_or_auto)]
KvBits = Annotated[Literal[16, 8, 4], BeforeValidator(parse_count)]
Size = Annotated[int, BeforeValidator(parse_size)]
Share = Annotated[str, BeforeValidator(parse_share)]
Names = Annotated[list[str], BeforeValidator(split_commas)]
Numbers = Annotated[list[float], BeforeValidator(split_commas)]
Ratios = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(split_commas)]
Lengths = Annotated[list[Length], BeforeValidator(split_commas)]
Paths = Annotated[list[Path], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]

METAVARS: dict[Any, str] = {
    parse_length: "LENGTH",
    parse_length_or_auto: "LENGTH|auto",
    parse_count_or_auto: "N|auto",
    parse_share: "I/N",
    parse_size: "SIZE",
}
"""How help pages name a value, by the function that reads it."""
