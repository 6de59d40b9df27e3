"""Writes a stage's metrics as JSON lines and TensorBoard events, and optionally to W&B."""

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
from opsd_jax.storage.files import Lines, Path, absolute, copy_into, in_bucket, read_json_lines

FILE = "metrics.jsonl"  # one row per step
GROUPS = "groups.jsonl"  # one row per problem of a step: how many of its rollouts were correct


def means(totals: Iterable[dict[str, tuple[Any, Any]]]) -> dict[str, Any]:
    """Returns the weighted mean of each metric over several updates.

    Args:
      totals: metrics of each update, name -> (sum, weight), as host numbers or arrays.

    Returns:
      Name -> the total of the sums divided by the total of the weights, a float or an array,
      without the metrics whose total weight is 0.
    """
    sums: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for metrics in totals:
        for name, (total, weight) in metrics.items():
            sums[name] = sums.get(name, 0.0) + np.float64(total)
            weights[name] = weights.get(name, 0.0) + float(weight)
    mean = {name: total / weights[name] for name, total in sums.items() if weights[name]}
    return {name: value if np.ndim(value) else float(value) for name, value in mean.items()}


def read(directory: Path, file: str = FILE) -> list[dict[str, Any]]:
    """Reads the rows of a stage's metrics file, in order. Returns [] if it does not exist."""
    path = directory / file
    fix = "Delete that line; the metrics of its step are lost."
    return read_json_lines(path, fix) if path.exists() else []


def writer(
    directory: Path, start: int, wandb_project: str = ""
) -> contextlib.AbstractContextManager[MetricsWriter | NoWriter]:
    """Returns a `MetricsWriter` on the first host, and a `NoWriter` on all other hosts."""
    return MetricsWriter(directory, start, wandb_project) if hosts.is_first() else NoWriter()


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """Formats rows as JSON Lines text."""
    return "".join(json.dumps(row) + "\n" for row in rows)


class NoWriter(contextlib.nullcontext):
    """A replacement for `MetricsWriter` that writes nothing, for hosts other than the first."""

    def __enter__(self) -> NoWriter:
        return self

    def write(self, *values: Any) -> None:
        pass

    def flush(self) -> None:
        pass


class MetricsWriter:
    """Context manager that writes the metrics of each step to files in a directory.

    It first drops the rows of steps that the resumed run will repeat, so the files equal those of
    a run that was never interrupted.
    """

    def __init__(self, directory: Path, start: int, wandb_project: str = ""):
        """Opens the files in `directory`, and drops their rows from step `start` on.

        Args:
          directory: the directory of the stage; it is created if it is missing.
          start: number of the first step to write.
          wandb_project: Weights & Biases project, which needs the extra `wandb`; "" for none.
        """
        directory.mkdir(parents=True, exist_ok=True)
        earlier = lambda file: [row for row in read(directory, file) if row["step"] < start]
        self._rows, self._groups = (
            Lines(directory / file, lines(earlier(file))) for file in (FILE, GROUPS)
        )
        self._directory = directory
        # TensorBoard's writer appends to its file, which a bucket does not allow: it writes to a
        # temporary directory, and `flush` copies the file.
        self._local = tempfile.TemporaryDirectory() if in_bucket(directory) else None
        events_directory = self._local.name if self._local else str(directory)
        self._events = tensorboardX.SummaryWriter(events_directory, purge_step=start)
        self._wandb: Any = None
        if wandb_project:
            import wandb

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
        """Writes the metrics of one step.

        Args:
          step: number of the step, from 0.
          values: metrics by name.
          groups: a JSON-ready record of each problem.
        """
        if groups:
            self._groups.write(lines({"step": step, **group} for group in groups))
        self._rows.write(lines([{"step": step, **values}]))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def flush(self) -> None:
        """Writes all buffered metrics to their files. Call it before each checkpoint."""
        self._groups.sync()
        self._rows.sync()
        self._events.flush()
        if self._local:
            copy_into(pathlib.Path(self._local.name), self._directory)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc) -> None:
        self.flush()
        self._events.close()
        if self._local:
            self._local.cleanup()
        if self._wandb is not None:
            self._wandb.finish()
