"""That one run at a time uses a directory in a bucket, where no file can be locked."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from opsd_jax.storage.files import Path

SECONDS = 10.0  # between two signs of life
LIVES = 3  # so many without one, and the holder counts as dead


class InUse(RuntimeError):
    """Another process holds it."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the object `path`, into which the holder writes a sign of life every few seconds. After
    one that died without a word it is had when LIVES x SECONDS have passed.

    A process that has been replaced, as one that stood still for so long, ends at once with exit
    code 1: what it would still write is another's.

    Raises:
      InUse: another process holds it.
    """
    me, signs = uuid.uuid4().hex, 0

    def sign() -> None:
        nonlocal signs
        signs += 1
        path.write_text(f"{me} {signs}")

    if last := _read(path):
        print(f"opsd-jax: {path}: waiting to see whether its process lives", file=sys.stderr)
        ended = time.monotonic() + LIVES * SECONDS
        while time.monotonic() < ended and (now := _read(path)):
            if now != last:
                raise InUse(str(path))
            time.sleep(SECONDS / 10)
    sign()
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, me, sign, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):  # it is had after a while in any case
            path.unlink()


def _renew(path: Path, me: str, sign: Callable[[], None], over: threading.Event) -> None:
    """Gives signs of life until it is over."""
    while not over.wait(SECONDS):
        try:
            holder = _read(path)
            if holder.startswith(me) or not holder:
                sign()
                continue
        except Exception:
            continue  # the network: the next one may arrive
        print(f"opsd-jax: {path} is another process's now: this one ends.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def _read(path: Path) -> str:
    """Who holds it, and their last sign; "" if nobody."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
