"""Renders HTML pages from the Jinja templates in `templates/`.

A page is one file: its style and its plots are inside it. The templates escape every value. Only
the plots are inserted as markup. `markdown` does the same for the reports in Markdown.
"""

from __future__ import annotations

import functools
import html
import re
from typing import Any

import jinja2
from markupsafe import Markup

from opsd_jax.evaluation.markers import MARKERS
from opsd_jax.storage.foreign import escape

SHOWN = 100_000  # characters of a response that a report shows
# Punctuation that starts markup in Markdown, and underscores that are not inside a word.
_MARKUP = re.compile(r"[\\`*\[\]>#!|~$]|(?<!\w)_|_(?!\w)")
# A number with what `tables.number` or `tables.interval` adds.
_UNCERTAINTY = re.compile(r"(\S+)( (?:±.*|\[.*\]))")


def shorten(text: str) -> str:
    """Cuts the middle out of a text with over SHOWN characters, and says how much is left out."""
    left_out = len(text) - SHOWN
    if left_out <= 0:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[… {left_out:,} characters are left out …]\n{text[-half:]}"


def markdown(text: str) -> str:
    """Escapes text for Markdown: the result is one line, and none of it is markup."""
    text = escape(shorten(text))
    return _MARKUP.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))


def highlight_markers(text: str) -> Markup:
    """Escapes text for HTML and wraps each epistemic marker in a <mark> element."""
    return Markup(MARKERS.sub(r"<mark>\1</mark>", html.escape(text)))


def small_uncertainty(cell: str) -> Markup:
    """Escapes a table cell for HTML and wraps its error or interval in a <small> element."""
    cell = html.escape(cell)
    found = _UNCERTAINTY.fullmatch(cell)
    return Markup(f"{found[1]}<small>{found[2]}</small>" if found else cell)


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns the Jinja environment that loads the templates and escapes every value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("opsd_jax.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shorten"] = shorten
    environment.filters["highlight_markers"] = highlight_markers
    environment.filters["small_uncertainty"] = small_uncertainty
    return environment


def render(template: str, **values: Any) -> str:
    """Renders a template with the given values, and returns the HTML page.

    Control characters in the values are escaped.

    Args:
      template: the name of a file in `templates/`.
      values: the variables of the template.

    Raises:
      jinja2.UndefinedError: the template uses a variable that `values` lacks.
    """
    return escape(_environment().get_template(template).render(values), keep="\n\t")
