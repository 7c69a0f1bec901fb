"""The text of HTML: paragraphs as a browser would show them, without scripts, styles and tags."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults
from longlora_cli.data.readers.opening import MOST_HELD_BYTES, InputFile, decode_utf8
from longlora_cli.data.rows import RowFault

# Words of a table, one to a line, would be a page of nothing.
_HIDDEN = frozenset("audio canvas head iframe noscript object script style svg template video".split())  # noqa: SIM905
_NOT_TEXT = _HIDDEN | {"button", "select", "textarea"}
_SECTIONS = frozenset("address article aside blockquote body footer form header main nav section".split())  # noqa: SIM905
_BLOCKS = frozenset("dd details div dl dt fieldset figcaption figure hr ol p pre table ul".split())  # noqa: SIM905
_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_PARAGRAPHS = _SECTIONS | _BLOCKS | _HEADINGS
_LINES = frozenset("br caption li option summary tr".split())  # noqa: SIM905
_CELLS = frozenset(("td", "th"))
_SPACES = re.compile(r"[ \t\n\r\f\u00a0]+")
_CHARSET = re.compile(
    rb"""(?:<meta[^>]{0,200}?charset|<\?xml[^>]{0,200}?encoding)\s*=\s*["']?([\w.:-]{1,40})""", re.I
)
_PRESCAN_BYTES = 1024  # where the HTML standard looks for a page's encoding
# In XHTML any element may be closed in its own tag; HTML would take all that follows for its content.
_SELF_CLOSED = re.compile(r"<([A-Za-z][\w:-]*)((?:\s[^<>]*)?)/>")
_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())  # noqa: SIM905

# Memory while a page is read, measured with selectolax 0.4: its bytes as they come, as text and in the tree; a stretch
# of text while it is tidied; an element with its text; an attribute.
_BYTE, _STRETCH_BYTE, _TAG, _ATTRIBUTE = 6, 18, 360, 270
_STRETCH = re.compile(rb"(?:\A|<)[^<]{65536,}")
_TAG_BODY = re.compile(rb"<[^<>\s]*\s([^<>]*)")
MOST_PAGE_BYTES = MOST_HELD_BYTES // _BYTE
"""A longer page is never read."""


def read_html(path: Path) -> Iterator[Document]:
    """A page as one document, in the encoding that it declares, else UTF-8.

    Raises:
        DataError: Bytes that are not of its encoding, or no text in it.
    """
    faults = Faults(str(path))
    raw = bytearray()
    size_bytes = 0
    try:
        with InputFile(path) as file:
            for block in file.blocks():
                raw += block
                if len(raw) > MOST_PAGE_BYTES:
                    break
            size_bytes = file.taken_bytes()
        refuse_large_page(raw)
    except RowFault as fault:
        faults.add(0, str(fault), hint=fault.hint)
    faults.raise_if_any()
    text = html_text(decode_markup(raw, faults))
    if not text and not len(faults):
        faults.add(0, "there is no text in it")
    faults.raise_if_any()
    yield Document(str(path), text, size_bytes)


def refuse_large_page(raw: bytes | bytearray, held_bytes: int = 0) -> None:
    """Raise where a page would take more memory than one document may have.

    Args:
        raw: The page.
        held_bytes: What is held beside it.

    Raises:
        RowFault: It would.
    """
    if held_bytes + page_bytes(raw, MOST_HELD_BYTES - held_bytes) > MOST_HELD_BYTES:
        raise RowFault(
            f"a page of {len(raw) / 1e6:,.0f} MB and {raw.count(b'<'):,} tags takes more than "
            f"{MOST_HELD_BYTES // 1_000_000} MB of memory while it is read, which is more than one document may have",
            hint="Make it several pages, or a text file.",
        )


def page_bytes(raw: bytes | bytearray, enough: int) -> int:
    """Memory that a page takes while it is read.

    Args:
        raw: The page.
        enough: From here on the sum need not be exact.

    Returns:
        An upper bound.
    """
    needed_bytes = len(raw) * _BYTE
    if needed_bytes > enough:
        return needed_bytes
    stretches = (match.end() - match.start() for match in _STRETCH.finditer(raw))
    needed_bytes += _TAG * raw.count(b"<") + _STRETCH_BYTE * max(stretches, default=0)
    spaces = sum(raw.count(space) for space in (b" ", b"\n", b"\t", b"\r", b"\f", b"/"))
    if needed_bytes + _ATTRIBUTE * spaces <= enough:
        return needed_bytes + _ATTRIBUTE * spaces
    tags = _TAG_BODY.finditer(raw)
    while needed_bytes <= enough and (tag := next(tags, None)):
        needed_bytes += _ATTRIBUTE * len(tag[1].replace(b"/", b" ").split())
    return needed_bytes


