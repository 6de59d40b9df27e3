"""The phases of a plan: what a run holds on a device whenever it executes a program."""

import collections

import jax
import pytest

from opsd_jax.config import checks as validation
from opsd_jax.models import decoder
from opsd_jax.parallel import aot
from opsd_jax.planning.chips import CHIPS
from opsd_jax.planning.phases import Phases
from opsd_jax.planning.programs import Compiler
from opsd_jax.rollout import engine
from opsd_jax.run import pipeline

PROMPT, BUDGETS = 32, {"rlvr": 96, "opsd": 112, "evaluation": 128}


def on_a_device():
    """Bytes of all arrays on the first device; several may be of one buffer."""
    first, buffers = jax.devices()[0], {}
    for array in jax.live_arrays():
        if not array.is_deleted() and first in array.sharding.device_set:
            (here,) = (s.data for s in array.addressable_shards if s.device == first)
            buffers[here.unsafe_buffer_pointer()] = here.nbytes
    return sum(buffers.values())


@pytest.fixture
def small(config, monkeypatch):
    """A run in which budgets differ, so that the name of a program tells its phase, and in which
    nothing is saved meanwhile: on a CPU, what is being written is the arrays themselves.
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
    validation.validate(small)
    monkeypatch.setattr(
        engine, "default_cache_lengths", lambda shape: [shape.prompt_tokens + shape.response_tokens]
    )
    made = decoder.model  # CPUs have the weights of sampling a second time, layer by layer
    monkeypatch.setattr(decoder, "model", lambda sizes: made(sizes)._replace(unrolled=None))
    return small


@pytest.mark.slow
def test_a_run_holds_what_its_plan_says(small, tmp_path, monkeypatch):
    """No more, and no less: all of it is needed at some time."""
    compiler = Compiler()
    with aot.planning(compiler):
        plan = Phases(small, jax.devices(), compiler, CHIPS["TPU v4"], 0.5)
        for name in small.stages:
            plan.stage(name)
        plan.evaluation()

    held = collections.defaultdict(list)
    before = on_a_device()

    def compiled(name, lowered):
        program = lowered.compile()

        def execute(*arguments):
            held[name].append(on_a_device() - before)
            return program(*arguments)

        return execute

    monkeypatch.setattr(aot, "compiled", compiled)
    pipeline.run(small, tmp_path)
    of_rlvr = small.rlvr.steps * small.rlvr.updates
    steps = held.pop("train step")
    found = {
        **{f"{n} rollouts": held[f"decode in {PROMPT + BUDGETS[n]}"] for n in small.stages},
        "evaluation": held[f"decode in {PROMPT + BUDGETS['evaluation']}"],
        "rlvr step": steps[:of_rlvr],
        "opsd step": steps[of_rlvr:],
        "opsd probe": held["probe"],
    }
    said = {phase["name"]: phase["total"] - phase["parts"]["temporaries"] for phase in plan.phases}
    assert {*said} - {*found} == {"rlvr reshard", "opsd reshard"}
    for name, sizes in found.items():
        # But for what a chunk drew, the sampling rule and metrics.
        assert max(sizes) == pytest.approx(said[name], rel=0.02), name
