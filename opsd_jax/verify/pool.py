"""Verification beside the device's work, in processes that can be killed.

Submit responses as they come, take verdicts when the loss needs them. What happens when
- a question runs over its time: its worker is killed, the verdict is "timeout";
- it takes more memory than it may: "memory"; it takes its process down: "crash";
- a worker is killed from outside: its question is asked again, ATTEMPTS times, then "crash";
- the verifier raises: "verifier ValueError", or whatever it was;
- no worker can start: verdicts raise PoolError, none is made up;
- the pool is left or its process ends: its workers end, and what they started. Only where a kernel
  does not kill by SIGIO (macOS) may one that is busy when its parent is killed run on, for as long
  as a question may take of the processor.
Each costs its own question alone, and the worker is replaced. A verdict is remembered, but not one
of time, memory or a crash: those may have been the machine's.

One thread owns the workers, and each worker has a pipe of its own. (concurrent.futures cannot kill;
pebble can, but its workers share a lock, and one killed while it holds that stops them all.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from opsd_jax.options import option
from opsd_jax.problem import Problem
from opsd_jax.verify.verdict import CRASH, MEMORY, TIMEOUT, Judge, Question, Verdict, Verifier
from opsd_jax.verify.verifiers import as_verifier

ATTEMPTS = 5  # times that a question is asked while its workers are killed from outside
STARTS = 5  # starts in a row that may fail; one that was killed from outside is a twentieth
START_SECONDS = 60.0  # that a start may take
RECYCLED = 5000  # questions after which a worker is replaced: parsers' caches grow
REMEMBERED = 1 << 16  # verdicts
PRELOADED = (
    "opsd_jax.verify.warm",
    "opsd_jax.verify.pool",
)  # in the server that workers are forked from

_KILLED = (-signal.SIGKILL, -signal.SIGTERM, 255)  # 255: the server that knew is gone, too
_CONTEXT = multiprocessing.get_context("forkserver")


class PoolError(RuntimeError):
    """Nothing can be verified: workers do not start, or the pool is closed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """The processes that verify responses, and what one response may cost."""

    workers: int = option(0, "Processes; 0 is one per core, at most 8.", at_least=0)
    seconds: float = option(
        2.0, "Time limit for one response, in seconds; then its worker is killed.", above=0
    )
    memory_mb: int = option(
        512, "Memory that a worker may allocate for one response, in MiB; Linux only.", above=0
    )


DEFAULTS = PoolOptions()
# Reference answers are checked once, and a slow machine must not make one of them a bad row.
PATIENT = PoolOptions(seconds=10.0)


class _Task:
    """A question on its way to a verdict."""

    def __init__(self, key: bytes, question: bytes):
        self.key, self.question, self.attempts = key, question, 0
        self.future: Future[Verdict] = Future()
        self.future.set_running_or_notify_cancel()  # others may wait for it: nobody cancels it


