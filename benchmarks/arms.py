"""Compares OPSD on correct, on incorrect and on all rollouts, from one RLVR model per seed.

    python benchmarks/arms.py [--config configs/quickstart_arms.py] [--workdir runs/arms]
        [--seeds 0 1 2] [--only-table] [--save DIRECTORY] [--config.field=value ...]

Runs the config once per seed, each in its own process (the quickstart's takes about six minutes on
two idle cores). Finished runs are not repeated, and unfinished ones resume. `--only-table` runs
nothing and reads the work directories. `--save` copies what it reads there to a directory that
`--workdir` can name later.

Prints a Markdown table of means and standard deviations over seeds. Changes also have a 95 %
interval, paired and clustered by problem, over the responses of all seeds. The last row compares
the result on incorrect rollouts with that on correct ones. The last line is a JSON object with the
values of each seed. A seed may have fewer stages than the others (`--config.stages=...`).
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
ARMS = ("opsd_correct", "opsd_incorrect")  # compared with each other, too
ARMS_CHANGE = "incorrect_over_correct"
Entries = dict[str, dict[pathlib.Path, Any]]  # name -> work directory -> entry of its report
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


def pooled(changes: dict[pathlib.Path, Any]) -> dict[str, Any]:
    """Compares the two evaluations of a change over the responses of all seeds."""
    sides = (
        [record for w, change in changes.items() for record in records.read(w / change[side])[0]]
        for side in ("from", "name")
    )
    return comparison.compare(*sides)


def describe(changes: dict[pathlib.Path, Any]) -> list[str]:
    """Formats what is compared with, and CHANGES: mean, deviation over seeds, pooled interval."""
    whole = pooled(changes)
    cells = [", ".join(sorted({change["from"] for change in changes.values()}))]
    for key in CHANGES:
        bounds = [tables.number(whole[f"{key}_{end}"], sign="+") for end in ("low", "high")]
        each = show([change[key] for change in changes.values()], "+")
        cells.append(f"{each} [{', '.join(bounds)}]")
    return cells


def gather(workdirs: list[pathlib.Path]) -> tuple[Entries, Entries, float]:
    """Reads the reports of work directories. A report may lack some stages.

    Returns:
      The evaluations; the changes, by the name of the later evaluation or ARMS_CHANGE; and the peak
      of the processes' memory, in GiB.
    """
    levels: Entries = {}
    changes: Entries = {}
    peak = 0.0
    for workdir in workdirs:
        report = json.loads((workdir / REPORT).read_text())
        peak = max(peak, report["peak_rss_gib"])
        for stage in [*filter(None, [report["untrained"]]), *report["stages"]]:
            levels.setdefault(stage["name"], {})[workdir] = stage
        for change in report["changes"]:
            changes.setdefault(change["name"], {})[workdir] = change
        if all(workdir in levels.get(arm, {}) for arm in ARMS):
            arms = dict(zip(("from", "name"), ARMS, strict=True))
            changes.setdefault(ARMS_CHANGE, {})[workdir] = arms | pooled({workdir: arms})
    return levels, changes, peak


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
    levels, changes, peak = gather(workdirs)

    print(
        "| after | seeds | accuracy, % | mean length, tokens | truncated, % "
        "| markers per 1,000 tokens | compared with | Δ accuracy, points | Δ length, % |"
    )
    print("|---" * 9 + "|")
    rows = [(name, changes.get(name)) for name in levels]
    if ARMS_CHANGE in changes:
        rows.append((ARMS[1], changes[ARMS_CHANGE]))
    for name, change in rows:
        found = list(levels[name].values())
        cells = [name, str(len(found)), show([100 * stage["accuracy"] for stage in found])]
        cells += [show([stage["mean_length"] for stage in found])]
        cells += [show([100 * stage["truncation_rate"] for stage in found])]
        cells += [show([stage["markers_per_1000"] for stage in found])]
        cells += describe(change) if change else [""] * 3
        print(f"| {' | '.join(cells)} |")

    result: dict[str, Any] = {
        name.removeprefix("opsd_"): {
            key: [round(change[key], 2) for change in found.values()] for key in CHANGES
        }
        for name, found in changes.items()
    }
    result["seeds"] = arguments.seeds
    result["stage_seconds"] = {
        name: [round(stage["seconds"]) for stage in found.values()]
        for name, found in levels.items()
        if name != UNTRAINED
    }
    result["peak_rss_gib"] = round(peak, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
