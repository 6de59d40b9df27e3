"""Stopping well: the first SIGINT or SIGTERM asks for a checkpoint, the second does not wait.

A notice of Google Cloud that the machine is about to stop is as a SIGTERM. One that comes to any
host stops all of them, at the same place.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from opsd_jax.parallel import hosts
from opsd_jax.training import notices


class Interrupted(Exception):
    """A signal asked the run to stop, and it did, after saving."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or notice while it is entered; a signal after a signal
    acts as ever.
    """

    def __init__(self) -> None:
        self._received = 0
        self._watch = notices.Watch(self._notice)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        self._restore()
        # Not print: the signal may have come within one, and that is not reentrant.
        name = signal.Signals(signum).name
        text = f"\n{name}: stopping soon; what is done is kept; once more stops at once.\n"
        os.write(2, text.encode())

    def _notice(self, name: str) -> None:
        self._received = self._received or signal.SIGTERM
        os.write(2, f"\nnotice of {name}: stopping soon; what is done is kept.\n".encode())

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __enter__(self) -> StopSignal:
        self._previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)
        }
        self._watch.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._watch.__exit__(*exc)
        self._restore()

    def received(self) -> int:
        """The signal that has come to this host or another, 0 for none. All hosts ask together."""
        return hosts.largest(self._received)

    def check(self) -> None:
        """Raises Interrupted if a signal has come, as `received`."""
        if signum := self.received():
            raise Interrupted(signum)
