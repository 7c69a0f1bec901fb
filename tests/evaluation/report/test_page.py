"""The report in a real browser: what it shows, what it does when it is used, and what it never does."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from matplotlib import colormaps
from report_inputs import HOSTILE, generation_rows, grid_rows, make_evaluation

from longlora_cli.evaluation.grid import score_grid
from longlora_cli.evaluation.report.page import make_page
from longlora_cli.evaluation.report.samples import outcome

# Contrast by WCAG 2.1 of every text on what is behind it, in the page as it is shown.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    if (node.closest(".cell")) return parse(getComputedStyle(node.closest(".cell").querySelector("rect")).fill);
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || node.closest("script, title, noscript")) continue;
    const ink = parse(getComputedStyle(node)[node.closest("svg") ? "fill" : "color"]);
    const [a, b] = [luminance(ink), luminance(behind(node))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


def shown_samples(opened):
    """Task, length and depth as the head of each shown sample says them, badge first."""
    return [
        article.locator("h3 span").all_text_contents() for article in opened.page.locator(".sample").all()
    ]


def test_it_opens_from_a_file_without_a_message_or_a_request(open_page, evaluation):
    opened = open_page(evaluation)
    opened.page.wait_for_load_state("networkidle")
    assert opened.page.url.startswith("file://")
    assert (opened.messages, opened.requests) == ([], [])
    assert opened.page.title() == "Evaluation of runs/long"


def test_it_names_no_address_at_all(evaluation):
    page, _ = make_page(*evaluation)
    found = re.findall(
        r"""(?:src|href|action|srcset|data)=["']?([^"'\s>]*)|url\(([^)]*)\)|(https?://\S+)""", page
    )
    assert {part for parts in found for part in parts if part and not part.startswith("#")} == {"data:,"}


def test_every_part_is_there_and_reached_from_the_head(open_page, evaluation):
    opened = open_page(evaluation)
    parts = ["overview", "audits", "task-ppl", "task-needle", "task-generate", "samples", "settings"]
    assert opened.page.eval_on_selector_all("main > section", "all => all.map((s) => s.id)") == parts
    assert opened.page.eval_on_selector_all("nav a", "all => all.map((a) => a.hash)") == [
        f"#{p}" for p in parts
    ]
    facts = dict(zip(opened.texts("header dt"), opened.texts("header dd"), strict=True))
    assert facts == {
        "Model": "runs/long",
        "Base": "SmolLM2",
        "Adapter": "runs/long/adapter (folded into the weights)",
        "Positions": "yarn, up to 32,768",
        "Computed in": "bf16, cuda",
        "Versions": "longlora 1.2.3, torch 2.11.0",
        "Cost": "61.5 s, 3,072 MiB at most",
    }


def test_every_cell_of_the_heatmap_has_its_number_its_n_and_its_colour(open_page, evaluation):
    opened = open_page(evaluation)
    cells = evaluation[0]["tasks"]["needle"]["cells"]
    drawn = opened.page.locator("#task-needle .cell")
    assert drawn.count() == len(cells) == 9
    assert len({cell["score"] for cell in cells}) > 2  # a grid of equal cells would show nothing
    lefts, tops = {}, {}
    for cell in cells:
        one = opened.page.locator(f'.cell[data-length="{cell["length"]}"][data-depth="{cell["depth"]!r}"]')
        assert one.locator("text").all_text_contents() == [f"{100 * cell['score']:.0f}", f"n={cell['n']}"]
        low, high = (f"{100 * bound:.1f}".removesuffix(".0") for bound in cell["ci95"])
        assert f"[{low}, {high}] %, n=4" in one.get_attribute("aria-label")
        expected = np.round(np.array(colormaps["cividis"](cell["score"])[:3]) * 255)
        fill = one.locator("rect").evaluate("rect => getComputedStyle(rect).fill")
        assert np.abs(np.array([int(v) for v in re.findall(r"\d+", fill)]) - expected).max() <= 1
        box = one.locator("rect").bounding_box()
        lefts.setdefault(cell["length"], set()).add(round(box["x"]))
        tops.setdefault(cell["depth"], set()).add(round(box["y"]))
    # Lengths from left to right, depths from top to bottom.
    assert [lefts[key] for key in sorted(lefts)] == sorted(lefts.values(), key=min)
    assert [tops[key] for key in sorted(tops)] == sorted(tops.values(), key=min)
    assert all(len(places) == 1 for places in [*lefts.values(), *tops.values()])


