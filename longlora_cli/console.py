"""All printing. Commands hold one `Console`; core code never prints, it returns values and raises errors.

Results go to standard output and everything else to standard error, so that `--json` leaves exactly one JSON object
on standard output. Only rank 0 of several processes prints.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

# Escape, the other C0 controls but newline and tab, DEL and the C1 range: a document or a model must not be able to
# move the cursor, set the clipboard (OSC 52) or clear the screen.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_C1 = re.compile(r"[\x7f-\x9f]")
# A pipe gets one progress line in this many seconds, a terminal a live bar.
_PLAIN_PROGRESS_SECONDS = 10.0

Advance = Callable[[int], None]


def quiet_libraries() -> None:
    """Keep transformers, datasets and bitsandbytes from drawing bars and logging between our lines."""
    import logging
    import warnings

    # Read when transformers and the hub client are imported, which may be later than now.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch|accelerate")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def show_log(console: Console, name: str = "longlora") -> Iterator[None]:
    """Print what the core logs meanwhile, such as which attention kernel was chosen and why; core code never prints."""
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage())

    logger, lines = logging.getLogger(name), Lines()
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)


def printable(text: str) -> str:
    """`text` without control characters except newline and tab."""
    return _CONTROL.sub("", text)


class Console:
    """Where a command shows what it does.

    Args:
        json_mode: Print one JSON object at the end and nothing else on standard output.
    """

    def __init__(self, *, json_mode: bool = False) -> None:
        self.json_mode = json_mode
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self._rich: RichConsole | None = None

    @property
    def rich(self) -> RichConsole:
        """The rich console behind this one; made on first use because importing rich takes 30 ms."""
        if self._rich is None:
            from rich.console import Console as RichConsole

            stream = sys.stderr if self.json_mode else sys.stdout
            self._rich = RichConsole(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=True)
        return self._rich

    @property
    def is_interactive(self) -> bool:
        """True when a person watches and can type."""
        return self.is_main and not self.json_mode and sys.stdin.isatty() and self.rich.is_terminal

    def print(self, text: str = "") -> None:
        """One line for the user, control characters removed."""
        if self.is_main:
            self.rich.print(printable(text))

    @property
    def has_colours(self) -> bool:
        """True when styles can be seen: on a terminal, unless NO_COLOR is set."""
        return self.rich.is_terminal and not self.rich.no_color

    def styled(self, parts: Iterable[tuple[str, str]]) -> None:
        """One line, or several, of texts with a Rich style each; control characters removed."""
        if self.is_main:
            from rich.text import Text

            self.rich.print(Text.assemble(*((printable(text), style) for text, style in parts)))

    def warn(self, text: str) -> None:
        """One line on standard error."""
        if self.is_main:
            sys.stderr.write(f"longlora: warning: {printable(text)}\n")
            sys.stderr.flush()

    def stream(self, piece: str) -> None:
        """Append a piece of generated text, without a newline; nothing already shown is drawn again."""
        if self.is_main and not self.json_mode:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()

    def table(self, title: str, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
        """A small table; numbers are aligned to the right."""
        if not self.is_main:
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        cells = [[_cell(value) for value in row] for row in rows]
        for index, name in enumerate(header):
            numeric = all(_is_number(row[index]) for row in cells) and bool(cells)
            table.add_column(name, justify="right" if numeric else "left")
        for row in cells:
            table.add_row(*row)
        self.rich.print(table)

    @contextmanager
    def progress(self, label: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        """Show progress; yields a function to call with the number of units just done.

        With a `unit` the bar also tells units done and units per second.

        A terminal gets a live bar; a pipe gets one line in ten seconds; `--json` and other ranks get nothing.
        """
        if not self.is_main or self.json_mode:
            yield lambda count: None
        elif self.rich.is_terminal:
            from rich.progress import Progress, TextColumn

            rate = [TextColumn("{task.fields[rate]}")] if unit else []
            columns = (*Progress.get_default_columns(), *rate)
            with Progress(*columns, console=self.rich, transient=True, refresh_per_second=5) as bar:
                task = bar.add_task(label, total=total, rate="")
                started = time.monotonic()
                done = 0

                def advance(count: int) -> None:
                    nonlocal done
                    done += count
                    speed = done / max(time.monotonic() - started, 1e-9)
                    bar.update(task, advance=count, rate=f"{done:,} {unit}, {speed:,.0f}/s")

                yield advance
        else:
            yield self._plain_progress(label, total)

    def _plain_progress(self, label: str, total: int | None) -> Advance:
        state = {"done": 0, "shown": time.monotonic()}

        def advance(count: int) -> None:
            state["done"] += count
            if time.monotonic() - state["shown"] >= _PLAIN_PROGRESS_SECONDS:
                state["shown"] = time.monotonic()
                of_total = f" of {total:,}" if total else ""
                self.print(f"{label}: {state['done']:,}{of_total}")

        return advance

    def result(self, content: dict[str, Any]) -> None:
        """The one JSON object of `--json`; without it nothing, the command has already shown its result."""
        if self.is_main and self.json_mode:
            text = json.dumps(content, ensure_ascii=False, default=str)
            # JSON escapes the C0 controls only; a raw U+009B from a model would still drive a terminal.
            sys.stdout.write(_C1.sub(lambda m: f"\\u{ord(m[0]):04x}", text) + "\n")
            sys.stdout.flush()

    def error(self, lines: list[str], exit_code: int) -> None:
        """An error: what, the rule, what to do instead; as JSON on standard output too under `--json`."""
        if not self.is_main:
            return
        first, *rest = [printable(line) for line in lines]
        sys.stderr.write("".join([f"longlora: error: {first}\n", *(f"  {line}\n" for line in rest)]))
        sys.stderr.flush()
        self.result({"error": lines[0], "details": lines[1:], "exit_code": exit_code})


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(value))


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d,.]+(e[-+]?\d+)?[ %×x]?\S{0,5}", cell)) or cell in ("", "-")
