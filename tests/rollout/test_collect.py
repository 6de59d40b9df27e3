"""Collecting rollouts: groups, and verification while the device samples."""

import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Collector, concatenate
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import Verdict


@pytest.fixture(scope="module")
def arguments(model, task):
    """The sampling arguments of all tests."""
    stop = task.tokenizer.eos_ids
    return {
        "key": jax.random.key(3),
        "sampling_params": sampling.params(model.vocab_size, stop=stop),
    }


@pytest.fixture(scope="module")
def make_engine(model, params):
    """A function `(mesh_shape, slots) -> (engine, params)`, with params in the engine's layout."""

    def make_engine(mesh_shape=(1, 1, 1), slots=16):
        mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
        placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
        abstract = abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed))
        layout = decode_layout(model, abstract, mesh)
        shape = EngineShape(slots, mesh_lib.row_shards(mesh), 16, 40)
        return Engine(model, layout.abstract, mesh, shape), layout.convert(placed)

    return make_engine


@pytest.fixture(scope="module")
def one_device(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def collector(task, arguments):
    """A function `(engine, params) -> collect`, where `collect(problems)` returns rollouts."""

    def collector(engine, params, pool=None):
        made = Collector(engine, task, pool or VerifierPool(task.verify), 2)
        return lambda problems, by=Collector.__call__, **options: by(
            made, params, problems, **(arguments | options)
        )

    return collector


@pytest.fixture(scope="module")
def collect(collector, one_device):
    return collector(*one_device)


@pytest.mark.parametrize(
    "mesh_shape",
    [(8, 1, 1), *(pytest.param(m, marks=pytest.mark.slow) for m in ((2, 4, 1), (2, 2, 2)))],
)
def test_devices_and_slots_do_not_change_rollouts(
    make_engine, collector, collect, task, mesh_shape
):
    problems = [task.train[i] for i in range(11)]
    one, eight = collect(problems), collector(*make_engine(mesh_shape, slots=8))(problems)
    for a, b in zip(one.responses, eight.responses, strict=True):
        np.testing.assert_array_equal(a, b)
    for field in ("sampling_logprobs", "model_logprobs"):
        for a, b in zip(getattr(one, field), getattr(eight, field), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert one.problems == [problem for problem in problems for _ in range(2)]
    assert [v.reason for v in one.judged.verdicts] == [v.reason for v in eight.judged.verdicts]


def test_outcomes_are_disjoint_and_complete(collect, task):
    rollouts = collect([task.train[i] for i in range(32)])
    outcomes_3xN = np.stack(rollouts.judged.outcomes)
    np.testing.assert_array_equal(outcomes_3xN.sum(axis=0), 1)
    np.testing.assert_array_equal(
        rollouts.judged.outcomes.truncated,
        [r[-1] not in task.tokenizer.eos_ids for r in rollouts.responses],
    )
    assert rollouts.judged.outcomes.truncated.any()


def test_a_problem_is_yielded_when_its_last_rollout_ends(collect, task):
    """Problems are yielded in another order, but with the rollouts that a call returns."""
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


def test_numbers_select_the_random_numbers(collect, task):
    problems = [task.train[i] for i in range(6)]
    whole = collect(problems)
    some = dict(collect(problems[3:], Collector.by_problem, numbers=[3, 4, 5]))
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(some[i].responses[j], whole.responses[2 * (i + 3) + j])


@pytest.mark.parametrize("is_idle", [False, True])
def test_only_idle_time_of_the_device_is_counted(collector, one_device, task, is_idle):
    """Submitting a response counts as waiting if the device has nothing to do meanwhile."""
    engine, params = one_device

    class Watched:
        shape = engine.shape

        def __call__(self, *args, **options):
            for ended in engine(*args, **options):
                yield ended._replace(device_is_idle=lambda: is_idle)

    class Slow:
        def submit(self, problem, response):
            time.sleep(0.02)
            (future := Future()).set_result(Verdict(True, "match"))
            return future

    rollouts = collector(Watched(), params, Slow())([task.train[i] for i in range(8)])
    submitted = int((~rollouts.truncated).sum())
    assert submitted > 3
    assert (rollouts.judged.wait_seconds >= 0.02 * submitted) == is_idle


def test_verdicts_that_arrive_while_the_device_samples_cost_no_time(collect, task):
    assert 0 <= collect([task.train[i] for i in range(8)]).judged.wait_seconds < 0.05


def test_settled_rollouts_concatenate_with_others(collect, task):
    """Dynamic sampling relies on this. The order and the time spent waiting are kept."""
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
