"""The quickstart, killed and stopped at random moments: is it the run that was never disturbed?

    python benchmarks/survival.py [--kills 25] [--sigterms 10] [--workdir runs/survival] [--seed 0]

Runs the quickstart once undisturbed; once killed (SIGKILL) so many times and started again each
time; once stopped (SIGTERM) so many times and started again. Compares parameters, metrics and
responses of the three to the bit. A step is lost if a stopped run has written its metrics and no
checkpoint has it. Prints where the kills hit, and last one JSON line.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("sft", "rlvr", "opsd")
TIMES = {"seconds", "verifier_wait_seconds"}


def start(workdir: pathlib.Path) -> subprocess.Popen:
    """The run in that directory, from where it is."""
    command = [sys.executable, "-m", "opsd_jax.main", "train", "--workdir", str(workdir)]
    command += ["--config", str(ROOT / "configs" / "quickstart.py")]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"), "JAX_PLATFORMS": "cpu"}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    return subprocess.Popen(command, env=os.environ | cache, stdout=log, stderr=log)


def is_done(workdir: pathlib.Path) -> bool:
    """Whether the run has ended."""
    return (workdir / "report" / "report.json").exists()


def where(workdir: pathlib.Path) -> str:
    """What a run is at, as its directory tells."""
    if any(workdir.glob("*/checkpoints/*tmp*")) or any(workdir.glob("*tmp*")):
        return "saving"
    begun = [name for name in STAGES if (workdir / name).is_dir()]
    if not begun:
        return "before the first stage"
    if (workdir / begun[-1] / "evaluation.json").exists():
        return f"after {begun[-1]}"
    evaluates = (workdir / begun[-1] / "settings.json").exists()
    return f"in the evaluation of {begun[-1]}" if evaluates else f"in {begun[-1]}"


def restored(workdir: pathlib.Path, process: subprocess.Popen, began: float) -> float | None:
    """Seconds until a started run has its state and begins to work; None if it ends before."""
    while process.poll() is None:
        for path in (*workdir.glob("*/metrics.jsonl"), *workdir.glob("*/responses.jsonl")):
            if path.stat().st_mtime > began:
                return time.time() - began
        time.sleep(0.05)
    return None


def kept(workdir: pathlib.Path) -> int:
    """Grows with what a run that is killed now would keep."""
    checkpoints = [int(p.name) for p in workdir.glob("*/checkpoints/*") if p.name.isdigit()]
    return sum(checkpoints) + 10_000 * len([*workdir.glob("*/evaluation.json")])


def disturbed(
    workdir: pathlib.Path, signum: int, times: int, rng: random.Random
) -> tuple[list[str], int, list[float]]:
    """Runs it to the end with so many signals: of four, three come some seconds after it has kept
    something new, and one whenever it is.

    Returns:
      Where each hit, the steps that were lost, and the seconds of each restoration.
    """
    hits: list[str] = []
    lost, seconds = 0, []
    while not is_done(workdir):
        began, process = time.time(), start(workdir)
        if len(hits) == times:
            assert process.wait() == 0, f"see {workdir}.log"
            break
        if rng.random() < 0.75:
            before = kept(workdir)
            taken = restored(workdir, process, began)
            if taken is not None and hits:
                seconds.append(taken)
            while process.poll() is None and kept(workdir) <= before:
                time.sleep(0.02)
        time.sleep(rng.uniform(0, 8))
        if process.poll() is not None:
            continue
        hits.append(where(workdir))
        process.send_signal(signum)
        code = process.wait()
        if signum == signal.SIGTERM and code == 128 + signum:
            lost += steps_lost(workdir)
    return hits, lost, seconds


def steps_lost(workdir: pathlib.Path) -> int:
    """Steps whose metrics are written and that no checkpoint has."""
    lost = 0
    for name in STAGES:
        path = workdir / name / "metrics.jsonl"
        if path.exists():
            steps = [int(p.name) for p in (workdir / name / "checkpoints").glob("[0-9]*")]
            lost += len(path.read_text().splitlines()) - max(steps, default=0)
    return lost


def outcome(workdir: pathlib.Path) -> list:
    """All of a run that does not tell the time."""
    made: list = []
    for name in STAGES:
        with ocp.StandardCheckpointer() as checkpointer:
            made.append(checkpointer.restore(workdir / name / "params"))
        rows = map(json.loads, (workdir / name / "metrics.jsonl").read_text().splitlines())
        made.append([{k: v for k, v in row.items() if k not in TIMES} for row in rows])
        for file in ("responses.jsonl", "groups.jsonl", "divergence.json"):
            path = workdir / name / file
            made.append(path.read_text() if path.exists() else None)
    return made


def equal(a, b) -> bool:
    """Whether two trees are the same, arrays to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b) if hasattr(a, "shape") else a == b


def main() -> None:
    """Runs the three and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--sigterms", type=int, default=10)
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
    for place, count in collections.Counter(killed).most_common():
        print(f"killed {place}: {count}")
    for place, count in collections.Counter(stopped).most_common():
        print(f"stopped {place}: {count}")
    expected = outcome(workdir / "undisturbed")
    line = {
        "kills": len(killed),
        "bit_equal": all(equal(expected, outcome(workdir / w)) for w in ("killed", "stopped")),
        "sigterms": len(stopped),
        "steps_lost": lost,
        "restored_seconds_median": round(statistics.median(after_kills + after_stops), 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
