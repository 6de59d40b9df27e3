"""The HTML of the reports: everything that a model or a dataset writes stays text."""

import jinja2
import pytest

from opsd_jax.evaluation import benchmarks, markup, plots, records, statistics, tables
from opsd_jax.evaluation import summary as summary_lib
from opsd_jax.options import ConfigError

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


CONTROL = "a\x1b[31m\x00\ud800\u202eb\r"
ESCAPED = r"a\x1b[31m\x00\ud800\u202eb\r"


def test_control_characters_are_escaped():
    text = page(title=CONTROL, pairs=[(response(response=CONTROL), response())])
    assert text.count(ESCAPED) == 3  # the title twice, and the response
    text.encode()
    assert all(char.isprintable() or char in "\n\t" for char in text)


def test_the_middle_of_a_long_response_is_left_out():
    long = "a" * 10**6 + "b" * 10**6
    text = page(pairs=[(response(response=long, question=long, answer=long), response())])
    assert text.count("[… 1,900,000 characters are left out …]") == 3
    assert len(text) < 500_000
    assert markup.shorten("a" * markup.SHOWN) == "a" * markup.SHOWN


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("opsd_correct (0.5)", "opsd_correct (0.5)"),
        ("untrained → opsd", "untrained → opsd"),
        ("<img src=x>", r"&lt;img src=x\>"),
        ("![a](b) [c](d)", r"\!\[a\](b) \[c\](d)"),
        ("a|b`c`*d*_e_~f~", r"a\|b\`c\`\*d\*\_e\_\~f\~"),
        ("&lt;\n# b\\", r"&amp;lt;\\n\# b\\"),
    ],
)
def test_markup_in_a_name_is_escaped_in_markdown(name, shown):
    assert markup.markdown(name) == shown
    table = tables.Table(["name", "accuracy"], [[name, "1.0 [0.5, 1.5]"]])
    assert table.markdown()[-1] == f"| {shown} | 1.0 [0.5, 1.5] |"


def test_plots_show_any_name():
    names = [CONTROL, r"$\frac$", "<script>", "a" * 300]
    for name in names:
        assert "<script>" not in plots.lengths({name: [1, 2]})
    assert r"\ud800" in plots.lengths({CONTROL: [1, 2]})


def test_the_files_of_a_report_stay_in_its_directory(tmp_path):
    """The source of a record becomes part of a file name."""
    counts = {name: 1 for name in statistics.RATIOS} | {f"{n}_se": None for n in statistics.RATIOS}
    summary = counts | {
        "name": CONTROL, "problems": 1, "samples": 1, "sources": {}, "pass_at": {},
        "pass_at_se": {},
        "median_length": 1, "p95_length": 1, "median_length_correct": 1, "p95_length_correct": 1,
        "settings": {
            "model": "<b>[x](y)", "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "response_tokens": 9, "seed": 0,
        },
    }  # fmt: skip
    record = response(problem="a", sample=0, source="../../up\x1b", truncated=False, extracted=None)
    out = tmp_path / "a" / "b" / "out"
    out.mkdir(parents=True)
    records.recorder(out, [record])
    records.finish(out, summary)
    summary_lib.write(out)
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "responses.jsonl", "report.md", "index.html", "accuracy_length.svg",
        "lengths_______up_.svg",
    }  # fmt: skip
    text = (out / "report.md").read_text()
    assert r"Model: &lt;b\>\[x\](y)." in text
    assert "\x1b" not in text + (out / "index.html").read_text()


@pytest.mark.parametrize("name", ["../a", "a/b", "a.b", "a\nb", "", "a b", "a" * 99])
def test_the_name_of_a_benchmark_is_checked(name):
    with pytest.raises(ConfigError, match="expected a name of letters, digits, _ and -, of at"):
        benchmarks.source(f"{name}=a.jsonl")
