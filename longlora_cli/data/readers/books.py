"""EPUB and PDF: a file is one document."""

from __future__ import annotations

import posixpath
import re
import struct
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.markup import MOST_PAGE_BYTES, decode_markup, refuse_large_page, xhtml_text
from longlora_cli.data.readers.opening import MOST_HELD_BYTES, character_bytes, first_line
from longlora_cli.data.rows import RowFault

# A book's list of its files; its elements take 50 times its bytes.
_MOST_XML_BYTES = 1 << 24
# What a ZIP file says of its list of files at its end: their number and the list's bytes (APPNOTE.TXT 4.3.16). Each
# file becomes about 1 KB of objects when the list is opened; the 64-bit form, where both fields are full, has no end.
_END_OF_LIST, _END_FORMAT, _LONGEST_COMMENT = b"PK\x05\x06", "<4s4H2LH", 0xFFFF
_MOST_LIST_BYTES = 1 << 24
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_PAGES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
# Control characters that PDF fonts without a table of characters give; tab and newline stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def read_epub(path: Path) -> Iterator[Document]:
    """The book's pages in reading order (its spine), without its table of contents.

    Raises:
        DataError: No EPUB, encrypted, a page that is missing or not of its encoding, or no text in it.
    """
    faults = Faults(str(path))
    texts = _Texts()
    try:
        _refuse_long_list(path)
        with zipfile.ZipFile(path) as book:
            for name in _spine(book):
                page = Faults(str(path))
                raw = _read(book, name)
                try:
                    refuse_large_page(raw, texts.held_bytes)
                    texts.add(xhtml_text(decode_markup(raw, page)))
                except RowFault as fault:
                    raise RowFault(f"in {name}: {fault}", hint=fault.hint) from fault
                page.move_to(faults, f"in {name}: ")
                if faults.is_full:
                    break
    except zipfile.BadZipFile as error:
        faults.add(0, f"not an EPUB that can be read: {first_line(error)}")
    except RowFault as fault:
        faults.add(0, str(fault), hint=fault.hint)
    text = "" if len(faults) else texts.joined()
    if not text and not len(faults):
        faults.add(0, "there is no text in it")
    faults.raise_if_any()
    yield Document(str(path), text, path.stat().st_size)


def _refuse_long_list(path: Path) -> None:
    """Refuse a book of so many files that their names alone would fill the memory.

    Raises:
        RowFault: More than 65,534 files, or a list of them above 16 MiB.
    """
    end_bytes = struct.calcsize(_END_FORMAT)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - end_bytes - _LONGEST_COMMENT))
        tail = file.read()
    place = tail.rfind(_END_OF_LIST)
    if place < 0 or len(tail) - place < end_bytes:
        return  # no ZIP file; the library says why
    _, _, _, _, files, list_bytes, _, _ = struct.unpack_from(_END_FORMAT, tail, place)
    if files == 0xFFFF:
        raise RowFault("the book has more than 65,534 files")
    if list_bytes > _MOST_LIST_BYTES:
        raise RowFault(
            f"the list of the book's files takes {list_bytes:,} bytes, more than {_MOST_LIST_BYTES:,}"
        )


