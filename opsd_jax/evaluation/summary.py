"""The report of one evaluation, `report.md` and `index.html`, and what changed since another."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from opsd_jax.config import ConfigError
from opsd_jax.evaluation import comparison, markup, plots, statistics, tables
from opsd_jax.evaluation import records as evaluate
from opsd_jax.evaluation.markup import card, soft
from opsd_jax.problem import Problem
from opsd_jax.storage import files
from opsd_jax.storage.files import Path

COMPARISON = "comparison.json"
BARS = "Bars are two standard errors. Hollow: before, where two are compared."


def check_comparable(earlier: Path, problems: Sequence[Problem]) -> None:
    """Raises ConfigError where a directory holds no finished evaluation of these problems."""
    if not (earlier / evaluate.SUMMARY).is_file():
        raise ConfigError(
            f"--compare {earlier} holds no finished evaluation: there is no {evaluate.SUMMARY}; "
            "expected the directory of an evaluation or of a stage."
        )
    there = {record["problem"] for record in evaluate.read(earlier)[0]}
    now = {problem.id for problem in problems}
    if there != now:
        raise ConfigError(
            f"--compare {earlier} holds an evaluation of other problems: {len(there)} there, "
            f"{len(now)} now, {len(there & now)} in both; expected the same ones."
        )


def compared(was: dict[str, Any], now: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`comparison.compare` of two evaluations with these figures, and `before` and `after`: their
    models; `settings`: those that differ, as [name, before, after].
    """
    different = evaluate.differences(was["settings"], now["settings"])
    return {
        "before": was["settings"]["model"],
        "after": now["settings"]["model"],
        "settings": [list(d) for d in different if d[0] != "weights"],
        **changes,
    }


def warning(changes: dict[str, Any]) -> str:
    """That two evaluations were not sampled alike, or ""."""
    different = ", ".join(f"{name} {a!r} and {b!r}" for name, a, b in changes["settings"])
    return f"The two evaluations were not sampled alike: {different}." if different else ""


def write(directory: Path, earlier: Path | None = None) -> dict[str, Any] | None:
    """Writes the report of a finished evaluation, and what changed since an `earlier` one, which
    it returns.
    """
    responses, figures = evaluate.read(directory)
    before, was = evaluate.read(earlier) if earlier else ([], None)
    changes = compared(was, figures, comparison.compare(before, responses)) if was else None
    if changes:
        files.write_atomically(directory / COMPARISON, files.to_json(changes, indent=2) + "\n")
    named = tables.with_sources(figures)
    shown = [tables.correctness(named, "benchmark", {}), tables.lengths(named, "benchmark")]
    notes = [f"Model: {figures['settings']['model']}.", tables.method(figures)]
    if changes:
        shown.append(tables.changes(tables.with_sources(changes), "change"))
        notes += [f"Changes: from {changes['before']}.", *filter(None, [warning(changes)])]
    drawn = _draw(responses, figures, before, was)

    title = f"Evaluation of {figures['name']}"
    lines = [f"# {title}"]
    for block in [*notes[:2], *("\n".join(table.markdown()) for table in shown), *notes[2:]]:
        lines += ["", block]
    lines += ["", *(f"![{name}]({name}.svg)" for name in drawn)]
    files.write_atomically(directory / "report.md", "\n".join(lines) + "\n")
    for name, svg in drawn.items():
        files.write_atomically(directory / f"{name}.svg", svg)

    parts = [f"<h1>{html.escape(title)}</h1>", *map(soft, notes)]
    parts += [card(table.html()) for table in shown]
    parts.append("<h2>Accuracy and length</h2>")
    parts.append(card(drawn.pop("accuracy_length") + soft(BARS)))
    parts.append("<h2>Response lengths</h2>")
    for name, svg in drawn.items():
        parts.append(f"<h3>{html.escape(name.removeprefix('lengths_'))}</h3>{card(svg)}")
    if changes:
        parts += ["<h2>The same problems, before and after</h2>", soft(markup.EXAMPLES)]
        names = changes["before"], changes["after"]
        parts.append(markup.examples(names, markup.choose(before, responses)))
    files.write_atomically(directory / "index.html", markup.document(title, parts))
    return changes


def _draw(
    responses: list[dict[str, Any]],
    figures: dict[str, Any],
    before: list[dict[str, Any]],
    was: dict[str, Any] | None,
) -> dict[str, str]:
    """The plots, by the name of their file."""
    now, then = figures["sources"] or {"all": figures}, (was or {}).get("sources")
    points: dict[str, Sequence[dict[str, Any]]] = {
        name: [*([(then or {"all": was}).get(name, was)] if was else []), part]
        for name, part in now.items()
    }
    drawn = {"accuracy_length": plots.accuracy_and_length(points)}
    new, old = statistics.by_source(responses), statistics.by_source(before)
    for source, records in new.items():
        sides = {"before": old[source], "after": records} if before else {figures["name"]: records}
        drawn[f"lengths_{source or 'all'}"] = plots.lengths(
            {side: [record["length"] for record in part] for side, part in sides.items()}
        )
    return drawn
