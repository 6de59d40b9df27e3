"""Draws the plots of the reports as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opsd_jax.stages.algorithm import Curve
from opsd_jax.storage.foreign import escape

BEFORE, AFTER = "#8a94a6", "#1f6feb"
COLOURS = ("#1f6feb", "#d1242f", "#2da44e", "#9a6700", "#8250df")
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a94a6",
    "legend.frameon": False,
    "svg.hashsalt": "opsd_jax",  # makes the text of a plot reproducible
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may contain dollar signs
}


def _svg(draw: Callable[[Any], None], columns: int = 1, width: float = 6.2) -> str:
    """Draws a figure and returns it as SVG text.

    Args:
      draw: draws on the axes: a single `Axes` for one column, otherwise an array of them.
      columns: number of axes, which are side by side.
      width: width of the plot, in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 3.1), layout="constrained")
        draw(figure.subplots(1, columns))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the running mean of `values` [N] over a window of 2 * width + 1 elements.

    The window is cut off at both ends of the array.
    """
    sums = np.cumsum(np.concatenate([[0.0], values]))
    i = np.arange(len(values))
    low, high = np.maximum(i - width, 0), np.minimum(i + width + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def stages(summaries: Sequence[dict[str, Any]]) -> str:
    """Draws accuracy and mean response length after each stage, with bars of ± 2 standard errors.

    Args:
      summaries: the summary of each stage, with its `name`.
    """

    def draw(axes):
        names = [escape(s["name"]) for s in summaries]
        y = np.arange(len(names))[::-1]
        for axis, key, scale, label in (
            (axes[0], "accuracy", 100, "held-out accuracy, %"),
            (axes[1], "mean_length", 1, "mean response length, tokens"),
        ):
            values = np.array([s[key] for s in summaries]) * scale
            errors = np.nan_to_num([_number(s[f"{key}_se"]) for s in summaries]) * scale * 2
            axis.barh(y, values, xerr=errors, height=0.6, color=AFTER, ecolor="#24292f")
            for row, value, error in zip(y, values, errors, strict=True):
                axis.text(value + error, row, f"  {value:.1f}", va="center")
            axis.set_yticks(y, names)
            axis.set_xlabel(label)
            axis.set_xlim(0, 1.18 * max((values + errors).max(), 1))
            axis.grid(axis="y", visible=False)
        axes[1].set_yticklabels([])

    return _svg(draw, columns=2, width=9.6)


def training(rows: Sequence[dict[str, float]], curves: Sequence[Curve]) -> str:
    """Draws a stage's training metrics by step, raw and smoothed, with one panel per metric.

    Args:
      rows: the metrics of each step.
      curves: the metrics to draw. Steps that lack a metric are left out.
    """

    def draw(axes):
        for axis, (metric, label, scale) in zip(np.atleast_1d(axes), curves, strict=True):
            points = [(row["step"] + 1, row[metric] * scale) for row in rows if metric in row]
            step, value = np.array(points).reshape(-1, 2).T  # there may be no points
            smooth = len(value) // 40 + 1
            axis.plot(step, value, color=AFTER, alpha=0.3, linewidth=1)
            axis.plot(step, _smooth(value, smooth), color=AFTER, linewidth=1.8)
            axis.set_xlabel("step")
            axis.set_ylabel(label)

    return _svg(draw, columns=len(curves), width=9.6)


def lengths(named: Mapping[str, Sequence[int]]) -> str:
    """Draws histograms of the response lengths of one or two models.

    Args:
      named: name -> lengths in tokens, for one model, or for two models (before, after).
    """

    def draw(axis: Axes):
        top = max(map(max, named.values())) + 1
        width = -(-top // 45)  # in whole tokens
        bins = np.arange(0, top + width, width)
        for (name, values), colour in zip(
            named.items(), (BEFORE, AFTER)[-len(named) :], strict=True
        ):
            label = f"{escape(name)}: mean {np.mean(values):.1f}"
            axis.hist(values, bins.tolist(), color=colour, alpha=0.65, label=label)
        axis.set_xlabel("response length, tokens")
        axis.set_ylabel("responses")
        axis.legend()

    return _svg(draw)


def accuracy_and_length(named: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Draws accuracy against mean response length per source, with bars of ± 2 standard errors.

    Args:
      named: source -> its metrics for one model, or for two models (before, after), which a line
        joins.
    """

    def draw(axis: Axes):
        for (name, points), colour in zip(named.items(), COLOURS * len(named), strict=False):
            length, accuracy = ([p[key] for p in points] for key in ("mean_length", "accuracy"))
            axis.plot(length, 100 * np.array(accuracy), color=colour, linewidth=1, alpha=0.5)
            for point, face in zip(points, ("none", colour)[-len(points) :], strict=True):
                axis.errorbar(
                    point["mean_length"],
                    100 * point["accuracy"],
                    xerr=2 * _number(point["mean_length_se"]),
                    yerr=200 * _number(point["accuracy_se"]),
                    fmt="o",
                    color=colour,
                    markerfacecolor=face,
                    capsize=3,
                    label=escape(name) if face != "none" else None,
                )
        axis.set_xlabel("mean response length, tokens")
        axis.set_ylabel("accuracy, %")
        axis.legend()

    return _svg(draw)