class _Texts:
    """The texts of a book's pages, as long as all of them fit into memory twice: in pieces and joined."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._characters = 0
        self._width = 1
        self.held_bytes = 0

    def add(self, text: str) -> None:
        """Take the next page's.

        Raises:
            RowFault: It is too much.
        """
        if not text:
            return
        self._texts.append(text)
        self._characters += len(text) + 2
        self._width = max(self._width, character_bytes(text))
        self.held_bytes += character_bytes(text) * len(text)
        if self.held_bytes + self._characters * self._width > MOST_HELD_BYTES:
            raise RowFault(
                f"the book's text takes more than {MOST_HELD_BYTES // 1_000_000} MB of memory, which is more than one "
                "document may have"
            )

    def joined(self) -> str:
        """All of them, a blank line between two; nothing is held any more."""
        text = "\n\n".join(self._texts)
        self._texts = []
        return text


def _spine(book: zipfile.ZipFile) -> list[str]:
    """Names of the pages in reading order."""
    roots = _elements(_xml(book, _CONTAINER), "rootfile")
    package_name = roots[0].get("full-path") if roots else None
    if not package_name:
        raise RowFault(f"{_CONTAINER} names no package")
    package = _xml(book, package_name)
    folder = posixpath.dirname(package_name)
    pages = {}
    for item in _elements(package, "item"):
        is_contents = "nav" in (item.get("properties") or "").split()
        if item.get("media-type") in _PAGES and not is_contents:
            href = unquote((item.get("href") or "").split("#")[0])
            pages[item.get("id")] = posixpath.normpath(posixpath.join(folder, href))
    known = {item.get("id") for item in _elements(package, "item")}
    order = [reference.get("idref") for reference in _elements(package, "itemref")]
    lost = [name for name in order if name not in known]
    if lost:
        raise RowFault(f"the spine names {shown(lost[0])}, which the book does not have")
    names = [pages[name] for name in order if name in pages]
    if _ENCRYPTION in book.namelist():
        locked = {unquote(r.get("URI") or "") for r in _elements(_xml(book, _ENCRYPTION), "CipherReference")}
        if locked & set(names):
            raise RowFault("the book is encrypted (DRM)")
    return names


def _xml(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    raw = _read(book, name, _MOST_XML_BYTES)
    if b"<!ENTITY" in raw:  # no book needs one here, and a few lines of them can fill any memory
        raise RowFault(f"{name} declares entities, which are not read")
    try:
        return ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise RowFault(f"{name} is not XML: {first_line(error)}") from error


def _read(book: zipfile.ZipFile, name: str, most_bytes: int = MOST_PAGE_BYTES) -> bytes:
    try:
        with book.open(name) as file:
            raw = file.read(most_bytes + 1)
    except KeyError as error:
        raise RowFault(f"the book has no {shown(name)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise RowFault(f"{name} cannot be unpacked: {first_line(error)}") from error
    if len(raw) > most_bytes:
        raise RowFault(f"{name} unpacks to more than {most_bytes // 1_000_000} MB")
    return raw


def _elements(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if str(element.tag).rpartition("}")[2] == name]


def read_pdf(path: Path) -> Iterator[Document]:
    """The text of all pages, a blank line between them; words that a line's end had split are put together.

    Raises:
        DataError: No PDF, encrypted, a page that cannot be read, or no text in it.
    """
    import pypdfium2

    faults = Faults(str(path))
    texts = _Texts()
    pages = 0
    try:
        with pypdfium2.PdfDocument(path) as document:
            pages = len(document)
            for number in range(pages):
                try:
                    texts.add(_page_text(document[number]))
                except pypdfium2.PdfiumError as error:
                    faults.add(0, f"page {number + 1} cannot be read: {first_line(error)}")
    except pypdfium2.PdfiumError as error:
        locked = "assword" in str(error)
        what = "encrypted, and its password is not known" if locked else "not a PDF that can be read"
        faults.add(0, what if locked else f"{what}: {first_line(error)}")
    except RowFault as fault:
        faults.add(0, str(fault))
    text = "" if len(faults) else texts.joined()
    if not text and not len(faults):
        faults.add(0, f"there is no text on its {pages} pages; pictures of text need OCR first")
    faults.raise_if_any()
    yield Document(str(path), text, path.stat().st_size)


def _page_text(page: Any) -> str:
    words = page.get_textpage()
    try:
        text = words.get_text_range()
    finally:
        words.close()
        page.close()
    # PDFium gives U+FFFE, or U+0002, for a hyphen that only the line's end needed.
    text = re.sub("[\ufffe\x02]\r?\n?", "", text).replace("\r\n", "\n")
    return _CONTROL.sub("", text).strip()
