"""Functions for multi-host runs: connecting hosts, exchanging values and exiting.

Every host runs the same Python code on the same numbers, so most decisions need no communication.
If only one host has a piece of information, such as a file, a signal or a verdict, a small
all-gather sends it to all hosts. All hosts must make these calls in the same order. On a single
host, the calls return at once without communication.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax.parallel.watchdog import Wait, waiting

T = TypeVar("T")

# The port of the coordinator, which runs on the first host. The default firewall rules of a Google
# Cloud project open it between the hosts of a TPU. They do not open JAX's default port
# (jax-ml/jax#35905).
PORT = 8476
HEARTBEAT_SECONDS = 30  # A host that is silent for this long is lost.
LEAVE_SECONDS = 3.0  # The time for which the first host lets the others end by themselves.
# Parts of the error messages of collectives that failed because a host is lost.
LOSS = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "closed by peer", "reset by peer", "halted")
# Threads in the pool of XLA:CPU, which both launches and executes programs. By default it has one
# per core or device. If programs that wait for a collective occupy all of them, the programs that
# would complete the collective never start.
THREADS = 64


def start(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Connects this process to the other processes of the run.

    Call it before anything asks JAX for its devices. If the CPU is seen as several devices, it also
    sets the environment variable NPROC, so that XLA creates enough threads.

    Args:
      coordinator: "HOST:PORT" or "HOST" of process 0. "auto" reads all arguments from the metadata
        of Cloud TPU or the environment of a GKE job. "" means a run with a single process.
      processes: The number of processes; required unless `coordinator` is "auto" or "".
      process: The index of this process, from 0; required unless `coordinator` is "auto" or "".

    Raises:
      ValueError: `processes` or `process` is missing or out of range.
    """
    forced = (
        "device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    )
    if coordinator or forced:
        os.environ.setdefault("NPROC", str(max(THREADS, os.cpu_count() or 1)))
    if not coordinator:
        return
    os.environ.setdefault("JAX_COORDINATOR_PORT", str(PORT))
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(
            f"--coordinator is {coordinator}, --processes is {processes} and --process is "
            f"{process}; expected --processes N, the number of processes, and --process I, "
            "the index of this process, from 0 to N - 1."
        )
    address = coordinator if ":" in coordinator else f"{coordinator}:{PORT}"
    jax.distributed.initialize(
        address, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def count() -> int:
    """Returns the number of hosts in the run."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def number() -> int:
    """Returns the index of this host, from 0."""
    return jax.process_index() if count() > 1 else 0


def is_first() -> bool:
    """Returns whether this is the first host, which writes all records and messages."""
    return number() == 0


def is_loss(error: BaseException | None) -> bool:
    """Returns whether an error or one of its causes means that another host is lost.

    This is so if a collective failed because a peer is gone. If the collective hangs instead, JAX
    ends the process after HEARTBEAT_SECONDS.
    """
    while error is not None and count() > 1:
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in str(error) for s in LOSS):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> None:
    """Exits the process without cleanup if the run has several processes; otherwise returns.

    A normal exit would wait for minutes for hosts that have failed too or that are behind. The
    first host waits for LEAVE_SECONDS, because it runs the coordinator, and JAX aborts the other
    hosts when the coordinator ends.
    """
    if count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(LEAVE_SECONDS)
    os._exit(code)


def largest(value: int) -> int:
    """Returns the maximum of an int32 value over all hosts."""
    return value if count() == 1 else int(_all_gathered(np.int32(value)).max())


def gathered(value: T) -> list[T]:
    """Gathers a picklable value from each host, and returns all values as a list in host order."""
    if count() == 1:
        return [value]
    data = pickle.dumps(value)
    lengths = _all_gathered(np.int32(len(data)))
    rows = _all_gathered(_padded(data, lengths.max()))
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def each(make: Callable[[], T]) -> list[T]:
    """Calls `make` on every host, and returns all results as a list in host order.

    Args:
      make: Returns a picklable value.

    Raises:
      Exception: If `make` fails on some hosts, every host raises the error of the first such host.
    """
    if count() == 1:
        return [make()]
    results = []
    for result in gathered(_try(make)):
        if isinstance(result, _Failure):
            raise result.error
        results.append(result)
    return results


def from_first(make: Callable[[], T]) -> T:
    """Calls `make` on the first host only, and returns its result on every host.

    Args:
      make: Returns a picklable value.

    Raises:
      Exception: If `make` fails, every host raises its error.
    """
    if count() == 1:
        return make()
    data = pickle.dumps(_try(make)) if is_first() else b""
    length = int(_from_first(np.int32(len(data))))
    row = _from_first(_padded(data, length))
    result = pickle.loads(row[:length].tobytes())
    if isinstance(result, _Failure):
        raise result.error
    return result


def together(make: Callable[[], T]) -> T:
    """Calls `make` on every host, and returns this host's result once all calls have succeeded.

    The result need not be picklable.

    Raises:
      Exception: If `make` fails on some hosts, every host raises the error of the first such host.
    """
    made: list[T] = []
    each(lambda: made.append(make()))
    return made[0]


class _Failure(NamedTuple):
    """The error that a function raised on one host, for transfer to the other hosts."""

    error: Exception


def _try(make: Callable[[], T]) -> T | _Failure:
    """Calls `make` and returns its result, or a `_Failure` with its error.

    If the error cannot be pickled, a RuntimeError with its text takes its place.
    """
    try:
        return make()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return _Failure(RuntimeError(f"{type(error).__name__}: {error}"))
        return _Failure(error)


def _padded(data: bytes, length: int) -> np.ndarray:
    """Pads bytes to a uint8 array whose size is the smallest power of two >= `length`.

    Every size of an all-gather compiles a program, so there should be few sizes.
    """
    row = np.zeros(1 << max(0, int(length) - 1).bit_length(), np.uint8)
    row[: len(data)] = np.frombuffer(data, np.uint8)
    return row


def _all_gathered(x: np.ndarray | np.generic) -> np.ndarray:
    """Gathers the arrays of all hosts and stacks them along a new first axis."""
    with waiting(Wait.HOSTS), jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(x)


def _from_first(x: np.ndarray | np.generic) -> np.ndarray:
    """Broadcasts the first host's array to all hosts."""
    with waiting(Wait.HOSTS), jax.transfer_guard("allow"):
        return multihost_utils.broadcast_one_to_all(x)
