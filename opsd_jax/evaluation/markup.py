"""Renders HTML pages from the Jinja templates in `templates/`.

A page is one file: its style and its plots are inside it. The templates escape every value. Only
the plots are inserted as markup.
"""

from __future__ import annotations

import functools
import html
import re
from typing import Any

import jinja2
from markupsafe import Markup

from opsd_jax.evaluation.markers import MARKERS

# A number with what `tables.number` or `tables.interval` adds.
_UNCERTAINTY = re.compile(r"(\S+)( (?:±.*|\[.*\]))")


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
    environment.filters["highlight_markers"] = highlight_markers
    environment.filters["small_uncertainty"] = small_uncertainty
    return environment


def render(template: str, **values: Any) -> str:
    """Renders a template with the given values, and returns the HTML page.

    Args:
      template: the name of a file in `templates/`.
      values: the variables of the template.

    Raises:
      jinja2.UndefinedError: the template uses a variable that `values` lacks.
    """
    return _environment().get_template(template).render(values)