def test_the_curve_by_length_and_its_band_lie_where_the_numbers_are(open_page, evaluation):
    opened = open_page(evaluation)
    plot = opened.page.locator("#task-needle svg.curve")
    lines = [float(line.get_attribute("y1")) for line in plot.locator("line.grid").all()]
    bottom, top = max(lines), min(lines)
    lengths = evaluation[0]["tasks"]["needle"]["lengths"]

    def height(share):
        return bottom - share * (bottom - top)

    heights = [float(dot.get_attribute("cy")) for dot in plot.locator("circle").all()]
    assert heights == pytest.approx([height(part["score"]) for part in lengths], abs=0.06)
    corners = [
        float(corner.split(",")[1]) for corner in plot.locator("polygon").get_attribute("points").split()
    ]
    expected = [height(part["ci95"][1]) for part in lengths]
    expected += [height(part["ci95"][0]) for part in reversed(lengths)]
    assert corners == pytest.approx(expected, abs=0.06)


def test_the_loss_curves_have_nats_left_perplexity_right_and_a_name_each(open_page, evaluation):
    opened = open_page(evaluation)
    plot = opened.page.locator("#task-ppl svg.curve")
    assert plot.locator("g > text").all_text_contents() == ["full context", "at most 128 tokens of context"]
    left = [float(text) for text in plot.locator("text.tick.end").all_text_contents()]
    ticks = plot.locator("text.tick:not(.end):not(.mid)").all_text_contents()
    right = [float(text) for text in ticks if not text.endswith("context")]
    assert right == pytest.approx([math.exp(nats) for nats in left], rel=0.01)
    for series, losses in ((0, [3.0, 2.75, 2.5]), (1, [3.0, 2.875, 2.875])):
        dots = plot.locator(f".series-{series}:has(polyline) circle")
        heights = np.array([float(dot.get_attribute("cy")) for dot in dots.all()])
        lines = np.array([float(line.get_attribute("y1")) for line in plot.locator("line.grid").all()])
        scale = (max(lines) - min(lines)) / (max(left) - min(left))
        assert heights == pytest.approx(max(lines) - (np.array(losses) - min(left)) * scale, abs=0.06)
        # The intervals are of perplexities; their logarithms are 0.2 above and 0.1 below the loss.
        corners = plot.locator(f".series-{series} polygon").get_attribute("points").split()
        found = [float(corner.split(",")[1]) for corner in corners]
        ends = np.array([nll + 0.2 for nll in losses] + [nll - 0.1 for nll in reversed(losses)])
        assert found == pytest.approx(max(lines) - (ends - min(left)) * scale, abs=0.06)
        said = dots.locator("title").all_text_contents()
        assert f"perplexity {math.exp(losses[1]):.4g} " in said[1]
        assert said[1].endswith("n=2,000 tokens")


def test_without_a_short_context_there_is_one_curve_and_no_name(open_page, evaluation):
    for bucket in evaluation[0]["tasks"]["ppl"]["by_position"]:
        del bucket["short_nll"]
    opened = open_page(evaluation)
    plot = opened.page.locator("#task-ppl svg.curve")
    assert (plot.locator("polyline").count(), plot.locator("g > text").count()) == (1, 0)


