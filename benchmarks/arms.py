"""Compares OPSD on correct, on incorrect and on all rollouts, from one RLVR model per seed.

    python benchmarks/arms.py [--config configs/quickstart_arms.py] [--workdir runs/arms]
        [--seeds 0 1 2] [--only-table] [--save DIRECTORY] [--config.field=value ...]

Runs the config once per seed, each in its own process (the quickstart's takes about six minutes on
two idle cores). Finished runs are not repeated, and unfinished ones resume. `--only-table` runs
nothing and reads the work directories. `--save` copies what it reads there to a directory that
`--workdir` can name later.

Prints a Markdown table of means and standard deviations over seeds. Changes also have a 95 %
interval, paired and clustered by problem, over the responses of all seeds. The last line is a JSON
object with the values of each seed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

from opsd_jax.evaluation import comparison, divergence, records, tables
from opsd_jax.storage.names import UNTRAINED

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart_arms.py"
CHANGES = ("d_accuracy_points", "d_length_percent")
REPORT = "report/report.json"
KEPT = ("problem", "source", "sample", "response", "length", "correct", "truncated", "verdict")


def run(config: str, workdir: pathlib.Path, seed: int, overrides: list[str]) -> None:
    """Runs one seed, unless it is finished."""
    command = [sys.executable, "-m", "opsd_jax", "train", "--config", config]
    command += ["--workdir", str(workdir), f"--config.seed={seed}", *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)


def show(values: list[float], sign: str = "") -> str:
    """Formats the mean and the standard deviation of values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return tables.number(statistics.mean(values), deviation, sign)


def pooled(workdirs: list[pathlib.Path], before: str, after: str) -> dict[str, Any]:
    """Compares two evaluations over the responses of all seeds."""
    sides = ([r for w in workdirs for r in records.read(w / name)[0]] for name in (before, after))
    return comparison.compare(*sides)


def save(workdir: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies what a table or a plot of a run needs. Records lose their tokens and questions."""
    for summary in workdir.glob(f"*/{records.SUMMARY}"):
        responses, evaluation = records.read(summary.parent)
        copy = directory / summary.parent.name
        copy.mkdir(parents=True, exist_ok=True)
        kept = [{name: record[name] for name in KEPT} for record in responses]
        (copy / records.RESPONSES).write_text(records.to_lines(kept))
        records.finish(copy, evaluation)
    metrics = [*workdir.glob("*/metrics.jsonl")]
    for path in [*metrics, *workdir.glob(f"*/{divergence.FILE}"), workdir / REPORT]:
        copy = directory / path.relative_to(workdir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def main() -> None:
    """Runs the seeds and prints the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/arms"))
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--save", type=pathlib.Path)
    arguments, overrides = parser.parse_known_args()
    if arguments.save and arguments.save.resolve() == arguments.workdir.resolve():
        parser.error("--save is the --workdir; expected another directory")
    workdirs = [arguments.workdir / f"seed{seed}" for seed in arguments.seeds]
    for seed, workdir in zip(arguments.seeds, workdirs, strict=True):
        if not arguments.only_table:
            run(arguments.config, workdir, seed, overrides)
        if arguments.save:
            save(workdir, arguments.save / workdir.name)
    reports = [json.loads((workdir / REPORT).read_text()) for workdir in workdirs]

    stages = [stage["name"] for stage in reports[0]["stages"]]
    levels = {name: [r["stages"][i] for r in reports] for i, name in enumerate(stages)}
    changes = {
        change["name"]: [r["changes"][i] for r in reports]
        for i, change in enumerate(reports[0]["changes"])
    }
    print(
        "| after | accuracy, % | mean length, tokens | truncated, % | markers per 1,000 tokens "
        "| Δ accuracy, points | Δ length, % |"
    )
    print("|---|---|---|---|---|---|---|")
    if reports[0]["untrained"]:
        levels = {UNTRAINED: [r["untrained"] for r in reports], **levels}
    for name, evaluations in levels.items():
        values = lambda key, scale=1, found=evaluations: show([scale * s[key] for s in found])
        cells = [name, values("accuracy", 100), values("mean_length")]
        cells += [values("truncation_rate", 100), values("markers_per_1000")]
        if name in changes:
            whole = pooled(workdirs, changes[name][0]["from"], name)
            for key in CHANGES:
                bounds = [tables.number(whole[f"{key}_{end}"], sign="+") for end in ("low", "high")]
                each = show([change[key] for change in changes[name]], "+")
                cells.append(f"{each} [{', '.join(bounds)}]")
        print(f"| {' | '.join(cells + [''] * (7 - len(cells)))} |")

    result: dict[str, Any] = {
        (name.removeprefix("opsd_")): {
            key: [round(change[key], 2) for change in found] for key in CHANGES
        }
        for name, found in changes.items()
    }
    result["seeds"] = arguments.seeds
    result["stage_seconds"] = {name: [round(s["seconds"]) for s in levels[name]] for name in stages}
    result["peak_rss_gib"] = round(max(report["peak_rss_gib"] for report in reports), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
