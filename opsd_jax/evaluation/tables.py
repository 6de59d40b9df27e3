"""The tables of the reports, as text cells: rendered as Markdown and as HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_SPREAD = re.compile(r" (?:±.*|\[.*\])$")


class Table(NamedTuple):
    """A head and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Its lines."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return [f"| {' | '.join(cells)} |" for cells in lines]

    def html(self) -> str:
        """Its element; errors and intervals are small."""

        def row(tag: str, cells: Sequence[str]) -> str:
            texts = [_SPREAD.sub(r"<small>\g<0></small>", html.escape(cell)) for cell in cells]
            return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

        body = "".join(row("td", cells) for cells in self.rows)
        return f"<table><thead>{row('th', self.head)}</thead><tbody>{body}</tbody></table>"


def _told(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None, error: float | None = None, sign: str = "", digits: int = 1) -> str:
    """A number with its standard error; a dash where there is none."""
    if not _told(value):
        return DASH
    text = f"{value:{sign}.{digits}f}".replace("-", MINUS)
    return text if not _told(error) else f"{text} ± {error:.{digits}f}"


def interval(change: dict[str, Any], name: str) -> str:
    """A change with its 95 % interval."""
    value, low, high = (change[f"{name}{end}"] for end in ("", "_low", "_high"))
    if not (_told(low) and _told(high)):
        return number(value, sign="+")
    return f"{number(value, sign='+')} [{number(low, sign='+')}, {number(high, sign='+')}]"


def _percent(figures: dict[str, Any], name: str) -> str:
    return number(_scaled(figures[name]), _scaled(figures[f"{name}_se"]))


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share


def correctness(
    named: Sequence[tuple[str, dict[str, Any]]], what: str, extra: dict[str, list[str]]
) -> Table:
    """Accuracy, pass@k, the majority, boxed and truncated responses, a row for each of the figures.

    Args:
      named: (name, `statistics.figures`).
      what: head of the names.
      extra: further columns at the end.
    """
    tried = sorted({int(k) for _, f in named for k in f["pass_at"]} - {1})
    samples = {f["samples"] for _, f in named}
    n = samples.pop() if len(samples) == 1 else "n"
    head = [what, f"avg@{n}, %", *(f"pass@{k}, %" for k in tried)]
    rows = [
        [
            name,
            _percent(f, "accuracy"),
            *(
                number(_scaled(f["pass_at"].get(str(k))), _scaled(f["pass_at_se"].get(str(k))))
                for k in tried
            ),
        ]
        for name, f in named
    ]
    if any("majority" in f for _, f in named):
        head.append(f"maj@{n}, %")
        for row, (_, f) in zip(rows, named, strict=True):
            row.append(_percent(f, "majority") if "majority" in f else DASH)
    head += ["in a box, %", "truncated, %", *extra]
    for i, (row, (_, f)) in enumerate(zip(rows, named, strict=True)):
        row += [_percent(f, "boxed_rate"), _percent(f, "truncation_rate")]
        row += [cells[i] for cells in extra.values()]
    return Table(head, rows)


def lengths(named: Sequence[tuple[str, dict[str, Any]]], what: str) -> Table:
    """Lengths of all and of the correct responses and epistemic markers, a row for each of the
    figures; the arguments as above.
    """
    head = [what, "tokens, mean", "median", "95th %", "correct: mean", "median", "95th %"]
    rows = [
        [
            name,
            number(f["mean_length"], f["mean_length_se"]),
            number(f["median_length"], digits=0),
            number(f["p95_length"], digits=0),
            number(f["mean_length_correct"], f["mean_length_correct_se"]),
            number(f["median_length_correct"], digits=0),
            number(f["p95_length_correct"], digits=0),
            number(f["markers_per_1000"], f["markers_per_1000_se"]),
        ]
        for name, f in named
    ]
    return Table([*head, "markers per 1,000"], rows)


def changes(named: Sequence[tuple[str, dict[str, Any]]], what: str) -> Table:
    """What changed, with intervals, a row for each (name, `comparison.compare`)."""
    head = [what, "accuracy, points", "length, %", "length if correct, %", "markers, %"]
    names = ["accuracy_points", "length_percent", "length_correct_percent", "markers_percent"]
    rows = [[name, *(interval(change, f"d_{what}") for what in names)] for name, change in named]
    return Table(head, rows)


def with_sources(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The named parts of figures or changes: each source's, then all."""
    return [*figures["sources"].items(), ("all", figures)]


def method(figures: dict[str, Any]) -> str:
    """How the figures of an evaluation were taken, in a few sentences."""
    settings = figures["settings"]
    rule = f"temperature {settings['temperature']:g}"
    if settings["top_p"] < 1:
        rule += f", top_p {settings['top_p']:g}"
    if settings["top_k"]:
        rule += f", top_k {settings['top_k']}"
    if settings.get("min_p"):  # evaluations of before it was an option lack it
        rule += f", min_p {settings['min_p']:g}"
    return (
        f"{figures['problems']} problems, {figures['samples']} responses to each, sampled at "
        f"{rule}, of up to {settings['response_tokens']:,} tokens (seed {settings['seed']}); "
        "± is one standard error, clustered by problem. Brackets are 95 % bootstrap intervals of "
        "changes, paired by problem. A truncated response counts as wrong. Lengths are in tokens, "
        "EOS included."
    )
