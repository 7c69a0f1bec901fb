"""`longlora prepare`: documents and chats in, a folder of packed chunks out."""

from __future__ import annotations

import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from longlora_cli.commands.prepare_again import MADE_FROM, identity, made_before, with_content, with_dates
from longlora_cli.commands.prepare_continue import continued
from longlora_cli.commands.prepare_duplicates import Deduplicated
from longlora_cli.commands.prepare_inputs import Mixture, Texts, watched
from longlora_cli.commands.prepare_overlap import OverlapWatch
from longlora_cli.commands.prepare_show import Samples, show_samples
from longlora_cli.commands.prepare_synthetic import synthetic_chats, synthetic_counts
from longlora_cli.config import PrepareConfig
from longlora_cli.console import Console
from longlora_cli.data.boundaries import Boundaries
from longlora_cli.data.chat_template import require_template
from longlora_cli.data.chunk_cost import ChunkCost, chunk_cost
from longlora_cli.data.chunking import Cutter
from longlora_cli.data.dataset import ChunkDataset, ChunkWriter
from longlora_cli.data.documents import Source, find_sources
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.kept_tokens import KeptTokens
from longlora_cli.data.ordering import GROUP
from longlora_cli.data.plots import load_library, save_lengths
from longlora_cli.data.preparation import Preparation, length_histogram
from longlora_cli.data.samples import sampled_chunks
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import is_artifact, refuse_existing, remove_workspace, workspace_of

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
    chats_wanted = synthetic_counts(config.synthetic)
    sources = find_sources(config.inputs, split=config.split, stream=config.stream, format=config.rows_format)
    asked = find_sources(config.overlap_check, split=config.split)
    _tell_left_out(sources, console)
    tokenizer = _tokenizer(config, has_chats=bool(chats_wanted))
    if is_artifact(config.out, "dataset"):
        before = made_before(config.out, with_content(identity(config, tokenizer), [*sources, *asked]))
        return _unchanged(before, config, tokenizer, console, dry_run=dry_run)
    once = Deduplicated(sources, config, console)
    mixture = Mixture(once.sources, tokenizer, config, console)
    cutter = _cutter(config, tokenizer)
    safe_encoder(tokenizer)  # made before the thread begins, with which it would share Python's lock
    meta: dict[str, Any] = {}
    overlap = OverlapWatch.of(config, asked)
    with ExitStack() as stack:
        hashes = stack.enter_context(ThreadPoolExecutor(1))  # and a picture, beside reading and writing
        begun = hashes.submit(identity, config, tokenizer)
        key = hashes.submit(lambda: with_dates(begun.result(), [*sources, *asked]))
        size_bytes = mixture.size_bytes
        kept = None if dry_run else stack.enter_context(continued(config.out, key, size_bytes, console))
        writer = None if dry_run else stack.enter_context(_writing(config.out, meta, hashes))
        origin = hashes.submit(lambda: with_content(begun.result(), [*sources, *asked]))
        # A dry run that shows chunks has to hold their tokens somewhere: in a file without a name, gone at the end.
        spool = writer.folder if writer else Path(tempfile.gettempdir()) if config.show else None
        preparation = Preparation(cutter, spool)
        stack.callback(preparation.close)
        formats = _read(preparation, mixture, overlap, tokenizer, config, console, kept)
        cost = chunk_cost(config.model)
        layout = preparation.layout(cost, packed=config.pack, seed=config.seed)
        summary = _summary(preparation, layout, cost, config, chats_wanted, overlap.left_out)
        summary |= {"mixture": mixture.rows(), "formats": formats, **once.facts(), **overlap.facts()}
        if writer is not None:
            meta |= summary | _origin(config, begun.result(), origin.result())
            del meta["out"]
            _write(preparation, layout, writer, hashes)
        samples = Samples(sampled_chunks(len(layout), config.show, config.seed))
        if samples.wanted:
            preparation.write([layout[index] for index in samples.wanted], samples)
        preparation.close()
    seconds = time.monotonic() - started  # not in the manifest, which is the same whenever it is made
    summary |= {"seconds": seconds, "tokens_per_second": summary["tokens_read"] / seconds}
    _show(summary, console, dry_run, [once, overlap])
    if samples.wanted:
        show_samples(samples, len(layout), tokenizer, console)
    return summary | {"unchanged": False, "dry_run": dry_run}


def _tell_left_out(sources: list[Source], console: Console) -> None:
    for name in [file for source in sources for file in source.left_out]:
        console.warn(f"left out {name}: not a kind of document that can be read")


def _tokenizer(config: PrepareConfig, *, has_chats: bool) -> Any:
    tokenizer = load_tokenizer(config.model, config.chat_template)
    if has_chats:
        require_template(tokenizer)
    return tokenizer


