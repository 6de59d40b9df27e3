"""Measures what checkpoints cost: the quickstart's steps with them and without.

    python benchmarks/saving.py [--repeats 3] [--workdir runs/saving] [--checksums]

Runs the quickstart alternately as it is, and with a checkpoint at the end of each stage only.
Programs come from JAX's compilation cache. The seconds of a run are the sum over its steps, without
the first step of each stage. Prints the seconds of each run, and as its last line a JSON object:
the median ratio of two consecutive runs minus one, and the seconds.

With --checksums, it only measures the checksums of the arrays: it saves a state of 1 GiB, and
prints the time that the checksums take as a fraction of the time until the checkpoint is on disk.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import statistics
import time

import jax
import survival

from opsd_jax.training.checkpoint import Checkpoints
from opsd_jax.training.checksum import checksums


def run(workdir: pathlib.Path, *arguments: str) -> float:
    """Runs the quickstart in an empty work directory; returns the seconds of its steps."""
    shutil.rmtree(workdir, ignore_errors=True)
    assert survival.start(workdir, *arguments).wait() == 0, f"see {workdir}.log"
    seconds = 0.0
    for name in survival.STAGES:
        rows = (workdir / name / "metrics.jsonl").read_text().splitlines()
        seconds += sum(json.loads(row)["seconds"] for row in rows[1:])
    return seconds


def checksum_share(directory: pathlib.Path, repeats: int) -> dict[str, float]:
    """Returns the seconds of the checksums and of saving, and their median ratio."""
    make = lambda i: jax.random.normal(jax.random.key(i), (1024, 4096))  # 16 MiB
    state = jax.block_until_ready({f"array{i}": make(i) for i in range(64)})
    checksums(state)  # compiles
    sums, saves = [], []
    for i in range(1, repeats + 1):
        began = time.monotonic()
        checksums(state)
        sums.append(time.monotonic() - began)
        began = time.monotonic()
        with Checkpoints(directory / "checkpoints") as checkpoints:
            checkpoints.save(i, state)
        saves.append(time.monotonic() - began)
    shutil.rmtree(directory / "checkpoints")
    ratios = [a / b for a, b in zip(sums, saves, strict=True)]
    return {
        "checksum_share": round(statistics.median(ratios), 4),
        "checksum_seconds": round(statistics.median(sums), 3),
        "save_seconds": round(statistics.median(saves), 3),
    }


def main() -> None:
    """Runs both variants alternately and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/saving"))
    parser.add_argument("--checksums", action="store_true")
    arguments = parser.parse_args()
    workdir = arguments.workdir.absolute()
    never = [f"--config.{name}.checkpoint_every=1000000" for name in survival.STAGES]
    workdir.mkdir(parents=True, exist_ok=True)
    if arguments.checksums:
        print(json.dumps(checksum_share(workdir, arguments.repeats)))
        return

    run(workdir / "run")  # fills the compilation cache
    saved, unsaved = [], []
    for _ in range(arguments.repeats):
        saved.append(run(workdir / "run"))
        unsaved.append(run(workdir / "run", *never))
        print(f"with checkpoints {saved[-1]:.1f} s, without {unsaved[-1]:.1f} s", flush=True)
    ratios = [a / b for a, b in zip(saved, unsaved, strict=True)]
    line = {
        "saving_share": round(statistics.median(ratios) - 1, 4),
        "seconds_with": [round(s, 1) for s in saved],
        "seconds_without": [round(s, 1) for s in unsaved],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
