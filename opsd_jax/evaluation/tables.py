"""Builds the tables of the reports, which are rendered as Markdown and as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsd_jax.evaluation import markup

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

Named = Sequence[tuple[str, dict[str, Any]]]  # (name, metrics) or (name, changes), one per row


class Table(NamedTuple):
    """A table of text: column headings, and rows with one cell per column."""

    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Returns the table as lines of Markdown. The first cell of a row is escaped."""
        rows = [[markup.markdown(name), *cells] for name, *cells in self.rows]
        lines = [self.head, ["---"] * len(self.head), *rows]
        return [f"| {' | '.join(cells)} |" for cells in lines]


def _is_finite(value: float | None) -> bool:
    """Returns whether a value is a finite number. None, which stands for nan, is not."""
    return value is not None and math.isfinite(value)


def number(value: float | None, error: float | None = None, sign: str = "", digits: int = 1) -> str:
    """Formats a number with its standard error. A number that is not finite becomes a dash.

    Args:
      value: the number.
      error: its standard error, left out if it is None or not finite.
      sign: "+" writes the sign of positive numbers too.
      digits: digits after the decimal point.
    """
    if not _is_finite(value):
        return DASH
    text = f"{value:{sign}.{digits}f}".replace("-", MINUS)
    return f"{text} ± {error:.{digits}f}" if _is_finite(error) else text


def interval(change: dict[str, Any], name: str) -> str:
    """Formats the change `name` in a result of `comparison.compare`, with its 95 % interval."""
    value, low, high = (change[f"{name}{end}"] for end in ("", "_low", "_high"))
    if not (_is_finite(low) and _is_finite(high)):
        return number(value, sign="+")
    return f"{number(value, sign='+')} [{number(low, sign='+')}, {number(high, sign='+')}]"


def _percent(metrics: dict[str, Any], name: str) -> str:
    """Formats a metric between 0 and 1, and its standard error, as percentages."""
    return number(_times_100(metrics[name]), _times_100(metrics[f"{name}_se"]))


def _times_100(fraction: float | None) -> float | None:
    """Converts a fraction to a percentage. Returns None for None."""
    return None if fraction is None else 100 * fraction


def correctness(named: Named, first_column: str, extra: Mapping[str, list[str]]) -> Table:
    """Returns a table of accuracies, pass@k, and the fractions of boxed and truncated responses.

    Args:
      named: (name, result of `statistics.metrics`) of each row.
      first_column: heading of the column with the names.
      extra: heading -> cells of further columns, which come last.
    """
    tried = sorted({int(k) for _, m in named for k in m["pass_at"]} - {1})
    samples = {m["samples"] for _, m in named}
    n = samples.pop() if len(samples) == 1 else "n"
    head = [first_column, f"avg@{n}, %", *(f"pass@{k}, %" for k in tried)]
    rows = [
        [
            name,
            _percent(m, "accuracy"),
            *(
                number(_times_100(m["pass_at"].get(k)), _times_100(m["pass_at_se"].get(k)))
                for k in map(str, tried)
            ),
        ]
        for name, m in named
    ]
    if any("majority" in m for _, m in named):
        head.append(f"maj@{n}, %")
        for row, (_, m) in zip(rows, named, strict=True):
            row.append(_percent(m, "majority") if "majority" in m else DASH)
    head += ["in a box, %", "truncated, %", *extra]
    for i, (row, (_, m)) in enumerate(zip(rows, named, strict=True)):
        row += [_percent(m, "boxed_rate"), _percent(m, "truncation_rate")]
        row += [cells[i] for cells in extra.values()]
    return Table(head, rows)


def lengths(named: Named, first_column: str) -> Table:
    """Returns a table of response lengths and the frequency of epistemic markers.

    Args:
      named: (name, result of `statistics.metrics`) of each row.
      first_column: heading of the column with the names.
    """
    head = [first_column, "tokens, mean", "median", "95th %", "correct: mean", "median", "95th %"]
    rows = [
        [
            name,
            number(m["mean_length"], m["mean_length_se"]),
            number(m["median_length"], digits=0),
            number(m["p95_length"], digits=0),
            number(m["mean_length_correct"], m["mean_length_correct_se"]),
            number(m["median_length_correct"], digits=0),
            number(m["p95_length_correct"], digits=0),
            number(m["markers_per_1000"], m["markers_per_1000_se"]),
        ]
        for name, m in named
    ]
    return Table([*head, "markers per 1,000"], rows)


def changes(named: Named, first_column: str) -> Table:
    """Returns a table of changes between evaluations, with their 95 % confidence intervals.

    Args:
      named: (name, result of `comparison.compare`) of each row.
      first_column: heading of the column with the names.
    """
    head = [first_column, "accuracy, points", "length, %", "length if correct, %", "markers, %"]
    keys = ["accuracy_points", "length_percent", "length_correct_percent", "markers_percent"]
    rows = [[name, *(interval(change, f"d_{key}") for key in keys)] for name, change in named]
    return Table(head, rows)


def with_sources(metrics: dict[str, Any]) -> Named:
    """Returns (name, metrics) pairs: one for each source, and then one for all problems.

    Args:
      metrics: the result of `statistics.summarise` or `comparison.compare`.
    """
    return [*metrics["sources"].items(), ("all", metrics)]


def method(summary: dict[str, Any]) -> str:
    """Describes an evaluation's sampling settings and statistics in a few sentences.

    Args:
      summary: the content of its `evaluation.json`.
    """
    settings = summary["settings"]
    sampling = f"temperature {settings['temperature']:g}"
    if settings["top_p"] < 1:
        sampling += f", top_p {settings['top_p']:g}"
    if settings["top_k"]:
        sampling += f", top_k {settings['top_k']}"
    if settings.get("min_p"):  # absent from evaluations that are older than the option
        sampling += f", min_p {settings['min_p']:g}"
    return (
        f"{summary['problems']} problems, {summary['samples']} responses to each, sampled at "
        f"{sampling}, of up to {settings['response_tokens']:,} tokens (seed {settings['seed']}); "
        "± is one standard error, clustered by problem. Brackets are 95 % bootstrap intervals of "
        "changes, paired by problem. A truncated response counts as wrong. Lengths are in tokens, "
        "EOS included."
    )
