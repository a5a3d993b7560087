"""How a run ends early: a failed check, or Ctrl-C and SIGTERM, which let it save first."""

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(RuntimeError):
    """A check failed and the run cannot go on; the message says what was seen and what to do."""


@dataclass
class Interrupt:
    """A context in which the first signal only sets `requested`; a second one stops at once.

    Where it is requested from the start, the first one stops. Outside the main thread, where Python
    takes no signals, it does nothing.
    """

    requested: bool = False
    previous: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):  # print() may be what was interrupted
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops now\n")
