"""`longlora prepare`: documents and chats in, a folder of packed chunks out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from longlora_cli.config import PrepareConfig
from longlora_cli.console import Advance, Console
from longlora_cli.data.boundaries import Boundaries
from longlora_cli.data.chat_template import require_template
from longlora_cli.data.chunk_cost import ChunkCost, chunk_cost
from longlora_cli.data.chunking import Cutter
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.ordering import GROUP
from longlora_cli.data.preparation import Preparation, length_histogram
from longlora_cli.data.synthetic import make_training_chat
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256, tokenizer_sha256
from longlora_cli.storage import refuse_existing

# Text kept in memory to hide facts in; what comes after it is still prepared, only no haystack.
_HAYSTACK_CHARACTERS = 1 << 26
_BAR_WIDTH = 32


def run(config: PrepareConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Prepare data as the settings say.

    Returns:
        The summary that `--json` prints: counts, what was cut, fill, histogram, the folder.

    Raises:
        SettingsError: The output folder exists, or `--synthetic` cannot be read.
        DataError: An input that cannot be used, or nothing left to write.
        NotFoundError: No such model or hub dataset.
    """
    refuse_existing(config.out)
    chats_wanted = _synthetic_chats(config.synthetic)
    sources = find_sources(config.inputs, split=config.split)
    for name in [file for source in sources for file in source.left_out]:
        console.warn(f"left out {name}: not a kind of document that can be read")
    tokenizer = load_tokenizer(config.model)
    if chats_wanted:
        require_template(tokenizer)
    cutter = Cutter(
        config.max_length,
        config.min_length,
        config.shared_tokens,
        config.on_long,
        config.split_at,
        config.learn_overlap,
        Boundaries(tokenizer) if config.split_at != "token" else None,
    )
    meta: dict[str, Any] = {}
    texts = _Texts(keep=bool(chats_wanted))
    with ExitStack() as stack:
        writer = None if dry_run else stack.enter_context(ChunkDataset.writing(config.out, meta))
        preparation = Preparation(cutter, writer.folder if writer else None)
        stack.callback(preparation.close)
        with console.progress("Reading, bytes", sum(s.size_bytes for s in sources) or None) as advance:
            documents = _watched(read_documents(sources, seed=config.seed), texts, advance)
            for document in tokenize(documents, tokenizer, labels=config.labels):
                preparation.add(document)
        if chats_wanted:
            with console.progress("Retrieval chats", chats_wanted) as advance:
                chats = _retrieval_chats(texts.haystack(), tokenizer, config, chats_wanted, advance)
                for document in tokenize(chats, tokenizer, labels=config.labels):
                    preparation.add(document)
        cost = chunk_cost(config.model)
        layout = preparation.layout(cost, packed=config.pack, seed=config.seed)
        summary = _summary(preparation, layout, cost, config, chats_wanted)
        if writer is not None:
            meta |= {key: value for key, value in summary.items() if key != "out"}
            meta["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
            meta["template_sha256"] = template_sha256(tokenizer)
            meta["settings"] = config.model_dump(mode="json", exclude_unset=True)
            preparation.write(layout, writer)
            preparation.close()
    _show(summary, console, dry_run)
    return summary | {"dry_run": dry_run}


def _synthetic_chats(requests: list[str]) -> int:
    """Retrieval chats asked for by `needle=COUNT`."""
    count = 0
    for request in requests:
        kind, _, number = request.partition("=")
        if kind != "needle" or not number.isdigit() or not int(number):
            raise SettingsError(
                f"--synthetic {request!r} cannot be read", hint="Write --synthetic needle=2000."
            )
        count += int(number)
    return count


class _Texts:
    """The texts read so far, as a haystack for synthetic chats."""

    def __init__(self, *, keep: bool) -> None:
        self._texts: list[str] = []
        self._room = _HAYSTACK_CHARACTERS if keep else 0

    def add(self, text: str) -> None:
        if self._room > 0:
            self._texts.append(text[: self._room])
            self._room -= len(text)

    def haystack(self) -> Haystack:
        if not self._texts:
            raise DataError(
                "--synthetic needs texts to hide facts in, and the inputs hold only chats",
                hint="Add a .txt file to the inputs.",
            )
        return Haystack(self._texts)


def _watched(documents: Iterable[Document], texts: _Texts, advance: Advance) -> Iterator[Document]:
    for document in documents:
        if isinstance(document.content, str):
            texts.add(document.content)
        advance(document.size_bytes)
        yield document


def _retrieval_chats(
    haystack: Haystack, tokenizer: Any, config: PrepareConfig, count: int, advance: Advance
) -> Iterator[Document]:
    for index in range(count):
        chat = make_training_chat(
            haystack,
            tokenizer,
            longest=config.synthetic_length or config.max_length,
            facts=config.synthetic_facts,
            questions=config.synthetic_questions,
            seed=config.seed,
            index=index,
        )
        advance(1)
        yield Document(f"needle:{index}", chat.messages)


def _summary(
    preparation: Preparation,
    layout: list[list[int]],
    cost: ChunkCost,
    config: PrepareConfig,
    synthetic: int,
) -> dict[str, Any]:
    lengths = preparation.lengths
    counts = preparation.counts.as_dict()
    if not len(lengths):
        raise DataError(
            f"nothing is left of {counts['documents']} documents and {counts['chats']} chats",
            rule=f"--min-length is {config.min_length}, --max-length {config.max_length}, "
            f"--on-long {config.on_long}; chats are never split.",
        )
    tokens = int(lengths.sum())
    return {
        "out": str(config.out),
        **counts,
        "synthetic_chats": synthetic,
        "chunks": len(layout),
        "tokens": tokens,
        "trained_tokens": preparation.trained_tokens,
        "max_length": config.max_length,
        "longest_chunk": max(int(lengths[chunk].sum()) for chunk in layout),
        "fill": tokens / (len(layout) * config.max_length),
        "balance": preparation.balance(layout, cost),
        "cost": cost.as_dict(),
        "histogram": [{"up_to": bound, "pieces": count} for bound, count in length_histogram(lengths)],
    }


def _show(summary: dict[str, Any], console: Console, dry_run: bool) -> None:
    trained = summary["trained_tokens"] / summary["tokens"]
    rows = [
        ("texts", summary["documents"]),
        ("chats", summary["chats"]),
        ("of them synthetic", summary["synthetic_chats"]),
        ("tokens read", summary["tokens_read"]),
        ("tokens cut away", summary["tokens_dropped"]),
        ("tokens repeated by overlap", summary["tokens_repeated"]),
        ("tokens in chunks", summary["tokens"]),
        ("tokens learnt", summary["trained_tokens"]),
        ("texts split", summary["documents_split"]),
        ("cuts before a chapter", summary["cuts_at_chapter"]),
        ("cuts before a paragraph", summary["cuts_at_paragraph"]),
        ("cuts before a sentence", summary["cuts_at_sentence"]),
        ("cuts at any token", summary["cuts_at_token"]),
        ("texts truncated", summary["documents_truncated"]),
        ("texts left out", summary["documents_dropped"]),
        ("chats left out", summary["chats_dropped"]),
        ("short ends left out", summary["pieces_dropped"]),
        ("chunks", summary["chunks"]),
        ("longest chunk, tokens", summary["longest_chunk"]),
    ]
    needed = {"tokens read", "tokens in chunks", "tokens learnt", "chunks", "longest chunk, tokens"}
    console.table("", ["Prepared", ""], [row for row in rows if row[1] or row[0] in needed])
    console.print(f"Chunks are {summary['fill']:.1%} full; {trained:.1%} of the tokens are learnt.")
    console.print(
        f"Cost balance {summary['balance']:.1%}: mean over maximum of {GROUP} chunks at a time, by the sizes of "
        f"{summary['cost']['model']}."
    )
    console.print("Pieces by length in tokens:")
    most = max(row["pieces"] for row in summary["histogram"])
    for row in summary["histogram"]:
        console.print(f"  up to {row['up_to']:>11,} {row['pieces']:>11,} {_bar(row['pieces'] / most)}")
    console.print("Nothing was written (--dry-run)." if dry_run else f"Wrote {summary['out']}.")


def _bar(share: float) -> str:
    eighths = math.ceil(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
