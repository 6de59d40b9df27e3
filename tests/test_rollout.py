"""Sampling: behaviour log-probabilities, reproducibility, stopping, statistics."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout import sampler
from opsd_jax.rollout.collect import Collector
from opsd_jax.rollout.engine import Engine, SamplerShape, left_pad
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import Verdict

EOS, PAD = 2, 0


sample = jax.jit(sampler.generate, static_argnums=0, static_argnames="max_new_tokens")


def generate(model, params, prompts, ids, *, width=8, budget=24, temperature=1.0, seed=0):
    tokens, positions = left_pad(prompts, width, PAD)
    return sample(
        model.policy,
        params,
        jnp.array(tokens),
        jnp.array(positions),
        jnp.array(ids, jnp.int32),
        jax.random.key(seed),
        jnp.float32(temperature),
        jnp.array([EOS]),
        jnp.int32(PAD),
        max_new_tokens=budget,
    )


def full_logits(score, params, tokens):
    """Logits [T, V] in float64 of a full forward over the tokens."""
    padded, positions = np.zeros((1, 32), np.int32), np.full((1, 32), -1, np.int32)
    padded[0, : len(tokens)], positions[0, : len(tokens)] = tokens, np.arange(len(tokens))
    return np.asarray(score(params, padded, positions), np.float64)[0, : len(tokens)]


PROMPTS = [[1, 9, 20], [1, 5, 6, 7, 8, 3], [4]]


@pytest.fixture(scope="module")
def samples(model, params):
    return jax.device_get(generate(model, params, PROMPTS, range(12)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_teacher_forced_ones(model, score, params, temperature):
    samples = jax.device_get(generate(model, params, PROMPTS, range(12), temperature=temperature))
    for row in range(12):
        prompt, n = PROMPTS[row // 4], samples.lengths[row]
        logits = full_logits(score, params, [*prompt, *samples.tokens[row, :n]])
        logits = logits[len(prompt) - 1 : -1] / temperature
        logprobs = logits - logsumexp(logits, axis=-1, keepdims=True)
        expected = logprobs[np.arange(n), samples.tokens[row, :n]]
        np.testing.assert_allclose(samples.logprobs[row, :n], expected, atol=1e-4)


def test_a_response_ends_with_its_eos_or_its_budget(samples):
    assert {sampler.STOP_EOS, sampler.STOP_LENGTH} == set(samples.stop.tolist())  # both occur
    for tokens, logprobs, n, stop in zip(*samples, strict=True):
        assert EOS not in tokens[: n - 1]
        assert (tokens[n:] == PAD).all()
        assert (logprobs[n:] == 0).all()
        assert (logprobs[:n] < 0).all()
        assert (tokens[n - 1] == EOS) == (stop == sampler.STOP_EOS)
        assert n == 24 or stop == sampler.STOP_EOS


def test_a_rollout_depends_on_its_id_alone(model, params, samples):
    """Not on its row, on the prompts beside it, on their padding, or on the group's size."""
    alone = generate(model, params, PROMPTS[1:2], [6], width=6)
    moved = generate(model, params, PROMPTS[::-1], [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], width=9)
    np.testing.assert_array_equal(alone.tokens[0], samples.tokens[6])
    np.testing.assert_array_equal(moved.tokens[::-1], samples.tokens)


def test_steps_and_rollouts_have_noise_of_their_own(model, params, samples):
    rows = {tuple(row) for row in samples.tokens.tolist()}
    assert len(rows) == 12
    other = generate(model, params, PROMPTS, range(12), seed=1)
    assert not rows & {tuple(row) for row in other.tokens.tolist()}


def test_greedy_takes_the_likeliest(model, score, params):
    samples = jax.device_get(generate(model, params, PROMPTS, range(3), temperature=0.0))
    for row, prompt in enumerate(PROMPTS):
        tokens = samples.tokens[row, : samples.lengths[row]]
        logits = full_logits(score, params, [*prompt, *tokens])[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_sampled_frequencies_are_the_distribution(model, score, params):
    """First tokens of 20,000 rollouts against softmax(logits / T): chi-square, fixed seed."""
    n, temperature = 20_000, 1.3
    samples = generate(
        model, params, [PROMPTS[0]], range(n), width=3, budget=1, temperature=temperature
    )
    logits = full_logits(score, params, PROMPTS[0])[-1] / temperature
    p = np.exp(logits - logsumexp(logits))
    counts = np.bincount(np.asarray(samples.tokens[:, 0]), minlength=32)
    often = p * n >= 5
    observed, expected = counts[often], p[often] * n
    if not often.all():  # the rare words in one bin
        observed = np.append(observed, counts[~often].sum())
        expected = np.append(expected, p[~often].sum() * n)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.fixture(scope="module")
def collect(model, params, task):
    def make(mesh_shape=(1, 1, 1), prompts=8):
        mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
        shardings = mesh_lib.param_shardings(mesh, model.rules, params)
        placed = jax.device_put(params, shardings)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
        )
        pool = VerifierPool(task.verify)
        engine = Engine(
            model.policy,
            abstract,
            mesh,
            SamplerShape(prompts, 16, 2, 40),
            eos_ids=task.tokenizer.eos_ids,
            pad_id=task.tokenizer.pad_id,
        )
        collector = Collector(engine, task, pool)
        return lambda problems, **kw: collector(
            placed, problems, **({"key": jax.random.key(3), "temperature": 1.0} | kw)
        )

    return make


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_eight_devices_sample_what_one_does(collect, task, mesh_shape):
    problems = [task.train[i] for i in range(16)]
    one, eight = collect()(problems), collect(mesh_shape)(problems)
    for a, b in zip(one.responses, eight.responses, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.logprobs, eight.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_calls_and_their_filling_change_nothing(collect, task):
    problems = [task.train[i] for i in range(11)]
    few, many = collect(prompts=4)(problems), collect(prompts=16)(problems)
    assert len(few.responses) == len(many.responses) == 22
    for a, b in zip(few.responses, many.responses, strict=True):
        np.testing.assert_array_equal(a, b)
    assert few.problems == [p for p in problems for _ in range(2)]


def test_groups_are_disjoint_and_cover(collect, task):
    rollouts = collect()([task.train[i] for i in range(32)])
    groups = np.stack(rollouts.judged.groups)
    np.testing.assert_array_equal(groups.sum(axis=0), 1)
    np.testing.assert_array_equal(
        rollouts.judged.groups.truncated,
        [r[-1] not in task.tokenizer.eos_ids for r in rollouts.responses],
    )
    assert rollouts.judged.groups.truncated.any()


def test_the_device_s_wait_is_measured(collect, task, monkeypatch):
    """What is judged while the device samples costs nothing; what it waits for is told."""
    problems = [task.train[i] for i in range(8)]
    assert 0 <= collect()(problems).judged.wait_seconds < 0.05

    def slow(self, problem, response):
        time.sleep(0.02)
        return VerifierPool.__dict__["_resolve"](self, lambda: Verdict(True, "match"))

    monkeypatch.setattr(VerifierPool, "submit", slow)
    rollouts = collect()(problems)  # one call: nothing is beside it
    asked = int((~rollouts.truncated).sum())
    assert asked > 3
    assert 0.02 * asked <= rollouts.judged.wait_seconds < 0.02 * asked + 0.5


def test_a_prompt_that_is_too_long_is_named(collect, task):
    long = task.train[0]._replace(question="A 1 " * 20)
    with pytest.raises(ValueError, match=f"problem {long.id} has 42 tokens; prompt_tokens is 16"):
        collect()([task.train[1], long])
