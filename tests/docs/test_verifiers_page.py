"""The code in docs/verifiers.md works as written."""

import json
import re
import runpy
import subprocess
import sys

import pytest
import tiny_config
from paths import ROOT

from opsd_jax import config as config_lib
from opsd_jax.config.run_options import parse_run
from opsd_jax.data.load import load
from opsd_jax.problem import Problem
from opsd_jax.verify.extract import CONVENTIONS
from opsd_jax.verify.maths import maths
from opsd_jax.verify.pool import PoolOptions, VerifierPool
from opsd_jax.verify.verdict import REASONS, Verdict
from opsd_jax.verify.verifiers import by_source, choice, numeric

PAGE = (ROOT / "docs" / "verifiers.md").read_text()
SOURCES, GYM_SOURCE, COUNTDOWN, COUNTDOWN_SOURCE, ALONE = re.findall(
    r"```python\n(.*?)```", PAGE, re.DOTALL
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the module and the data of the examples on the page."""
    (tmp_path / "countdown.py").write_text(COUNTDOWN)
    row = json.loads(re.search(r"\{.*\}", COUNTDOWN)[0])
    (tmp_path / "countdown.jsonl").write_text(json.dumps(row))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("countdown", None)


def test_the_example_verifier_judges_responses(here):
    config = tiny_config.quickstart()
    exec(COUNTDOWN_SOURCE, {"config": config, "config_lib": config_lib})
    config.data.heldout.any = config_lib.source("heldout.jsonl")
    data = load(parse_run(config).data)
    (problem,) = data.train["countdown"]
    responses = {
        r"(7 - 8 / 8) * 4 \boxed{(7 - 8 / 8) * 4}": "match",
        r"\boxed{7 - 8 / 8}": "other numbers",
        r"\boxed{4 + 7 + 8 + 8}": "mismatch",
        r"\boxed{4 / (8 - 8) + 7}": "not an expression",
        r"\boxed{__import__('os').getpid()}": "not an expression",
        "24": "no answer",
    }
    with VerifierPool(by_source(data.verifiers), PoolOptions(workers=1)) as pool:
        futures = [pool.submit(problem, response) for response in responses]
        verdicts = [future.result(timeout=60) for future in futures]
    assert [v.reason for v in verdicts] == list(responses.values())
    assert [v.correct for v in verdicts] == [True] + [False] * 5


def test_the_example_sources_are_valid(here):
    config = tiny_config.quickstart()
    exec(SOURCES, {"config": config, "config_lib": config_lib})
    train = parse_run(config).data.train
    assert train["gsm8k"].verifier.answer == ("####", "boxed")
    assert train["physics"].verifier.kind == "numeric"


def test_the_example_of_reasoning_gym_is_valid(here):
    config = tiny_config.quickstart()
    exec(GYM_SOURCE, {"config": config, "config_lib": config_lib})
    data = parse_run(config).data
    assert data.train["legs"].extra == ("gym",)
    assert data.heldout_problems == 256


def test_verification_without_a_config(here):
    script = here / "alone.py"
    script.write_text(ALONE)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    expected = re.search(r"print\(main\(\)\)  # (.*)", ALONE)[1]
    assert done.stdout.strip() == expected
    assert runpy.run_path(str(script))["Problem"] is Problem


def test_the_page_names_every_convention_reason_and_field():
    missing = [
        name for name in (*CONVENTIONS, *REASONS, *config_lib.verifier()) if name not in PAGE
    ]
    assert missing == []


def examples():
    """Yields (verifier, gold answer, answer, whether it is accepted) of the tables of examples."""
    verifiers = {"`numeric`": numeric(relative_tolerance=0.01), "`choice`": choice()}
    for row in re.findall(r"^\| ?(.*) \|$", PAGE, re.MULTILINE):
        kind, *cells = re.split(r"(?<!\\) \| ", row)
        spans = [re.findall("`([^`]+)`", cell) for cell in cells]
        if len(cells) == 3 and len(spans[0]) == 1:
            for accepted, answers in ((True, spans[1]), (False, spans[2])):
                for answer in answers:
                    yield verifiers.get(kind, maths()), spans[0][0], answer, accepted


EXAMPLES = list(examples())


@pytest.mark.parametrize(("verifier", "gold", "answer", "accepted"), EXAMPLES)
def test_the_tables_of_examples_are_true(verifier, gold, answer, accepted):
    problem = Problem(0, "", "", gold)
    assert verifier(problem, rf"\boxed{{{answer}}}").correct == accepted
    prepared = verifier.prepare_gold(problem)
    assert (prepared if isinstance(prepared, Verdict) else verifier.judge(prepared)).correct


def test_the_tables_have_examples_of_every_kind():
    assert len(EXAMPLES) > 150
