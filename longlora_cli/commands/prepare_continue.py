"""An interrupted `longlora prepare` continues: what it had tokenized lies beside the output and is found again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from longlora_cli.console import Console
from longlora_cli.data.kept_tokens import Amount, KeptTokens
from longlora_cli.errors import Interrupted, LongLoRAError, NotFoundError
from longlora_cli.storage import remove_workspace, workspace


@contextmanager
def continued(
    out: Path, key: Future[dict[str, str]], size_bytes: int, console: Console
) -> Iterator[KeptTokens]:
    """Tokens kept beside `out` until it is there.

    They stay when the process is killed or interrupted, when a hub dataset cannot be had any more, and after a bug.
    They go when `out` is done, and when the inputs or the disk are at fault: then nothing is left.

    Args:
        out: The folder to make.
        key: What tokens depend on, by name.
        size_bytes: Of all inputs; 0 where it is not known.
        console: Says what was found.

    Raises:
        SettingsError: Another process is making `out`.
        Interrupted: Ctrl-C; says what is kept.
    """
    with workspace(out) as folder:
        kept = KeptTokens(folder, key)
        if kept.replaced:
            others = ", ".join(kept.replaced)
            console.warn(
                f"what an interrupted prepare left for {out} is removed: it was begun with other {others}"
            )
        elif kept.found.tokens:
            console.print(f"continuing: {_told(kept.found, size_bytes)} tokenized already")
        try:
            yield kept
        except BaseException as error:
            amount = kept.amount()
            at_fault = isinstance(error, LongLoRAError) and not isinstance(error, NotFoundError)
            if at_fault or not amount.tokens:
                remove_workspace(out)
            elif isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    f"interrupted; {_told(amount, size_bytes)} tokenized already",
                    hint=f"The same command continues from there. To give up instead, remove {folder}.",
                ) from error
            raise
        if kept.damaged:
            files = "1 damaged file" if kept.damaged == 1 else f"{kept.damaged:,} damaged files"
            was = "was" if kept.damaged == 1 else "were"
            console.warn(f"{files} of the interrupted prepare {was} made again")
        remove_workspace(out)


def _told(amount: Amount, size_bytes: int) -> str:
    if size_bytes and amount.input_bytes:
        return f"{min(amount.input_bytes / size_bytes, 1):.0%} of the text is"
    return f"{amount.tokens:,} tokens of text are"
