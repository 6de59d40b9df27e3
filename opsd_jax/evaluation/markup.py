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

_UNCERTAINTY = re.compile(r" (?:±.*|\[.*\])$")  # what `tables.number` and `tables.interval` add


def highlight_markers(text: str) -> Markup:
    """Escapes text for HTML and wraps each epistemic marker in a <mark> element."""
    return Markup(MARKERS.sub(r"<mark>\1</mark>", html.escape(text)))


def small_uncertainty(cell: str) -> Markup:
    """Escapes a table cell for HTML and wraps its error or interval in a <small> element."""
    return Markup(_UNCERTAINTY.sub(r"<small>\g<0></small>", html.escape(cell)))


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