def _number(value: float | None) -> float:
    """Converts None, which stands for nan in JSON files, to nan. Returns numbers unchanged."""
    return np.nan if value is None else value


def divergence(curves: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Draws KL(student || teacher) by position before and after a stage, one panel per outcome.

    Positions that fewer than 10 responses reach are left out. Truncated responses are drawn only if
    there are no others.

    Args:
      curves: "before" or "after" -> outcome -> curve from `divergence.by_position`.
    """
    found = curves["before"] | curves["after"]
    outcomes = [outcome for outcome in found if outcome != "truncated"] or ["truncated"]

    def draw(axes):
        for axis, outcome in zip(np.atleast_1d(axes), outcomes, strict=True):
            for when, colour in (("before", BEFORE), ("after", AFTER)):
                if outcome not in curves[when]:
                    continue
                curve = curves[when][outcome]
                mean, error = np.array(curve["mean"]), np.array(curve["se"])
                enough = np.array(curve["count"]) >= 10
                x = np.flatnonzero(enough) + 1
                mean, error = mean[enough], error[enough]
                axis.plot(x, mean, color=colour, linewidth=1.6, label=when)
                axis.fill_between(
                    x, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, linewidth=0
                )
            axis.set_title(f"{outcome} rollouts", fontsize=10)
            axis.set_xlabel("position in the response")
            axis.legend()
        np.atleast_1d(axes)[0].set_ylabel("KL(student ‖ teacher), nats")

    return _svg(draw, columns=len(outcomes), width=9.6)


def comparison(changes: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Draws changes in accuracy against changes in mean length, with 95 % intervals.

    Args:
      changes: pairs (name, result of `comparison.compare`).
    """

    def error_bar(change: dict[str, Any], name: str) -> list[list[float]]:
        """Returns the distances from a change to the lower and upper bounds of its interval."""
        low, high = change[f"{name}_low"], change[f"{name}_high"]
        return [[max(change[name] - low, 0)], [max(high - change[name], 0)]]

    def draw(axis: Axes):
        axis.axhline(0, color="#8a94a6", linewidth=1)
        axis.axvline(0, color="#8a94a6", linewidth=1)
        for (name, change), colour in zip(changes, COLOURS * len(changes), strict=False):
            axis.errorbar(
                change["d_length_percent"],
                change["d_accuracy_points"],
                xerr=error_bar(change, "d_length_percent"),
                yerr=error_bar(change, "d_accuracy_points"),
                fmt="o",
                color=colour,
                capsize=3,
                label=escape(name),
            )
        axis.set_xlabel("change of mean length, %")
        axis.set_ylabel("change of accuracy, points")
        axis.legend()

    return _svg(draw)