class _Worker:
    """A process, its pipe, and the task that it has."""

    def __init__(self, judge: bytes, options: PoolOptions):
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_work, args=(theirs, judge, options), name="verifier", daemon=True
        )
        self._process.start()
        theirs.close()
        self.ready, self.ended = False, False
        self.task: _Task | None = None
        self.tasks = 0  # that it was given
        self.deadline = time.monotonic() + START_SECONDS

    def give(self, task: _Task, seconds: float) -> None:
        """Hands it a task."""
        self.task, self.deadline = task, time.monotonic() + seconds
        task.attempts += 1
        self.tasks += 1
        # One that has died is found out when it is listened to.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(task.question)

    def free(self) -> _Task | None:
        """Takes its task from it."""
        task, self.task, self.deadline = self.task, None, math.inf
        return task

    def end(self, wait: float = 0.0) -> int:
        """Its exit code, once it has ended: by itself within `wait` seconds, or killed."""
        self._process.join(wait)
        # With what it has started: a worker leads a group of its own, once it is ready.
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
    """Asks a verifier's questions in processes. A context manager; leaving it ends them.

    Threads may share it. What was asked before, or is being asked, is not asked again. Processes
    start with the first question: a verifier that settles everything needs none. They import the
    main module, as multiprocessing's do, so a script that makes a pool wants its
    `if __name__ == "__main__":`.

    Attributes:
      judged: how many questions workers were asked.
    """

    def __init__(self, verifier: Verifier | Judge, options: PoolOptions = DEFAULTS):
        """
        Args:
          verifier: judges the responses.
          options: number of processes and limits.

        Raises:
          ValueError: the judge cannot be sent to another process.
        """
        self._verifier, self._options = as_verifier(verifier), options
        try:
            self._judge = pickle.dumps(self._verifier.judge)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the judge {self._verifier.judge!r} cannot be sent to a worker ({error}); "
                "expected a function of a module, or a functools.partial of one."
            ) from error
        self._size = options.workers or min(os.cpu_count() or 1, 8)
        self._lock = threading.Lock()
        self._waiting: collections.deque[_Task] = collections.deque()
        self._known: collections.OrderedDict[bytes, Future[Verdict]] = collections.OrderedDict()
        self._failure = ""
        self._thread: threading.Thread | None = None
        self._workers: list[_Worker] = []  # the thread's alone
        self._failed_starts = 0.0
        self._ear, self._mouth = _CONTEXT.Pipe(duplex=False)
        self.judged = 0

    def submit(self, problem: Problem, response: str) -> Future[Verdict]:
        """Queues a response; the future's `result()` is its verdict.

        Raises:
          PoolError: the pool is closed, or its workers do not start.
        """
        return self._resolve(self._verifier.ask, problem, response)

    def submit_gold(self, problem: Problem) -> Future[Verdict]:
        """As `submit`, whether the problem's own answer verifies against itself."""
        return self._resolve(self._verifier.ask_gold, problem)

    def _resolve(self, ask: Callable[..., Verdict | Question], *arguments) -> Future[Verdict]:
        try:
            reply = ask(*arguments)
            question = b"" if isinstance(reply, Verdict) else pickle.dumps(reply)
        except Exception as error:
            reply = _raised(error)
        if isinstance(reply, Verdict):
            settled: Future[Verdict] = Future()
            settled.set_result(reply)
            return settled
        key = hashlib.blake2b(question, digest_size=16).digest()
        with self._lock:
            if self._failure:
                raise PoolError(self._failure)
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            task = _Task(key, question)
            self._known[key] = task.future
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            self._waiting.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="verifiers", daemon=True)
                self._thread.start()
            self._mouth.send_bytes(b"")
        return task.future

    def close(self) -> None:
        """Ends the workers; whoever still waits for a verdict gets a PoolError."""
        with self._lock:
            self._failure = self._failure or "the pool of verifiers is closed."
            if not self._mouth.closed:
                self._mouth.send_bytes(b"")
        if self._thread is not None:
            self._thread.join()
        self._mouth.close()
        self._ear.close()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _run(self) -> None:
        """The thread that owns the workers."""
        _CONTEXT.set_forkserver_preload(list(PRELOADED))
        try:
            while not self._failure:
                self._staff()
                patience = min((w.deadline for w in self._workers), default=math.inf)
                pipes = {worker.pipe: worker for worker in self._workers}
                heard = multiprocessing.connection.wait(
                    [self._ear, *pipes],
                    None if patience == math.inf else max(0.0, patience - time.monotonic()),
                )
                while self._ear.poll():
                    self._ear.recv_bytes()
                for pipe, worker in pipes.items():
                    if pipe in heard:
                        self._listen(worker)
                    elif worker.deadline <= time.monotonic():
                        if not worker.ready:
                            self._failed_start(f"not ready after {START_SECONDS:.0f} s")
                        self._settle(worker, TIMEOUT)
                        worker.end()
                self._workers = [worker for worker in self._workers if not worker.ended]
        except BaseException as error:
            self._failure = f"the pool of verifiers failed: {error!r}."
            raise
        finally:
            for worker in self._workers:
                worker.end()
            with self._lock:
                tasks = [*filter(None, map(_Worker.free, self._workers)), *self._waiting]
                self._waiting.clear()
            for task in tasks:
                task.future.set_exception(PoolError(self._failure))

    def _staff(self) -> None:
        """Starts the workers that are missing, and gives those that are free what waits."""
        while self._waiting and not self._failure and len(self._workers) < self._size:
            try:
                self._workers.append(_Worker(self._judge, self._options))
            except (EOFError, OSError) as error:
                # The server that forks was killed. A moment, and the next start renews it.
                time.sleep(0.1)
                self._failed_start(repr(error), 0.05)
        for worker in self._workers:
            if worker.ready and worker.task is None and self._waiting:
                worker.give(self._waiting.popleft(), self._options.seconds)

    def _failed_start(self, why: str, share: float = 1.0) -> None:
        self._failed_starts += share
        if self._failed_starts >= STARTS:
            self._failure = (
                f"{STARTS} verifier processes in a row ended at their start ({why}); what they "
                "wrote stands above. A script that makes a pool has to do it under "
                "`if __name__ == '__main__':`."
            )

    def _listen(self, worker: _Worker) -> None:
        """Takes what a worker says, or finds that it has died."""
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker, worker.end(wait=1.0))
            return
        if not worker.ready:
            worker.ready, worker.deadline, self._failed_starts = True, math.inf, 0
            return
        verdict = Verdict(*said)
        self._settle(worker, verdict)
        # After MEMORY nobody knows what it could not allocate.
        if verdict == MEMORY or worker.tasks >= RECYCLED:
            worker.end()

    def _settle(self, worker: _Worker, verdict: Verdict) -> None:
        task = worker.free()
        if task is None:
            return
        self.judged += 1
        if verdict in (TIMEOUT, CRASH, MEMORY):
            with self._lock:
                self._known.pop(task.key, None)
        task.future.set_result(verdict)

    def _bury(self, worker: _Worker, code: int) -> None:
        """What becomes of the task of a worker that ended by itself, or was killed from outside."""
        outside = code in _KILLED
        if not worker.ready:
            self._failed_start(f"exit code {code}", 0.05 if outside else 1.0)
        if worker.task is None:
            return
        if outside and worker.task.attempts < ATTEMPTS:
            task = worker.free()
            assert task is not None
            self._waiting.appendleft(task)
        else:
            self._settle(worker, TIMEOUT if code == -signal.SIGXCPU else CRASH)


