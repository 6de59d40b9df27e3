"""Compares OPSD on correct, on incorrect and on all rollouts, from one RLVR model per seed.

    python benchmarks/arms.py [--seeds 0 1 2] [--workdir runs/arms]

Runs configs/quickstart_arms.py once per seed, each in its own process (about six minutes on two
idle cores). Finished runs are not repeated, and unfinished ones resume. Prints a Markdown table of
means and standard deviations over seeds, and as its last line a JSON object with the values of
each seed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart_arms.py"


def run(seed: int, workdir: pathlib.Path) -> dict:
    """Runs one seed, unless it is finished, and returns its report."""
    command = [sys.executable, "-m", "opsd_jax", "train", "--config", str(CONFIG)]
    command += ["--workdir", str(workdir), f"--config.seed={seed}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((workdir / "report" / "report.json").read_text())


def show(values: list[float], sign: str = "") -> str:
    """Formats the mean and the standard deviation of values."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.1f} ± {deviation:.1f}"


def main() -> None:
    """Runs the seeds and prints the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/arms"))
    arguments = parser.parse_args()
    reports = [run(seed, arguments.workdir / f"seed{seed}") for seed in arguments.seeds]

    stages = [stage["name"] for stage in reports[0]["stages"]]
    levels = {
        name: [next(s for s in r["stages"] if s["name"] == name) for r in reports]
        for name in stages
    }
    changes = {
        name: [next(c for c in r["changes"] if c["name"] == name) for r in reports]
        for name in stages
    }
    print("| after | accuracy, % | mean length | Δ accuracy, points | Δ length, % |")
    print("|---|---|---|---|---|")
    for name in stages:
        cells = [
            name,
            show([100 * s["accuracy"] for s in levels[name]]),
            show([s["mean_length"] for s in levels[name]]),
        ]
        cells += (
            ["", ""]
            if name == "sft"
            else [
                show([c["d_accuracy_points"] for c in changes[name]], "+"),
                show([c["d_length_percent"] for c in changes[name]], "+"),
            ]
        )
        print(f"| {' | '.join(cells)} |")

    result = {
        (name.removeprefix("opsd_")): {
            key: [round(c[key], 2) for c in changes[name]]
            for key in ("d_accuracy_points", "d_length_percent")
        }
        for name in stages
        if name != "sft"
    }
    result["seeds"] = arguments.seeds
    result["stage_seconds"] = {name: [round(s["seconds"]) for s in levels[name]] for name in stages}
    result["peak_rss_gib"] = round(max(report["peak_rss_gib"] for report in reports), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
