"""Duplicates: what is alike is found whatever the number of documents, and what is not alike stays."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlora_cli.data import duplicates
from longlora_cli.data.document import Document, Source
from longlora_cli.data.documents import read_documents
from longlora_cli.data.duplicates import _Table, bands_of, find_duplicates
from longlora_cli.data.fingerprints import SIGNATURE, SLOTS, digest, signature
from longlora_cli.errors import DataError, SettingsError

WORDS = [
    f"{a}{b}" for a in ("ri", "mo", "ta", "le", "shu", "fen") for b in ("ver", "ss", "ble", "nt", "d", "x")
]


def paragraph(seed: Any, words: int = 60) -> str:
    return " ".join(random.Random(f"{seed}").choices(WORDS, k=words)) + "."


def text(seed: Any, paragraphs: int = 20) -> str:
    return "\n\n".join(paragraph(f"{seed}:{n}") for n in range(paragraphs))


def changed(whole: str, number: int) -> str:
    """One paragraph of a text is another one."""
    parts = whole.split("\n\n")
    parts[number] = paragraph(f"changed {number} {whole[:9]}")
    return "\n\n".join(parts)


def chat(question: str, answer: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def source_of(name: str, *contents: Any, **more: Any) -> Source:
    documents = [
        Document(f"{name}:{n}", content, size_bytes=10) for n, content in enumerate(contents, start=1)
    ]
    return Source(name, lambda: iter(documents), **more)


def kept(*sources: Source, threshold: float | None = 0.8, folder: Path) -> list[str]:
    found = find_duplicates(list(sources), threshold=threshold, folder=folder, advance=lambda size: None)
    return [document.source for part in found for document in part.source.read()]


def runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[n : n + 5]) for n in range(len(words) - 4)}


def similarity(a: str, b: str) -> float:
    """The Jaccard similarity that signatures estimate."""
    one, two = (runs(x.replace(".", "").split()) for x in (a, b))
    return len(one & two) / len(one | two)


def test_equal_texts_are_left_out_but_the_first(tmp_path: Path) -> None:
    texts = [text(1), text(2), text(1), text(3), text(2), text(1)]
    for threshold in (None, 0.8):
        assert kept(source_of("a", *texts), threshold=threshold, folder=tmp_path) == ["a:1", "a:2", "a:4"]


def test_white_space_makes_no_difference_and_everything_else_does(tmp_path: Path) -> None:
    texts = ["One mill.\n\nTwo.", " One  mill. Two.\r\n", "one mill. Two.", "One mill, Two.", "Onemill. Two."]
    assert kept(source_of("a", *texts), threshold=None, folder=tmp_path) == ["a:1", "a:3", "a:4", "a:5"]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_a_digest_does_not_depend_on_the_pieces_that_a_text_is_read_in(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    texts = ["", "a", " a  b\n", "ab cd   ef", "   ", "a\n\n\n\n\nb", "ab", "a b"]
    whole = [digest(Document("", each)) for each in texts]
    monkeypatch.setattr("longlora_cli.data.fingerprints._CHARACTERS_AT_ONCE", at_once)
    assert [digest(Document("", each)) for each in texts] == whole
    assert len(set(whole)) == 5  # "", "a", "a b", "ab cd ef" and "ab"


def test_a_text_with_a_changed_paragraph_is_near_and_not_exact(tmp_path: Path) -> None:
    texts = [text(1), changed(text(1), 7), text(2)]
    assert similarity(*texts[:2]) > 0.85
    assert kept(source_of("a", *texts), folder=tmp_path) == ["a:1", "a:3"]
    assert kept(source_of("a", *texts), threshold=None, folder=tmp_path) == ["a:1", "a:2", "a:3"]


def test_the_threshold_says_how_much_may_differ(tmp_path: Path) -> None:
    whole = text(1)
    other = whole
    for number in (3, 6, 9, 12):
        other = changed(other, number)
    assert 0.55 < similarity(whole, other) < 0.75
    assert kept(source_of("a", whole, other), threshold=0.8, folder=tmp_path) == ["a:1", "a:2"]
    assert kept(source_of("a", whole, other), threshold=0.5, folder=tmp_path) == ["a:1"]


def test_distinct_texts_stay(tmp_path: Path) -> None:
    texts = [paragraph(n, words=12 + n % 50) for n in range(500)]
    assert len(kept(source_of("a", *texts), threshold=0.5, folder=tmp_path)) == 500


def test_every_near_duplicate_among_many_texts_is_found(tmp_path: Path) -> None:
    originals = [text(n) for n in range(150)]
    copies = [changed(whole, n % 20) for n, whole in enumerate(originals)]
    assert kept(source_of("a", *originals, *copies), folder=tmp_path) == [f"a:{n}" for n in range(1, 151)]


def test_case_and_punctuation_do_not_keep_a_near_duplicate(tmp_path: Path) -> None:
    assert kept(source_of("a", text(1), text(1).upper().replace(".", "!")), folder=tmp_path) == ["a:1"]


@pytest.mark.parametrize("words", ["🙂🚀", "...", "?! 🙂"])
def test_texts_without_words_are_compared_exactly(tmp_path: Path, words: str) -> None:
    texts = [words, words + "🌍", words]
    assert kept(source_of("a", *texts), folder=tmp_path) == ["a:1", "a:2"]


def test_short_texts_are_alike_when_their_words_are(tmp_path: Path) -> None:
    texts = ["The mill", "the mill!", "The hill", "The", "The mill was old", "The mill was very old"]
    assert kept(source_of("a", *texts), folder=tmp_path) == ["a:1", "a:3", "a:4", "a:5", "a:6"]


def test_of_two_alike_the_first_in_the_order_of_inputs_stays(tmp_path: Path) -> None:
    first, second = source_of("a", text(1), text(2)), source_of("b", text(2), changed(text(1), 4), text(3))
    assert kept(first, second, folder=tmp_path) == ["a:1", "a:2", "b:3"]
    assert kept(second, first, folder=tmp_path) == ["b:1", "b:2", "b:3"]


def test_for_each_that_is_left_out_one_that_stays_is_alike(tmp_path: Path) -> None:
    versions = [text(1)]
    for number in range(19):  # the last has nothing of the first but its last paragraph
        versions.append(changed(versions[-1], number))
    stay = kept(source_of("a", *versions), folder=tmp_path)
    assert 2 < len(stay) < 12
    for version in versions:
        assert max(similarity(version, versions[int(name[2:]) - 1]) for name in stay) > 0.7
    assert similarity(versions[0], versions[-1]) < 0.1


def greedy(signatures: np.ndarray, threshold: float) -> list[bool]:
    """The plain twin: each document against all earlier ones that stay."""
    near: list[bool] = []
    for mine in signatures:
        others = signatures[: len(near)][~np.array(near, bool)]
        equal = (others == mine).reshape(len(others), SIGNATURE // SLOTS, SLOTS).mean(2).min(1)
        near.append(bool((equal >= threshold).any()))
    return near


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_bands_find_what_comparing_all_with_all_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, block: int
) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    rng = np.random.default_rng(3)
    families = rng.integers(0, 1 << 32, (20, SIGNATURE), dtype=np.uint32)
    signatures = families[rng.integers(0, 20, 300)]
    # Far from the threshold on both sides: there a band is shared with near certainty, so the two must agree.
    other = rng.random(signatures.shape) < rng.choice([0.0, 0.01, 0.8], (300, 1))
    signatures = np.where(other, rng.integers(0, 1 << 32, signatures.shape, dtype=np.uint32), signatures)
    table = _Table(tmp_path, threshold)
    for row in signatures:
        table.add(row)
    near = table.like_earlier(np.zeros(300, bool))
    table.close()
    assert near.tolist() == greedy(signatures, threshold)
    assert 100 < near.sum() < 280


@pytest.mark.parametrize("threshold", [0.5, 0.65, 0.8, 0.9, 0.99, 1.0])
def test_of_pairs_at_the_threshold_99_in_100_share_a_band(threshold: float) -> None:
    bands, slots = bands_of(threshold)
    assert bands * slots <= SLOTS
    assert 1 - (1 - threshold**slots) ** bands >= 0.99
    longer = slots + 1
    assert longer > SLOTS or 1 - (1 - threshold**longer) ** (SLOTS // longer) < 0.99


def test_signatures_estimate_the_share_of_common_runs() -> None:
    whole = text(1, paragraphs=40)
    other = whole
    errors = []
    for number in range(0, 30, 3):
        other = changed(other, number)
        one, two = (signature(Document("", each), b"0" * 16) for each in (whole, other))
        errors.append(float((one == two)[:SLOTS].mean()) - similarity(whole, other))
    assert np.abs(errors).max() < 0.15
    assert abs(np.mean(errors)) < 0.05


def test_a_signature_does_not_depend_on_the_pieces_that_a_text_is_read_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [
        text(1, paragraphs=2),
        "one two three four five",
        "one two three four",
        "one",
        " ",
        "a  b\n\nc d e f ",
    ]
    whole = [signature(Document("", each), b"0" * 16) for each in texts]
    for at_once in (8, 9, 10, 11, 30, 70):  # no word is longer
        monkeypatch.setattr("longlora_cli.data.fingerprints._CHARACTERS_AT_ONCE", at_once)
        again = [signature(Document("", each), b"0" * 16) for each in texts]
        assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_text_without_spaces_is_read_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlora_cli.data.fingerprints._CHARACTERS_AT_ONCE", 10)
    one, two = (signature(Document("", letter * 1000), b"0" * 16) for letter in "ab")
    assert (one != two)[:SLOTS].all()


def test_chats_are_compared_as_whole_conversations(tmp_path: Path) -> None:
    question, answer = text("question"), text("answer", 4)
    chats = [
        chat(question, answer),
        chat(question, answer),
        chat(changed(question, 3), answer),
        chat(text("other"), answer),
        question + answer,
    ]
    assert kept(source_of("a", *chats), folder=tmp_path) == ["a:1", "a:4", "a:5"]


def test_other_questions_about_the_same_context_are_not_alike(tmp_path: Path) -> None:
    context = text("context", 40)
    chats = [chat(f"{context}\n\nWho was at {n}?", f"The miller of {paragraph(n, 6)}") for n in range(20)]
    assert kept(source_of("a", *chats, chats[3]), folder=tmp_path) == [f"a:{n}" for n in range(1, 21)]


def test_answers_that_differ_in_a_number_or_an_emoji_are_not_alike(tmp_path: Path) -> None:
    chats = [chat(text(1), answer) for answer in ("48213", "48214", "👍", "👎", "")]
    assert len(kept(source_of("a", *chats), folder=tmp_path)) == 5


def test_roles_calls_and_tools_make_chats_differ(tmp_path: Path) -> None:
    calls = [{"function": {"name": "weigh", "arguments": {"what": "flour"}}}]
    one = chat("What?", "This.")
    contents = [one, chat("What?", "This.", tool_calls=calls), [one[0], {**one[1], "role": "system"}], one]
    documents = [Document(f"a:{n}", content) for n, content in enumerate(contents, start=1)]
    documents.append(Document("a:5", one, tools=[{"function": {"name": "weigh"}}]))
    assert kept(Source("a", lambda: iter(documents)), threshold=None, folder=tmp_path) == [
        "a:1",
        "a:2",
        "a:3",
        "a:5",
    ]


def test_a_sample_is_drawn_from_what_stays(tmp_path: Path) -> None:
    source = source_of("a", *[text(n // 5) for n in range(20)], sample=4)
    found = find_duplicates([source], threshold=None, folder=tmp_path, advance=lambda size: None)
    documents = list(read_documents([part.source for part in found], seed=0))
    assert [document.source for document in documents] == ["a:1", "a:6", "a:11", "a:16"]


def test_what_is_found_is_counted_by_source_and_the_bytes_passed_over_are_told(tmp_path: Path) -> None:
    texts = [text(1), text(2), text(1), changed(text(2), 1), text(3)]
    found = find_duplicates(
        [source_of("a", *texts), source_of("b", text(3))],
        threshold=0.8,
        folder=tmp_path,
        advance=lambda size: None,
    )
    assert [(part.documents, part.exact, part.near) for part in found] == [(5, 1, 1), (1, 1, 0)]
    assert [part.characters for part in found] == [len(texts[2]) + len(texts[3]), len(text(3))]
    assert [document.size_bytes for document in found[0].source.read()] == [10, 10, 30]


@pytest.mark.parametrize(("threshold", "room"), [(None, 10), (0.8, 4)])
def test_more_documents_than_there_is_memory_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None, room: int
) -> None:
    monkeypatch.setattr(duplicates, "_MOST_BYTES", 720)
    texts = [f"text {n}" for n in range(room + 1)]
    assert len(kept(source_of("a", *texts[:-1]), threshold=threshold, folder=tmp_path)) == room
    with pytest.raises(DataError, match=f"more than {room} documents"):
        kept(source_of("a", *texts), threshold=threshold, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_grows_while_it_is_read_is_told(tmp_path: Path) -> None:
    documents = [Document("a:1", "One."), Document("a:2", "Two.")]
    found = find_duplicates(
        [Source("a", lambda: iter(documents))], threshold=None, folder=tmp_path, advance=lambda size: None
    )
    documents.append(Document("a:3", "Three."))
    with pytest.raises(DataError, match="a has changed while it was read"):
        list(found[0].source.read())


def test_near_duplicates_without_rensa_are_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as caught:
        kept(source_of("a", "One."), folder=tmp_path)
    assert "pip install 'longlora-cli[dedup]'" in str(caught.value.hint)
    assert kept(source_of("a", "One."), threshold=None, folder=tmp_path) == ["a:1"]


MEMORY = """
import json, sys, tempfile
from pathlib import Path
import numpy as np, rensa
from longlora_cli.data import duplicates, fingerprints
from longlora_cli.data.document import Document, Source

