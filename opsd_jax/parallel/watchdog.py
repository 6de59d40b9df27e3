"""What a run waits for, and a word from a thread of its own where it waits too long."""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

FACTOR = 10.0  # times the median of the last steps is too long,
LEAST_SECONDS = 60.0  # and no less than this;
KNOWN = 3  # so many steps have to have been seen, and until they have
FIRST_SECONDS = 1800.0  # this is too long, with what a first step compiles;
LAST = 50  # of so many the median is taken
LOOK_SECONDS = 1.0

_waits: list[tuple[str, float]] = []  # from the outermost on: what for, and since when


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Within it the run waits for this, such as "the verifier"."""
    _waits.append((what, time.monotonic()))
    try:
        yield
    finally:
        _waits.pop()


class Watchdog:
    """Says on standard error which step takes many times the median, what it waits for, and where
    every thread is. Once, and again each time that it has taken twice as long.
    """

    def __init__(self, name: str):
        """`name`: of the stage."""
        self._name, self._left = name, threading.Event()
        self._seconds: deque[float] = deque(maxlen=LAST)
        self._step, self._began, self._limit = -1, 0.0, float("inf")

    def begin(self, step: int) -> None:
        """A step begins, and the one before has ended."""
        now = time.monotonic()
        if self._step >= 0:
            self._seconds.append(now - self._began)
        known = len(self._seconds) >= KNOWN
        limit = FACTOR * statistics.median(self._seconds) if known else FIRST_SECONDS
        self._step, self._began, self._limit = step, now, max(LEAST_SECONDS, limit)

    def _look(self) -> None:
        while not self._left.wait(LOOK_SECONDS):
            taken = time.monotonic() - self._began
            if taken > self._limit:
                self._limit = 2 * taken
                self._say(taken)

    def _say(self, taken: float) -> None:
        median = f"{statistics.median(self._seconds):.1f} s" if self._seconds else "unknown yet"
        waits = [*_waits] or [("its own Python", self._began)]
        what, waited = " > ".join(name for name, _ in waits), time.monotonic() - waits[-1][1]
        print(
            f"opsd-jax: {self._name}, step {self._step}, has taken {taken:.0f} s; the median is "
            f"{median}. It has waited {waited:.0f} s for {what}. Its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._left.set()
