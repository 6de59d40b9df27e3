"""The options of the data that are refused, and their error messages."""

import pathlib
import re

import pytest
import tiny_config

from opsd_jax import config as config_lib
from opsd_jax.config import loading
from opsd_jax.data.options import DataOptions, SourceOptions
from opsd_jax.options import ConfigError, parse, section


def source(**changes):
    """Returns a valid source, with changes."""
    return config_lib.source(**({"path": "a.jsonl"} | changes))


def parsed(config):
    """Returns the options of `config.data`, checked as for a run."""
    options = parse(DataOptions, config.data, "data")
    options.check_sources("data")
    return options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"a": {"path": "a"}}}, "data.train.a.split is missing. Set it, for"),
        ({"train": {"problems": None}}, "data.train.problems is None; expected a section with the"),
        (
            {"train": {"a/b": source()}},
            "config.data.train has a source named 'a/b'; expected a name of letters, digits",
        ),
        (
            {"heldout": {"x": source()}},
            "config.data.train has a source named 'x', which another section has as well",
        ),
        (
            {"train": {"a": source(path="")}},
            "data.train.a.path is ''; expected a file or directory",
        ),
        ({"train": {"a": source(weight=0.0)}}, "a.weight is 0.0; expected a number above 0"),
        ({"train": {"a": source(weight=None)}}, "a.weight is None; expected a number"),
        (
            {"train": {"a": source(weight=1e-7)}},
            "data.train.a.weight is 1e-07; expected at least a millionth of the sum",
        ),
        ({"train": {"a": source(columns={"id": None})}}, "columns.id is None; expected a string"),
        (
            {"train": {"a": source(columns={"question": ""})}},
            "columns.question is ''; expected the name of a column",
        ),
        (
            {"train": {"a": source(difficulty={"low": float("nan")})}},
            "a.difficulty.low is nan; expected a number",
        ),
        (
            {"train": {"a": source(difficulty={"low": 2.0, "high": 1.0})}},
            "a.difficulty.low is 2.0; expected at most 1.0, the value of config.data.train.a.diff",
        ),
        (
            {"train": {"a": source(pass_rates={"low": 0.9, "high": 0.1})}},
            "a.pass_rates.low is 0.9; expected at most 0.1, the value of config.data.train.a.pass",
        ),
        (
            {"train": {"a": source(pass_rates={"high": 90.0})}},
            "a.pass_rates.high is 90.0; expected a number in [0, 1]",
        ),
        (
            {"train": {"a": source(extra=("b", 1))}},
            "extra is ('b', 1); expected a tuple of strings",
        ),
        (
            {"train": {"a": source(verifier={"ignore_case": None})}},
            "data.train.a.verifier.ignore_case is None; expected True or False",
        ),
        (
            {"train": {"a": source(bad_rows="keep")}},
            "a.bad_rows is 'keep'; expected 'refuse' or 'drop'",
        ),
        ({"thinking": "yes"}, "data.thinking is 'yes'; expected one of '', 'on', 'off'"),
        ({"date": "2026-1-1"}, "data.date is '2026-1-1'; expected a day such as '2026-01-31'"),
        ({"heldout_problems": -1}, "data.heldout_problems is -1; expected at least 0"),
    ],
)
def test_options_that_cannot_be_used(change, message):
    config = tiny_config.quickstart()
    config.data.train.x = source()
    for field, value in change.items():
        if isinstance(value, dict):
            for name, section in value.items():
                config.data[field][name] = section
        else:
            config.data[field] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        parsed(config)


def test_a_source_without_a_path_is_refused_only_by_check_sources():
    config = tiny_config.quickstart()
    config.data.train.a = config_lib.source()
    options = parse(DataOptions, config.data, "data")
    assert options.train["a"] == SourceOptions()
    with pytest.raises(ConfigError, match=r"data.train.a.path is ''; expected a file or directory"):
        options.check_sources("data")


def test_a_source_rejects_unknown_fields():
    with pytest.raises(KeyError, match="answers"):
        config_lib.source("a", columns={"answers": "gold"})
    assert config_lib.source("a", columns={"answer": "gold"}).columns.question == "problem"


def test_a_source_may_be_a_path_and_have_the_name_of_a_field():
    config = tiny_config.quickstart()
    config.data.train.problems = config_lib.source(pathlib.Path("a") / "b.jsonl")
    assert parsed(config).train["problems"].path == "a/b.jsonl"


def test_default_values_match_the_config():
    """The one field that differs is the tokenizer of the quickstart."""
    options = DataOptions(tokenizer=tiny_config.quickstart().data.tokenizer)
    assert loading.flatten(section(options)) == loading.flatten(tiny_config.quickstart().data)
    assert section(SourceOptions()) == config_lib.source()


def test_infinite_bounds_survive_a_saved_config():
    """JSON has no infinity: a saved config has the largest float in its place."""
    config = tiny_config.quickstart()
    config.data.train.a = source()
    saved = loading.from_flat(loading.flatten(config))
    assert parsed(saved).train["a"].difficulty.high > 1e308
