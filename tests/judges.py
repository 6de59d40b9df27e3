"""Judges that misbehave, for test_pool.py: workers import them from here."""

import os
import resource
import signal
import time

from opsd_jax.verify.verdict import Verdict


def double(problem, response):
    """What an honest judge does, in a few milliseconds."""
    time.sleep(0.003)
    return int(response) == 2 * int(problem.answer)


def misbehave(problem, response):
    """Does what the response says."""
    what, _, detail = response.partition(" ")
    if what == "sleep":
        time.sleep(float(detail))
    elif what == "spin":  # native code, deaf to signals' handlers
        pow(3, 10**9)
    elif what == "eat":
        bytearray(int(detail) * 2**20)
    elif what == "die":
        os.kill(os.getpid(), getattr(signal, detail))
    elif what == "exit":
        raise SystemExit(3)
    elif what == "raise":
        raise LookupError(detail)
    elif what == "answer":
        return detail
    elif what == "limit":  # as if it had been set before the worker began
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    elif what == "mark":  # says that it began, and does not end
        open(detail, "w").close()
        time.sleep(60)
    elif what == "mark-spin":
        open(detail, "w").close()
        pow(3, 10**9)
    return Verdict(True, what)
