"""Advice for a run that does not fit names fields that its config has, for every algorithm."""

import re

import best_of_n
import jax
import pytest

from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.options import section
from opsd_jax.parallel import aot
from opsd_jax.parallel.chips import CHIPS
from opsd_jax.planning import table
from opsd_jax.planning.chips import GIB, PlanError
from opsd_jax.planning.keys import Part
from opsd_jax.planning.phases import Phases
from opsd_jax.planning.plan import Plan
from opsd_jax.planning.programs import CompiledProgram, Compiler
from opsd_jax.stages.algorithm import RowFields

BATCH = {
    "sft": "a smaller sft.batch_size; fewer buckets",
    "rlvr": "a smaller rlvr.prompts or rlvr.group_size, or a larger rlvr.updates; fewer buckets",
    "best": "a smaller best.prompts; fewer buckets",
    "opsd": "a smaller opsd.prompts or opsd.group_size; fewer buckets",
}
WRONG = best_of_n.ALGORITHM._replace(row_fields=RowFields(("prompts", "problems")))


class Refusing(Compiler):
    """Refuses every program, and so takes no time."""

    def __call__(self, key, lowered):
        del lowered
        name = f"{self.prefix}{key}"
        self.built.append(CompiledProgram(key, name, "", 0.0, 0, 0, 0, refused=True))


@pytest.fixture(scope="module")
def every(shared_config):
    """A config with a stage of each algorithm, the user's too; OPSD samples memos."""
    every = shared_config.copy_and_resolve_references()
    with every.unlocked():
        every.mesh = (2, 2, 2)
        every.stages = tuple(BATCH)
        every.best = section(best_of_n.BestOfNOptions(steps=20, prompt_tokens=16, slots=64))
        every.best.update({"response_tokens": 88, "buckets": (103,)})
        every.opsd.contexts = ("memo",)
        every.opsd.memo.update({"request_tokens": 16, "tokens": 32, "close_tokens": 16})
        for name in every.stages:
            every[name].update({"microbatch": 16, "init_from": ""})
    return every


def phases_of(config, stages):
    """Returns the phases of some stages and of the evaluation."""
    options, compiler = parse_run(config), Refusing()
    with aot.planning(compiler):
        run = Phases(options, jax.devices(), compiler, CHIPS["TPU v4"], 0.5)
        for name in stages:
            run.add_stage(name)
        run.add_evaluation()
    return run


@pytest.fixture(scope="module")
def plan(every):
    run = phases_of(every, every.stages)
    mesh = dict(run.parameters.mesh.shape)
    return Plan(
        topology="v4:2x2x2", slices=1, devices=8, chip="TPU v4", hbm=32 * GIB, mesh=mesh,
        decode_mesh=mesh, response_length=0.5, config=loading.flatten(every), phases=run.phases,
        seconds_at_best=1.0, seconds_in_turn=2.0, programs=run.programs, largest_collective={},
        smallest_weight=1, fits=False,
    )  # fmt: skip


def advice(plan, phase, part):
    """Returns the advice if a part of a phase does not fit."""
    phase = phase._replace(parts=phase.parts | {part: 99 * GIB})
    text = " ".join("\n".join(table.lines(plan._replace(phases=[phase]))).split())
    return re.search(r"To reduce it: (.*?)(?: The compiler refuses|$)", text)[1]


def test_every_field_of_the_advice_is_in_the_config(plan):
    sections = "|".join([*BATCH, "evaluation", "model"])
    texts = [advice(plan, phase, part) for phase in plan.phases for part in phase.parts]
    fields = set(re.findall(rf"\b(?:{sections})(?:\.\w+)+", " ".join(texts)))
    assert fields - plan.config.keys() == set()
    assert {
        *(f"{name}.slots" for name in ("rlvr", "opsd", "best", "evaluation")),
        *(f"{name}.response_tokens" for name in ("rlvr", "opsd", "best", "evaluation")),
        *(f"opsd.memo.{name}" for name in ("slots", "tokens", "close_tokens")),
        *(f"{name}.microbatch" for name in BATCH),
    } <= fields


def test_advice_on_a_batch_names_the_fields_of_the_algorithm(plan):
    steps = {phase.key.section: phase for phase in plan.phases if phase.row_fields}
    assert {name: advice(plan, step, Part.BATCH) for name, step in steps.items()} == BATCH


def test_advice_on_a_cache_with_a_pool_names_its_field(plan):
    phase = next(phase for phase in plan.phases if phase.key.section == "rlvr" and phase.sampling)
    limited = phase._replace(sampling=phase.sampling._replace(pool_tokens=640))
    assert advice(plan, phase, Part.CACHE) == (
        "a smaller rlvr.slots or rlvr.response_tokens; more devices"
    )
    assert advice(plan, limited, Part.CACHE) == "a smaller rlvr.pool_tokens; more devices"


def test_a_plan_says_how_many_slots_fit(plan):
    phase = next(phase for phase in plan.phases if phase.sampling)
    paged = phase._replace(cache_tokens=8192, slots_that_fit=24)
    lines = lambda phase: "\n".join(table.summary(plan._replace(phases=[phase])))
    assert "slots fit" not in lines(phase)
    slots = phase.sampling.slots
    assert f"the cache holds 8,192 tokens: 24 slots fit, {slots} are set" in lines(paged)
    assert paged.to_json()["slots_that_fit"] == 24


def test_a_field_that_an_algorithm_names_has_to_exist(every):
    wrong = every.copy_and_resolve_references()
    wrong.best.algorithm = f"{__name__}:WRONG"
    with pytest.raises(PlanError, match=r"config.best.problems: there is no such field, but"):
        phases_of(wrong, ["best"])
