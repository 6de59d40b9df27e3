"""Parts of an HTML page that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from opsd_jax.evaluation.markers import MARKERS

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


def card(content: str) -> str:
    """A box around some HTML."""
    return f'<div class="card">{content}</div>'


def soft(text: str) -> str:
    """A paragraph of less weight."""
    return f'<p class="soft">{html.escape(text)}</p>'


def facts(cards: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: (what, number, what else)."""
    return (
        '<div class="facts">'
        + "".join(
            f'<div class="fact"><span>{html.escape(what)}</span><b>{html.escape(number)}</b>'
            f"<span>{html.escape(rest)}</span></div>"
            for what, number, rest in cards
        )
        + "</div>"
    )


def _response(name: str, response: dict[str, Any]) -> str:
    kind = "right" if response["correct"] else "wrong"
    text = MARKERS.sub(r"<mark>\1</mark>", html.escape(response["response"]))
    return (
        f'<div><p class="soft">{html.escape(name)} · {response["length"]} tokens · '
        f'<span class="{kind}">{html.escape(response["verdict"])}</span></p><pre>{text}</pre></div>'
    )


def examples(names: tuple[str, str], pairs: Sequence[tuple[dict, dict]]) -> str:
    """Responses of two models side by side."""
    return "".join(
        f'<div class="card"><p><code>{html.escape(a["question"])}</code> '
        f'<span class="soft">answer {html.escape(a["answer"])}</span></p>'
        f'<div class="pair">{_response(names[0], a)}{_response(names[1], b)}</div></div>'
        for a, b in pairs
    )


def choose(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of responses to the same problem, of three problems: the first two that are correct
    before and after, and the first whose verdict changed; where there are none, any.
    """
    there = {(b["problem"], b["sample"]): b for b in before}
    pairs = [(there[k], a) for a in after if (k := (a["problem"], a["sample"])) in there]
    both = [(a, b) for a, b in pairs if a["correct"] and b["correct"]]
    changed = [(a, b) for a, b in pairs if a["correct"] != b["correct"]]
    chosen: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
    for most, kind in ((2, both), (3, changed), (3, pairs)):
        for a, b in kind:
            if len(chosen) < most:
                chosen.setdefault(a["problem"], (a, b))
    return list(chosen.values())


EXAMPLES = (
    "The first two that were answered correctly both times, and the first whose verdict changed."
)


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
