"""Verifies responses in worker processes with time and memory limits, while the device samples.

Submit responses as they end, and read the verdicts when the loss needs them. A verification job
that fails costs only its own verdict, and its worker is replaced:
- if it runs longer than the limit, its worker is killed and the verdict is "timeout";
- if it allocates more memory than the limit, the verdict is "memory";
- if it ends its process, the verdict is "crash";
- if its worker is killed from outside, it is retried up to MAX_ATTEMPTS times, then "crash";
- if the verifier raises, the verdict is "verifier ValueError", or the name of the other exception;
- if no worker can start, reading a verdict raises PoolError.

Equal jobs are judged once, and the verdict is cached. Timeouts, memory errors and crashes are not
cached, because the machine may have caused them.

When the pool is closed or its process ends, the workers and the processes that they started end
too. There is one exception. Where the kernel does not kill a process by SIGIO (macOS), a busy
worker whose parent is killed may run until its limit of processor time.

One thread owns the workers, and each worker has its own pipe. (concurrent.futures cannot kill a
worker. In pebble, workers share a lock, and killing a worker that holds it blocks all others.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from opsd_jax.options import option
from opsd_jax.problem import Problem
from opsd_jax.verify.verdict import (
    CRASH,
    MEMORY,
    TIMEOUT,
    Job,
    Judge,
    Verdict,
    Verifier,
    checked,
)
from opsd_jax.verify.verifiers import as_verifier

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # times that a job is started while its workers are killed from outside
MAX_FAILED_STARTS = 5  # consecutive failed starts of workers before the pool gives up
KILLED_START = 0.05  # a start that was killed from outside counts as this much of a failed start
START_SECONDS = 60.0  # time limit for the start of a worker
JOBS_PER_WORKER = 5000  # then the worker is replaced, because the parser's caches grow
CACHED_VERDICTS = 1 << 16  # verdicts of earlier jobs that the pool keeps
FIRST_VERDICTS = 100  # verdicts before `PoolOptions.failures` applies
LOGGED_FAILURES = 3  # failures that are logged with their traceback
LOGGED_CHARACTERS = 4000  # end of a traceback that is logged
# Modules that the server process imports before it forks workers, so that workers start fast.
PRELOADED = ("opsd_jax.verify.warm", "opsd_jax.verify.pool")

# Exit codes of a worker that was killed from outside. 255: the server process was killed too.
_KILLED = (-signal.SIGKILL, -signal.SIGTERM, 255)
_CONTEXT = multiprocessing.get_context("forkserver")


class PoolError(RuntimeError):
    """Raised if a pool cannot verify, because its workers do not start or because it is closed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """The number of worker processes that verify responses, and their limits for each response."""

    workers: int = option(0, "Worker processes; 0 is one per core, at most 8.", at_least=0)
    seconds: float = option(
        2.0, "Time limit for one response, in seconds; then its worker is killed.", above=0
    )
    memory_mb: int = option(
        512, "Memory that a worker may allocate for one response, in MiB; Linux only.", above=0
    )
    failures: float = option(
        0.5,
        "Fraction of verifications that may fail (exceptions, timeouts, crashes); beyond it the "
        "run stops, after the first 100 verifications. 1 never stops it.",
        at_least=0,
        at_most=1,
        added=True,
    )


DEFAULTS = PoolOptions()
# For gold answers. Each is checked once, and a slow machine must not make one of them a bad row.
PATIENT = PoolOptions(seconds=10.0, failures=1.0)


class _Pending:
    """A verification job that has no verdict yet.

    Attributes:
      key: digest of the job; equal jobs have equal keys.
      job: the job, pickled.
      attempts: times that it was sent to a worker.
      future: receives the verdict.
    """

    def __init__(self, key: bytes, job: bytes):
        """Creates a future for the verdict of a pickled job."""
        self.key, self.job, self.attempts = key, job, 0
        self.future: Future[Verdict] = Future()
        # Several callers may share the future, so none of them may cancel it.
        self.future.set_running_or_notify_cancel()