def test_every_score_is_in_a_table_with_its_n_interval_and_scorer(open_page, evaluation):
    opened = open_page(evaluation)
    rows = {
        task: [
            row.locator("th, td").all_text_contents()
            for row in opened.page.locator(f"#task-{task} table.scores tbody tr").all()
        ]
        for task in ("ppl", "needle", "generate")
    }
    assert [row[0] for row in rows["ppl"]] == [
        "perplexity", "perplexity_macro", "nll", "bits_per_byte", "perplexity", "gain",
    ]  # fmt: skip
    assert rows["ppl"][-1][1:3] + rows["ppl"][-1][4:6] == ["all", "0.125", "[0.0625, 0.25]", "7,000"]
    assert rows["ppl"][0][1:3] + rows["ppl"][0][4:] == ["all", "12.18", "[12, 12.5]", "12,345", "–"]
    assert rows["ppl"][-2][1:3] + rows["ppl"][-2][5:6] == ["by longlora", "11.5", "9,999"]
    needle = evaluation[0]["tasks"]["needle"]
    assert len(rows["needle"]) == 2 * (1 + len(needle["lengths"]))
    assert rows["needle"][0][2] == f"{100 * needle['score']:.1f} %"
    assert rows["needle"][0][5:] == ["36", "retrieval@exact-1"]
    assert [row[1] for row in rows["needle"] if row[0] == "score"] == [
        "all", "4,096 tokens", "8,192 tokens", "16,384 tokens",
    ]  # fmt: skip
    found = {row[0]: (row[2], row[6]) for row in rows["generate"]}
    assert found == {
        "rougeL": ("50 %", "rougeL@1"),
        "f1": ("25 %", "f1@1"),
        "exact_match": ("0 %", "exact_match@1"),
        "accuracy": ("100 %", "accuracy@1"),
    }


def test_groups_of_tasks_and_effective_lengths_are_shown(open_page, evaluation):
    results = evaluation[0]
    needle = results["tasks"]["needle"]
    results["groups"] = {"ruler": {"tasks": ["needle", "other"], "score": 0.5, "n": 72, "wavg_inc": 0.25}}
    results["groups"]["ruler"]["lengths"] = needle["lengths"][:2]
    needle["effective_length"] = {"ruler": {"threshold": 0.856, "text": "8K, but 16K not excluded"}}
    opened = open_page(evaluation)
    rows = [
        row.locator("th, td").all_text_contents() for row in opened.page.locator("table.lengths tr").all()
    ]
    assert rows[0] == ["task", "4,096", "8,192", "16,384"]
    assert ([row[0] for row in rows[1:]], rows[1][3]) == (["ruler", "needle"], "–")
    last = needle["lengths"][2]
    low, high = (f"{100 * bound:.1f}".removesuffix(".0") for bound in last["ci95"])
    assert rows[2][3] == f"{100 * last['score']:.1f} % [{low}, {high}] %"
    assert opened.texts("#task-ruler p") == ["The mean of needle, other"]
    assert opened.texts("#task-ruler dl div") == ["wavg_inc0.25"]
    said = "Effective length by ruler, 85.6 % needed8K, but 16K not excluded"
    assert opened.texts("#task-needle > dl div") == [said]


def test_audits_say_what_is_good_what_is_not_and_what_is_only_told(open_page, evaluation):
    opened = open_page(evaluation)
    rows = [
        row.locator("th, td").all_text_contents() for row in opened.page.locator("#audits tbody tr").all()
    ]
    assert rows == [
        ["BOS tokens", "✓ good", "1", "one, as in training"],
        ["cut answers", "✗ look at this", "0.25", "raise --max-new-tokens"],
        ["attention", "· told", "torch", ""],
    ]
    assert opened.texts("#audits caption") == ["3 checks of the measurement itself, 1 to look at"]


