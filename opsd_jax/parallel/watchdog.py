"""A watchdog that warns about slow steps and reports what the run is waiting for."""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import logging
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

logger = logging.getLogger(__name__)

FACTOR = 10.0  # A step takes too long after this multiple of the median of recent steps,
LEAST_SECONDS = 60.0  # and after at least this time.
FIRST_SECONDS = 1800.0  # The limit while no median is known. It includes compilation.
KNOWN = 3  # The number of finished steps that a median needs.
LAST = 50  # The number of recent steps that the median covers.
LOOK_SECONDS = 1.0  # The time between two checks.


class Wait(enum.StrEnum):
    """What the main thread of a run can wait for."""

    TRAIN_STEP = "the train step"
    DECODING = "decoding"
    VERIFIER = "the verifier"
    HOSTS = "other hosts"
    CHECKPOINT = "a checkpoint"
    COMPILING = "the compiler"


class Moment(NamedTuple):
    """A moment of a run, from which times are measured.

    Attributes:
      seconds: `time.monotonic()`.
      waited: seconds of each kind of `Wait` up to now. Of nested waits, only the innermost counts.
    """

    seconds: float
    waited: dict[Wait, float]


# The nested waits of the main thread, outermost first: what it waits for, and since when.
_waits: list[tuple[Wait, float]] = []
_waited = dict.fromkeys(Wait, 0.0)  # seconds of each wait up to `_counted`
_counted = 0.0


def now() -> Moment:
    """Returns the current `Moment`."""
    return Moment(_count(), {**_waited})


def _count() -> float:
    """Adds the time since the last call to the innermost wait. Returns the current time."""
    global _counted
    before, _counted = _counted, time.monotonic()
    if _waits:
        _waited[_waits[-1][0]] += _counted - before
    return _counted


@contextlib.contextmanager
def waiting(what: Wait) -> Iterator[None]:
    """Context manager that records what the run is waiting for.

    The contexts can be nested.
    """
    _waits.append((what, _count()))
    try:
        yield
    finally:
        _count()
        _waits.pop()


class Watchdog:
    """Context manager that logs a warning about each step that takes too long.

    A thread checks the current step. Once the step has taken a multiple of the median step time,
    the thread logs the times and what the run is waiting for (see `waiting`), and writes the stack
    of every thread to standard error. It repeats this whenever the time has doubled.
    """

    def __init__(self, name: str):
        """Creates a watchdog for the steps of one stage.

        Args:
          name: The name of the stage, for the warnings.
        """
        self._name, self._left = name, threading.Event()
        self._seconds: deque[float] = deque(maxlen=LAST)
        self._step, self._began, self._limit = -1, 0.0, float("inf")

    def begin(self, step: int) -> None:
        """Marks the end of the previous step and the beginning of step number `step`."""
        now = time.monotonic()
        if self._step >= 0:
            self._seconds.append(now - self._began)
        known = len(self._seconds) >= KNOWN
        limit = FACTOR * statistics.median(self._seconds) if known else FIRST_SECONDS
        self._step, self._began, self._limit = step, now, max(LEAST_SECONDS, limit)

    def _watch(self) -> None:
        """Checks the current step about once per second, and warns if it takes too long."""
        while not self._left.wait(LOOK_SECONDS):
            taken = time.monotonic() - self._began
            if taken > self._limit:
                self._limit = 2 * taken
                self._warn(taken)

    def _warn(self, taken: float) -> None:
        """Logs that the current step has taken `taken` seconds, and prints every thread's stack."""
        median = f"{statistics.median(self._seconds):.1f} s" if self._seconds else "not known yet"
        waits: list[tuple[str, float]] = [*_waits] or [("its own Python code", self._began)]
        what, waited = " > ".join(name for name, _ in waits), time.monotonic() - waits[-1][1]
        logger.warning(
            "opsd-jax: step %d of %s has taken %.0f s. The median step time is %s. The step has "
            "been waiting for %s for %.0f s. The stacks of all threads:",
            self._step,
            self._name,
            taken,
            median,
            what,
            waited,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._left.set()
