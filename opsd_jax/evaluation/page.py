"""The HTML page of a run's report, rendered from `templates/run.html.j2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsd_jax.evaluation import examples, markup, tables
from opsd_jax.evaluation.statistics import Record
from opsd_jax.stages import algorithm_of


def title(stage: dict[str, Any]) -> str:
    """Returns a stage's name, followed by its reported options in parentheses.

    A value that the name already contains is left out, such as the gate of "opsd_correct".
    """
    name = stage["name"]
    fields = algorithm_of(stage["algorithm"]).reported if "algorithm" in stage else ()
    values = [str(stage[field]) for field in fields if str(stage[field]) not in name]
    return f"{name} ({', '.join(values)})" if values else name


def arms(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Selects the before/after comparisons whose responses the report shows side by side."""
    return [change for change in changes if algorithm_of(change["algorithm"]).before_and_after]


def method(results: dict[str, Any]) -> str:
    """Describes how the stages were evaluated, in a few sentences."""
    summary = results["stages"][-1] if results["stages"] else results["untrained"]
    if summary is None:
        return "Nothing has been evaluated yet."
    return f"Held out: {tables.method(summary)}"


def tables_of(results: dict[str, Any]) -> list[tables.Table]:
    """Returns the report's tables: the metrics after each stage, and the changes between stages."""
    stages = ([results["untrained"]] if results["untrained"] else []) + results["stages"]
    named = [(title(stage), stage) for stage in stages]
    extra = {
        "steps": [str(stage["steps"]) for stage in stages],
        "s": [f"{stage['seconds']:.0f}" for stage in stages],
    }
    changed = [(_arrow(change), change) for change in results["changes"]]
    return [
        tables.correctness(named, "after", extra),
        tables.lengths(named, "after"),
        *([tables.changes(changed, "change")] if changed else []),
    ]


def _arrow(change: dict[str, Any]) -> str:
    """Returns the names of the two compared evaluations with an arrow: "untrained → opsd"."""
    return f"{change['from']} → {title(change)}"


def _facts(changes: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns the page's headlines: how the stages changed accuracy and response length."""
    facts = []
    for change in changes:
        headline = algorithm_of(change["algorithm"]).headline
        if not headline:
            continue
        points = f"{tables.number(change['d_accuracy_points'], sign='+')} points"
        percent = f"{tables.number(change['d_length_percent'], sign='+')} %"
        if headline == "accuracy":
            first, rest = points, f"accuracy, and {percent} length"
        else:
            first, rest = percent, f"length, and {points} accuracy"
        facts.append({"change": _arrow(change), "headline": first, "rest": rest})
    return facts


def _before_and_after(
    change: dict[str, Any], plots: Mapping[str, str], responses: Mapping[str, list[Record]]
) -> dict[str, Any]:
    """Returns the template values for comparing the responses before and after a stage."""
    name, before = change["name"], change["from"]
    return {
        "title": title(change),
        "before": before,
        "lengths": plots[f"lengths_{name}"],
        "divergence": plots.get(f"divergence_{name}", ""),
        "pairs": examples.choose(responses[before], responses[name]),
    }


def _verification(stage: dict[str, Any]) -> str:
    """Describes the verdicts on a stage's rollouts. Returns "" for a stage without rollouts."""
    if "verdicts" not in stage:
        return ""
    counts = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}"
        for reason, count in sorted(stage["verdicts"].items(), key=lambda item: -item[1])
    )
    text = f"Verdicts on its rollouts: {counts}."
    waited = stage["verifier_wait_share"]
    if waited is not None:
        text += f" The device waited for them {waited:.2%} of the time, without the first step."
    return text


def _speed(stage: dict[str, Any]) -> str:
    """Describes where a stage's time went and how fast it was. Returns "" if it is not known."""
    if "time_shares" not in stage:
        return ""
    shares = sorted(stage["time_shares"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares if share)
    figures = stage["speed"]
    text = f"Time: {parts}. Median speed: {figures['tokens_per_device']:,.0f} tokens/s per device"
    if "tflops_per_device" in figures:
        text += f", and in the train step {figures['tflops_per_device']:.3g} TFLOP/s per device"
        text += _of_peak(figures, "mfu")
    if "decode_gb_per_device" in figures:
        text += f". Decoding reads {figures['decode_gb_per_device']:.3g} GB/s per device"
        text += _of_peak(figures, "mbu")
    return text + "."


# Metric -> how the page names it, and its format.
_PLANNED = {
    "seconds": ("step", "{:.1f} s"),
    "rollout_seconds": ("rollouts", "{:.1f} s"),
    "update_seconds": ("update", "{:.1f} s"),
    "useful_tokens": ("useful tokens", "{:.0%}"),
}


def _plan(stage: dict[str, Any]) -> str:
    """Describes a stage's speed beside its plan. Returns "" for a run without a plan."""
    if "plan" not in stage:
        return ""
    plan = stage["plan"]
    if "differs" in plan:
        return f"Not compared with the plan {plan['file']}: {plan['differs']}."
    parts = []
    for name, figures in plan["metrics"].items():
        label, form = _PLANNED[name]
        limits = " to ".join(dict.fromkeys(map(form.format, figures["planned"])))
        parts.append(f"{label} {form.format(figures['measured'])}, planned {limits}")
    return f"Median beside the plan {plan['file']}: {'; '.join(parts)}."


def _of_peak(figures: Mapping[str, float], name: str) -> str:
    """Describes a speed as a fraction of the device's peak rate: "mfu" or "mbu"."""
    if name not in figures:
        return f" (no {name.upper()}: unknown device)"
    return f", which is an {name.upper()} of {figures[name]:.1%}"


def _training(results: dict[str, Any], plots: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the template values for the section on each stage's training."""
    return [
        {
            "title": title(stage),
            "plot": plots[f"training_{stage['name']}"],
            "verification": _verification(stage),
            "speed": f"{_speed(stage)} {_plan(stage)}".strip(),
        }
        for stage in results["stages"]
        if f"training_{stage['name']}" in plots
    ]


def _footer(results: dict[str, Any]) -> str:
    """Returns the page's footer: the run's time, peak memory, machine and package versions."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['seconds']:.0f} s in all, compilation and evaluation included; at most "
        f"{results['peak_rss_gib']:.1f} GiB of memory. {results['machine']}; {versions}; "
        f"{results['made']}."
    )


def render(
    results: dict[str, Any], plots: Mapping[str, str], responses: Mapping[str, list[Record]]
) -> str:
    """Renders the HTML page of a run's report. The arguments are the fields of `report.Report`."""
    return markup.render(
        "run.html.j2",
        title="opsd_jax report",
        heading=" → ".join(stage["name"] for stage in results["stages"]) or "No finished stage",
        method=method(results),
        facts=_facts(results["changes"]),
        tables=tables_of(results),
        note=results["note"],
        plots=plots,
        arms=[_before_and_after(c, plots, responses) for c in arms(results["changes"])],
        training=_training(results, plots),
        footer=_footer(results),
    )
