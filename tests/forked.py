"""Commands and scripts in processes of their own that begin with everything imported.

The imports of `longlora train` take five seconds of a processor, the small work that tests give it less than one. The
server imports once and forks. It computes nothing itself: threads do not survive a fork. What a test of a process is
about stays as it is: memory, signals, exit code, streams, ranks. That a fresh process and a launcher come to the same
is tested where they are the claim.

Each line of standard input is a JSON object. `start`: the words of a command, or a script and its arguments; with
`environment`, `folder`, and `out` and `err`, the files of its streams; the answer is its process id. `poll`: a process
id; the answer is its exit code (negative: the signal) or null.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import IO, Any

IMPORTED = [
    "longlora_cli.cli",
    "longlora_cli.options",
    *(f"longlora_cli.commands.{name}" for name in ("train", "eval", "merge", "chat")),
    "longlora_cli.console",
]


class Forked:
    """A process, or several of one launch; as `subprocess.Popen` as far as tests need it."""

    def __init__(self, server: Server, pids: list[int], streams: Path) -> None:
        self.returncode: int | None = None
        self._server, self._pids, self._streams = server, pids, streams
        self._codes: dict[int, int] = {}

    def poll(self) -> int | None:
        """None while one runs; then the exit code of the first that failed, or 0."""
        for pid in self._pids:
            if pid not in self._codes and (code := self._server.ask(poll=pid)) is not None:
                self._codes[pid] = code
        if len(self._codes) == len(self._pids):
            self.returncode = next((code for code in self._codes.values() if code), 0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """To each that was not seen to end; an ended one is not reaped before, so its id is no other's."""
        for pid in self._pids:
            if pid not in self._codes:
                os.kill(pid, number)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Standard output and error of all, when all have ended.

        Raises:
            TimeoutError: one runs longer; all are killed.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"{timeout} seconds; {self._read('err')[-2000:]}")
            time.sleep(0.005)
        return self._read("out"), self._read("err")

    def _read(self, name: str) -> str:
        return self._streams.with_suffix(f".{name}").read_text(encoding="utf-8")


class Server:
    """The process that forks others. Close it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=environment
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(request), file=stdin, flush=True)
        return json.loads(stdout.readline())

    def start(self, *words: str | Path, processes: int = 1, script: Path | None = None) -> Forked:
        """`longlora` with these words, or a script with these arguments, in the current folder and environment; as
        a launcher starts it in several processes.
        """
        streams = self._folder / str(next(self._numbers))
        request: dict[str, Any] = {
            "start": [str(word) for word in words],
            "script": script and str(script),
            "folder": os.getcwd(),
            "out": f"{streams}.out",
            "err": f"{streams}.err",
        }
        ranks: list[dict[str, str]] = [{}]
        if processes > 1:
            port = free_port()
            ranks = [rank_of(rank, processes, port) for rank in range(processes)]
        return Forked(self, [self.ask(**request, environment=rank) for rank in ranks], streams)

    def close(self) -> None:
        """End it."""
        with self._process:  # closes both pipes and waits
            pass


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rank_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in numbers.items()}


def child(request: dict[str, Any]) -> None:
    """One command or script; does not return."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    code: Any = 1
    try:
        if request["script"]:
            sys.argv = [request["script"], *request["start"]]
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        else:
            sys.argv = ["longlora", *request["start"]]
            import_module("longlora_cli.cli").main(request["start"])
            code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:  # noqa: BLE001, as at the end of any process
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def serve(requests: IO[str]) -> None:
    """Answer until the requests end."""
    for line in requests:
        request = json.loads(line)
        answer: int | None = None
        if "start" in request:
            answer = os.fork()
            if not answer:
                child(request)
        else:
            done, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    for name in IMPORTED:
        import_module(name)
    serve(sys.stdin)
