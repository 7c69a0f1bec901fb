"""What `smollm2_extension.py` reads: texts to train on and texts to ask about, choices, prompts; adapters in parts."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm2_32k import HELD_OUT

GENRES = ("books", "meetings", "manuals", "chats")
_CONTEXT_SENTENCES = 8
_SHORTEST_CHOICE = 40
_PART_BYTES = 15 * 2**20


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.xz file."""
    with (
        lzma.open(path, "rt", encoding="utf-8")
        if path.suffix == ".xz"
        else path.open(encoding="utf-8") as file
    ):
        for line in file:
            yield json.loads(line)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def messages_of(conversation: str) -> list[dict[str, str]]:
    """Turns of `USER: ... ASSISTANT: ...`, alternating from a user's on; an unanswered last one is left out."""
    parts = re.split(r"\s*(USER|ASSISTANT): ", conversation)[1:]
    turns = [
        {"role": "user" if who == "USER" else "assistant", "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    count = next(
        (n for n, turn in enumerate(turns) if turn["role"] != ("user", "assistant")[n % 2]), len(turns)
    )
    return turns[: count - count % 2]


def split_data(books: Path, meetings: Path, chats: Path, manuals: Path, work: Path) -> None:
    """`work/train` (books/, meetings.jsonl, chats.jsonl), `work/held` (texts by genre, meetings.jsonl, choices.jsonl).

    Held out are three books, the meetings that are not of the train split, every third conversation, and all manuals.
    """
    train, held = work / "train", work / "held"
    for folder in (train / "books", *(held / genre for genre in GENRES)):
        folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(books.glob("*.txt")):
        is_held = path.stem in HELD_OUT
        (held / "books" if is_held else train / "books").joinpath(path.name).write_bytes(path.read_bytes())
    rows = list(read_lines(meetings))
    write_lines(train / "meetings.jsonl", [row for row in rows if row["split"] == "train"])
    others = [row for row in rows if row["split"] != "train"]
    write_lines(held / "meetings.jsonl", others)
    for row in others:
        (held / "meetings" / f"{row['id']}.txt").write_text(row["context"], encoding="utf-8")
    talks = [row["conversation"] for row in read_lines(chats)]
    trained = [messages_of(talk) for number, talk in enumerate(talks) if number % 3]
    write_lines(train / "chats.jsonl", [{"messages": messages} for messages in trained if messages])
    for number, talk in enumerate(talks[::3]):
        (held / "chats" / f"{number}.txt").write_text(talk, encoding="utf-8")
    for path in sorted(manuals.glob("*.md")):
        (held / "manuals" / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    texts = {
        genre: [path.read_text(encoding="utf-8") for path in sorted((held / genre).glob("*.txt"))]
        for genre in GENRES
    }
    write_lines(held / "choices.jsonl", choices(texts, each=100))


def choices(texts: dict[str, list[str]], *, each: int, seed: int = 0) -> list[dict[str, Any]]:
    """Which of four sentences comes next? The others are of the same text, so that its subject does not tell.

    Args:
        texts: Texts of each genre.
        each: Rows of a genre, fewer where its texts are few.
        seed: Decides places and order.
    """
    from longlora_cli.data.haystack import split_sentences

    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for genre, own in texts.items():
        lists = [[s.text for s in split_sentences(text)] for text in own]
        places = [
            (number, place)
            for number, sentences in enumerate(lists)
            for place in range(_CONTEXT_SENTENCES, len(sentences))
            if len(sentences[place]) >= _SHORTEST_CHOICE
        ]
        for number, place in sorted(rng.sample(places, min(each, len(places)))):
            sentences = lists[number]
            near = set(sentences[place - _CONTEXT_SENTENCES : place + 1])
            others = sorted({s for s in sentences if len(s) >= _SHORTEST_CHOICE} - near)
            if len(others) < 3:
                continue
            shown = [sentences[place], *rng.sample(others, 3)]
            rng.shuffle(shown)
            rows.append(
                {
                    "context": " ".join(sentences[place - _CONTEXT_SENTENCES : place]),
                    "question": "Which sentence comes next?",
                    "choices": shown,
                    "answer": shown.index(sentences[place]),
                    "subject": genre,
                }
            )
    return rows


def write_questions(model: Path, held: list[str], settings: dict[str, Any], length: int, path: Path) -> int:
    """The prompts of one row of the grid as token ids, for `plain_answers.py`; how many.

    They are made by the task's own function with the settings of the evaluation, so that both ask the same questions;
    `sample_hash` says so.
    """
    from longlora_cli.evaluation.tasks.needle import needle_questions
    from longlora_cli.evaluation.texts import read_haystack
    from longlora_cli.models.tokenizer import load_tokenizer

    asked = needle_questions(
        read_haystack([Path(name) for name in held], split="test"),
        load_tokenizer(str(model)),
        length=length,
        depths=settings["depths"],
        samples=settings["samples"],
        facts=settings["needle_facts"],
        seed=settings["seed"],
        answer_tokens=settings["max_new_tokens"],
        wording=settings["needle_wording"],
    )
    rows = [
        {
            "prompt": [int(token) for token in q.prompt],
            "references": q.references,
            "sample_hash": q.sample_hash,
            "length": length,
            "depth": q.facts["depth"],
            "sample": q.facts["sample"],
        }
        for q in asked
    ]
    write_lines(path, rows)
    return len(rows)


def pack(folders: list[Path], out: Path) -> list[Path]:
    """Folders as one tar in parts of 15 MiB, `out/part00` ..., with their SHA-256 in `out/parts.json`.

    An adapter of rank 64 has 78 MB; a machine that is lent for half an hour may not give back files as large.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for folder in folders:
            tar.add(
                folder, arcname=folder.name if len(folders) == 1 else f"{folder.parent.name}/{folder.name}"
            )
    content, parts, sums = file.getvalue(), [], {}
    for number, start in enumerate(range(0, len(content), _PART_BYTES)):
        path = out / f"part{number:02d}"
        path.write_bytes(content[start : start + _PART_BYTES])
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        parts.append(path)
    (out / "parts.json").write_text(json.dumps(sums, indent=1))
    return parts


def unpack(parts: Path, into: Path) -> None:
    """The inverse of `pack`.

    Raises:
        ValueError: A part is missing or not the one that was packed.
    """
    sums = json.loads((parts / "parts.json").read_text())
    content = b""
    for name, sha256 in sums.items():
        piece = (parts / name).read_bytes() if (parts / name).is_file() else b""
        if hashlib.sha256(piece).hexdigest() != sha256:
            raise ValueError(f"{parts / name} is missing or damaged")
        content += piece
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(into, filter="data")