def check_golds(verifier: Verifier | Judge, problems: Sequence[Problem]) -> list[str]:
    """Whether each problem's answer verifies against itself: "" if so, else the reason."""
    with VerifierPool(verifier, PATIENT) as pool:
        futures = [pool.submit_gold(problem) for problem in problems]
        verdicts = [future.result() for future in futures]
    return ["" if verdict.correct else verdict.reason for verdict in verdicts]


def _raised(error: BaseException) -> Verdict:
    return Verdict(False, f"verifier {type(error).__name__}")


def _work(pipe: multiprocessing.connection.Connection, judge: bytes, options: PoolOptions) -> None:
    """A worker: reads questions, writes verdicts, until its pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setsid()
    for name in PRELOADED:
        importlib.import_module(name)
    decide = pickle.loads(judge)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            question = pickle.loads(pipe.recv_bytes())
            # From here to the verdict the kernel ends this process if the parent's end of the pipe
            # closes, or if it takes more processor time than the parent would have let it: native
            # code hears no thread and no handler.
            fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
            flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
            _bound(options)
            try:
                correct, reason = decide(question)
                said = bool(correct), str(reason)
            except MemoryError:
                said = False, MEMORY.reason
            except BaseException as error:
                said = False, _raised(error).reason
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags)
            pipe.send(said)


def _bound(options: PoolOptions) -> None:
    """Bounds what this process may take from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + options.seconds) + 1)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, size + options.memory_mb * 2**20)


def _lower(kind: int, most: int) -> None:
    """Sets a limit of the kernel's, below the one that this process was given."""
    _, hard = resource.getrlimit(kind)
    unlimited = hard == resource.RLIM_INFINITY
    resource.setrlimit(kind, (most if unlimited else min(most, hard), hard))
