"""Ctrl-C that cannot be lost while an answer is made."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class CtrlC:
    """Remembers a Ctrl-C, beside raising `KeyboardInterrupt` for it as Python does.

    Python raises in whatever code happens to run, and where that is a finalizer or a callback of a library, the
    exception is printed or dropped and the answer would go on. `check` raises it again at the next token. It listens
    in the main thread and in place of Python's own handler only.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C came and nobody heard it."""
        if self._asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        raise KeyboardInterrupt
