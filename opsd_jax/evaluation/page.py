"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d9dee3; --blue: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); font-size: 14px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 16px; overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 16px;
  margin: 24px 0 8px; }
.fact { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px; }
.fact b { display: block; font-size: 26px; line-height: 1.3; white-space: nowrap; }
.fact span { color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); font-size: 14px; } td small { color: var(--soft); }
svg { max-width: 100%; height: auto; display: block; margin: 0 auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr; } }
.pair p { margin: 0 0 6px; }
code, pre { font: 13.5px/1.65 ui-monospace, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; margin: 0; } mark { background: #fff1c2; border-radius: 3px; }
.right { color: #1a7f37; } .wrong { color: #cf222e; }
details summary { cursor: pointer; color: var(--soft); }
"""

BARS = '<p class="soft">Bars are two standard errors.</p>'

# Words of doubt and re-checking, marked in the examples.
MARKERS = re.compile(r"\b(wait|hmm|check|perhaps|maybe|however|alternatively)\b", re.IGNORECASE)


def title(stage: dict[str, Any]) -> str:
    """A stage's name, with its gate if it has one that the name does not tell."""
    gate = stage.get("gate")
    return f"{stage['name']} ({gate})" if gate and gate not in stage["name"] else stage["name"]


def method(figures: dict[str, Any]) -> str:
    """How the figures were taken, in a sentence or two."""
    s = figures["stages"][-1] if figures["stages"] else figures["untrained"]
    if s is None:
        return "Nothing has been evaluated yet."
    return (
        f"{s['problems']} held-out problems, {s['samples']} responses to each, sampled at "
        f"temperature {s['temperature']:g}; ± is one standard error, clustered by problem "
        "(changes: paired by problem). A truncated response counts as wrong. Lengths are in "
        "tokens, EOS included."
    )


def _number(value: float, error: float | None = None, sign: str = "") -> str:
    text = f"{value:{sign}.1f}".replace("-", "\N{MINUS SIGN}")
    return text if error is None else f"{text} <small>± {error:.1f}</small>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = lambda tag, row: "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _facts(figures: dict[str, Any]) -> str:
    """What RLVR and OPSD changed, in large numbers: a card each, the main effect first."""
    cards = []
    for c in figures["changes"]:
        points = f"{_number(c['d_accuracy_points'], sign='+')} points"
        percent = f"{_number(c['d_length_percent'], sign='+')} %"
        first, rest = (
            (points, f"accuracy, and {percent} length")
            if c["algorithm"] == "rlvr"
            else (percent, f"length, and {points} accuracy")
        )
        if c["algorithm"] != "sft":
            cards.append(
                f'<div class="fact"><span>{html.escape(c["from"])} → {html.escape(title(c))}</span>'
                f"<b>{first}</b><span>{rest}</span></div>"
            )
    return f'<div class="facts">{"".join(cards)}</div>'


def _stage_table(figures: dict[str, Any]) -> str:
    rows = []
    for s in ([figures["untrained"]] if figures["untrained"] else []) + figures["stages"]:
        correct = s["mean_length_correct"]
        rows.append(
            [
                html.escape(title(s)),
                _number(100 * s["accuracy"], 100 * s["accuracy_se"]),
                _number(s["mean_length"], s["mean_length_se"]),
                "\N{EN DASH}" if correct is None else _number(correct),
                _number(100 * s["truncation_rate"]),
                str(s["steps"]),
                f"{s['seconds']:.0f}",
            ]
        )
    head = ["after", "accuracy, %", "mean length", "of correct ones", "truncated, %", "steps", "s"]
    return _table(head, rows)


def _change_table(figures: dict[str, Any]) -> str:
    return _table(
        ["change", "accuracy, points", "mean length, %"],
        [
            [
                f"{html.escape(c['from'])} → {html.escape(title(c))}",
                _number(c["d_accuracy_points"], c["d_accuracy_points_se"], "+"),
                _number(c["d_length_percent"], c["d_length_percent_se"], "+"),
            ]
            for c in figures["changes"]
        ],
    )


def _verification(stage: dict[str, Any]) -> str:
    if "verdicts" not in stage:
        return ""
    counts = ", ".join(
        f"{count:,} {html.escape(reason.replace('_', ' '))}"
        for reason, count in sorted(stage["verdicts"].items(), key=lambda item: -item[1])
    )
    share = stage["verifier_wait_share"]
    waited = (
        ""
        if share is None
        else f" The device waited {share:.2%} of the time for them, the first step apart."
    )
    return f'<p class="soft">Verdicts on its rollouts: {counts}.{waited}</p>'


def _response(name: str, response: dict[str, Any]) -> str:
    kind = "right" if response["correct"] else "wrong"
    text = MARKERS.sub(r"<mark>\1</mark>", html.escape(response["response"]))
    return (
        f'<div><p class="soft">{html.escape(name)} · {response["length"]} tokens · '
        f'<span class="{kind}">{html.escape(response["verdict"])}</span></p><pre>{text}</pre></div>'
    )


def _examples(change: dict[str, Any], pairs: list[tuple[dict, dict]]) -> str:
    return "".join(
        f'<div class="card"><p><code>{html.escape(a["question"])}</code> '
        f'<span class="soft">answer {html.escape(a["answer"])}</span></p>'
        f'<div class="pair">{_response(change["from"], a)}{_response(title(change), b)}</div></div>'
        for a, b in pairs
    )


def render(data: dict[str, Any], examples: Callable[[list, list], list[tuple[dict, dict]]]) -> str:
    """The page.

    Args:
      data: from `report.gather`.
      examples: chooses pairs of responses, before and after, to show.
    """
    figures, plots, responses = data["figures"], data["plots"], data["responses"]
    card = lambda content: f'<div class="card">{content}</div>'
    parts = [
        "<h1>SFT → RLVR → OPSD</h1>",
        f'<p class="soft">{html.escape(method(figures))}</p>',
        _facts(figures),
        "<h2>After each stage</h2>",
        card(_stage_table(figures)),
    ]
    if figures["changes"]:
        parts.append(card(_change_table(figures)))
    if "stages" in plots:
        parts.append(card(plots["stages"] + BARS))
    if figures["note"]:
        parts.append(f'<p class="soft">{html.escape(figures["note"])}</p>')

    arms = [c for c in figures["changes"] if c["algorithm"] == "opsd"]
    if "gates" in plots:
        parts += ["<h2>The gates compared</h2>", card(plots["gates"] + BARS)]
    for change in arms:
        name, before = change["name"], change["from"]
        parts.append(f"<h2>{html.escape(title(change))}: before and after</h2>")
        parts += ["<h3>Response lengths</h3>", card(plots[f"lengths_{name}"])]
        if f"divergence_{name}" in plots:
            parts.append("<h3>Divergence from the teacher by position</h3>")
            parts.append(
                card(
                    plots[f"divergence_{name}"]
                    + '<p class="soft">Each model on its own held-out responses; bands are two '
                    "standard errors, clustered by problem.</p>"
                )
            )
        parts.append("<h3>The same problems, before and after</h3>")
        parts.append(
            '<p class="soft">The first two that were answered correctly both times, and the first '
            "whose verdict changed.</p>"
        )
        parts.append(_examples(change, examples(responses[before], responses[name])))

    parts.append("<h2>Training</h2>")
    for stage in figures["stages"]:
        if f"training_{stage['name']}" in plots:
            parts.append(f"<h3>{html.escape(title(stage))}</h3>")
            parts.append(card(plots[f"training_{stage['name']}"] + _verification(stage)))
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    parts.append(
        f'<p class="soft">{figures["seconds"]:.0f} s in all, compilation and evaluation included; '
        f"at most {figures['peak_rss_gib']:.1f} GiB of memory. "
        f"{html.escape(figures['machine'])}; {html.escape(versions)}; {figures['made']}.</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>opsd_jax report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
