"""The phases of a plan: their memory equals what a run holds on a device."""

import collections
import dataclasses

import jax
import pytest

from opsd_jax.config.run_options import parse_run
from opsd_jax.models import decoder
from opsd_jax.parallel import aot
from opsd_jax.parallel.chips import CHIPS
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.planning.keys import Part, PhaseKey, PhaseKind
from opsd_jax.planning.phases import Phases
from opsd_jax.planning.programs import Compiler
from opsd_jax.rollout import engine
from opsd_jax.run import pipeline

PROMPT, BUDGETS = 32, {"rlvr": 96, "opsd": 112, "evaluation": 128}


def on_a_device():
    """Returns the bytes of all arrays on the first device; a shared buffer counts once."""
    first, buffers = jax.devices()[0], {}
    for array in jax.live_arrays():
        if not array.is_deleted() and first in array.sharding.device_set:
            (here,) = (s.data for s in array.addressable_shards if s.device == first)
            buffers[here.unsafe_buffer_pointer()] = here.nbytes
    return sum(buffers.values())


@pytest.fixture
def small(config, monkeypatch):
    """A config with different budgets, so that a program's cache length identifies its phase.

    It saves no checkpoints while programs run: on a CPU, a save holds the arrays themselves.
    """
    small = config.copy_and_resolve_references()
    with small.unlocked():
        small.mesh, small.decode_mesh, small.stages = (2, 2, 2), (2, 1, 4), ("rlvr", "opsd")
        small.model.update({"hidden_size": 64, "intermediate_size": 256, "num_layers": 4})
        small.model.update({"num_kv_heads": 4, "attention": "dense", "cache": "dense"})
        small.rlvr.update({"init_from": "", "steps": 2, "updates": 2, "checkpoint_every": 99})
        small.rlvr.objective.kl_coefficient = 0.1
        small.opsd.update({"init_from": "rlvr", "steps": 2, "checkpoint_every": 99})
        for name, tokens in BUDGETS.items():
            small[name].update({"prompt_tokens": PROMPT, "response_tokens": tokens})
            if name in small.stages:
                small[name].buckets = (64, PROMPT + tokens)
        small.opsd.teacher_buckets = ()
    monkeypatch.setattr(
        engine, "default_cache_lengths", lambda shape: [shape.prompt_tokens + shape.response_tokens]
    )
    made = decoder.model  # on a CPU, sampling would hold the weights twice
    monkeypatch.setattr(decoder, "model", lambda sizes: made(sizes)._replace(unrolled=None))
    return parse_run(small)


@pytest.mark.slow
def test_a_plan_compiles_the_programs_that_speculate(small):
    """It counts their temporaries. It assumes that they save no time."""
    found = []
    for guesses in (0, 3):
        section = dataclasses.replace(small.sections["rlvr"], speculation=guesses)
        compiler = Compiler()
        with aot.planning(compiler):
            config = dataclasses.replace(small, sections={**small.sections, "rlvr": section})
            plan = Phases(config, jax.devices(), compiler, CHIPS["TPU v4"], 0.5)
            plan.add_stage("rlvr")
        key = PhaseKey("rlvr", PhaseKind.SAMPLING, "rollouts")
        found.append(next(phase for phase in plan.phases if phase.key == key))
    off, on = found
    assert on.programs == [*off.programs, "rlvr rollouts: speculate in 128"]
    assert on.seconds_at_best == off.seconds_at_best
    assert on.parts[Part.TEMPORARIES] >= off.parts[Part.TEMPORARIES]
    assert {**on.parts, Part.TEMPORARIES: 0} == {**off.parts, Part.TEMPORARIES: 0}


@pytest.mark.slow
def test_a_run_holds_the_memory_of_its_plan(small, tmp_path, monkeypatch):
    """At its peak, a phase holds all of its planned memory and no more."""
    compiler = Compiler()
    with aot.planning(compiler):
        plan = Phases(small, jax.devices(), compiler, CHIPS["TPU v4"], 0.5)
        for name in small.stages:
            plan.add_stage(name)
        plan.add_evaluation()

    held = collections.defaultdict(list)
    before = on_a_device()

    def compiled(key, lowered):
        program = lowered.compile()

        def execute(*arguments):
            held[key].append(on_a_device() - before)
            return program(*arguments)

        return execute

    monkeypatch.setattr(aot, "compiled", compiled)
    pipeline.run(small, tmp_path)
    rlvr_steps = small.sections["rlvr"].optimizer_updates()
    steps = held.pop(ProgramKey(ProgramKind.TRAIN_STEP))
    decoding = lambda name: held[ProgramKey(ProgramKind.DECODE, PROMPT + BUDGETS[name])]
    found = {
        **{PhaseKey(name, PhaseKind.SAMPLING, "rollouts"): decoding(name) for name in small.stages},
        PhaseKey("evaluation", PhaseKind.EVALUATION): decoding("evaluation"),
        PhaseKey("rlvr", PhaseKind.STEP): steps[:rlvr_steps],
        PhaseKey("opsd", PhaseKind.STEP): steps[rlvr_steps:],
        PhaseKey("opsd", PhaseKind.PROBE): held[ProgramKey(ProgramKind.PROBE)],
    }
    expected = {phase.key: phase.total - phase.parts[Part.TEMPORARIES] for phase in plan.phases}
    reshards = {PhaseKey(name, PhaseKind.RESHARD) for name in small.stages}
    assert expected.keys() - found.keys() == reshards
    for key, sizes in found.items():
        # A plan does not count sampled tokens, sampling parameters and metrics.
        assert max(sizes) == pytest.approx(expected[key], rel=0.02), str(key)
