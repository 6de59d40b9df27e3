"""What Google Cloud tells a machine that it is about to stop: a preemption or maintenance."""

from __future__ import annotations

import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

SECONDS = 5.0  # between two looks: a preempted machine has 30
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
# Of the metadata server, what to ask for, and how an answer begins that means the end.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE"}


def server() -> str:
    """The host of this machine's metadata; "" where it is none of Google Cloud."""
    if host := os.environ.get("GCE_METADATA_HOST", ""):
        return host
    is_google = PRODUCT.exists() and PRODUCT.read_text().startswith("Google")
    return "metadata.google.internal" if is_google else ""


def notice(host: str) -> str:
    """The notice that is there, such as "preempted"; "" if there is none or nobody answers."""
    for name, end in NOTICES.items():
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/{name}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                if answer.read().decode().strip().startswith(end):
                    return name
        except (urllib.error.URLError, OSError):
            continue
    return ""


class Watch:
    """Calls `tell` with the first notice that comes while it is entered, from a thread of its own.
    Does nothing on other machines.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._left = tell, threading.Event()

    def _look(self, host: str) -> None:
        while not self._left.wait(SECONDS):
            if name := notice(host):
                self._tell(name)
                return

    def __enter__(self) -> Watch:
        if host := server():
            threading.Thread(target=self._look, args=(host,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._left.set()