def test_a_summary_of_an_unknown_shape_is_shown_as_its_facts(open_page):
    opened = open_page(({"tasks": {"new": {"n": 3, "tau": 0.25, "inner": {"a": [1, 2]}}}}, {}))
    section = opened.page.locator("#task-new")
    section.locator("summary").click()
    assert section.locator("dt").all_text_contents() == ["inner.a", "tau"]
    assert section.locator("dd").all_text_contents() == ["1, 2", "0.25"]
    assert opened.texts("#samples p") == ["No task of this evaluation has answers."]
    assert opened.messages == []


def test_samples_below_1_come_first_and_more_come_on_demand(open_page, evaluation):
    opened = open_page(evaluation)
    assert len(shown_samples(opened)) == 25
    opened.page.click("#sample-more")
    badges = [head[0] for head in shown_samples(opened) if head[1] == "needle"]
    assert len(badges) == 36
    assert badges == sorted(badges, key=lambda badge: badge == "✓ right")
    assert {"✓ right", "✗ wrong", "◐ partly"} == set(badges)
    assert opened.page.locator("#sample-more").is_hidden()
    assert opened.page.evaluate("document.activeElement.className").startswith("sample ")


@pytest.mark.parametrize("wanted", ["below", "wrong", "partly", "right"])
def test_the_filter_of_outcomes_shows_those_and_counts_them(open_page, evaluation, wanted):
    opened = open_page(evaluation)
    rows = evaluation[1]["needle"] + evaluation[1]["generate"]
    found = Counter(outcome(row["scores"]) for row in rows)
    expected = found["wrong"] + found["partly"] if wanted == "below" else found[wanted]
    opened.page.select_option("#filter-outcome", wanted)
    assert 0 < expected < len(rows)
    shown = min(expected, 25)
    text = f"Showing {shown} of {expected} matching samples, {len(rows)} in this page"
    assert opened.texts("#sample-count") == [text]
    badges = {"below": "✗ wrong ◐ partly"}.get(wanted, wanted)
    assert all(head[0] in badges or head[0][2:] == wanted for head in shown_samples(opened))


def test_filters_of_task_length_and_words_narrow_each_other_down(open_page, evaluation):
    opened = open_page(evaluation)
    opened.page.select_option("#filter-task", "needle")
    opened.page.select_option("#filter-length", "8192")
    assert [head[1:3] for head in shown_samples(opened)] == [["needle", "8,192 tokens"]] * 12
    opened.page.fill("#filter-words", "IT IS")
    said = [row for row in evaluation[1]["needle"] if row["length"] == 8192 and "it is" in row["prediction"]]
    assert 0 < len(said) == len(shown_samples(opened))
    opened.page.fill("#filter-words", "nowhere to be found")
    assert opened.texts("#sample-count") == ["No sample matches, 39 in this page"]
    opened.page.click("#filter-clear")
    assert len(shown_samples(opened)) == 25
    opened.page.select_option("#filter-task", "generate")
    assert [head[1] for head in shown_samples(opened)] == ["generate"] * 3


def test_a_sample_shows_prediction_references_finish_and_tokens(open_page, evaluation):
    opened = open_page(evaluation)
    opened.page.select_option("#filter-task", "generate")
    first = opened.page.locator(".sample").first
    assert first.locator("pre").all_text_contents() == ["answer 0", "an answer", "another answer"]
    assert first.locator(".label").all_text_contents() == ["prediction", "reference 1", "reference 2"]
    said = first.locator(".more").text_content().split(" · ")
    assert said[:5] == ["finish: eos", "rougeL: 0.5", "f1: 0.25", "exact_match: 0", "accuracy: 1"]
    assert {"prompt_tokens: 900", "new_tokens: 3"} <= set(said)


def test_a_cell_leads_to_its_samples(open_page, evaluation):
    opened = open_page(evaluation)
    opened.page.click('.cell[data-length="16384"][data-depth="0.5"]')
    heads = [head[1:] for head in shown_samples(opened)]
    assert heads == [["needle", "16,384 tokens", "depth 50 %"]] * 4
    assert opened.page.url.endswith("#samples")


