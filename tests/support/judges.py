"""Verifier functions for test_pool.py, most of which misbehave. Workers import this module."""

import multiprocessing
import os
import resource
import signal
import subprocess
import time

from opsd_jax.verify.verdict import Verdict


def double(problem, response):
    """Accepts twice the answer, after a few milliseconds, as a well-behaved verifier does."""
    time.sleep(0.003)
    return int(response) == 2 * int(problem.answer)


def worker_id(problem, response):
    """Accepts every response, with the process id of the worker as the reason."""
    return Verdict(True, str(os.getpid()))


def misbehave(problem, response):
    """Misbehaves in the way that the response names, and otherwise accepts it."""
    what, _, detail = response.partition(" ")
    if what == "sleep":
        time.sleep(float(detail))
    elif what == "spin":  # native code, during which no Python signal handler runs
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
    elif what == "limit":  # as if the limit had been set before the worker started
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    elif what == "child":  # starts a process and waits for it
        child = subprocess.Popen(["sleep", "300"])
        with open(detail, "w") as file:
            file.write(str(child.pid))
        child.wait()
    elif what == "once":  # slow the first time
        if not os.path.exists(detail):
            open(detail, "w").close()
            time.sleep(30)
    elif what == "mark":  # creates a file to show that it started, and does not end
        open(detail, "w").close()
        time.sleep(60)
    elif what == "mark-spin":
        open(detail, "w").close()
        pow(3, 10**9)
    return Verdict(True, what)


def odd(question):
    """Returns values that are not verdicts."""
    return {"none": None, "true": True, "list": [1, 2, 3], "object": (True, object())}[question]


class Hanging:
    """A judge that a worker never finishes unpickling."""

    def __reduce__(self):
        return _hang, ()

    def __call__(self, question):
        return Verdict(True, "match")


def _hang():
    if multiprocessing.current_process().name == "verifier":
        time.sleep(300)
    return Hanging()
