"""EPUB and PDF: a file is one document."""

from __future__ import annotations

import posixpath
import re
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.markup import decode_markup, xhtml_text
from longlora_cli.data.readers.opening import MOST_BYTES, first_line
from longlora_cli.data.rows import RowFault

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
    texts: list[str] = []
    try:
        with zipfile.ZipFile(path) as book:
            if sum(entry.file_size for entry in book.infolist()) > MOST_BYTES:
                raise RowFault("the book unpacks to more than 1 GiB")
            for name in _spine(book):
                page = Faults(str(path))
                texts.append(xhtml_text(decode_markup(_read(book, name), page)))
                page.move_to(faults, f"in {name}: ")
                if faults.is_full:
                    break
    except zipfile.BadZipFile as error:
        faults.add(0, f"not an EPUB that can be read: {first_line(error)}")
    except RowFault as fault:
        faults.add(0, str(fault))
    text = "\n\n".join(text for text in texts if text)
    if not text and not len(faults):
        faults.add(0, "there is no text in it")
    faults.raise_if_any()
    yield Document(str(path), text, path.stat().st_size)


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
    raw = _read(book, name)
    if b"<!ENTITY" in raw:  # no book needs one here, and a few lines of them can fill any memory
        raise RowFault(f"{name} declares entities, which are not read")
    try:
        return ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise RowFault(f"{name} is not XML: {first_line(error)}") from error


def _read(book: zipfile.ZipFile, name: str) -> bytes:
    try:
        with book.open(name) as file:
            raw = file.read(MOST_BYTES + 1)
    except KeyError as error:
        raise RowFault(f"the book has no {shown(name)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise RowFault(f"{name} cannot be unpacked: {first_line(error)}") from error
    if len(raw) > MOST_BYTES:
        raise RowFault(f"{name} unpacks to more than 1 GiB")
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
    texts: list[str] = []
    pages = 0
    try:
        with pypdfium2.PdfDocument(path) as document:
            pages = len(document)
            for number in range(pages):
                try:
                    texts.append(_page_text(document[number]))
                except pypdfium2.PdfiumError as error:
                    faults.add(0, f"page {number + 1} cannot be read: {first_line(error)}")
    except pypdfium2.PdfiumError as error:
        locked = "assword" in str(error)
        what = "encrypted, and its password is not known" if locked else "not a PDF that can be read"
        faults.add(0, what if locked else f"{what}: {first_line(error)}")
    text = "\n\n".join(text for text in texts if text)
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
