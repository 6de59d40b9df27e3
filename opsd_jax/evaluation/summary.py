"""The report of one evaluation: `report.md`, `index.html`, the plots, and `comparison.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_jax.evaluation import comparison, examples, markup, plots, records, statistics, tables
from opsd_jax.evaluation.statistics import Record
from opsd_jax.options import ConfigError
from opsd_jax.problem import Problem
from opsd_jax.storage import files
from opsd_jax.storage.files import Path

COMPARISON = "comparison.json"


def check_comparable(earlier: Path, problems: Sequence[Problem]) -> None:
    """Checks that a directory holds a finished evaluation of the given problems.

    Args:
      earlier: the directory of the earlier evaluation.
      problems: the problems of the current evaluation.

    Raises:
      ConfigError: the directory holds no finished evaluation, or its problems are different.
    """
    if not (earlier / records.SUMMARY).is_file():
        raise ConfigError(
            f"--compare {earlier} holds no finished evaluation: {records.SUMMARY} is missing; "
            "expected the directory of a finished evaluation or stage."
        )
    before = {record["problem"] for record in records.read(earlier)[0]}
    now = {problem.id for problem in problems}
    if before != now:
        raise ConfigError(
            f"--compare {earlier} holds an evaluation of different problems: it has {len(before)} "
            f"problems, the new evaluation has {len(now)}, and {len(before & now)} are in both; "
            "expected an evaluation of the same problems."
        )


def compared(
    before: dict[str, Any], after: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of `comparison.json`: models, differing settings and changes.

    Args:
      before, after: the summaries of the two evaluations (`evaluation.json`).
      changes: the result of `comparison.compare` for these evaluations.

    Returns:
      The changes, with the names of the models as `before` and `after`, and the settings that
      differ as `settings`, a list of [name, value before, value after].
    """
    different = records.differences(before["settings"], after["settings"])
    return {
        "before": before["settings"]["model"],
        "after": after["settings"]["model"],
        "settings": [list(d) for d in different if d[0] != "weights"],
        **changes,
    }


def warning(changes: dict[str, Any]) -> str:
    """Returns a warning if the two compared evaluations have different settings, otherwise ""."""
    different = ", ".join(f"{name} {a!r} and {b!r}" for name, a, b in changes["settings"])
    return f"The two evaluations have different settings: {different}." if different else ""


def write(directory: Path, earlier: Path | None = None) -> dict[str, Any] | None:
    """Writes the report of a finished evaluation into its directory.

    Args:
      directory: the directory of the evaluation.
      earlier: the directory of a finished evaluation to compare it with; None for none.

    Returns:
      The content of `comparison.json`; None without an earlier evaluation.
    """
    responses, summary = records.read(directory)
    old_responses, old_summary = records.read(earlier) if earlier else ([], None)
    changes = None
    if old_summary:
        change = comparison.compare(old_responses, responses)
        changes = compared(old_summary, summary, change)
        files.write_atomically(directory / COMPARISON, files.to_json(changes, indent=2) + "\n")
    shown, notes = _tables(summary, changes), _notes(summary, changes)
    drawn = _draw(responses, summary, old_responses, old_summary)
    title = f"Evaluation of {summary['name']}"
    files.write_atomically(directory / "report.md", _markdown(title, shown, notes, drawn))
    for name, svg in drawn.items():
        files.write_atomically(directory / f"{name}.svg", svg)
    page = markup.render(
        "evaluation.html.j2",
        title=title,
        notes=notes,
        tables=shown,
        accuracy_length=drawn.pop("accuracy_length"),
        lengths={name.removeprefix("lengths_"): svg for name, svg in drawn.items()},
        before=changes and changes["before"],
        after=changes and changes["after"],
        pairs=examples.choose(old_responses, responses) if changes else None,
    )
    files.write_atomically(directory / "index.html", page)
    return changes


def _tables(summary: dict[str, Any], changes: dict[str, Any] | None) -> list[tables.Table]:
    """Returns the report's tables: correctness, lengths and, if `changes` is given, changes."""
    named = tables.with_sources(summary)
    shown = [tables.correctness(named, "benchmark", {}), tables.lengths(named, "benchmark")]
    if changes:
        shown.append(tables.changes(tables.with_sources(changes), "change"))
    return shown


def _notes(summary: dict[str, Any], changes: dict[str, Any] | None) -> list[str]:
    """Returns the report's paragraphs: two on the evaluation, and up to two on a comparison."""
    notes = [f"Model: {summary['settings']['model']}.", tables.method(summary)]
    if changes:
        notes += [f"Changes: from {changes['before']}.", *filter(None, [warning(changes)])]
    return notes


def _markdown(
    title: str, shown: Sequence[tables.Table], notes: Sequence[str], drawn: Mapping[str, str]
) -> str:
    """Returns the text of `report.md`: the notes, the tables and links to the plots."""
    lines = [f"# {markup.markdown(title)}"]
    first, last = ([markup.markdown(note) for note in part] for part in (notes[:2], notes[2:]))
    for block in [*first, *("\n".join(table.markdown()) for table in shown), *last]:
        lines += ["", block]
    lines += ["", *(f"![{name}]({name}.svg)" for name in drawn)]
    return "\n".join(lines) + "\n"


def _draw(
    responses: Sequence[Record],
    summary: dict[str, Any],
    old_responses: Sequence[Record],
    old_summary: dict[str, Any] | None,
) -> dict[str, str]:
    """Draws the plots. Returns {file name without suffix: SVG text}."""
    old_sources = (old_summary or {}).get("sources") or {}
    points = {}
    for name, metrics in (summary["sources"] or {"all": summary}).items():
        old = [old_sources.get(name, old_summary)] if old_summary else []
        points[name] = [*old, metrics]
    drawn = {"accuracy_length": plots.accuracy_and_length(points)}
    lengths = lambda part: [record["length"] for record in part]
    old_by_source = statistics.by_source(old_responses)
    for source, part in statistics.by_source(responses).items():
        if old_summary:
            named = {"before": lengths(old_by_source[source]), "after": lengths(part)}
        else:
            named = {summary["name"]: lengths(part)}
        file = re.sub(r"[^\w-]", "_", source)[:80]  # the records may come from anywhere
        drawn[f"lengths_{file or 'all'}"] = plots.lengths(named)
    return drawn
