"""Stopping well: the first SIGINT or SIGTERM asks for a checkpoint, the second does not wait."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop, and it did, after saving."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopSignal:
    """Remembers the first SIGINT or SIGTERM while it is entered; a second acts as ever."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()
        # Not print: the signal may have come within one, and that is not reentrant.
        name = signal.Signals(signum).name
        text = f"\n{name}: stopping soon; what is done is kept; once more stops at once.\n"
        os.write(2, text.encode())

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __enter__(self) -> StopSignal:
        self._previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exc) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)
