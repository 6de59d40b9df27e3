"""A fourth algorithm in one file, tests/support/best_of_n.py, works without changes to the package.

It is checked, trained, planned and reported like the others.
"""

import json

import best_of_n
import jax
import numpy as np
import pytest
from paths import SUPPORT

from opsd_jax.config.run_options import parse_run
from opsd_jax.options import ConfigError, section
from opsd_jax.parallel import aot
from opsd_jax.parallel.chips import CHIPS
from opsd_jax.planning.keys import PhaseKey, PhaseKind
from opsd_jax.planning.phases import Phases
from opsd_jax.planning.programs import Compiler
from opsd_jax.run import assembly, pipeline
from opsd_jax.stages import ALGORITHMS


@pytest.fixture
def own(config):
    """A run of SFT and then best-of-n."""
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.best = section(
            best_of_n.BestOfNOptions(
                init_from="sft",
                steps=2,
                prompts=16,
                group_size=2,
                slots=16,
                microbatch=8,
                prompt_tokens=16,
                response_tokens=88,
                buckets=(64, 103),
                checkpoint_every=1,
            )
        )
        own.best.optimizer.warmup = 0
        own.stages = ("sft", "best")
    return own


def test_the_file_is_short():
    assert len((SUPPORT / "best_of_n.py").read_text().splitlines()) < 80
    assert best_of_n.ALGORITHM not in ALGORITHMS.values()  # the package does not know it


def test_it_trains_and_reports(own, tmp_path):
    options = parse_run(own)
    pipeline.run(options, tmp_path)
    pipeline.write_report(options, tmp_path)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [stage["algorithm"] for stage in report["stages"]] == ["sft", "best_of_n:ALGORITHM"]
    assert (tmp_path / "report" / "training_best.svg").exists()
    assert "sft → best" in (tmp_path / "report" / "index.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "best" / "metrics.jsonl").open()]
    assert [row["problems"] for row in rows] == [16, 16]


def test_it_chooses_the_shortest_correct_rollout():
    options = best_of_n.BestOfNOptions(group_size=2)

    class Rollouts:
        class judged:
            class outcomes:
                correct = np.array([True, True, False, True, False, False])

        lengths = np.array([7, 5, 1, 9, 1, 2])

    assert best_of_n.chosen(options, Rollouts) == [1, 3]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("least", 3, "config.best.least is 3; expected at most group_size = 2"),
        ("buckets", (64, 90), "config.best.buckets is .*; expected a last length of at least 103"),
        (
            "algorithm",
            "nothing:HERE",
            "config.best.algorithm: 'nothing:HERE' cannot be imported",
        ),
        (
            "algorithm",
            "json:dumps",
            "expected the name of an instance of opsd_jax.stages.algorithm.Algorithm",
        ),
    ],
)
def test_it_validates(own, field, value, message):
    own.best[field] = value
    with pytest.raises(ConfigError, match=message):
        parse_run(own)


def test_its_data_and_slots_are_checked(own, tmp_path):
    own.best.prompt_tokens = 8
    with pytest.raises(ConfigError, match=r"best.prompt_tokens is 8; expected at least 16"):
        assembly.assemble(parse_run(own), tmp_path)
    own.best.update({"prompt_tokens": 16, "slots": 12})
    with pytest.raises(
        ConfigError, match=r"best.slots is 12; expected a multiple of 8, the product"
    ):
        assembly.assemble(parse_run(own), tmp_path)


def test_it_is_planned(own):
    """The plan compiles the sampling and the train step of the stage, here for CPUs."""
    compiler = Compiler()
    own.model.update({"attention": "dense", "cache": "dense"})
    with aot.planning(compiler):
        plan = Phases(parse_run(own), jax.devices(), compiler, CHIPS["TPU v4"], 0.5)
        plan.add_stage("best")
    phases = {phase.key: phase for phase in plan.phases}
    step = PhaseKey("best", PhaseKind.STEP)
    assert {PhaseKey("best", PhaseKind.SAMPLING, "rollouts"), step} <= phases.keys()
    assert 0 < phases[step].useful_tokens <= 1
    assert all(phase.times == 2 for phase in plan.phases)
