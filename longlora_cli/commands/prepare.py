"""`longlora prepare`: documents and chats in, a folder of packed chunks out."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from longlora_cli.commands.prepare_again import MADE_FROM, made_before, made_from
from longlora_cli.commands.prepare_inputs import Mixture, Texts, watched
from longlora_cli.commands.prepare_overlap import OverlapWatch
from longlora_cli.commands.prepare_show import Samples, show_samples
from longlora_cli.config import PrepareConfig
from longlora_cli.console import Advance, Console
from longlora_cli.data.boundaries import Boundaries
from longlora_cli.data.chat_template import require_template
from longlora_cli.data.chunk_cost import ChunkCost, chunk_cost
from longlora_cli.data.chunking import Cutter
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.documents import Document, find_sources
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.ordering import GROUP
from longlora_cli.data.plots import save_lengths
from longlora_cli.data.preparation import Preparation, length_histogram
from longlora_cli.data.samples import sampled_chunks
from longlora_cli.data.synthetic import make_training_chat
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256, tokenizer_sha256
from longlora_cli.storage import is_artifact, refuse_existing

_BAR_WIDTH = 32


def run(config: PrepareConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Prepare data as the settings say.

    Returns:
        The summary that `--json` prints: counts, what was cut, fill, histogram, the folder, and how long it took.

    Raises:
        SettingsError: The output folder exists, or `--synthetic` cannot be read.
        DataError: An input that cannot be used, or nothing left to write.
        NotFoundError: No such model or hub dataset.
    """
    started = time.monotonic()
    if not is_artifact(config.out, "dataset"):
        refuse_existing(config.out)
    chats_wanted = _synthetic_chats(config.synthetic)
    sources = find_sources(config.inputs, split=config.split, stream=config.stream)
    asked = find_sources(config.overlap_check, split=config.split)
    for name in [file for source in sources for file in source.left_out]:
        console.warn(f"left out {name}: not a kind of document that can be read")
    tokenizer = load_tokenizer(config.model, config.chat_template)
    if chats_wanted:
        require_template(tokenizer)
    if is_artifact(config.out, "dataset"):
        before = made_before(config.out, made_from(config, [*sources, *asked], tokenizer))
        return _unchanged(before, config, tokenizer, console, dry_run=dry_run)
    mixture = Mixture(sources, tokenizer, config, console)
    cutter = _cutter(config, tokenizer)
    meta: dict[str, Any] = {}
    overlap = OverlapWatch.of(config, asked)
    with ExitStack() as stack:
        writer = None if dry_run else stack.enter_context(ChunkDataset.writing(config.out, meta))
        hashes = stack.enter_context(ThreadPoolExecutor(1))  # of files and tokenizer, while texts are read
        origin = hashes.submit(made_from, config, [*sources, *asked], tokenizer)
        # A dry run that shows chunks has to hold their tokens somewhere: in a file without a name, gone at the end.
        spool = writer.folder if writer else Path(tempfile.gettempdir()) if config.show else None
        preparation = Preparation(cutter, spool)
        stack.callback(preparation.close)
        _read(preparation, mixture, overlap, tokenizer, config, console)
        cost = chunk_cost(config.model)
        layout = preparation.layout(cost, packed=config.pack, seed=config.seed)
        summary = _summary(preparation, layout, cost, config, chats_wanted)
        summary |= {"mixture": mixture.rows(), **overlap.facts()}
        if writer is not None:
            meta |= {key: value for key, value in summary.items() if key != "out"}
            meta |= _origin(config, tokenizer, origin.result())
            preparation.write(layout, writer)
            save_lengths(writer.folder / "lengths.png", *writer.documents())
        samples = Samples(sampled_chunks(len(layout), config.show, config.seed))
        if samples.wanted:
            preparation.write([layout[index] for index in samples.wanted], samples)
        preparation.close()
    seconds = time.monotonic() - started  # not in the manifest, which is the same whenever it is made
    summary |= {"seconds": seconds, "tokens_per_second": summary["tokens_read"] / seconds}
    _show(summary, console, dry_run)
    overlap.show(console)
    if samples.wanted:
        show_samples(samples, len(layout), tokenizer, console)
    return summary | {"unchanged": False, "dry_run": dry_run}


