"""Judges that misbehave, for test_pool.py: workers import them from here."""

import multiprocessing
import os
import resource
import signal
import subprocess
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
    elif what == "child":  # starts a process and waits for it
        child = subprocess.Popen(["sleep", "300"])
        with open(detail, "w") as file:
            file.write(str(child.pid))
        child.wait()
    elif what == "once":  # slow the first time that it is asked
        if not os.path.exists(detail):
            open(detail, "w").close()
            time.sleep(30)
    elif what == "mark":  # says that it began, and does not end
        open(detail, "w").close()
        time.sleep(60)
    elif what == "mark-spin":
        open(detail, "w").close()
        pow(3, 10**9)
    return Verdict(True, what)


def odd(question):
    """Verdicts that are none."""
    return {"none": None, "true": True, "list": [1, 2, 3], "object": (True, object())}[question]


class Hanging:
    """A judge whose arrival in a worker takes for ever."""

    def __reduce__(self):
        return _hang, ()

    def __call__(self, question):
        return Verdict(True, "match")


def _hang():
    if multiprocessing.current_process().name == "verifier":
        time.sleep(300)
    return Hanging()
