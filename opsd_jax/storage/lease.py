"""A lock for a work directory in Cloud Storage, which has no file locks."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from opsd_jax.storage.files import Path

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0  # time between two heartbeats of the holder
MISSED_HEARTBEATS = 3  # a lease without this many heartbeats has expired


class InUse(RuntimeError):
    """Raised if another process holds the lease. The message is the path of the lease file."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Context manager that holds a lease (a lock that expires) while its block runs.

    The holder writes a heartbeat to the file `path` every HEARTBEAT_SECONDS. The lease of a crashed
    holder expires after MISSED_HEARTBEATS of them.

    If another process takes the lease over, for example because this one was suspended for longer
    than that, this process exits at once with code 1. It must not write any more: the directory
    belongs to the other process.

    Raises:
      InUse: another process holds the lease.
    """
    holder, beats = uuid.uuid4().hex, 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        path.write_text(f"{holder} {beats}")

    if last := _read(path):
        logger.warning(
            "opsd-jax: %s exists: waiting up to %.0f s to see whether its process is alive",
            path,
            MISSED_HEARTBEATS * HEARTBEAT_SECONDS,
        )
        expires = time.monotonic() + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        while time.monotonic() < expires and (now := _read(path)):
            if now != last:
                raise InUse(str(path))
            time.sleep(HEARTBEAT_SECONDS / 10)
    beat()
    released = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, holder, beat, released), daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with contextlib.suppress(Exception):  # if the file stays, the lease expires by itself
            path.unlink()


def _renew(path: Path, holder: str, beat: Callable[[], None], released: threading.Event) -> None:
    """Renews the lease until `released` is set. Exits if another process takes the lease."""
    while not released.wait(HEARTBEAT_SECONDS):
        try:
            content = _read(path)
            if content.startswith(holder) or not content:
                beat()
                continue
        except Exception:
            continue  # a network error: the next heartbeat may succeed
        logger.error(
            "opsd-jax: another process has taken over %s, so this process exits. Run one process "
            "per work directory.",
            path,
        )
        logging.shutdown()  # flushes the message
        os._exit(1)


def _read(path: Path) -> str:
    """Returns the content of the lease file, or "" if the file does not exist."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
