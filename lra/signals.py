"""Signals that ask a run to stop: noted for its next whole step, and not waited for too long."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE_SECONDS = 5
"""How long a run may take to heed a signal; a scheduler kills it some seconds later."""


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Calls ``handler`` for the signals that ask for an end, even where they were ignored."""
    previous = {number: signal.signal(number, handler) for number in ENDS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP; acts at once until ``deferred``, and on a second one.

    Args:
        give_up: Called in a thread of its own, with the signal's name, where the main thread does
            not leave the context within `GRACE_SECONDS`: it may be in an operation that takes
            longer, in which Python sees no signal.
    """

    def __init__(self, give_up: Callable[[str], None]) -> None:
        self.signal: str | None = None
        self.deferred = False
        self._give_up = give_up
        self._left = threading.Event()
        self._handled = handled(self._note)

    def __enter__(self) -> "StopSignals":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # The system writes a signal's number there whatever the main thread is in.
        self._previous_writing = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._handled.__exit__(None, None, None)
        signal.set_wakeup_fd(self._previous_writing)
        os.close(self._writing)  # ends the thread

    def _note(self, number: int, _frame: object) -> None:
        again = self.signal is not None
        self.signal = signal.Signals(number).name
        if again or not self.deferred:
            raise KeyboardInterrupt

    def _watch(self, reading: int) -> None:
        told = os.read(reading, 1)
        while told and told[0] not in ENDS:
            told = os.read(reading, 1)
        if told and not self._left.wait(GRACE_SECONDS):
            self._give_up(signal.Signals(told[0]).name)
        os.close(reading)
