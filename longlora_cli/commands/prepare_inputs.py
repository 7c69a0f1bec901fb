"""What `longlora prepare` reads: inputs, mixed by weight where they have weights, and texts to hide facts in."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from longlora_cli.config import PrepareConfig
from longlora_cli.console import Advance, Console
from longlora_cli.data.chunking import TokenizedDocument
from longlora_cli.data.documents import Document, Mixed, Source, mix, read_documents
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError

# Text kept in memory to hide facts in; what comes after it is still prepared, only no haystack.
_HAYSTACK_CHARACTERS = 1 << 26


class Mixture:
    """The sources, mixed where they have weights, and the tokens that each of them gave.

    Args:
        sources: From `find_sources`.
        tokenizer: Counts the tokens of a few documents, so that weights are shares of tokens.
        config: Settings of the command.
        console: Shows the first reading.
    """

    def __init__(
        self, sources: list[Source], tokenizer: Any, config: PrepareConfig, console: Console
    ) -> None:
        self._seed = config.seed
        self._sources = sources
        self._parts: list[Mixed] = []
        if any(source.weight is not None for source in sources):

            def count_tokens(documents: list[Document]) -> list[int]:
                return [len(d.ids) for d in tokenize(documents, tokenizer, labels=config.labels)]

            with console.progress("Weighing, inputs", len(sources)) as advance:
                self._parts = mix(sources, seed=config.seed, count_tokens=count_tokens)
                advance(len(sources))
            self._sources = [part.source for part in self._parts]
        self._origins: deque[int] = deque()  # of the documents that are being tokenized, in order
        self._tokens = [0] * len(sources)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files, 0 where parts of them are read."""
        return 0 if self._parts else sum(source.size_bytes for source in self._sources)

    def read(self, keeps: Callable[[Document], bool]) -> Iterator[Document]:
        """The documents that `keeps` says to keep."""
        if not self._parts:
            yield from filter(keeps, read_documents(self._sources, seed=self._seed))
            return
        for number, source in enumerate(self._sources):
            for document in filter(keeps, read_documents([source], seed=self._seed)):
                self._origins.append(number)
                yield document
                del document

    def counted(self, documents: Iterable[TokenizedDocument]) -> Iterator[TokenizedDocument]:
        """The documents of `read`, tokenized and in the same order; their tokens are added to their inputs."""
        for document in documents:
            if self._parts:
                self._tokens[self._origins.popleft()] += len(document.ids)
            yield document

    def rows(self) -> list[dict[str, Any]]:
        """For the summary: each input's weight and what it came to; empty where nothing is mixed."""
        total = sum(self._tokens) or 1
        return [
            {
                "input": part.source.name,
                "weight": part.weight,
                "share": tokens / total,
                "tokens": tokens,
                "documents": part.documents,
                "of_documents": part.available,
            }
            for part, tokens in zip(self._parts, self._tokens, strict=False)
        ]


class Texts:
    """What was read so far: the texts as a haystack for synthetic chats, and how many rows had which format."""

    def __init__(self, *, keep: bool) -> None:
        self.formats: Counter[str] = Counter()
        self._texts: list[str] = []
        self._room = _HAYSTACK_CHARACTERS if keep else 0

    def add(self, text: str) -> None:
        """Keep a text, or as much of it as there is room for."""
        if self._room > 0:
            self._texts.append(text[: self._room])
            self._room -= len(text)

    def haystack(self) -> Haystack:
        """All texts kept.

        Raises:
            DataError: There are none.
        """
        if not self._texts:
            raise DataError(
                "--synthetic needs texts to hide facts in, and the inputs hold only chats",
                hint="Add a .txt file to the inputs.",
            )
        return Haystack(self._texts)


def watched(documents: Iterable[Document], texts: Texts, advance: Advance) -> Iterator[Document]:
    """The documents, each kept in `texts` and told to `advance` as it passes."""
    for document in documents:
        if document.format is not None:
            texts.formats[document.format] += 1
        if isinstance(document.content, str):
            texts.add(document.content)
        advance(document.size_bytes)
        yield document
        del document  # a long text goes before the next one is read
