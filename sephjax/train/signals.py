"""SIGTERM and SIGINT ask a run to save and end; a second SIGINT ends it at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax


class Stopped(Exception):  # noqa: N818 - it is no error
    """Raised in the middle of work that may be dropped."""


class Stop:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.requested = False
        self._droppable = False

    def handle(self, number: int, _frame: object = None) -> None:
        """The signal handler."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self._droppable:
            self._droppable = False
            raise Stopped

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """Inside it the request raises `Stopped`: for an evaluation, which can be had again.

        Only in a run of one process: the others would wait for this one.
        """
        self._droppable = jax.process_count() == 1
        try:
            if self._droppable and self.requested:
                raise Stopped
            yield
        finally:
            self._droppable = False


@contextlib.contextmanager
def caught() -> Iterator[Stop]:
    """Catches both signals for as long as it lasts (only the main thread can)."""
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, stop.handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
