"""Watches for Google Cloud's notice that this machine will be preempted or stopped."""

from __future__ import annotations

import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

POLL_SECONDS = 5.0  # time between two requests; a preempted machine stops 30 s after its notice
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
# Key of the metadata server -> how its value begins when the machine is about to stop.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE"}


def metadata_host() -> str:
    """Returns the host name of this machine's metadata server; "" outside Google Cloud."""
    if host := os.environ.get("GCE_METADATA_HOST", ""):
        return host
    is_google = PRODUCT.exists() and PRODUCT.read_text().startswith("Google")
    return "metadata.google.internal" if is_google else ""


def current_notice(host: str) -> str:
    """Returns the name of the metadata server's stop notice, such as "preempted"; "" if none.

    Returns "" also if the server does not answer.
    """
    for name, begin in NOTICES.items():
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/{name}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=POLL_SECONDS) as response:
                if response.read().decode().strip().startswith(begin):
                    return name
        except (urllib.error.URLError, OSError):
            continue
    return ""


class Watcher:
    """Context manager that waits for a stop notice from Google Cloud in a background thread.

    It does nothing on machines outside Google Cloud.
    """

    def __init__(self, on_notice: Callable[[str], None]) -> None:
        """Creates a watcher whose thread calls `on_notice(name)` once, when a notice appears."""
        self._on_notice, self._exited = on_notice, threading.Event()

    def _poll(self, host: str) -> None:
        """Polls the metadata server until a notice appears or the context manager exits."""
        while not self._exited.wait(POLL_SECONDS):
            if name := current_notice(host):
                self._on_notice(name)
                return

    def __enter__(self) -> Watcher:
        if host := metadata_host():
            threading.Thread(target=self._poll, args=(host,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._exited.set()
