"""Several hosts that run one program: how they find each other, and what they agree on.

Every host runs the same Python over the same numbers, so most decisions need no word between them.
What only one can know (a file, a signal, a verdict) is told to all by small all-gathers, which all
hosts have to reach in the same order.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax.parallel.watchdog import waiting

T = TypeVar("T")

# Of the coordinator, on the first host. The hosts of a TPU reach each other there by the firewall
# rules that Google's projects begin with; at JAX's own default they do not (jax-ml/jax#35905).
PORT = 8476
HEARTBEAT_SECONDS = 30  # of silence, after which a host is lost
LEAVE_SECONDS = 3.0  # for the others to end by themselves, where all of them do
# What the errors of collectives say when a peer is gone.
LOSS = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "closed by peer", "reset by peer", "halted")
# Of XLA's pool on CPU, which launches programs and runs them: where what waits for a collective, or
# for room, takes all of its threads, one a core or device, the others never get to theirs.
THREADS = 64


def start(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several, before anything else asks JAX for devices; where it has
    several devices of a CPU, gives these threads enough.

    Args:
      coordinator: "HOST:PORT" or "HOST" of process 0; "auto": as Cloud TPU's metadata or the
        variables of GKE's jobs say; "" for a process by itself.
      processes: how many there are; needed unless "auto".
      process: which of them this is, from 0 on.

    Raises:
      ValueError: an argument is missing, or the process is none of them.
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
            f"--coordinator {coordinator} with --processes {processes} and --process {process}; "
            "expected how many there are and which of them this is, from 0 on."
        )
    address = coordinator if ":" in coordinator else f"{coordinator}:{PORT}"
    jax.distributed.initialize(
        address, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def count() -> int:
    """How many hosts there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def number() -> int:
    """Which of them this is."""
    return jax.process_index() if count() > 1 else 0


def is_first() -> bool:
    """Whether this one writes the records and speaks for all."""
    return number() == 0


def is_loss(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, means that another host is lost: a collective
    failed. Where it hangs instead, JAX ends the process after HEARTBEAT_SECONDS.
    """
    while error is not None and count() > 1:
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in str(error) for s in LOSS):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> None:
    """Ends this process at once, where it is one of several: JAX's own way out waits for minutes
    for hosts that may have failed too, or not come so far. The first goes last: it has the
    coordinator, without which JAX aborts the others.
    """
    if count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(LEAVE_SECONDS)
    os._exit(code)


def largest(value: int) -> int:
    """The largest of the hosts' values."""
    return value if count() == 1 else int(_all_gathered(np.int32(value)).max())


def gathered(value: T) -> list[T]:
    """The value of each host, in their order; it can be pickled."""
    if count() == 1:
        return [value]
    data = pickle.dumps(value)
    lengths = _all_gathered(np.int32(len(data)))
    rows = _all_gathered(_padded(data, lengths.max()))
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def each(make: Callable[[], T]) -> list[T]:
    """What `make` returns on each host, in their order; it can be pickled.

    Raises:
      Exception: what it raised on the first host of those on which it did, on all hosts.
    """
    if count() == 1:
        return [make()]
    made = gathered(_tried(make))
    for _, error in made:
        if error is not None:
            raise error
    return [result for result, _ in made]  # type: ignore[misc]


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first host, on all. It runs there alone, and can be pickled.

    Raises:
      Exception: what it raised, on all hosts.
    """
    if count() == 1:
        return make()
    result, error = _tried(make) if is_first() else (None, None)
    data = pickle.dumps((result, error)) if is_first() else b""
    length = int(_from_first(np.int32(len(data))))
    row = _from_first(_padded(data, length))
    result, error = pickle.loads(row[:length].tobytes())
    if error is not None:
        raise error
    return result


def together(make: Callable[[], T]) -> T:
    """What `make` returns on this host, if it fails on none.

    Raises:
      Exception: as `each`.
    """
    made: list[T] = []
    each(lambda: made.append(make()))
    return made[0]


def _tried(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it returns and None, or None and what it raises, in a form that can be pickled."""
    try:
        return make(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _padded(data: bytes, length: int) -> np.ndarray:
    """The bytes, with room for `length` of them: of few sizes, as each is a program."""
    row = np.zeros(1 << max(0, int(length) - 1).bit_length(), np.uint8)
    row[: len(data)] = np.frombuffer(data, np.uint8)
    return row


def _all_gathered(x: np.ndarray | np.generic) -> np.ndarray:
    with waiting("other hosts"), jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(x)


def _from_first(x: np.ndarray | np.generic) -> np.ndarray:
    with waiting("other hosts"), jax.transfer_guard("allow"):
        return multihost_utils.broadcast_one_to_all(x)
