"""How a run ends early: a failed check, or Ctrl-C and SIGTERM, which let it save first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


class RunStopped(RuntimeError):
    """A check failed and the run cannot go on; the message says what was seen and what to do."""


@dataclass
class Interrupt:
    """Whether a signal asked the run to end."""

    requested: bool

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Ask for the end; where that was asked before, end."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):  # print() may be what was interrupted
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops now\n")


@contextlib.contextmanager
def catch_signals(requested: bool = False) -> Iterator[Interrupt]:
    """Inside, the first signal only sets `requested`; a second one stops at once.

    Where it is requested from the start, the first one stops. Outside the main thread, where Python
    takes no signals, it does nothing.
    """
    interrupt = Interrupt(requested)
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    previous = {number: signal.signal(number, interrupt.receive) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
