"""Run `longlora` again and again in processes that begin with everything imported, and kill them at will.

A command's imports take longer than the small work that tests give it. This process imports once and forks; it
tokenizes nothing itself, because threads do not survive a fork.

Each line of standard input is a JSON object: `arguments`, `folder` (where it runs), and `seconds` or `event`: when to
kill it with SIGKILL, after so many seconds or before its event of that number, counted from 0. Events are all that
Python changes in the folder: files opened for writing, renamed and removed, folders made and removed. With `interrupt`
it gets SIGINT instead. The answer is a JSON object: exit `code` (negative: the signal), `seconds`, `events`, `output`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event is a change in the folder."""
    if event == "open":
        name, mode, flags = arguments
        writes = (mode and any(letter in mode for letter in "wax+")) or flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and isinstance(name, str | os.PathLike) and in_folder(os.fspath(name), folder)
    # Removing a tree names its files alone, relative to a descriptor.
    return event in CHANGES and (arguments[-1] != -1 or in_folder(os.fspath(arguments[0]), folder))


def in_folder(name: str | bytes, folder: str) -> bool:
    return os.path.abspath(os.fsdecode(name)).startswith(folder)


def watch(folder: str, at: int | None, sent: int, counts: Any) -> None:
    """Count events in the file `counts`, and send this process a signal before one of them."""
    state = {"events": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event == "open" or event in CHANGES) and changes(event, arguments, folder):
            state["events"] += 1
            if at is not None and state["events"] == at + 1:
                os.kill(os.getpid(), sent)
            os.pwrite(counts, b"%12d" % state["events"], 0)

    sys.addaudithook(hook)


def child(request: dict[str, Any], counts: int, log: int) -> None:
    """One command; does not return."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    sent = signal.SIGINT if request.get("interrupt") else signal.SIGKILL
    watch(request["folder"], request.get("event"), sent, counts)
    from longlora_cli.cli import main

    code = 1
    try:
        main(request["arguments"])
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request: dict[str, Any], logs: Path) -> dict[str, Any]:
    """Fork, wait or kill, answer."""
    log = os.open(logs / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    counts = os.open(logs / "counts", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    started = time.monotonic()
    process = os.fork()
    if not process:
        child(request, counts, log)
    seconds = request.get("seconds")
    done = status = 0
    while not done:
        done, status = os.waitpid(process, os.WNOHANG)
        if not done and seconds is not None and time.monotonic() - started >= seconds:
            os.kill(process, signal.SIGKILL)
            seconds = None
        time.sleep(0.001)
    answer = {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "events": int(os.pread(counts, 12, 0) or 0),
        "output": os.pread(log, 1 << 20, 0).decode(),
    }
    os.close(log)
    os.close(counts)
    return answer


def warm() -> None:
    """Import what `prepare` imports, also when it is first needed."""
    from longlora_cli.models.tokenizer import load_tokenizer

    for name in (
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "longlora_cli.cli",
        "longlora_cli.options",
    ):
        import_module(name)
    import_module("longlora_cli.commands.prepare")
    load_tokenizer("builtin")


if __name__ == "__main__":
    for setting in sys.argv[2:]:  # such as _GROUP_CHARACTERS=4096: small data in several pieces
        from longlora_cli.data import tokenizing

        name, _, number = setting.partition("=")
        assert hasattr(tokenizing, name)
        setattr(tokenizing, name, int(number))
    warm()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), Path(sys.argv[1]))), flush=True)  # noqa: T201
