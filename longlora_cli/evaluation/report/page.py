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

from longlora_cli.evaluation.report.comparison_section import ID, comparison_section
from longlora_cli.evaluation.report.markup import Markup, join, table, tag
from longlora_cli.evaluation.report.numbers import interval, number, percent
from longlora_cli.evaluation.report.parts import definitions, folded, score_cells, slug, value_text
from longlora_cli.evaluation.report.samples import MOST_BYTES, MOST_SAMPLES, Picked, Row, data_block, pick
from longlora_cli.evaluation.report.scores import flat, scores_of
from longlora_cli.evaluation.report.task_section import group_section, task_section


def make_page(
    results: dict[str, Any],
    rows_by_task: Mapping[str, Sequence[Row]],
    *,
    most_samples: int = MOST_SAMPLES,
    most_bytes: int = MOST_BYTES,
    compared: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> tuple[str, Picked]:
    """The report of an evaluation.

    Args:
        results: The content of `results.json`. `tasks` is needed; `model`, `settings`, `versions`, `groups` (means of
            several tasks, with `score` and `lengths`) and `audits`, a list of `{"name", "value", "ok", "note"}`, are
            shown where they are. `ok` may be None: told, not judged.
        rows_by_task: The content of `samples/<task>.jsonl`.
        most_samples: At most so many samples in the page.
        most_bytes: At most so much JSON of samples in the page.
        compared: What `compare_evaluations` found with this evaluation as A, and the results of B; shown as before and
            after.

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
        _head(results, name, [*groups, *tasks], is_compared=compared is not None),
        tag(
            "main",
            _overview(tasks, groups),
            Markup("") if compared is None else comparison_section(compared[0], tasks, compared[1]["tasks"]),
            _audits(results.get("audits")),
            *(group_section(name, group) for name, group in groups.items()),
            *(task_section(task, summary, rows[task]) for task, summary in tasks.items()),
            _browser(picked),
            _settings(results),
            id="main",
        ),
        data_block(picked),
        tag("script", script),
    )
    page = tag("html", tag("head", _meta(name, style, script)), tag("body", body), lang="en")
    return f"<!doctype html>\n{page}\n", picked


def _meta(name: str, style: Markup, script: Markup) -> Markup:
    """What a browser is told before it shows anything; nothing else may run or be fetched."""
    return join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"Evaluation of {name}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )


def _source(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {hashed(script)}; style-src {hashed(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _head(results: dict[str, Any], name: str, parts: list[str], *, is_compared: bool) -> Markup:
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
    links = [("overview", "Overview"), *([(ID, "Before and after")] if is_compared else [])]
    links += [*([("audits", "Audits")] if results.get("audits") else [])]
    links += [(slug(task), task) for task in parts]
    links += [("samples", "Samples"), ("settings", "Settings")]
    return tag(
        "header",
        tag("p", "longlora eval", class_="maker"),
        tag("h1", "Evaluation of ", tag("span", name, class_="name")),
        definitions(facts),
        tag(
            "nav",
            *(tag("a", said, href=f"#{target}") for target, said in links),
            aria_label="Parts of this report",
        ),
    )


def _overview(tasks: dict[str, Any], groups: dict[str, Any]) -> Markup:
    rows = []
    for task, summary in [*groups.items(), *tasks.items()]:
        for score in [s for s in scores_of(summary) if s.where == "all"][:1]:
            link = tag("a", task, href=f"#{slug(task)}")
            rows.append([link, *score_cells(score)[:1], *score_cells(score)[2:]])
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
                value_text(audit.get("value")),
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
        [f"{part}.{key}", value_text(value)]
        for part in ("settings", "model", "versions")
        for key, value in flat(results.get(part, {})).items()
    ]
    caption = f"{len(rows)} values; results.json has all of them in full"
    return tag(
        "section",
        tag("h2", "Settings"),
        folded(
            "Settings, model and versions", table(["name", "value"], rows, caption=caption, class_="settings")
        ),
        id="settings",
    )
