"""One HTML file that holds an evaluation: no network, no other file, nothing in it that runs but its own script.

Two locks keep text from models and users inert: every piece is escaped when it is put in (markup.py), and the page's
content security policy allows the one script and the one style sheet by their hashes, and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from longlora_cli.evaluation.report.curves import accuracy_by_length, interval_bar, loss_by_position
from longlora_cli.evaluation.report.heatmap import heatmap
from longlora_cli.evaluation.report.markup import Markup, join, table, tag
from longlora_cli.evaluation.report.numbers import interval, number, percent
from longlora_cli.evaluation.report.samples import MOST_BYTES, MOST_SAMPLES, Picked, Row, data_block, pick
from longlora_cli.evaluation.report.scores import Score, flat, other_facts, scores_of

# Perplexity's texts in a table; more of them are in samples/ppl.jsonl.
_MOST_TEXTS = 200
_SHOWN_VALUES = 12
_SCORE_COLUMNS = ["score", "of", "value", "", "95 % interval", "n", "scorer"]


def make_page(
    results: dict[str, Any],
    rows_by_task: Mapping[str, Sequence[Row]],
    *,
    most_samples: int = MOST_SAMPLES,
    most_bytes: int = MOST_BYTES,
) -> tuple[str, Picked]:
    """The report of an evaluation.

    Args:
        results: The content of `results.json`. `tasks` is needed; `model`, `settings`, `versions`, `groups` (means of
            several tasks, with `score` and `lengths`) and `audits`, a list of `{"name", "value", "ok", "note"}`, are shown
            where they are. `ok` may be None: told, not judged.
        rows_by_task: The content of `samples/<task>.jsonl`.
        most_samples: At most so many samples in the page.
        most_bytes: At most so much JSON of samples in the page.

    Returns:
        The page, the same text for the same input, and the samples in it.
    """
    # As results.json has it, so that a page made anew from the folder is the same.
    results = json.loads(json.dumps(results, sort_keys=True))
    order = [*results.get("settings", {}).get("tasks", []), *results["tasks"]]
    tasks = {task: results["tasks"][task] for task in dict.fromkeys(order) if task in results["tasks"]}
    rows = {task: rows_by_task.get(task, []) for task in tasks}
    picked = pick(rows, most=most_samples, most_bytes=most_bytes)
    groups: dict[str, Any] = results.get("groups", {})
    style, script = _source("page.css"), _source("page.js")
    name = str(results.get("model", {}).get("name", "model"))
    body = join(
        tag("a", "Skip to the results", href="#overview", class_="skip"),
        _head(results, name, [*groups, *tasks]),
        tag(
            "main",
            _overview(tasks, groups),
            _audits(results.get("audits")),
            *(_group(name, group) for name, group in groups.items()),
            *(_task(task, summary, rows[task]) for task, summary in tasks.items()),
            _browser(picked),
            _settings(results),
            id="main",
        ),
        data_block(picked),
        tag("script", script),
    )
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"Evaluation of {name}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )
    page = tag("html", tag("head", head), tag("body", body), lang="en")
    return f"<!doctype html>\n{page}\n", picked


def _source(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {hashed(script)}; style-src {hashed(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _slug(task: str) -> str:
    return "task-" + "".join(character if character.isalnum() else "-" for character in task)


def _head(results: dict[str, Any], name: str, parts: list[str]) -> Markup:
    model, versions = results.get("model", {}), results.get("versions", {})
    facts: list[tuple[str, str]] = [("Model", name)]
    if model.get("base") not in (None, name):
        facts.append(("Base", str(model["base"])))
    if model.get("adapter"):
        how = "folded into the weights" if model.get("adapter_folded") else "beside the weights"
        facts.append(("Adapter", f"{model['adapter']} ({how})"))
    if (rope := model.get("rope")) is not None:
        kind = rope.get("parameters", {}).get("rope_type", "default")
        facts.append(("Positions", f"{kind}, up to {rope['max_position_embeddings']:,}"))
    held = [
        str(model[key]) for key in ("dtype", "quantization", "device") if model.get(key) not in (None, "none")
    ]
    if held:
        facts.append(("Computed in", ", ".join(held)))
    if versions:
        facts.append(("Versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    cost = []
    if "seconds" in results:
        cost.append(f"{number(results['seconds'])} s")
    if "peak_bytes" in results:
        cost.append(f"{results['peak_bytes'] / 2**20:,.0f} MiB at most")
    if cost:
        facts.append(("Cost", ", ".join(cost)))
    links = [("overview", "Overview"), *([("audits", "Audits")] if results.get("audits") else [])]
    links += [(_slug(task), task) for task in parts]
    links += [("samples", "Samples"), ("settings", "Settings")]
    return tag(
        "header",
        tag("p", "longlora eval", class_="maker"),
        tag("h1", "Evaluation of ", tag("span", name, class_="name")),
        _definitions(facts),
        tag(
            "nav",
            *(tag("a", said, href=f"#{target}") for target, said in links),
            aria_label="Parts of this report",
        ),
    )


def _definitions(facts: Sequence[tuple[str, str]]) -> Markup:
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts), class_="facts")


def _overview(tasks: dict[str, Any], groups: dict[str, Any]) -> Markup:
    rows = []
    for task, summary in [*groups.items(), *tasks.items()]:
        for score in [s for s in scores_of(summary) if s.where == "all"][:1]:
            link = tag("a", task, href=f"#{_slug(task)}")
            rows.append([link, *_cells(score)[:1], *_cells(score)[2:]])
    return tag(
        "section",
        tag("h2", "Overview"),
        table(
            ["task", "score", "value", "", "95 % interval", "n", "scorer"],
            rows,
            caption="The first score of each task; all of them are in the tasks' sections",
            class_="scores",
        ),
        _by_length(groups | tasks),
        id="overview",
    )


def _by_length(tasks: dict[str, Any]) -> Markup:
    """Tasks down, lengths across, for several tasks that were asked at lengths."""
    found = {
        task: {part["length"]: part for part in summary["lengths"]}
        for task, summary in tasks.items()
        if summary.get("lengths")
    }
    lengths = sorted({length for parts in found.values() for length in parts})
    if len(found) < 2 or len(lengths) < 2:
        return Markup("")
    rows: list[list[str]] = [
        [task, *(_share_cell(parts.get(length)) for length in lengths)] for task, parts in found.items()
    ]
    caption = "Score by task and context length (tokens), with 95 % intervals"
    return table(["task", *(f"{length:,}" for length in lengths)], rows, caption=caption, class_="lengths")


def _share_cell(part: dict[str, Any] | None) -> str:
    if part is None:
        return "–"
    bounds = interval(part.get("ci95"), is_share=True)
    return tag("span", percent(part["score"]), " ", tag("small", bounds), title=f"n={part['n']:,}")


def _group(name: str, group: dict[str, Any]) -> Markup:
    """The mean of several tasks."""
    tasks = group.get("tasks", [])
    parts: list[Markup] = [tag("p", "The mean of " + ", ".join(tasks))]
    if len(group.get("lengths", [])) > 1:
        plot = accuracy_by_length(name, group)
        parts.append(_figure("Mean score by length, band: 95 % intervals", plot))
    caption = f"{name}: every score"
    parts.append(
        table(_SCORE_COLUMNS, [_cells(score) for score in scores_of(group)], caption=caption, class_="scores")
    )
    facts = {key: value for key, value in other_facts(group).items() if key != "tasks"}
    if facts:
        parts.append(_definitions([(key, _value(value)) for key, value in facts.items()]))
    return tag("section", tag("h2", name), *parts, id=_slug(name), class_="group")


def _cells(score: Score) -> list[str]:
    """A score as cells: name, where, value, bar, interval, n, scorer."""
    value = percent(score.value) if score.is_share else number(score.value)
    bounds = interval(score.ci95, is_share=score.is_share)
    bar = interval_bar(score.value, score.ci95, f"{value} {bounds}") if score.is_share else Markup("")
    return [
        score.name,
        score.where,
        tag("span", value, class_="value"),
        bar,
        bounds,
        f"{score.n:,}",
        score.scorer or "–",
    ]


def _audits(audits: Sequence[dict[str, Any]] | None) -> Markup:
    if not audits:
        return Markup("")
    said = {True: ("✓ good", "good"), False: ("✗ look at this", "bad"), None: ("· told", "told")}
    rows: list[list[str]] = []
    for audit in audits:
        words, class_ = said[audit.get("ok")]
        rows.append(
            [
                str(audit["name"]),
                tag("span", words, class_=f"verdict {class_}"),
                _value(audit.get("value")),
                str(audit.get("note") or ""),
            ]
        )
    bad = sum(audit.get("ok") is False for audit in audits)
    caption = f"{len(audits)} checks of the measurement itself, {bad} to look at"
    return tag(
        "section",
        tag("h2", "Audits"),
        table(["check", "verdict", "value", "note"], rows, caption=caption, class_="audits"),
        id="audits",
    )


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        shown = ", ".join(_value(item) for item in value[:_SHOWN_VALUES])
        more = len(value) - _SHOWN_VALUES
        return shown + (f" … {more:,} more" if more > 0 else "") if value else "–"
    return str(value)


def _task(task: str, summary: dict[str, Any], rows: Sequence[Row]) -> Markup:
    scores = scores_of(summary)
    parts: list[Markup] = []
    if summary.get("cells"):
        parts.append(_figure("Right answers by length and depth, in per cent", heatmap(task, summary)))
        parts.append(_cells_table(task, summary))
    if len(summary.get("lengths", [])) > 1:
        parts.append(
            _figure("Right answers by length, band: 95 % intervals", accuracy_by_length(task, summary))
        )
    if summary.get("effective_length"):
        parts.append(_effective(summary["effective_length"]))
    if summary.get("by_position"):
        title = (
            f"Loss by tokens of context, band: 95 % intervals; {summary['curve_windows']:,} "
            f"{summary['curve_source']}"
        )
        parts += [_figure(title, loss_by_position(task, summary)), _positions_table(task, summary)]
    if scores:
        caption = f"{task}: every score"
        parts.append(
            table(_SCORE_COLUMNS, [_cells(score) for score in scores], caption=caption, class_="scores")
        )
    if texts := [row for row in rows if "scores" not in row and "text" in row]:
        parts.append(_texts_table(task, texts))
    if facts := other_facts(summary):
        parts.append(_folded("Counts and costs", _definitions([(key, _value(facts[key])) for key in facts])))
    return tag("section", tag("h2", task), *parts, id=_slug(task), class_="task", data_task=task)


def _effective(rules: dict[str, Any]) -> Markup:
    """The effective context length by each rule, in words that say what the intervals leave open."""
    facts = [
        (f"Effective length by {rule}, {percent(found['threshold'])} needed", str(found["text"]))
        for rule, found in rules.items()
    ]
    return _definitions(facts)


def _figure(title: str, plot: Markup) -> Markup:
    # Focusable, so that the keyboard can scroll a plot that is wider than the screen.
    scroll = tag("div", plot, class_="scroll", tabindex="0", role="region", aria_label=title)
    return tag("figure", tag("figcaption", title), scroll)


def _folded(title: str, *inner: Markup) -> Markup:
    return tag("details", tag("summary", title), *inner)


def _cells_table(task: str, summary: dict[str, Any]) -> Markup:
    rows = [
        [
            f"{cell['length']:,}",
            percent(cell["depth"]),
            percent(cell["score"]),
            interval(cell.get("ci95"), is_share=True),
            f"{cell['n']:,}",
        ]
        for cell in summary["cells"]
    ]
    head = ["length (tokens)", "depth", "right", "95 % interval", "n"]
    return _folded("The same as a table", table(head, rows, caption=f"{task}: right answers of every cell"))


def _positions_table(task: str, summary: dict[str, Any]) -> Markup:
    rows = [
        [
            f"{bucket['from']:,} to {bucket['to']:,}",
            name,
            number(bucket[f"{prefix}nll"]),
            number(bucket[f"{prefix}perplexity"]),
            interval(bucket.get(f"{prefix}ci95"), is_share=False),
            f"{bucket['n']:,}",
        ]
        for name, prefix in (("full", ""), ("short", "short_"))
        for bucket in summary["by_position"]
        if f"{prefix}nll" in bucket
    ]
    head = ["tokens of context", "context", "nats a token", "perplexity", "95 % interval", "n (tokens)"]
    return _folded("The same as a table", table(head, rows, caption=f"{task}: loss by position"))


def _texts_table(task: str, texts: Sequence[Row]) -> Markup:
    rows = [
        [str(row["text"]), *(_value(row.get(key)) for key in ("n", "nll", "bytes", "seconds"))]
        for row in texts[:_MOST_TEXTS]
    ]
    caption = f"{task}: {len(texts):,} texts"
    if len(texts) > _MOST_TEXTS:
        caption += f", the first {_MOST_TEXTS} of them; all are in samples/{task}.jsonl"
    return _folded(
        "Texts", table(["text", "tokens", "nats a token", "bytes", "seconds"], rows, caption=caption)
    )


def _browser(picked: Picked) -> Markup:
    total, kept = sum(picked.total.values()), sum(picked.kept.values())
    if not total:
        said = "No task of this evaluation has answers."
    elif picked.left_out:
        said = (
            f"{kept:,} of {total:,} samples are in this page, those with a score below 1 first; the other "
            f"{picked.left_out:,} are in samples/*.jsonl of the evaluation's folder."
        )
    else:
        said = f"All {total:,} samples, those with a score below 1 first."
    inner = [tag("h2", "Samples"), tag("p", said, id="samples-kept")]
    if kept:
        inner += [
            tag(
                "noscript",
                tag("p", "The browser of samples needs JavaScript. They are in samples/*.jsonl, too."),
            ),
            tag("div", id="sample-controls", class_="controls"),
            tag("p", id="sample-count", role="status", aria_live="polite"),
            tag("div", id="sample-list"),
            tag("button", "Show more", type="button", id="sample-more", hidden=True),
        ]
    return tag("section", *inner, id="samples")


def _settings(results: dict[str, Any]) -> Markup:
    rows = [
        [f"{part}.{key}", _value(value)]
        for part in ("settings", "model", "versions")
        for key, value in flat(results.get(part, {})).items()
    ]
    caption = f"{len(rows)} values; results.json has all of them in full"
    return tag(
        "section",
        tag("h2", "Settings"),
        _folded(
            "Settings, model and versions", table(["name", "value"], rows, caption=caption, class_="settings")
        ),
        id="settings",
    )
