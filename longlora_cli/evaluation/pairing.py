"""Which row of one evaluation belongs to which row of another: the same question, asked of two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longlora_cli.evaluation.finished import Evaluation
from longlora_cli.evaluation.journal import key_of

Row = Mapping[str, Any]
_PLACE = ("length", "depth", "sample", "row", "question", "id")
# What decides the samples that are made; with the same of these, a place holds the same task for every tokenizer.
_MADE_BY = ("seed", "depths", "needle_facts", "needle_wording", "max_new_tokens")


@dataclass(frozen=True)
class Pairing:
    """Rows of two evaluations side by side.

    Args:
        pairs: One row of each.
        only_a: Rows of the first without a partner.
        only_b: Rows of the second without a partner.
        other_text: Pairs at the same place (length, depth, sample) whose texts differ, because samples are fitted to
            the tokenizer and chat template of the model that reads them.
    """

    pairs: list[tuple[Row, Row]]
    only_a: list[Row]
    only_b: list[Row]
    other_text: int = 0


def pair_rows(a: Evaluation, b: Evaluation, task: str) -> Pairing:
    """Pair the samples of a task by their text and references, whatever model was asked.

    Rows whose partner has another text only because the models have other tokenizers or templates are paired by their
    place; then seed, haystack and all else that makes samples must be the same.
    """
    rows_a, rows_b = a.rows[task], b.rows[task]
    hashed = all(row.get("sample_hash") for row in (*rows_a, *rows_b))
    exact = _match(rows_a, rows_b, _hash_of if hashed else _place_and_references)
    if not (hashed and _made_alike(a, b)):
        return exact
    placed = _match(exact.only_a, exact.only_b, _place_of)
    return Pairing(exact.pairs + placed.pairs, placed.only_a, placed.only_b, len(placed.pairs))


def _match(a: Sequence[Row], b: Sequence[Row], key: Callable[[Row], Hashable | None]) -> Pairing:
    """Pair equal keys, the first with the first where several are equal; None pairs with nothing."""
    waiting: dict[Hashable, list[Row]] = {}
    for row in b:
        waiting.setdefault(key(row), []).append(row)
    waiting.pop(None, None)
    pairs, only_a = [], []
    for row in a:
        if found := waiting.get(key(row)):
            pairs.append((row, found.pop(0)))
        else:
            only_a.append(row)
    taken = {id(row) for _, row in pairs}
    return Pairing(pairs, only_a, [row for row in b if id(row) not in taken])


def _hash_of(row: Row) -> Hashable:
    return str(row["sample_hash"])


def _place_and_references(row: Row) -> Hashable:
    return key_of(place_of(row), row.get("references"))


def _place_of(row: Row) -> Hashable | None:
    return key_of(row["length"], row.get("depth"), row["sample"]) if "sample" in row else None


def place_of(row: Row) -> dict[str, Any]:
    """What tells a row from others: its length, depth, sample, line, question, as far as it has them."""
    return {name: row[name] for name in _PLACE if name in row}


def _made_alike(a: Evaluation, b: Evaluation) -> bool:
    """The two differ by tokenizer or template, and by nothing else that makes samples."""
    if not a.inputs or not b.inputs:
        return False
    fitted = any(a.inputs[name] != b.inputs[name] for name in ("tokenizer", "chat_template"))
    same = all(a.settings.get(name) == b.settings.get(name) for name in _MADE_BY)
    return fitted and same and a.inputs["haystack"] == b.inputs["haystack"]


def texts_of(rows: Sequence[Row]) -> list[Hashable]:
    """For each row a mark of the text it is about; rows with equal marks are not independent."""
    return [
        ("sample", row.get("length"), row["sample"])
        if "sample" in row
        else ("document", row["document"])
        if "document" in row
        else ("row", index)
        for index, row in enumerate(rows)
    ]


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """The context lengths that rows were made for, shortest first; none where each row has a length of its own."""
    found = Counter(row["length"] for row in rows if row.get("length") is not None)
    nominal = all("sample" in row or "depth" in row for row in rows) or 2 * len(found) <= len(rows)
    return sorted(found) if nominal else []
