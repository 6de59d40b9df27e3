"""The report of a run: `report.json`, `report.md`, the plots, and an HTML page.

Everything is read from the work directory. A report can therefore be written again at any time, and
also for a run that has finished only some of its stages.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsd_jax.evaluation import comparison, divergence, markup, page, plots, records
from opsd_jax.evaluation.statistics import Record
from opsd_jax.stages import algorithm_of
from opsd_jax.stages.options import StageOptions
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.storage.names import REPORT, UNTRAINED
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.speed import OTHER, PARTS, SPEED, median


class Report(NamedTuple):
    """The content of a run's report: results, plots and responses.

    Attributes:
      results: the content of `report.json`.
      plots: name -> SVG.
      responses: name of an evaluation -> its records.
    """

    results: dict[str, Any]
    plots: dict[str, str]
    responses: dict[str, list[Record]]


def gather(sections: Mapping[str, StageOptions], workdir: Path, note: str) -> Report:
    """Builds a run's report: reads the finished stages, compares them, and draws the plots.

    Args:
      sections: name of a stage -> its options, in the order of the run.
      workdir: the work directory of the run.
      note: a note about the task for the reader; "" for none.
    """
    evaluations = {
        name: records.read(workdir / name)
        for name in (UNTRAINED, *sections)
        if (workdir / name / records.SUMMARY).exists()
    }
    stages, changes = [], []
    for name, options in sections.items():
        if name not in evaluations:
            continue
        own = {"algorithm": options.algorithm, "init_from": options.init_from}
        reported = algorithm_of(options.algorithm).reported
        own |= {field: getattr(options, field) for field in reported}
        responses, summary = evaluations[name]
        rows = metrics_lib.read(workdir / name)
        stages.append(own | summary | verification(rows) | speed(rows, summary["seconds"]))
        before = options.init_from or UNTRAINED
        if before in evaluations:
            change = comparison.compare(evaluations[before][0], responses)
            changes.append({"name": name, "from": before, **own, **change})
    summaries = {name: summary for name, (_, summary) in evaluations.items()}
    results = {
        "stages": stages,
        "changes": changes,
        "untrained": summaries.get(UNTRAINED),
        "note": note,
        "seconds": sum(summary["seconds"] for summary in summaries.values()),
        "peak_rss_gib": max((s["peak_rss_gib"] for s in summaries.values()), default=0.0),
        **_environment(),
    }
    responses_of = {name: responses for name, (responses, _) in evaluations.items()}
    return Report(results, draw(workdir, stages, changes, responses_of), responses_of)


def _environment() -> dict[str, Any]:
    """Returns the current time, the machine and the package versions, for `report.json`."""
    return {
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("opsd-jax", "jax", "flax", "optax")
        },
    }


def verification(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Returns a stage's verdict counts, and the fraction of time spent waiting for verdicts.

    Args:
      rows: the metrics of the stage, one dictionary per step.

    Returns:
      `verdicts`: reason -> number of rollouts with this verdict. `verifier_wait_share`: the
      fraction of the time that the device waited for verdicts, without the first step; None if
      there is no later step. Empty for a stage without rollouts.
    """
    verdicts: Counter[str] = Counter()
    for row in rows:
        verdicts.update({k: int(v) for k, v in row.items() if k.startswith("verdict/")})
    if not verdicts:
        return {}
    waited, seconds = (
        sum(row[name] for row in rows[1:]) for name in ("verifier_wait_seconds", "seconds")
    )
    return {
        "verifier_wait_share": waited / seconds if seconds else None,
        "verdicts": {name.removeprefix("verdict/"): count for name, count in verdicts.items()},
    }


def speed(rows: Sequence[dict[str, float]], seconds: float) -> dict[str, Any]:
    """Returns where a stage's time went, and how fast its updates were.

    Args:
      rows: the metrics of the stage, one dictionary per step.
      seconds: the time of the whole stage.

    Returns:
      `time_shares`: the fraction of the time that the host spent waiting for the train step, for
      decoding and so on (`seconds/...` in the metrics), and on everything outside of steps, mostly
      the evaluation. They add up to 1. `speed`: medians of the figures `speed/...`, without the
      first step; a figure is missing if it is unknown. Empty for a run of an earlier version.
    """
    if not rows or any(OTHER not in row for row in rows):
        return {}
    parts = {
        name.removeprefix(PARTS): sum(row[name] for row in rows)
        for name in rows[0]
        if name.startswith(PARTS)
    }
    parts["outside_of_steps"] = seconds - sum(parts.values())
    later = rows[1:] or rows
    names = sorted({name for row in later for name in row if name.startswith(SPEED)})
    return {
        "time_shares": {name: part / seconds for name, part in parts.items()},
        "speed": {name.removeprefix(SPEED): median(rows, name) for name in names},
    }


def draw(
    workdir: Path,
    stages: Sequence[dict[str, Any]],
    changes: Sequence[dict[str, Any]],
    responses: dict[str, list[Record]],
) -> dict[str, str]:
    """Draws the plots of a run's report, as SVG text.

    Args:
      workdir: the work directory of the run.
      stages, changes: these entries of `report.json`.
      responses: name of an evaluation -> its records.

    Returns:
      Name of a plot, which is also the name of its file -> SVG.
    """
    drawn = {}
    if stages:
        drawn["stages"] = plots.stages([s | {"name": page.title(s)} for s in stages])
    arms = page.arms(changes)
    if len(arms) > 1:
        drawn["gates"] = plots.comparison([(page.title(change), change) for change in arms])
    for change in arms:
        name, before = change["name"], change["from"]
        old, new = ([record["length"] for record in responses[n]] for n in (before, name))
        drawn[f"lengths_{name}"] = plots.lengths({before: old, page.title(change): new})
        path = workdir / name / divergence.FILE
        if path.exists() and any((curves := files.read_json(path)).values()):
            drawn[f"divergence_{name}"] = plots.divergence(curves)
    for stage in stages:
        rows = metrics_lib.read(workdir / stage["name"])
        curves = algorithm_of(stage["algorithm"]).curves
        # A step without training rows lacks some metrics, and some options add metrics.
        if curves := [curve for curve in curves if any(curve.metric in row for row in rows)]:
            drawn[f"training_{stage['name']}"] = plots.training(rows, curves)
    return drawn


def markdown(report: Report) -> str:
    """Returns the text of `report.md`: the tables, the method, the note and the plots."""
    lines = ["# Report"]
    for table in page.tables_of(report.results):
        lines += ["", *table.markdown()]
    lines += [
        "",
        markup.markdown(page.method(report.results)),
        "",
        *map(markup.markdown, report.results["note"].splitlines()),
        "",
        *(f"![{name.replace('_', ' ')}]({name}.svg)" for name in report.plots),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(sections: Mapping[str, StageOptions], workdir: Path, note: str) -> Path:
    """Writes a run's report to `workdir/report/`. The arguments are the same as for `gather`.

    Returns:
      The path of the HTML page.
    """
    report = gather(sections, workdir, note)
    directory = workdir / REPORT
    directory.mkdir(parents=True, exist_ok=True)
    results = files.to_json(report.results, indent=2, ensure_ascii=False)
    files.write_atomically(directory / "report.json", results + "\n")
    files.write_atomically(directory / "report.md", markdown(report))
    for name, svg in report.plots.items():
        files.write_atomically(directory / f"{name}.svg", svg)
    html = directory / "index.html"
    files.write_atomically(html, page.render(report.results, report.plots, report.responses))
    return html
