"""Signals that ask a run to stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[float]]:
    """Inside, SIGINT and SIGTERM do not end the process; their times are appended to the list. A
    signal more than PATIENCE seconds after the first ends the process as usual. An earlier one may
    be the same request twice: launchers pass on signals that the terminal has already sent to the
    whole process group. Outside the main thread, signals are left alone.
    """
    asked: list[float] = []
    before: dict[int, Any] = {}

    def note(number, frame):
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > PATIENCE:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def anywhere(accelerator: "Accelerator", asked: bool) -> bool:
    """Whether any of the processes was asked to stop; all of them learn it in the same step."""
    if accelerator.num_processes == 1:
        return asked
    if asked:
        accelerator.set_trigger()
    return accelerator.check_trigger()
