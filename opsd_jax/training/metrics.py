"""Metrics of a stage: JSON lines and TensorBoard events, and Weights & Biases if asked for."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorboardX

from opsd_jax.parallel import hosts
from opsd_jax.storage.files import Lines, Path, absolute, in_bucket, read_json_lines, written

FILE = "metrics.jsonl"
GROUPS = "groups.jsonl"  # of the problems that a step rolled out, how many rollouts were correct


def means(totals: Iterable[dict[str, tuple[Any, Any]]]) -> dict[str, float]:
    """Host numbers of `(sum, weight)` metrics: all sums over all weights; none where that is 0."""
    sums: dict[str, np.ndarray] = {}
    for metrics in totals:
        for name, pair in metrics.items():
            sums[name] = sums.get(name, np.zeros(2)) + np.array([float(x) for x in pair])
    return {name: float(s / w) for name, (s, w) in sums.items() if w}


def read(directory: Path, file: str = FILE) -> list[dict[str, Any]]:
    """The rows written so far, in order: of FILE one a step, of GROUPS one a problem."""
    path = directory / file
    mend = "Delete that line: what it told of its step is lost."
    return read_json_lines(path, mend) if path.exists() else []


def writer(
    directory: Path, start: int, wandb_project: str = ""
) -> contextlib.AbstractContextManager[MetricsWriter | NoWriter]:
    """A `MetricsWriter` on the first host; others write nothing."""
    return MetricsWriter(directory, start, wandb_project) if hosts.is_first() else NoWriter()


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class NoWriter(contextlib.nullcontext):
    """In the place of a `MetricsWriter`: writes nothing."""

    def __enter__(self) -> NoWriter:
        return self

    def write(self, *values: Any) -> None:
        pass

    def flush(self) -> None:
        pass


class MetricsWriter:
    """Writes a row a step under `directory`. A context manager.

    Rows of steps that the resumed run is going to take again are dropped first, so that the record
    is that of a run which was never stopped.
    """

    def __init__(self, directory: Path, start: int, wandb_project: str = ""):
        """`start`: the first step to be written. `wandb_project`: "" for none."""
        directory.mkdir(parents=True, exist_ok=True)
        rows = lambda file: [row for row in read(directory, file) if row["step"] < start]
        self._rows, self._groups = (
            Lines(directory / file, _lines(rows(file))) for file in (FILE, GROUPS)
        )
        self._directory = directory
        # TensorBoard's writer appends: for a bucket here, and what it has written is copied.
        self._local = tempfile.TemporaryDirectory() if in_bucket(directory) else None
        where = self._local.name if self._local else str(directory)
        self._events = tensorboardX.SummaryWriter(where, purge_step=start)
        self._wandb: Any = None
        if wandb_project:
            import wandb  # the extra `wandb`

            self._wandb = wandb.init(
                project=wandb_project,
                name=f"{directory.parent.name}/{directory.name}",
                dir=None if in_bucket(directory) else str(directory),
                id=f"{zlib.crc32(str(absolute(directory)).encode()):08x}",
                resume="allow",
            )

    def write(
        self, step: int, values: dict[str, float], groups: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Writes the values of one step and the records of its problems."""
        if groups:
            self._groups.write(_lines({"step": step, **group} for group in groups))
        self._rows.write(_lines([{"step": step, **values}]))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def flush(self) -> None:
        """Writes out what is still held here: all of the steps that a checkpoint has behind it."""
        self._groups.sync()
        self._rows.sync()
        self._events.flush()
        if self._local:
            for path in pathlib.Path(self._local.name).iterdir():
                with written(self._directory):
                    (self._directory / path.name).write_bytes(path.read_bytes())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc) -> None:
        self.flush()
        self._events.close()
        if self._local:
            self._local.cleanup()
        if self._wandb is not None:
            self._wandb.finish()
