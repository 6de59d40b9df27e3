"""The report of a run: `report.json` with its figures, `report.md` and plots, and one HTML page.

Everything is read from the working directory, so a report can be made again, also of a run that has
only done some of its stages.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections import Counter
from typing import Any

from ml_collections import ConfigDict

from opsd_jax.evaluation import comparison, divergence, page, plots
from opsd_jax.evaluation import records as evaluate
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.training import metrics as metrics_lib

# By algorithm, what is drawn of its training: (metric, label, scale).
CURVES: dict[str, list[tuple[str, str, float]]] = {
    "sft": [("loss", "loss, nats a token", 1), ("token_accuracy", "token accuracy, %", 100)],
    "rlvr": [("reward", "reward", 1), ("length", "mean length, tokens", 1)],
    "opsd": [
        ("token_divergence", "divergence a token, nats", 1),
        ("length", "mean length, tokens", 1),
        ("reward", "reward", 1),
    ],
}


def gather(config: ConfigDict, workdir: Path, untrained: str, note: str) -> dict[str, Any]:
    """All that a report shows, of the stages that are done.

    Args:
      config: of the run.
      workdir: its directory.
      untrained: the name of the evaluation of the initial parameters.
      note: what a reader has to know of the task, or "".

    Returns:
      `figures`: what `report.json` holds; `plots`: name -> SVG; `responses`: evaluation -> records.
    """
    evaluations = {
        name: evaluate.read(workdir / name)
        for name in (untrained, *config.stages)
        if (workdir / name / evaluate.SUMMARY).exists()
    }
    stages, changes = [], []
    for name in config.stages:
        if name not in evaluations:
            continue
        section = config[name]
        own = {"algorithm": section.algorithm, "init_from": section.init_from}
        if section.algorithm == "opsd":
            own["gate"] = section.gate
        responses, summary = evaluations[name]
        stages.append(own | summary | verification(metrics_lib.read(workdir / name)))
        before = section.init_from or untrained
        if before in evaluations:
            change = comparison.compare(evaluations[before][0], responses)
            changes.append({"name": name, "from": before, **own, **change})
    figures = {
        "stages": stages,
        "changes": changes,
        "untrained": evaluations[untrained][1] if untrained in evaluations else None,
        "note": note,
        "seconds": sum(summary["seconds"] for _, summary in evaluations.values()),
        "peak_rss_gib": max((s["peak_rss_gib"] for _, s in evaluations.values()), default=0.0),
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("opsd-jax", "jax", "flax", "optax")
        },
    }
    judged = {name: evaluation[0] for name, evaluation in evaluations.items()}
    return {
        "figures": figures,
        "plots": draw(workdir, stages, changes, judged),
        "responses": judged,
    }


def verification(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Of a stage's metrics, what its rollouts' verdicts were, and the share of its time, the first
    step apart, that the device waited for them; nothing of a stage without rollouts.
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


def draw(
    workdir: Path,
    stages: list[dict[str, Any]],
    changes: list[dict[str, Any]],
    responses: dict[str, list[dict[str, Any]]],
) -> dict[str, str]:
    """The plots, by the name of their file."""
    drawn = {}
    if stages:
        drawn["stages"] = plots.stages([s | {"name": page.title(s)} for s in stages])
    arms = [c for c in changes if c["algorithm"] == "opsd"]
    if len(arms) > 1:
        drawn["gates"] = plots.comparison([(page.title(c), c) for c in arms])
    for change in arms:
        name, before = change["name"], change["from"]
        old, new = ([r["length"] for r in responses[n]] for n in (before, name))
        drawn[f"lengths_{name}"] = plots.lengths({before: old, page.title(change): new})
        path = workdir / name / divergence.FILE
        if path.exists() and any((curves := files.read_json(path)).values()):
            drawn[f"divergence_{name}"] = plots.divergence(curves)
    for stage in stages:
        if rows := metrics_lib.read(workdir / stage["name"]):
            drawn[f"training_{stage['name']}"] = plots.curve(rows, CURVES[stage["algorithm"]])
    return drawn


def markdown(data: dict[str, Any]) -> str:
    """The report's tables as Markdown."""
    figures = data["figures"]
    lines = ["# Report"]
    for table in page.figure_tables(figures):
        lines += ["", *table.markdown()]
    lines += [
        "",
        page.method(figures),
        "",
        figures["note"],
        "",
        *(f"![{name.replace('_', ' ')}]({name}.svg)" for name in data["plots"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(config: ConfigDict, workdir: Path, untrained: str, note: str) -> Path:
    """Writes `workdir/report/`; returns the path of its page."""
    data = gather(config, workdir, untrained, note)
    directory = workdir / "report"
    directory.mkdir(parents=True, exist_ok=True)
    figures = files.to_json(data["figures"], indent=2, ensure_ascii=False)
    files.write_atomically(directory / "report.json", figures + "\n")
    files.write_atomically(directory / "report.md", markdown(data))
    for name, svg in data["plots"].items():
        files.write_atomically(directory / f"{name}.svg", svg)
    html = directory / "index.html"
    files.write_atomically(html, page.render(data))
    return html
