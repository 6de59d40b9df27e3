"""Saves a checkpoint and stops the run on SIGINT or SIGTERM. A second signal stops it at once.

A notice from Google Cloud that the machine will stop counts as SIGTERM. A signal to one host stops
all hosts, at the same step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from opsd_jax.parallel import hosts
from opsd_jax.training import notices


class Interrupted(Exception):
    """The run stopped because of a signal, after it saved its progress.

    Attributes:
      exit_code: exit code for the process, 128 + the number of the signal.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopSignal:
    """Context manager that records the first SIGINT, SIGTERM or preemption notice.

    After the first signal, the previous handlers are back in place, so a second signal usually ends
    the process at once.
    """

    def __init__(self) -> None:
        self._received = 0
        self._watcher = notices.Watcher(self._on_notice)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Records a signal and restores the previous handlers."""
        self._received = signum
        self._restore()
        # The signal may interrupt a print or a log call, which are not reentrant.
        name = signal.Signals(signum).name
        text = f"\n{name}: stopping soon, with all progress saved; a second signal stops at once.\n"
        os.write(2, text.encode())

    def _on_notice(self, name: str) -> None:
        """Records a notice from Google Cloud as if it were SIGTERM."""
        self._received = self._received or signal.SIGTERM
        os.write(2, f"\nnotice of {name}: stopping soon, with all progress saved.\n".encode())

    def _restore(self) -> None:
        """Restores the signal handlers that this context manager replaced."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __enter__(self) -> StopSignal:
        self._previous = {
            s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)
        }
        self._watcher.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._watcher.__exit__(*exc)
        self._restore()

    def received(self) -> int:
        """Returns the number of a signal that a host has received; 0 if no host has received one.

        A collective operation: all hosts must call it together.
        """
        return hosts.largest(self._received)

    def check(self) -> None:
        """Raises Interrupted if any host has received a signal. All hosts must call it together."""
        if signum := self.received():
            raise Interrupted(signum)
