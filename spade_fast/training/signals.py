"""What asks a run to stop."""

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
    """Inside, SIGINT and SIGTERM end nothing, but their times are added to the list. One that comes
    more than PATIENCE seconds after the first ends the process as always; before, it may be the
    same request, which launchers pass on to processes that had it from the terminal. In other
    threads than the main one signals are left alone.
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
    """Whether one of the processes was asked to stop: all of them know of it in the same step."""
    if accelerator.num_processes == 1:
        return asked
    if asked:
        accelerator.set_trigger()
    return accelerator.check_trigger()
