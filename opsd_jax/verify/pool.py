"""Verification beside the device's work: submit responses as they come, take verdicts later."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from opsd_jax.verify.verdict import Verdict, Verifier


class VerifierPool:
    """Runs a verifier on worker threads while the caller keeps the device busy.

    For verifiers that are quick and trusted, as the embedded task's exact comparison is. A context
    manager; leaving it drops what was not asked for.
    """

    def __init__(self, verify: Verifier, workers: int = 1):
        self._verify = verify
        self._executor = concurrent.futures.ThreadPoolExecutor(workers, "verifier")

    def submit(self, problem: Any, response: str) -> concurrent.futures.Future[Verdict]:
        """Queues one response; the future's `result()` is its verdict."""
        return self._executor.submit(self._judge, problem, response)

    def _judge(self, problem: Any, response: str) -> Verdict:
        """The verdict; a verifier that raises costs its own row alone, and is counted."""
        try:
            return self._verify(problem, response)
        except Exception as error:
            return Verdict(False, f"verifier {type(error).__name__}")

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