class _Worker:
    """A worker process, its pipe, and the job that it runs.

    Attributes:
      pipe: this end of its pipe.
      ready: whether it has started.
      ended: whether `stop` was called.
      pending: the job that it runs; None while it is idle.
      jobs: number of jobs that it was sent.
      deadline: value of `time.monotonic()` at which its start or its job has taken too long.
    """

    def __init__(self, judge: bytes, options: PoolOptions):
        """Starts a worker process, which judges jobs with a pickled `judge` function."""
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_worker_main, args=(theirs, judge, options), name="verifier", daemon=True
        )
        self._process.start()
        theirs.close()
        self.ready, self.ended = False, False
        self.pending: _Pending | None = None
        self.jobs = 0
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, pending: _Pending, seconds: float) -> None:
        """Sends a job to the worker, with a time limit in seconds."""
        self.pending, self.deadline = pending, time.monotonic() + seconds
        pending.attempts += 1
        self.jobs += 1
        # If the worker has died, the pool notices when it next reads the pipe.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(pending.job)

    def take_job(self) -> _Pending | None:
        """Marks the worker as idle, and returns the job that it was running, or None."""
        pending, self.pending, self.deadline = self.pending, None, math.inf
        return pending

    def stop(self, wait: float = 0.0) -> int:
        """Kills the process unless it ends within `wait` seconds, and returns its exit code."""
        self._process.join(wait)
        # A worker that is ready leads its own process group, so the processes that it started
        # are killed too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.ready and self._process.pid:
                os.killpg(self._process.pid, signal.SIGKILL)
            elif self._process.exitcode is None:
                self._process.kill()
        self._process.join()
        self.pipe.close()
        self.ended = True
        return self._process.exitcode or 0


