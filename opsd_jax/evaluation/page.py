"""The report of a run as one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
from typing import Any

from opsd_jax.evaluation import markup, tables
from opsd_jax.evaluation.markup import card, soft

BARS = soft("Bars are two standard errors.")
INTERVALS = soft("Bars are 95 % intervals.")


def title(stage: dict[str, Any]) -> str:
    """A stage's name, with its gate if it has one that the name does not tell."""
    gate = stage.get("gate")
    return f"{stage['name']} ({gate})" if gate and gate not in stage["name"] else stage["name"]


def method(figures: dict[str, Any]) -> str:
    """How the figures were taken, in a few sentences."""
    s = figures["stages"][-1] if figures["stages"] else figures["untrained"]
    return "Nothing has been evaluated yet." if s is None else f"Held out: {tables.method(s)}"


def figure_tables(figures: dict[str, Any]) -> list[tables.Table]:
    """The run's tables: figures of each stage, and changes from one to the next."""
    stages = ([figures["untrained"]] if figures["untrained"] else []) + figures["stages"]
    named = [(title(s), s) for s in stages]
    extra = {
        "steps": [str(s["steps"]) for s in stages],
        "s": [f"{s['seconds']:.0f}" for s in stages],
    }
    changed = [(f"{c['from']} → {title(c)}", c) for c in figures["changes"]]
    return [
        tables.correctness(named, "after", extra),
        tables.lengths(named, "after"),
        *([tables.changes(changed, "change")] if changed else []),
    ]


def _facts(figures: dict[str, Any]) -> str:
    """What RLVR and OPSD changed, in large numbers: a card each, the main effect first."""
    cards = []
    for c in figures["changes"]:
        points = f"{tables.number(c['d_accuracy_points'], sign='+')} points"
        percent = f"{tables.number(c['d_length_percent'], sign='+')} %"
        first, rest = (
            (points, f"accuracy, and {percent} length")
            if c["algorithm"] == "rlvr"
            else (percent, f"length, and {points} accuracy")
        )
        if c["algorithm"] != "sft":
            cards.append((f"{c['from']} → {title(c)}", first, rest))
    return markup.facts(cards)


def _verification(stage: dict[str, Any]) -> str:
    if "verdicts" not in stage:
        return ""
    counts = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}"
        for reason, count in sorted(stage["verdicts"].items(), key=lambda item: -item[1])
    )
    share = stage["verifier_wait_share"]
    waited = (
        ""
        if share is None
        else f" The device waited {share:.2%} of the time for them, the first step apart."
    )
    return soft(f"Verdicts on its rollouts: {counts}.{waited}")


def render(data: dict[str, Any]) -> str:
    """The page of what `report.gather` returns."""
    figures, plots, responses = data["figures"], data["plots"], data["responses"]
    parts = [
        "<h1>SFT → RLVR → OPSD</h1>",
        soft(method(figures)),
        _facts(figures),
        "<h2>After each stage</h2>",
        *(card(table.html()) for table in figure_tables(figures)),
    ]
    if "stages" in plots:
        parts.append(card(plots["stages"] + BARS))
    if figures["note"]:
        parts.append(soft(figures["note"]))

    arms = [c for c in figures["changes"] if c["algorithm"] == "opsd"]
    if "gates" in plots:
        parts += ["<h2>The gates compared</h2>", card(plots["gates"] + INTERVALS)]
    for change in arms:
        name, before = change["name"], change["from"]
        parts.append(f"<h2>{html.escape(title(change))}: before and after</h2>")
        parts += ["<h3>Response lengths</h3>", card(plots[f"lengths_{name}"])]
        if f"divergence_{name}" in plots:
            parts.append("<h3>Divergence from the teacher by position</h3>")
            caption = (
                "Each model on its own held-out responses; bands are two standard errors, "
                "clustered by problem."
            )
            parts.append(card(plots[f"divergence_{name}"] + soft(caption)))
        parts += ["<h3>The same problems, before and after</h3>", soft(markup.EXAMPLES)]
        pairs = markup.choose(responses[before], responses[name])
        parts.append(markup.examples((before, title(change)), pairs))

    parts.append("<h2>Training</h2>")
    for stage in figures["stages"]:
        if f"training_{stage['name']}" in plots:
            parts.append(f"<h3>{html.escape(title(stage))}</h3>")
            parts.append(card(plots[f"training_{stage['name']}"] + _verification(stage)))
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    parts.append(
        soft(
            f"{figures['seconds']:.0f} s in all, compilation and evaluation included; at most "
            f"{figures['peak_rss_gib']:.1f} GiB of memory. {figures['machine']}; {versions}; "
            f"{figures['made']}."
        )
    )
    return markup.document("opsd_jax report", parts)
