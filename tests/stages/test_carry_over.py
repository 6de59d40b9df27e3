"""Rollouts that go on in the next step."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from tiny_config import stage_options

from opsd_jax.options import ConfigError
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import carry
from opsd_jax.rollout import programs as programs_lib
from opsd_jax.rollout.collect import Collector
from opsd_jax.rollout.engine import RUNNING, Engine, shape_for
from opsd_jax.rollout.layout import decode_layout
from opsd_jax.stages.rollouts import carrying_rollouts, no_rollouts, rollout_metrics
from opsd_jax.verify.pool import VerifierPool

STEPS = 7


@pytest.fixture(scope="module")
def options(shared_config):
    changes = {"prompts": 6, "carry_over": 5, "max_staleness": 2, "slots": 4, "group_size": 2}
    return stage_options(shared_config.rlvr, **changes, prompt_tokens=16, response_tokens=40)


@pytest.fixture(scope="module")
def roll_out(options, task, model, params):
    """A function `(step, carried) -> Rollouts` with a real engine of short chunks."""
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
    abstract = abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed))
    layout = decode_layout(model, abstract, mesh)
    shape = shape_for(
        slots=4,
        group_size=2,
        rollouts=22,
        prompt_tokens=16,
        response_tokens=40,
        shards=1,
        continues=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs_lib, "STEPS_PER_CHUNK", 4)
        engine = Engine(model, layout.abstract, mesh, shape)
    collector = Collector(engine, task, VerifierPool(task.verify), 2)
    sample = carrying_rollouts(options, task, collector, 5, vocab_size=model.vocab_size)
    return lambda step, carried: sample(step, layout.convert(placed), carried)


@pytest.fixture(scope="module")
def steps(roll_out, options):
    """The rollouts of STEPS steps."""
    made, carried = [], no_rollouts(options)
    for step in range(STEPS):
        made.append(roll_out(step, carried))
        carried = made[-1].carried
    return made


def test_every_problem_of_the_stream_trains_once(steps, task, options):
    """A step trains as many groups as without carry-over, and no group is lost or repeated."""
    stream = task.stream(5) if task.stream else task.train.shuffle(seed=5).repeat()
    trained = [p.id for step in steps for p in step.problems[:: options.group_size]]
    left = [group.place for group in carry.unpack(steps[-1].carried)]
    assert [len(step.problems) for step in steps] == [options.rollouts] * STEPS
    assert len(left) == options.carry_over
    drawn = range(STEPS * options.prompts + options.carry_over)
    expected = sorted(stream[i].id for i in drawn)
    assert sorted([*trained, *(stream[i].id for i in left)]) == expected


def test_a_step_ends_before_its_longest_rollouts(steps):
    """The first step carries over rollouts with tokens; another one trains them."""
    carried = [r for group in carry.unpack(steps[0].carried) for r in group.responses]
    assert any(len(r.tokens) > 0 and r.stop == RUNNING for r in carried)
    assert max(step.staleness.max() for step in steps) > 0


def test_a_step_waits_for_the_rollouts_that_are_due(steps, options):
    for number, step in enumerate(steps):
        assert step.staleness.max() <= options.max_staleness
        for group in carry.unpack(step.carried):
            assert number + 1 - group.began <= options.max_staleness
    values = rollout_metrics(steps[-1], options.group_size)
    assert values["staleness"] == steps[-1].staleness.mean()
    assert values["staleness_max"] == steps[-1].staleness.max()


def test_logprobs_are_those_of_a_full_forward_pass(steps, task, score, params, options):
    """Whether or not a rollout was carried over: the parameters are the same in all steps here."""
    continued = 0
    for step in steps:
        for i, response in enumerate(step.responses):
            prompt = task.prompt(step.problems[i])
            ids = np.array([*prompt, *response.tolist()])[None]
            logits = score(params, ids, np.arange(ids.shape[1])[None])[0]
            found = log_softmax(np.asarray(logits, np.float64), axis=-1)
            at = np.arange(len(prompt) - 1, ids.shape[1] - 1), response
            np.testing.assert_allclose(step.model_logprobs[i], found[at], atol=1e-4)
            np.testing.assert_allclose(step.sampling_logprobs[i], found[at], atol=1e-4)
            assert step.truncated[i] == (len(response) == options.response_tokens) or (
                response[-1] in task.tokenizer.eos_ids
            )
            continued += step.staleness[i] > 0
    assert continued > 5


def test_a_step_depends_on_what_it_gets_alone(roll_out, steps):
    """So a resumed run has the same rollouts."""
    for number in (4, 2):
        again = roll_out(number, steps[number - 1].carried)
        for a, b in zip(again.responses, steps[number].responses, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(again.sampling_logprobs, steps[number].sampling_logprobs, strict=True):
            np.testing.assert_array_equal(a, b)
        for name, array in again.carried.items():
            np.testing.assert_array_equal(array, steps[number].carried[name])


def test_more_groups_than_a_step_trains_are_refused(shared_config):
    """Otherwise, a step could not train all groups that are due."""
    with pytest.raises(ConfigError, match=r"rlvr.carry_over is 17; .* rlvr.prompts = 16"):
        stage_options(shared_config.rlvr, carry_over=17)


def test_carry_over_and_resampling_exclude_each_other(shared_config):
    with pytest.raises(ConfigError, match=r"rlvr.carry_over is 4; .* rlvr.resample_rounds = 2"):
        stage_options(shared_config.rlvr, carry_over=4, resample_rounds=2)