class VerifierPool:
    """A pool of worker processes that run a verifier's jobs. Use it as a context manager.

    Several threads may use one pool. Workers start with the first job, so a verifier that never
    needs a worker starts none. Like all multiprocessing workers they import the main module, so a
    script that creates a pool must do so under `if __name__ == "__main__":`.

    Attributes:
      judged: number of jobs that workers have finished.
    """

    def __init__(self, verifier: Verifier | Judge, options: PoolOptions = DEFAULTS):
        """Creates a pool without starting any process.

        Args:
          verifier: a `Verifier`, or a module-level function `(problem, response) -> Verdict or
            bool`.
          options: number of workers, and limits for each job.

        Raises:
          ValueError: the verifier's `judge` cannot be pickled.
        """
        self._verifier, self._options = as_verifier(verifier), options
        try:
            self._judge = pickle.dumps(self._verifier.judge)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the verifier's judge {self._verifier.judge!r} cannot be sent to a worker "
                f"({error}); expected a function defined at the top level of a "
                "module, or a functools.partial of one."
            ) from error
        self._size = options.workers or min(os.cpu_count() or 1, 8)
        self._lock = threading.Lock()
        self._waiting: collections.deque[_Pending] = collections.deque()
        # Futures by job, in the order of their last use.
        self._cache: collections.OrderedDict[bytes, Future[Verdict]] = collections.OrderedDict()
        self._failure = ""
        self._thread: threading.Thread | None = None
        self._at_exit: multiprocessing.util.Finalize | None = None
        self._workers: list[_Worker] = []  # only the thread uses them
        self._failed_starts = 0.0
        # The thread sleeps until it can read from a worker's pipe or from this one.
        self._wake_reader, self._wake_writer = _CONTEXT.Pipe(duplex=False)
        self.judged = 0
        self._verdicts, self._failures = 0, 0

    def submit(self, problem: Problem, response: str) -> Future[Verdict]:
        """Queues a response for verification, and returns a future for its verdict.

        Raises:
          PoolError: the pool is closed, or its workers do not start.
        """
        return self._submit(self._verifier.prepare, problem, response)

    def submit_gold(self, problem: Problem) -> Future[Verdict]:
        """Queues a check of a problem's own answer, and returns a future for the verdict."""
        return self._submit(self._verifier.prepare_gold, problem)

    def _submit(self, prepare: Callable[..., Verdict | Job], *arguments) -> Future[Verdict]:
        """Calls `prepare`, queues any job it returns, and returns a future for the verdict."""
        job, failure = b"", ""
        try:
            prepared = prepare(*arguments)
            if isinstance(prepared, Verdict):
                prepared = checked(prepared)
            else:
                job = pickle.dumps(prepared)
        except Exception as error:
            prepared, failure = _verdict_of_exception(error), traceback.format_exc()
        if isinstance(prepared, Verdict):
            self._count(failure)
            if self._failure:
                raise PoolError(self._failure)
            settled: Future[Verdict] = Future()
            settled.set_result(prepared)
            return settled
        key = hashlib.blake2b(job, digest_size=16).digest()
        with self._lock:
            if self._failure:
                raise PoolError(self._failure)
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            pending = _Pending(key, job)
            self._cache[key] = pending.future
            if len(self._cache) > CACHED_VERDICTS:
                self._cache.popitem(last=False)
            self._waiting.append(pending)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="verifiers", daemon=True)
                self._thread.start()
                # At exit, multiprocessing ends the workers and waits for them. The pool has to be
                # closed first, or it replaces them, and the exit takes as long as their jobs.
                self._at_exit = multiprocessing.util.Finalize(None, self.close, exitpriority=10)
            self._wake_writer.send_bytes(b"")
        return pending.future

    def close(self) -> None:
        """Ends the workers. Futures without a verdict raise PoolError."""
        with self._lock:
            self._failure = self._failure or "the pool of verifiers is closed."
            if not self._wake_writer.closed:
                self._wake_writer.send_bytes(b"")
        if self._at_exit is not None:
            self._at_exit.cancel()
        if self._thread is not None:
            self._thread.join()
        self._wake_writer.close()
        self._wake_reader.close()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _run(self) -> None:
        """Starts workers, sends them jobs and reads their verdicts. Runs in the pool's thread."""
        _CONTEXT.set_forkserver_preload(list(PRELOADED))
        try:
            while not self._failure:
                self._start_workers()
                self._send_jobs()
                self._handle_events()
        except BaseException as error:
            self._failure = f"the pool of verifiers failed: {error!r}."
            raise
        finally:
            for worker in self._workers:
                worker.stop()
            with self._lock:
                unfinished = [*filter(None, map(_Worker.take_job, self._workers)), *self._waiting]
                self._waiting.clear()
            for pending in unfinished:
                pending.future.set_exception(PoolError(self._failure))

    def _start_workers(self) -> None:
        """If jobs are waiting, starts workers until the pool has its full size."""
        while self._waiting and not self._failure and len(self._workers) < self._size:
            try:
                self._workers.append(_Worker(self._judge, self._options))
            except (EOFError, OSError) as error:
                # The server process was killed. The next start creates a new server.
                time.sleep(0.1)
                self._count_failed_start(repr(error), KILLED_START)

    def _send_jobs(self) -> None:
        """Sends waiting jobs to idle workers."""
        for worker in self._workers:
            if worker.ready and worker.pending is None and self._waiting:
                worker.send(self._waiting.popleft(), self._options.seconds)

    def _handle_events(self) -> None:
        """Waits for a message from a worker, an expired time limit or a wake-up, and handles it."""
        deadline = min((worker.deadline for worker in self._workers), default=math.inf)
        pipes = {worker.pipe: worker for worker in self._workers}
        readable = multiprocessing.connection.wait(
            [self._wake_reader, *pipes],
            None if deadline == math.inf else max(0.0, deadline - time.monotonic()),
        )
        while self._wake_reader.poll():
            self._wake_reader.recv_bytes()
        for pipe, worker in pipes.items():
            if pipe in readable:
                self._read(worker)
            elif worker.deadline <= time.monotonic():
                if not worker.ready:
                    self._count_failed_start(f"not ready after {START_SECONDS:.0f} s")
                self._settle(worker, TIMEOUT)
                worker.stop()
        self._workers = [worker for worker in self._workers if not worker.ended]

    def _count_failed_start(self, reason: str, weight: float = 1.0) -> None:
        """Counts a worker's failed start. After MAX_FAILED_STARTS in a row, the pool fails."""
        self._failed_starts += weight
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._failure = (
                f"{MAX_FAILED_STARTS} verifier processes in a row ended while they started "
                f"({reason}); their output is above. A script that creates a pool must do so under "
                "`if __name__ == '__main__':`."
            )

    def _read(self, worker: _Worker) -> None:
        """Handles the next message of a worker ("ready" or a verdict), or its exit."""
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._handle_exit(worker, worker.stop(wait=1.0))
            return
        if not worker.ready:
            worker.ready, worker.deadline, self._failed_starts = True, math.inf, 0
            return
        *verdict, failure = message
        verdict = Verdict(*verdict)
        self._settle(worker, verdict, failure)
        # After a failed allocation, the state of the process is unknown.
        if verdict == MEMORY or worker.jobs >= JOBS_PER_WORKER:
            worker.stop()

    def _count(self, failure: str) -> None:
        """Counts a verification, and logs the first failures. Too many failures end the pool.

        Args:
          failure: the traceback or reason of a failed verification; "" for one that did not fail.
        """
        with self._lock:
            self._verdicts += 1
            if not failure:
                return
            self._failures += 1
            if self._failures <= LOGGED_FAILURES:
                logger.warning("a response is incorrect because its verifier failed: %s", failure)
            limit = self._options.failures
            if self._verdicts >= FIRST_VERDICTS and self._failures > limit * self._verdicts:
                self._failure = self._failure or (
                    f"the verifier failed for {self._failures} of {self._verdicts} responses; "
                    f"expected at most a fraction of config.pool.failures = {limit}. The log has "
                    "the first failures. Fix the verifier, or increase config.pool.failures."
                )

    def _settle(self, worker: _Worker, verdict: Verdict, failure: str = "") -> None:
        """Gives a verdict to the job that a worker is running, if there is one."""
        pending = worker.take_job()
        if pending is None:
            return
        self.judged += 1
        failed = verdict in (TIMEOUT, CRASH, MEMORY)
        self._count(failure or (verdict.reason if failed else ""))
        if failed:
            with self._lock:
                self._cache.pop(pending.key, None)
        pending.future.set_result(verdict)

    def _handle_exit(self, worker: _Worker, code: int) -> None:
        """Retries or fails the job of a worker whose process has ended with exit code `code`."""
        killed = code in _KILLED
        if not worker.ready:
            self._count_failed_start(f"exit code {code}", KILLED_START if killed else 1.0)
        if worker.pending is None:
            return
        if killed and worker.pending.attempts < MAX_ATTEMPTS:
            self._waiting.appendleft(worker.pending)
            worker.take_job()
        else:
            self._settle(worker, TIMEOUT if code == -signal.SIGXCPU else CRASH)


