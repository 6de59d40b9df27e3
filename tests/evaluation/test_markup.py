"""The HTML of the reports: everything that a model or a dataset writes stays text."""

import jinja2
import pytest

from opsd_jax.evaluation import markup, tables

HOSTILE = "<script>alert('x')</script> & wait"


def response(**changes):
    return {
        "question": HOSTILE,
        "answer": HOSTILE,
        "response": HOSTILE,
        "verdict": HOSTILE,
        "length": 3,
        "correct": True,
    } | changes


def page(**changes):
    values = {
        "title": HOSTILE,
        "notes": [HOSTILE],
        "tables": [tables.Table([HOSTILE, "a"], [[HOSTILE, "1.0 ± 0.1"]])],
        "accuracy_length": "<svg></svg>",
        "lengths": {HOSTILE: "<svg></svg>"},
        "before": HOSTILE,
        "after": HOSTILE,
        "pairs": [(response(), response(correct=False))],
    }
    return markup.render("evaluation.html.j2", **(values | changes))


def test_text_is_escaped_and_plots_are_not():
    text = page()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(" in text
    assert text.count("<svg></svg>") == 2


def test_epistemic_markers_of_a_response_are_highlighted():
    assert page().count("&amp; <mark>wait</mark></pre>") == 2
    assert markup.highlight_markers("<b>Double-check</b>") == (
        "&lt;b&gt;<mark>Double-check</mark>&lt;/b&gt;"
    )


def test_errors_and_intervals_of_a_table_are_small():
    assert "<td>1.0<small> ± 0.1</small></td>" in page()
    assert markup.small_uncertainty("+1.0 [+0.5, +1.5]") == "+1.0<small> [+0.5, +1.5]</small>"
    assert markup.small_uncertainty("<a>") == "&lt;a&gt;"


def test_a_page_without_comparison_has_no_examples():
    assert "before and after" in page()
    assert "before and after" not in page(pairs=None)


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        markup.render("evaluation.html.j2")
