"""What happens around steps: log lines, progress, and stopping when asked to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from longlora_cli.parallel.mesh import Mesh


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Hand each of Trainer's log lines on as one row: to `metrics.jsonl`, to the screen.

    Args:
        receive: Called on the main process with a row that holds `step`.
        advance: Called with the number of steps just done.
    """

    def __init__(self, receive: Callable[[dict[str, Any]], None], advance: Callable[[int], None]) -> None:
        self.receive = receive
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the progress bar."""
        self.advance(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Pass a line on."""
        if state.is_world_process_zero and logs:
            self.receive({"step": state.global_step, **logs})


class StopSignals(TrainerCallback):  # type: ignore[misc]
    """Finish the step, save, and stop, when Ctrl-C or SIGTERM came to any process.

    A handler only sets a flag; the processes agree on it at the step's end, so that all save the same step. A second
    Ctrl-C stops at once: the newest checkpoint is whole at any time.

    Args:
        mesh: The processes.
        device: Where a flag is exchanged.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.device = device
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree whether to stop."""
        if self.mesh.any(self.received is not None, self.device):
            self.received = self.received or signal.SIGTERM
            control.should_save = True
            control.should_training_stop = True