def test_the_keyboard_alone_reaches_a_cell_and_its_samples(open_page, evaluation):
    opened = open_page(evaluation)
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        if opened.page.evaluate("document.activeElement.classList.contains('cell')"):
            break
    keys = ["ArrowUp", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"]
    for key in keys:  # the first up and the third right lead out of the grid and stay
        opened.page.keyboard.press(key)
    focused = opened.page.evaluate("({...document.activeElement.dataset})")
    assert focused == {"task": "needle", "length": "8192", "depth": "0.5"}
    stops = "all => all.map((cell) => cell === document.activeElement)"
    assert opened.page.eval_on_selector_all('.cell[tabindex="0"]', stops) == [True]
    opened.page.keyboard.press("Enter")
    assert [head[2:] for head in shown_samples(opened)] == [["8,192 tokens", "depth 50 %"]] * 4


def test_the_keyboard_visits_every_control_and_no_cell_but_one(open_page, evaluation):
    opened = open_page(evaluation)
    visited = []
    for _ in range(200):
        opened.page.keyboard.press("Tab")
        visited.append(
            opened.page.evaluate(
                "(e => e === document.body ? '' : e.id || e.getAttribute('class') || e.tagName)(document.activeElement)"
            )
        )
        if visited[-1] == "":
            break
    wanted = {f"filter-{name}" for name in ("task", "outcome", "length", "depth", "finish", "words", "clear")}
    assert wanted | {"skip", "sample-more", "SUMMARY"} <= set(visited)
    assert visited.count("cell") == 1
    assert visited.count("scroll") == 0  # on this screen there is nothing to scroll
    unnamed = "all => all.filter((e) => !e.closest('label') && !e.getAttribute('aria-label')).length"
    assert opened.page.eval_on_selector_all("select, input", unnamed) == 0


def test_on_a_small_screen_the_keyboard_scrolls_what_is_too_wide(open_page, evaluation):
    opened = open_page(evaluation, viewport={"width": 360, "height": 800})
    region = opened.page.locator("#task-needle figure .scroll").first
    assert region.get_attribute("tabindex") == "0"
    region.focus()
    opened.page.keyboard.press("ArrowRight")
    for _ in range(50):  # the browser scrolls smoothly
        if opened.page.evaluate("document.activeElement.scrollLeft") > 0:
            break
        opened.page.wait_for_timeout(20)
    assert opened.page.evaluate("document.activeElement.scrollLeft") > 0


def test_every_picture_has_a_name_and_a_title(open_page, evaluation):
    opened = open_page(evaluation)
    names = opened.page.eval_on_selector_all(
        "svg",
        "all => all.map((s) => [s.getAttribute('aria-label'), s.querySelector(':scope > title')?.textContent])",
    )
    assert len(names) > 3
    assert all(label and label == title for label, title in names)


def hostile_evaluation():
    results, rows = make_evaluation()
    task = f"needle {HOSTILE}"
    summary, scored = score_grid(
        [{**row, "prediction": HOSTILE, "references": [HOSTILE]} for row in grid_rows()]
    )
    results["tasks"] = {
        task: {**summary, "scorer": HOSTILE, HOSTILE: HOSTILE},
        "ppl": results["tasks"]["ppl"],
    }
    results["model"] |= {"name": HOSTILE, "adapter": HOSTILE}
    results["settings"] |= {"data": [HOSTILE]}
    results["audits"] = [{"name": HOSTILE, "value": HOSTILE, "ok": False, "note": HOSTILE}]
    for row in scored:
        row |= {"finish": HOSTILE, HOSTILE: HOSTILE, "scores": {HOSTILE: 0.0}}
    return results, {task: scored, "ppl": [{**rows["ppl"][0], "text": HOSTILE}]}


def test_text_of_models_and_users_is_shown_and_never_run(open_page):
    opened = open_page(hostile_evaluation())
    assert opened.page.evaluate("typeof window.pwned") == "undefined"
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script").count() == 2
    assert (opened.messages, opened.requests) == ([], [])
    assert opened.texts("h1 .name") == [HOSTILE]
    assert opened.texts(".sample pre")[:2] == [HOSTILE, HOSTILE]
    assert opened.texts("#audits th[scope=row]") == [HOSTILE]
    assert HOSTILE in opened.page.locator(".sample .more").first.text_content()


def test_a_script_that_got_past_the_escaping_would_be_stopped_by_the_policy(open_page, evaluation):
    page, _ = make_page(*evaluation)
    planted = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
    planted += "<img src='https://example.invalid/a.png'>"
    opened = open_page(page.replace("</main>", planted + "</main>"))
    assert opened.page.locator("img").count() == 2  # it is really in the page
    assert opened.page.evaluate("typeof window.pwned") == "undefined"
    assert sum("Content Security Policy" in message for message in opened.messages) >= 3
    assert len(shown_samples(opened)) == 25  # while the page's own script runs


def test_characters_that_no_page_can_hold_are_replaced(open_page, evaluation):
    results, rows = evaluation
    rows["generate"][0]["prediction"] = "a\ud800b\x00c\x1b[2J\u2028d\u202ee"
    results["model"]["name"] = "model\udcff"
    opened = open_page((results, rows))
    opened.page.select_option("#filter-task", "generate")
    assert opened.texts(".sample pre")[0] == "a\ufffdb\ufffdc\ufffd[2J\u2028d\u202ee"
    assert opened.texts("h1 .name") == ["model\ufffd"]


def test_many_long_samples_stay_below_10_mb_and_the_page_says_how_many_are_left_out(open_page, evaluation):
    results, rows = evaluation
    rows["needle"] = [
        {**row, "prediction": "réponse " * 2500} for row in score_grid(grid_rows(samples=500))[1]
    ]
    page, picked = make_page(results, rows)
    assert 7_000_000 < len(page.encode()) < 10_000_000
    total = len(rows["needle"]) + 3
    assert picked.left_out == total - len(picked.rows) > 2500
    opened = open_page(page)
    said = opened.texts("#samples-kept")[0]
    assert said.startswith(f"{len(picked.rows):,} of {total:,} samples are in this page")
    assert f"the other {picked.left_out:,} are in samples/*.jsonl" in said
    assert opened.texts(".sample .cut")[0] == "16,000 characters more"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_read_well_in_both_schemes(open_page, evaluation, scheme):
    opened = open_page(evaluation, color_scheme=scheme)
    for summary in opened.page.locator("summary").all():
        summary.click()
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 382) == (scheme == "light")
    lowest = opened.page.evaluate(CONTRASTS)
    assert len(lowest) > 200
    assert lowest[0][0] >= 4.5, lowest[:5]


@pytest.mark.parametrize("width", [360, 1280])
def test_no_screen_has_to_be_scrolled_sideways(open_page, evaluation, width):
    opened = open_page(evaluation, viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_paper_controls_are_gone_ink_is_dark_and_nothing_is_cut(open_page, evaluation):
    results, rows = evaluation
    rows["generate"][0]["prediction"] = "line\n" * 100
    opened = open_page((results, rows), color_scheme="dark")
    opened.page.select_option("#filter-task", "generate")
    opened.page.emulate_media(media="print")
    assert not any(opened.page.locator(part).is_visible() for part in ("nav", ".controls", "#sample-more"))
    assert opened.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    cut = "all => all.filter((e) => e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1).length"
    assert opened.page.eval_on_selector_all(".sample pre", cut) == 0
    assert opened.page.pdf().startswith(b"%PDF")


def test_equal_evaluations_are_equal_pages(evaluation):
    again = make_evaluation()
    again = ({key: again[0][key] for key in reversed(again[0])}, again[1])
    assert make_page(*evaluation)[0] == make_page(*again)[0]
    changed = make_evaluation()
    changed[1]["generate"] = generation_rows(2)
    assert make_page(*changed)[0] != make_page(*again)[0]