def _origin(config: PrepareConfig, tokenizer: Any, origin: dict[str, str] | None) -> dict[str, Any]:
    """What the manifest says of where the data come from."""
    return {
        "tokenizer_sha256": origin["tokenizer"] if origin else tokenizer_sha256(tokenizer),
        "template_sha256": template_sha256(tokenizer),
        "chat_template": config.chat_template,
        "settings": config.model_dump(mode="json", exclude_unset=True),
        MADE_FROM: origin,
    }


def _unchanged(
    before: dict[str, Any], config: PrepareConfig, tokenizer: Any, console: Console, *, dry_run: bool
) -> dict[str, Any]:
    """Say that nothing is to be done, and show what was asked for."""
    console.print(f"{config.out} was made by this command from these files: nothing to do.")
    data = ChunkDataset.open(config.out)
    samples = Samples(sampled_chunks(len(data), config.show, config.seed))
    samples.chunks = [data[index] for index in samples.wanted]
    if samples.wanted:
        show_samples(samples, len(data), tokenizer, console)
    return before | {"out": str(config.out), "unchanged": True, "dry_run": dry_run}


def _read(
    preparation: Preparation,
    mixture: Mixture,
    overlap: OverlapWatch,
    tokenizer: Any,
    config: PrepareConfig,
    console: Console,
) -> None:
    """Tokenize the inputs and the chats made from them, and cut them."""
    chats_wanted = _synthetic_chats(config.synthetic)
    texts = Texts(keep=bool(chats_wanted))
    with console.progress("Reading, bytes", mixture.size_bytes or None) as advance:
        documents = watched(mixture.read(overlap.keeps), texts, advance)
        for document in mixture.counted(tokenize(documents, tokenizer, labels=config.labels)):
            preparation.add(document)
    if chats_wanted:
        with console.progress("Retrieval chats", chats_wanted) as advance:
            chats = _retrieval_chats(texts.haystack(), tokenizer, config, chats_wanted, advance)
            for document in tokenize(chats, tokenizer, labels=config.labels):
                preparation.add(document)


def _cutter(config: PrepareConfig, tokenizer: Any) -> Cutter:
    return Cutter(
        config.max_length,
        config.min_length,
        config.shared_tokens,
        config.on_long,
        config.split_at,
        config.learn_overlap,
        Boundaries(tokenizer) if config.split_at != "token" else None,
    )


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
    for part in summary["mixture"]:
        console.print(
            f"{part['input']}: {part['share']:.1%} of the tokens read (wanted {part['weight']:.1%}), "
            f"{part['documents']:,} of {part['of_documents']:,} documents."
        )
    console.print(f"Chunks are {summary['fill']:.1%} full; {trained:.1%} of the tokens are learnt.")
    console.print(
        f"Cost balance {summary['balance']:.1%}: mean over maximum of {GROUP} chunks at a time, by the sizes of "
        f"{summary['cost']['model']}."
    )
    speed, seconds = summary["tokens_per_second"], summary["seconds"]
    done = "Read and tokenized" if dry_run else "Read, tokenized and written"
    console.print(f"{done} in {seconds:,.1f} s, {speed:,.0f} tokens/s.")
    console.print("Pieces by length in tokens:")
    most = max(row["pieces"] for row in summary["histogram"])
    for row in summary["histogram"]:
        console.print(f"  up to {row['up_to']:>11,} {row['pieces']:>11,} {_bar(row['pieces'] / most)}")
    console.print("Nothing was written (--dry-run)." if dry_run else f"Wrote {summary['out']}.")


def _bar(share: float) -> str:
    eighths = math.ceil(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