def peak_bytes():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

count, threshold = int(sys.argv[1]), float(sys.argv[2])
rng = np.random.default_rng(0)
# Each document has an earlier one in every band, the costliest case, and half of its slots in common with it.
families = rng.integers(0, 1 << 32, (count // 2, 8), dtype=np.uint32)
numbers = iter(range(count))
def sign(document, digest):
    n = next(numbers)
    return np.resize(families[n % (count // 2)], fingerprints.SIGNATURE) + np.uint32(n) * (np.arange(256) % 128 > 125)
duplicates.signature = sign
source = Source("a", lambda: (Document(str(n), str(n)) for n in range(count)))
before = peak_bytes()
found = duplicates.find_duplicates([source], threshold=threshold or None, folder=Path(tempfile.gettempdir()),
                                   advance=lambda size: None)
print(json.dumps([found[0].near, peak_bytes() - before]))
"""


# 0.5 has the most bands; near duplicates cost eight seconds each.
@pytest.mark.parametrize(
    ("threshold", "bytes_each"),
    [(0.0, 72), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0.8, 148), (0.5, 232)))],
)
def test_memory_a_document_is_what_the_limit_counts_with(threshold: float, bytes_each: int) -> None:
    count = 200_000
    words = [sys.executable, "-c", MEMORY, str(count), str(threshold)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    near, peak_bytes = json.loads(done.stdout)
    assert near == (count // 2 if threshold else 0)
    assert peak_bytes < count * bytes_each + 20_000_000  # the blocks being written, and imports at first use