def decode_markup(raw: bytes | bytearray, faults: Faults) -> str:
    """The characters of a page: by its byte order mark, by the encoding it declares, else UTF-8.

    Args:
        raw: The page.
        faults: Gets what is not of the encoding.
    """
    declared = _CHARSET.search(raw[:_PRESCAN_BYTES])
    name = declared[1].decode("ascii").lower() if declared else "utf-8"
    if raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or name.startswith("utf-"):
        return "".join(decode_utf8([bytes(raw)], faults))  # which names the other UTFs by their marks
    # Browsers read Latin-1 and ASCII as Windows' superset of both, and so must whoever reads what they showed.
    name = "cp1252" if name in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii") else name
    try:
        text = raw.decode(name)
    except LookupError:
        faults.add(0, f"the page declares the unknown encoding {name!r}")
        return ""
    except UnicodeDecodeError as error:
        faults.add(raw.count(b"\n", 0, error.start) + 1, f"byte {error.start} is not {name}")
        return ""
    if "\0" in text:
        faults.add(text.count("\n", 0, text.index("\0")) + 1, "a NUL character")
    return text


def xhtml_text(page: str) -> str:
    """The text of a page of XHTML, which may close any element in its own tag."""

    def opened(match: re.Match[str]) -> str:
        tag, rest = match.groups()
        return match[0] if tag.lower() in _VOID else f"<{tag}{rest}></{tag}>"

    return html_text(_SELF_CLOSED.sub(opened, page))


def html_text(page: str) -> str:
    """The text of a page: a blank line between paragraphs, a tab between the cells of a table.

    Args:
        page: HTML of any quality; it is read as browsers do.
    """
    from selectolax.lexbor import LexborHTMLParser

    root = LexborHTMLParser(page).root
    layout = _Layout()
    if root is not None:
        _walk(root, layout)
    return layout.text()


def _walk(root: Any, layout: _Layout) -> None:
    """Visit all nodes in order, without recursion: pages nest as deeply as they like."""
    node, depth, preformatted = root, 0, 0
    while True:
        tag = node.tag
        child = None
        if tag == "-text":
            layout.add(node.text_content or "", is_preformatted=preformatted > 0)
        elif tag not in _NOT_TEXT and not tag.startswith(("-", "!")):
            layout.open(tag)
            child = node.child
        if child is not None:
            preformatted += tag == "pre"
            node, depth = child, depth + 1
            continue
        layout.close(tag)
        while depth and node.next is None:
            node, depth = node.parent, depth - 1
            preformatted -= node.tag == "pre"
            layout.close(node.tag)
        if not depth:
            return
        node = node.next


class _Layout:
    """Text as it comes, with the breaks that were asked for between its parts."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._break = ""

    def open(self, tag: str) -> None:
        """An element begins."""
        if tag in _PARAGRAPHS:
            self._ask("\n\n")
        elif tag == "br":
            # Two in a row are a blank line, which is how old pages separate paragraphs.
            self._ask("\n\n" if self._break.startswith("\n") else "\n")
        elif tag in _LINES:
            self._ask("\n")

    def close(self, tag: str) -> None:
        """An element ends."""
        if tag in _PARAGRAPHS:
            self._ask("\n\n")
        elif tag in _CELLS:
            self._ask("\t")
        elif tag in _LINES and tag != "br":
            self._ask("\n")

    def _ask(self, wanted: str) -> None:
        order = ("", " ", "\t", "\n", "\n\n")
        if order.index(wanted) > order.index(self._break):
            self._break = wanted

    def add(self, text: str, *, is_preformatted: bool) -> None:
        """Text of an element; spaces and line ends are one space unless they are preformatted."""
        text = text.replace("\u00ad", "")
        if not is_preformatted:
            text = _SPACES.sub(" ", text)
            if text.startswith(" "):
                self._ask(" ")
            stripped = text.strip(" ")
            if not stripped:
                return
            self._put(stripped)
            if text.endswith(" "):
                self._ask(" ")
        elif text:
            self._put(text)

    def _put(self, text: str) -> None:
        if self._parts:
            if self._break.startswith("\n"):  # preformatted text may end with its own
                self._parts[-1] = self._parts[-1].rstrip("\n")
            self._parts.append(self._break)
        self._break = ""
        self._parts.append(text)

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts).strip()