def check_golds(verifier: Verifier | Judge, problems: Sequence[Problem]) -> list[str]:
    """Checks whether the verifier accepts each problem's own answer.

    Returns:
      For each problem "" if its answer verifies, otherwise the reason why not.
    """
    with VerifierPool(verifier, PATIENT) as pool:
        futures = [pool.submit_gold(problem) for problem in problems]
        verdicts = [future.result() for future in futures]
    return ["" if verdict.correct else verdict.reason for verdict in verdicts]


def _verdict_of_exception(error: BaseException) -> Verdict:
    """Returns the verdict on a response for which the verifier raised `error`."""
    return Verdict(False, f"verifier {type(error).__name__}")


def _worker_main(
    pipe: multiprocessing.connection.Connection, judge: bytes, options: PoolOptions
) -> None:
    """Runs a worker process: reads jobs and writes verdicts until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setsid()
    for name in PRELOADED:
        importlib.import_module(name)
    decide = pickle.loads(judge)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pickle.loads(pipe.recv_bytes())
            # From here to the verdict, the kernel kills this process if the parent's end of the
            # pipe closes, or if it uses more processor time than the limit. A thread or a signal
            # handler would not run while native code is busy.
            fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
            flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
            _set_limits(options)
            try:
                verdict = *checked(decide(job)), ""
            except MemoryError:
                verdict = *MEMORY, ""
            except BaseException as error:
                verdict = *_verdict_of_exception(error), traceback.format_exc()[-LOGGED_CHARACTERS:]
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags)
            pipe.send(verdict)


def _set_limits(options: PoolOptions) -> None:
    """Limits the processor time and the memory that this process may use for its next job."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + options.seconds) + 1)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _set_limit(resource.RLIMIT_AS, size + options.memory_mb * 2**20)


def _set_limit(kind: int, limit: int) -> None:
    """Sets a soft resource limit of this process, capped at the hard limit."""
    _, hard = resource.getrlimit(kind)
    unlimited = hard == resource.RLIM_INFINITY
    resource.setrlimit(kind, (limit if unlimited else min(limit, hard), hard))
