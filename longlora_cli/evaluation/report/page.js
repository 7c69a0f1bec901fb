"use strict";
// The sample browser and the heatmaps' keys. Text of models is only ever put in as textContent.
(() => {
  const PAGE = 25;
  const data = document.getElementById("sample-data");
  const rows = JSON.parse(data.textContent);
  const list = document.getElementById("sample-list");

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const number = (value) => (Number.isInteger(value) ? value.toLocaleString("en-US") : String(Number(value.toPrecision(4))));
  const percent = (share) => `${Number((100 * share).toFixed(1))} %`;

  const block = (title, text) => {
    const pre = element("pre", "", text === "" ? "(empty)" : text);
    pre.dir = "auto";
    return [element("p", "label", title), pre];
  };

  function sample(row) {
    const box = element("article", `sample ${row.outcome}`);
    const head = element("h3");
    head.append(element("span", "badge", { right: "✓ right", wrong: "✗ wrong", partly: "◐ partly" }[row.outcome]));
    head.append(element("span", "", row.task));
    const facts = { ...row.facts };
    if ("length" in facts) head.append(element("span", "", `${number(facts.length)} tokens`));
    if ("depth" in facts) head.append(element("span", "", `depth ${percent(facts.depth)}`));
    delete facts.length;
    delete facts.depth;
    const pair = element("div", "pair");
    const left = element("div");
    left.append(...block("prediction", row.prediction));
    if (row.prediction_left_out) left.append(element("p", "cut", `${number(row.prediction_left_out)} characters more`));
    const right = element("div");
    const references = row.references.length ? row.references : [""];
    references.forEach((text, index) =>
      right.append(...block(references.length > 1 ? `reference ${index + 1}` : "reference", text)));
    if (row.references_cut) right.append(element("p", "cut", "references are shortened here"));
    pair.append(left, right);
    const more = [`finish: ${row.finish || "unknown"}`];
    for (const [name, score] of Object.entries(row.scores)) more.push(`${name}: ${number(score)}`);
    for (const [name, fact] of Object.entries(facts))
      more.push(`${name}: ${typeof fact === "number" ? number(fact) : fact}`);
    box.append(head, pair, element("p", "more", more.join(" · ")));
    return box;
  }

  const filters = {
    task: { label: "Task", of: (row) => row.task, show: (value) => value },
    outcome: {
      label: "Outcome",
      options: [["below", "score below 1"], ["wrong", "wrong"], ["partly", "partly right"], ["right", "right"]],
      fits: (row, value) => (value === "below" ? row.outcome !== "right" : row.outcome === value),
    },
    length: { label: "Length", of: (row) => row.facts.length, show: (value) => `${number(Number(value))} tokens` },
    depth: { label: "Depth", of: (row) => row.facts.depth, show: (value) => percent(Number(value)) },
    finish: { label: "Finish", of: (row) => row.finish, show: (value) => value || "unknown" },
  };

  if (list && rows.length) {
    const controls = document.getElementById("sample-controls");
    const count = document.getElementById("sample-count");
    const more = document.getElementById("sample-more");
    let found = [];
    let shown = 0;

    const labelled = (text, control) => {
      const label = element("label", "", text);
      label.append(control);
      controls.append(label);
    };
    for (const [name, filter] of Object.entries(filters)) {
      let options = filter.options;
      if (!options) {
        const values = [...new Set(rows.map(filter.of))].filter((value) => value !== undefined);
        values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : 0));
        options = values.map((value) => [String(value), filter.show(value)]);
        filter.fits = (row, value) => String(filter.of(row)) === value;
      }
      const select = element("select");
      select.id = `filter-${name}`;
      select.append(new Option("all", ""), ...options.map(([value, said]) => new Option(said, value)));
      filter.select = select;
      select.addEventListener("change", filterRows);
      if (options.length > 1) labelled(filter.label, select);
    }
    const words = element("input");
    words.type = "search";
    words.id = "filter-words";
    words.placeholder = "any words";
    words.addEventListener("input", filterRows);
    labelled("Words", words);
    const clear = element("button", "", "Show all");
    clear.type = "button";
    clear.id = "filter-clear";
    clear.addEventListener("click", () => choose({}));
    controls.append(clear);

    function filterRows() {
      const asked = Object.values(filters).filter((filter) => filter.select.value !== "");
      const text = words.value.toLowerCase();
      found = rows.filter((row) =>
        asked.every((filter) => filter.fits(row, filter.select.value)) &&
        (!text || [row.prediction, ...row.references].some((part) => part.toLowerCase().includes(text))));
      list.replaceChildren();
      shown = 0;
      showMore();
    }

    function showMore() {
      const next = found.slice(shown, shown + PAGE);
      list.append(...next.map(sample));
      shown += next.length;
      more.hidden = shown >= found.length;
      count.textContent = found.length
        ? `Showing ${number(shown)} of ${number(found.length)} matching samples, ${number(rows.length)} in this page`
        : `No sample matches, ${number(rows.length)} in this page`;
    }

    function choose(values) {
      for (const [name, filter] of Object.entries(filters)) {
        filter.select.value = values[name] ?? "";
        if (filter.select.selectedIndex < 0) filter.select.value = "";
      }
      words.value = "";
      filterRows();
    }

    more.addEventListener("click", () => {
      const first = shown;
      showMore();
      const next = list.children[first];
      if (next) {
        next.tabIndex = -1;
        next.focus();
      }
    });
    for (const cell of document.querySelectorAll(".heatmap .cell"))
      cell.addEventListener("click", () => {
        const { task, length, depth } = cell.dataset;
        choose({ task, length, depth: String(Number(depth)) });
      });
    filterRows();
  }

  // What is too wide is scrolled with the keyboard; what is not is no stop of the Tab key.
  const scrollers = document.querySelectorAll(".scroll");
  const stop = () => {
    for (const box of scrollers) {
      if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  };
  for (const folded of document.querySelectorAll("details")) folded.addEventListener("toggle", stop);
  window.addEventListener("resize", stop);
  stop();

  // Arrow keys inside a heatmap; Tab enters and leaves it.
  for (const group of document.querySelectorAll(".heatmap .cells")) {
    const cells = [...group.querySelectorAll(".cell")];
    const place = (cell) => [cell.dataset.length, cell.dataset.depth].map(Number);
    const axes = [0, 1].map((axis) => [...new Set(cells.map((cell) => place(cell)[axis]))].sort((a, b) => a - b));
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1] };
    group.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      const now = event.target.closest(".cell");
      if (!step || !now) return;
      event.preventDefault();
      const wanted = place(now);
      const [axis, by] = step;
      wanted[axis] = axes[axis][axes[axis].indexOf(wanted[axis]) + by];
      const next = cells.find((cell) => place(cell).every((value, index) => value === wanted[index]));
      if (!next) return;
      for (const cell of cells) cell.setAttribute("tabindex", cell === next ? "0" : "-1");
      next.focus();
    });
  }
})();
