"""Rollouts of problems: in groups, verified while the device samples, the same on any devices."""

import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import engine as engine_lib
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Collector, concatenate
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import Verdict


@pytest.fixture(scope="module")
def collector(model, params, task):
    def make(mesh_shape=(1, 1, 1), slots=16):
        mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
        placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
        abstract = abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed))
        layout = decode_layout(model, abstract, mesh)
        shape = EngineShape(slots, mesh_lib.row_shards(mesh), 16, 40)
        engine = Engine(model, layout.abstract, mesh, shape)
        collector = Collector(engine, task, VerifierPool(task.verify), 2)
        arguments = {
            "key": jax.random.key(3),
            "sampling_params": sampling.params(model.vocab_size, stop=task.tokenizer.eos_ids),
        }
        params_there = layout.convert(placed)
        return lambda problems, by=Collector.__call__, **kw: by(
            collector, params_there, problems, **(arguments | kw)
        )

    return make


@pytest.fixture(scope="module")
def collect(collector):
    return collector()


@pytest.mark.parametrize(
    "mesh_shape",
    [(8, 1, 1), *(pytest.param(m, marks=pytest.mark.slow) for m in ((2, 4, 1), (2, 2, 2)))],
)
def test_eight_devices_and_other_slots_make_the_same(collector, collect, task, mesh_shape):
    problems = [task.train[i] for i in range(11)]
    one, eight = collect(problems), collector(mesh_shape, slots=8)(problems)
    for a, b in zip(one.responses, eight.responses, strict=True):
        np.testing.assert_array_equal(a, b)
    for field in ("sampling_logprobs", "model_logprobs"):
        for a, b in zip(getattr(one, field), getattr(eight, field), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert one.problems == [problem for problem in problems for _ in range(2)]
    assert [v.reason for v in one.judged.verdicts] == [v.reason for v in eight.judged.verdicts]


def test_groups_are_disjoint_and_cover(collect, task):
    rollouts = collect([task.train[i] for i in range(32)])
    groups = np.stack(rollouts.judged.outcomes)
    np.testing.assert_array_equal(groups.sum(axis=0), 1)
    np.testing.assert_array_equal(
        rollouts.judged.outcomes.truncated,
        [r[-1] not in task.tokenizer.eos_ids for r in rollouts.responses],
    )
    assert rollouts.judged.outcomes.truncated.any()


def test_a_problem_comes_when_its_last_rollout_has_ended(collect, task):
    """In another order than the problems'; those that come are those that are collected."""
    problems = [task.train[i] for i in range(24)]
    whole = collect(problems)
    parts = list(collect(problems, Collector.by_problem))
    order = [i for i, _ in parts]
    assert sorted(order) == list(range(24))
    assert order != sorted(order)
    for i, part in parts:
        assert part.problems == [problems[i]] * 2
        for j in range(2):
            np.testing.assert_array_equal(part.responses[j], whole.responses[2 * i + j])


def test_numbers_choose_the_noise(collect, task):
    problems = [task.train[i] for i in range(6)]
    whole = collect(problems)
    some = dict(collect(problems[3:], Collector.by_problem, numbers=[3, 4, 5]))
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(some[i].responses[j], whole.responses[2 * (i + 3) + j])


def test_the_device_s_wait_is_measured(collect, task, monkeypatch):
    """What is judged while the device samples costs nothing; what it waits for is told."""
    problems = [task.train[i] for i in range(8)]
    assert 0 <= collect(problems).judged.wait_seconds < 0.05

    def slow(self, problem, response):
        time.sleep(0.02)
        verdict = Future()
        verdict.set_result(Verdict(True, "match"))
        return verdict

    monkeypatch.setattr(VerifierPool, "submit", slow)
    for idle in (False, True):
        monkeypatch.setattr(engine_lib, "_is_done", lambda chunk, idle=idle: idle)
        rollouts = collect(problems)
        asked = int((~rollouts.truncated).sum())
        assert asked > 3
        assert (rollouts.judged.wait_seconds >= 0.02 * asked) == idle


def test_settled_rollouts_go_before_others(collect, task):
    """As dynamic sampling adds them: in order, with the time that was waited."""
    first, second = collect([task.train[0]]), collect([task.train[1], task.train[2]])
    waited = first.judged.wait_seconds
    both = concatenate([first.settled(), second])
    assert [p.id for p in both.problems] == [p.id for p in first.problems + second.problems]
    assert both.judged.verdicts == first.judged.verdicts + second.judged.verdicts
    assert both.judged.wait_seconds >= waited
    assert len(both.responses) == len(both.model_logprobs) == len(both.sampling_logprobs) == 6


def test_a_prompt_that_is_too_long_is_named(collect, task):
    long = task.train[0]._replace(question="A 1 " * 20)
    with pytest.raises(ValueError, match=f"problem {long.id} has 42 tokens; prompt_tokens is 16"):
        collect([task.train[1], long])
