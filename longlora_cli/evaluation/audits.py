"""Checks of a measurement itself: what makes numbers wrong without a word.

Each audit is `{"name", "value", "ok", "note"}`; `ok` is None where a fact is told and not judged. Those of this module
are made of finished rows alone, so that an evaluation that was killed or answered in shares has the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longlora_cli.evaluation.generation import FIRST_TOKENS, Row

Audit = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]
Summaries = Mapping[str, Mapping[str, Any]]

# A model of which most answers run into their limit does not end them: rules that look anywhere in an answer then
# judge what it says after it.
_MOST_CUT = 0.5
_NAMED = 5


def audit(name: str, value: Any, ok: bool | None, note: str = "") -> Audit:
    """One check as results hold it."""
    return {"name": name, "value": value, "ok": ok, "note": note}


def audit_rows(rows: Rows, summaries: Summaries, *, bos: int | None, begins_with_bos: bool) -> list[Audit]:
    """The audits that need nothing but what was kept.

    Args:
        rows: Task -> its finished rows.
        summaries: Task -> what `results.json` says of it.
        bos: The tokenizer's BOS token.
        begins_with_bos: It puts one in front of a plain text.
    """
    asked = {task: own for task, own in rows.items() if own and "first_tokens" in own[0]}
    if not asked:
        return []
    every = [row for own in asked.values() for row in own]
    return [
        _bos(every, bos, begins_with_bos=begins_with_bos),
        *_ends(asked),
        _cuts(asked, summaries),
        _duplicates(asked),
    ]


def longest_read(rows: Rows, summaries: Summaries) -> int:
    """Tokens of the longest thing that was read, its answer included."""
    sizes = [row["prompt_tokens"] + row["new_tokens"] for own in rows.values() for row in own if _asks(row)]
    for task, summary in summaries.items():
        if "window" in summary:
            sizes += [min(summary["window"], row["n"] + 1) for row in rows[task]]
    return max(sizes, default=0)


def _asks(row: Row) -> bool:
    return "prompt_tokens" in row


def _bos(rows: Sequence[Row], bos: int | None, *, begins_with_bos: bool) -> Audit:
    name = "BOS tokens that a prompt begins with"
    if bos is None:
        return audit(name, "the tokenizer has none", True)
    counts = Counter(_leading(row["first_tokens"], bos) for row in rows)
    value = {str(number): counts[number] for number in sorted(counts)}
    if twice := sum(count for number, count in counts.items() if number > 1):
        note = (
            f"{twice:,} of {len(rows):,} prompts have a second one: template and tokenizer both put it there"
        )
        return audit(name, value, False, note)
    if counts[0] and begins_with_bos:
        return audit(
            name, value, None, f"the tokenizer begins texts with one, {counts[0]:,} prompts have none"
        )
    return audit(name, value, True)


def _leading(tokens: Sequence[int], bos: int) -> int:
    """How many of the first tokens are BOS."""
    return list(tokens[:FIRST_TOKENS]).count(bos)


def _ends(asked: Rows) -> list[Audit]:
    """How the generated answers ended; choices that are weighed have no end."""
    ends = {
        task: Counter(row["finish"] for row in own if row["finish"] != "choice")
        for task, own in asked.items()
    }
    total = sum(sum(counts.values()) for counts in ends.values())
    if not total:
        return []
    shares = {end: sum(counts[end] for counts in ends.values()) / total for end in ("eos", "stop", "length")}
    ok = shares["length"] <= _MOST_CUT
    note = "" if ok else f"most answers ran into their limit: {_named(_by_most(ends, 'length'))}"
    return [audit("Share of answers that ended by EOS, stop string, limit", shares, ok, note)]


def _by_most(ends: Mapping[str, Counter[str]], end: str) -> list[str]:
    shares = {task: counts[end] / sum(counts.values()) for task, counts in ends.items() if counts.total()}
    return [f"{task} {100 * shares[task]:.0f} %" for task in sorted(shares, key=lambda t: -shares[t])]


def _cuts(asked: Rows, summaries: Summaries) -> Audit:
    lost = [row["n_truncated"] for own in asked.values() for row in own if row.get("n_truncated")]
    skipped = sum(summaries[task].get("skipped", 0) for task in asked)
    n = sum(map(len, asked.values()))
    value = {
        "truncated": len(lost) / n,
        "skipped": skipped / (n + skipped),
        "lost tokens": sum(lost),
    }
    if not lost and not skipped:
        return audit("Prompts cut or left out for their length", value, True)
    longest = f", the most cut by {max(lost):,} tokens" if lost else ""
    note = f"{len(lost):,} of {n:,} prompts were cut and {skipped:,} left out{longest}"
    return audit("Prompts cut or left out for their length", value, False, note)


def _duplicates(asked: Rows) -> Audit:
    twice = {task: _repeated(own) for task, own in asked.items()}
    number = sum(twice.values())
    note = (
        "" if not number else f"counted more than once: {_named(f'{t} {n}' for t, n in twice.items() if n)}"
    )
    return audit("Samples that an earlier one of their task equals", number, not number, note)


def _repeated(rows: Sequence[Row]) -> int:
    hashes = [row["sample_hash"] for row in rows if row.get("sample_hash")]
    return len(hashes) - len(set(hashes))


def _named(parts: Iterable[str]) -> str:
    every = list(parts)
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more
