"""HTML and SVG from small pieces in which text is escaped unless it says that it is finished.

Predictions, references, file names and audits' notes are written by models and users: a page made of plain strings
would run what they hold. `tag` escapes every child that is not `Markup`, and every attribute.
"""

from __future__ import annotations

import html
import re

# Elements that have no end tag; HTML standard, section 13.1.2.
_VOID = frozenset({"br", "hr", "input", "link", "meta"})
# What a page cannot hold or show: C0 controls but newline and tab, DEL, C1, and halves of surrogate pairs, which UTF-8
# has no bytes for and which tokenizers that cut a character leave behind.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Markup(str):
    """Finished HTML: everything in it that came from outside was escaped."""

    __slots__ = ()


def clean(text: str) -> str:
    """`text` with U+FFFD where a character cannot be shown."""
    return _UNSHOWABLE.sub("\ufffd", text)


def escape(text: str) -> Markup:
    """`text` as HTML, in elements and in attributes; `Markup` is left as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(clean(text)))


def join(*parts: str) -> Markup:
    """Pieces one after the other, escaped where they are not `Markup`."""
    return Markup("".join(map(escape, parts)))


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """One element.

    Args:
        name: Of the element.
        children: Text, which is escaped, or `Markup`.
        attributes: `class_` and `aria_label` are written `class` and `aria-label`; None and False are left out, True is
            a name without a value.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def table(head: list[str], rows: list[list[str]], *, caption: str, class_: str | None = None) -> Markup:
    """A table that scrolls sideways where it is too wide; the first cell of a row is its header.

    Args:
        head: Names of the columns.
        rows: Cells, text or `Markup`.
        caption: What it holds, above it.
        class_: Of the table.
    """
    columns = tag("tr", *(tag("th", name, scope="col") for name in head))
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows
    ]
    inner = join(tag("caption", caption), tag("thead", columns), tag("tbody", *body))
    # Focusable, so that the keyboard can scroll it.
    return tag(
        "div",
        tag("table", inner, class_=class_),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )
