"""Kills and stops the quickstart at random moments; compares it with an undisturbed run.

    python benchmarks/survival.py [--kills 25] [--sigterms 10] [--losses 3] [--seed 0]
        [--workdir runs/survival]

The first part runs the quickstart three times: undisturbed, killed with SIGKILL `--kills` times,
and stopped with SIGTERM `--sigterms` times. After each signal it starts the same command again. It
compares parameters, metrics and responses of the three runs bit for bit. A step is lost if a
stopped run has written its metrics but no checkpoint includes it.

The second part runs the three stages with fewer steps, also three times: as one process with eight
devices, as two processes with four devices each, and as two processes of which one is killed
`--losses` times. The second run must have the same token ids as the first, and the same metrics
except for rounding. The third run must equal the second bit for bit. (The second part has fewer
steps because SFT's 1,300 steps amplify rounding: two processes add numbers in a different order
than one.)

Prints where each signal hit, and as its last line a JSON object.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from opsd_jax.training.speed import without_times

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("sft", "rlvr", "opsd")
FEWER = {
    "sft.steps": 150,
    "sft.checkpoint_every": 50,
    "rlvr.steps": 6,
    "rlvr.checkpoint_every": 2,
    "opsd.steps": 6,
    "opsd.checkpoint_every": 2,
    "opsd.gate": "all",
    "evaluation.problems": 128,
}
SHORT = [f"--config.{field}={value}" for field, value in FEWER.items()]


def start(workdir: pathlib.Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts or resumes the run in a work directory; its output goes to `<workdir>.log`."""
    command = [sys.executable, "-m", "opsd_jax", "train", "--workdir", str(workdir)]
    command += ["--config", str(ROOT / "configs" / "quickstart.py"), *arguments]
    changes = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    return subprocess.Popen(command, env=os.environ | changes, stdout=log, stderr=log)


def start_pair(workdir: pathlib.Path) -> list[subprocess.Popen]:
    """Starts or resumes the run with fewer steps, as two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    return [start(workdir, *SHORT, *hosts, str(i), devices=4) for i in range(2)]


def is_done(workdir: pathlib.Path) -> bool:
    """Returns whether the run in a work directory has written its report."""
    return (workdir / "report" / "report.json").exists()


def saves(workdir: pathlib.Path) -> set[pathlib.Path]:
    """Returns the temporary directories of saves that are in progress or were interrupted."""
    return {*workdir.glob("*/checkpoints/*tmp*"), *workdir.glob("*/*tmp*")}


def where(workdir: pathlib.Path, cut_off: set[pathlib.Path]) -> str:
    """Describes the current work of a run; `cut_off` are unfinished saves of earlier processes."""
    begun = [name for name in STAGES if (workdir / name).is_dir()]
    if not begun:
        return "before the first stage"
    if saves(workdir) - cut_off:
        return f"in a save of {begun[-1]}"
    if (workdir / begun[-1] / "evaluation.json").exists():
        return f"after {begun[-1]}"
    evaluates = (workdir / begun[-1] / "settings.json").exists()
    return f"in the evaluation of {begun[-1]}" if evaluates else f"in {begun[-1]}"


def restored(workdir: pathlib.Path, process: subprocess.Popen, began: float) -> float | None:
    """Returns the seconds until a resumed run writes a record; None if it ends without one."""
    while process.poll() is None:
        for path in (*workdir.glob("*/metrics.jsonl"), *workdir.glob("*/responses.jsonl")):
            if path.stat().st_mtime > began:
                return time.time() - began
        time.sleep(0.05)
    return None


def disturbed(
    workdir: pathlib.Path, signum: int, times: int, rng: random.Random
) -> tuple[list[str], int, list[float]]:
    """Runs the quickstart to its end and interrupts it with signals.

    Each stage gets the same number of signals. One in four comes while the process starts, two come
    up to 4 s after the process has begun to work, and one comes as soon as it saves.

    Args:
      workdir: the work directory.
      signum: the signal.
      times: number of signals.
      rng: chooses the moments.

    Returns:
      Where each signal hit, the number of lost steps, and the seconds of each restart.
    """
    hits: list[str] = []
    lost, seconds = 0, []
    while not is_done(workdir):
        began, cut_off, process = time.time(), saves(workdir), start(workdir)
        if len(hits) == times:
            assert process.wait() == 0, f"see {workdir}.log"
            break
        moment = rng.choice(("starting", "working", "working", "saving"))
        if moment != "starting":
            taken = restored(workdir, process, began)
            if taken is not None and hits:
                seconds.append(taken)
        stage = workdir / STAGES[len(hits) * len(STAGES) // times]
        while process.poll() is None and hits and not stage.is_dir():
            time.sleep(0.02)
        if moment == "saving":
            while process.poll() is None and not saves(workdir) - cut_off:
                time.sleep(0.002)
        else:
            time.sleep(rng.uniform(0, 4))
        if process.poll() is not None:
            assert process.wait() == 0, f"see {workdir}.log"
            continue
        hits.append(where(workdir, cut_off))
        process.send_signal(signum)
        code = process.wait()
        if signum == signal.SIGTERM:
            # The run saved and exited, or the signal came before its handler was in place.
            assert code in (128 + signum, -signum), f"exit code {code}: see {workdir}.log"
            lost += steps_lost(workdir)
    return hits, lost, seconds


def bereaved(
    workdir: pathlib.Path, times: int, rng: random.Random
) -> tuple[list[str], list[float]]:
    """Runs the quickstart as two processes to its end, and kills one of them several times.

    Each stage gets the same number of kills, up to 20 s after the first step of the stage.

    Args:
      workdir: the work directory.
      times: number of kills.
      rng: chooses the moments and the processes.

    Returns:
      Where each kill hit, and the seconds until the other process ended.
    """
    hits: list[str] = []
    seconds: list[float] = []
    while not is_done(workdir):
        began, cut_off, pair = time.time(), saves(workdir), start_pair(workdir)
        if len(hits) == times:
            assert [process.wait() for process in pair] == [0, 0], f"see {workdir}.log"
            break
        restored(workdir, pair[0], began)
        rows = workdir / STAGES[len(hits) * len(STAGES) // times] / "metrics.jsonl"
        while not rows.exists():
            assert pair[0].poll() is None, f"see {workdir}.log"
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 20))
        lost, left = rng.sample(pair, 2)
        hits.append(where(workdir, cut_off))
        lost.kill()
        killed_at = time.monotonic()
        code = left.wait()
        seconds.append(time.monotonic() - killed_at)
        assert code in (75, -signal.SIGABRT), f"exit code {code}: see {workdir}.log"
    return hits, seconds


def steps_lost(workdir: pathlib.Path) -> int:
    """Returns the number of steps with metrics that no checkpoint includes."""
    lost = 0
    for name in STAGES:
        path = workdir / name / "metrics.jsonl"
        if path.exists():
            steps = [int(p.name) for p in (workdir / name / "checkpoints").glob("[0-9]*")]
            lost += len(path.read_text().splitlines()) - max(steps, default=0)
    return lost


def outcome(workdir: pathlib.Path) -> list:
    """Returns parameters, metrics without times, responses and divergence curves of a run."""
    results: list = []
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    for name in STAGES:
        with ocp.StandardCheckpointer() as checkpointer:
            path = workdir / name / "params"
            shapes = checkpointer.metadata(path).item_metadata.tree
            results.append(checkpointer.restore(path, jax.tree.map(abstract, shapes)))
        rows = map(json.loads, (workdir / name / "metrics.jsonl").read_text().splitlines())
        results.append([*map(without_times, rows)])
        for file in ("responses.jsonl", "groups.jsonl", "divergence.json"):
            path = workdir / name / file
            results.append(path.read_text() if path.exists() else None)
    return results


def equal(a, b) -> bool:
    """Returns whether two trees are exactly equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b) if hasattr(a, "shape") else a == b


def largest_difference(a: pathlib.Path, b: pathlib.Path) -> float:
    """Returns the largest difference between metrics of two runs, relative to max(|x|, 0.001)."""
    largest = 0.0
    for name in STAGES:
        texts = ((w / name / "metrics.jsonl").read_text().splitlines() for w in (a, b))
        for x, y in zip(*(map(json.loads, lines) for lines in texts), strict=True):
            for metric in without_times(x):
                difference = abs(x[metric] - y[metric]) / max(abs(x[metric]), 1e-3)
                largest = max(largest, difference)
    return largest


def ids(workdir: pathlib.Path) -> list[str]:
    """Returns the responses of a run and the records of its rollouts, as text."""
    paths = [workdir / n / f for n in STAGES for f in ("responses.jsonl", "groups.jsonl")]
    return [path.read_text() for path in paths if path.exists()]


def main() -> None:
    """Runs both parts and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--sigterms", type=int, default=10)
    parser.add_argument("--losses", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/survival"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    workdir, rng = arguments.workdir.absolute(), random.Random(arguments.seed)
    workdir.mkdir(parents=True, exist_ok=True)

    assert start(workdir / "undisturbed").wait() == 0, f"see {workdir}/undisturbed.log"
    killed, _, after_kills = disturbed(workdir / "killed", signal.SIGKILL, arguments.kills, rng)
    stopped, lost, after_stops = disturbed(
        workdir / "stopped", signal.SIGTERM, arguments.sigterms, rng
    )
    assert start(workdir / "eight", *SHORT, devices=8).wait() == 0, f"see {workdir}/eight.log"
    assert [process.wait() for process in start_pair(workdir / "pair")] == [0, 0]
    bereft, ended = bereaved(workdir / "bereaved", arguments.losses, rng)
    for what, hits in (("killed", killed), ("stopped", stopped), ("one of two killed", bereft)):
        for place, count in collections.Counter(hits).most_common():
            print(f"{what} {place}: {count}")
    expected = outcome(workdir / "undisturbed")
    line = {
        "kills": len(killed),
        "bit_equal": all(equal(expected, outcome(workdir / w)) for w in ("killed", "stopped")),
        "sigterms": len(stopped),
        "steps_lost": lost,
        "restored_seconds_median": round(statistics.median(after_kills + after_stops), 2),
        "pair_ids_equal": ids(workdir / "eight") == ids(workdir / "pair"),
        "pair_metrics_difference": largest_difference(workdir / "eight", workdir / "pair"),
        "hosts_lost": len(bereft),
        "other_ended_seconds_max": round(max(ended), 1),
        "pair_bit_equal": equal(outcome(workdir / "pair"), outcome(workdir / "bereaved")),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