def _writing(
    out: Path, meta: dict[str, Any], beside: ThreadPoolExecutor
) -> AbstractContextManager[ChunkWriter]:
    """The output, made where tokens are kept: all that a killed process leaves is in one place."""
    beside.submit(load_library)
    return ChunkDataset.writing(out, meta, inside=workspace_of(out))


def _write(
    preparation: Preparation, layout: list[list[int]], writer: ChunkWriter, beside: ThreadPoolExecutor
) -> None:
    """Write the chunks and draw their picture, at the same time."""
    picture = beside.submit(
        save_lengths, writer.folder / "lengths.png", preparation.lengths, preparation.learnt
    )
    preparation.write(layout, writer)
    picture.result()


def _origin(config: PrepareConfig, begun: dict[str, str], origin: dict[str, str] | None) -> dict[str, Any]:
    """What the manifest says of where the data come from."""
    return {
        "tokenizer_sha256": begun["tokenizer"],
        "template_sha256": begun["chat template"],
        "chat_template": config.chat_template,
        "settings": config.model_dump(mode="json", exclude_unset=True),
        MADE_FROM: origin,
    }


def _unchanged(
    before: dict[str, Any], config: PrepareConfig, tokenizer: Any, console: Console, *, dry_run: bool
) -> dict[str, Any]:
    """Say that nothing is to be done, and show what was asked for."""
    if not dry_run:
        remove_workspace(config.out)  # of a process that was killed after its last step but one
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
    kept: KeptTokens | None,
) -> dict[str, int]:
    """Tokenize the inputs and the chats made from them, and cut them; the number of rows of each format."""
    chats_wanted = synthetic_counts(config.synthetic)
    texts = Texts(keep=bool(chats_wanted))
    with console.progress("Reading, bytes", mixture.size_bytes or None) as advance:
        documents = watched(mixture.read(overlap.keeps), texts, advance)
        spool = kept.folder if kept else Path(tempfile.gettempdir())
        tokenized = tokenize(documents, tokenizer, labels=config.labels, kept=kept, spool=spool)
        for document in mixture.counted(tokenized):
            preparation.add(document)
    if chats_wanted:
        with console.progress("Synthetic chats", sum(chats_wanted.values())) as advance:
            chats = synthetic_chats(chats_wanted, texts.haystack(), tokenizer, config, advance)
            for document in tokenize(chats, tokenizer, labels=config.labels, kept=kept):
                preparation.add(document)
    return dict(sorted(texts.formats.items()))


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


def _summary(
    preparation: Preparation,
    layout: list[list[int]],
    cost: ChunkCost,
    config: PrepareConfig,
    synthetic: dict[str, int],
    overlapping: int,
) -> dict[str, Any]:
    lengths = preparation.lengths
    counts = preparation.counts.as_dict()
    if not len(lengths):
        dropped = f"; left out by --on-overlap drop: {overlapping:,}" if overlapping else ""
        raise DataError(
            f"nothing is left: texts read {counts['documents']:,}, chats {counts['chats']:,}{dropped}",
            rule=f"--min-length is {config.min_length}, --max-length {config.max_length}, "
            f"--on-long {config.on_long}; chats are never split.",
        )
    tokens = int(lengths.sum())
    return {
        "out": str(config.out),
        **counts,
        "synthetic_chats": sum(synthetic.values()),
        "synthetic_tasks": synthetic,
        "chunks": len(layout),
        "tokens": tokens,
        "trained_tokens": int(preparation.learnt.sum()),
        "max_length": config.max_length,
        "longest_chunk": max(int(lengths[chunk].sum()) for chunk in layout),
        "fill": tokens / (len(layout) * config.max_length),
        "balance": preparation.balance(layout, cost),
        "cost": cost.as_dict(),
        "histogram": [{"up_to": bound, "pieces": count} for bound, count in length_histogram(lengths)],
    }


def _show(
    summary: dict[str, Any], console: Console, dry_run: bool, more: list[Deduplicated | OverlapWatch]
) -> None:
    trained = summary["trained_tokens"] / summary["tokens"]
    tasks = summary["synthetic_tasks"]
    rows = [
        ("texts", summary["documents"]),
        ("chats", summary["chats"]),
        ("of them synthetic", summary["synthetic_chats"]),
        *((f"  {task}", count) for task, count in tasks.items() if len(tasks) > 1),
        *((f"rows of format {name}", count) for name, count in summary["formats"].items()),
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
    for part in more:
        part.show(console)


def _bar(share: float) -> str:
    eighths = math.ceil(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
