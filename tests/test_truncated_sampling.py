"""Top-k and nucleus sampling: the words that are left, their probabilities, the engine's rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout import sampler
from opsd_jax.rollout.engine import Engine, SamplerShape

RULES = [(5, None), (0, 0.8), (8, 0.7), (1, None), (4, 1e-6), (100, 0.95), (20, 0.95)]


def distribution(logits, temperature, top_k, top_p):
    """Word -> probability, word by word in float64."""
    words = sorted(range(len(logits)), key=lambda word: (-logits[word], word))
    words = words[: top_k or None]
    mass = np.exp(np.float64(logits[words]) / temperature)
    mass /= mass.sum()
    kept, reached = [], 0.0
    for word, share in zip(words, mass, strict=True):
        if kept and reached >= (1 if top_p is None else top_p):
            break
        kept.append((word, share))
        reached += share
    total = sum(share for _, share in kept)
    return {word: share / total for word, share in kept if share > 0}


@pytest.fixture(scope="module")
def logits():
    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    logits[[3, 17]] = -np.inf
    return logits


@pytest.mark.parametrize(("top_k", "top_p"), RULES)
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_what_is_drawn_is_the_distribution(logits, temperature, top_k, top_p):
    """20,000 draws: no other word, every log-probability right, chi-square with a fixed seed."""
    n = 20_000
    p = None if top_p is None else jnp.float32(top_p)
    tokens, logprobs = jax.device_get(
        jax.jit(sampler.draw, static_argnames="top_k")(
            jnp.tile(logits, (n, 1)),
            jax.random.split(jax.random.key(1), n),
            jnp.float32(temperature),
            top_k=top_k,
            top_p=p,
        )
    )
    expected = distribution(logits, temperature, top_k, top_p)
    assert set(tokens.tolist()) <= expected.keys()
    right = np.log([expected[token] for token in tokens])
    np.testing.assert_allclose(logprobs, right, atol=2e-5, rtol=1e-5)
    often = [word for word, share in expected.items() if share * n >= 5]
    if len(often) > 1:
        among = np.isin(tokens, often)
        observed = [np.sum(tokens == word) for word in often]
        shares = np.array([expected[word] for word in often])
        assert stats.chisquare(observed, shares / shares.sum() * among.sum()).pvalue > 1e-3


def test_of_equal_words_the_first_are_kept():
    logits = jnp.zeros((64, 6))
    keys = jax.random.split(jax.random.key(0), 64)
    tokens, logprobs = sampler.draw(logits, keys, jnp.float32(1), top_k=2)
    assert set(tokens.tolist()) == {0, 1}
    np.testing.assert_allclose(logprobs, np.log(0.5), rtol=1e-6)


def test_a_word_s_noise_is_its_own(logits):
    """Where a rule draws a word that a narrower rule keeps, that draws it too."""
    keys = jax.random.split(jax.random.key(2), 500)
    tokens = [
        sampler.draw(jnp.tile(logits, (500, 1)), keys, jnp.float32(1), top_k=k, top_p=p)[0]
        for k, p in ((3, None), (6, None), (0, jnp.float32(0.9999)))
    ]
    for few, more in itertools.pairwise(tokens):
        kept = np.isin(more, np.unique(few))
        np.testing.assert_array_equal(np.asarray(few)[kept], np.asarray(more)[kept])


def test_greedy_takes_the_likeliest_under_any_rule(logits):
    for rule in ({"top_k": 5}, {"top_p": jnp.float32(0.5)}):
        keys = jax.random.split(jax.random.key(0), 4)
        tokens, _ = sampler.draw(jnp.tile(logits, (4, 1)), keys, jnp.float32(0), **rule)
        np.testing.assert_array_equal(tokens, logits.argmax())


PROMPTS = [[1, 9, 20], [1, 5, 6, 7, 8, 3], [4], [1, 7], [9, 9, 4]]


@pytest.fixture(scope="module")
def engine(model, params):
    def make(prompts, mesh_shape=(1, 1, 1), eos_ids=(2,), **rule):
        mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
        placed = jax.device_put(params, mesh_lib.param_shardings(mesh, model.rules, params))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
        )
        engine = Engine(
            model.policy,
            abstract,
            mesh,
            SamplerShape(prompts, 8, 2, 24),
            eos_ids=eos_ids,
            pad_id=0,
            **rule,
        )

        def sample(prompts, **arguments):
            arguments = {"key": jax.random.key(5), "temperature": 1.0} | arguments
            calls = list(engine(placed, prompts, **arguments))
            return [ids.tolist() for call in calls for ids in call.responses], calls

        return sample

    return make


@pytest.mark.parametrize(
    "rule",
    [
        {"top_k": 6, "top_p": 0.9},
        *(pytest.param(rule, marks=pytest.mark.slow) for rule in ({}, {"top_p": 0.9})),
    ],
)
def test_calls_meshes_and_offsets_change_no_sample(engine, rule):
    whole, calls = engine(8, **rule)(PROMPTS)
    assert [call.first for call in calls] == [0]
    sample = engine(2, mesh_shape=(2, 1, 2), **rule)
    again, calls = sample(PROMPTS)
    assert [call.first for call in calls] == [0, 2, 4]
    assert [len(call.truncated) for call in calls] == [4, 4, 2]
    assert calls[-1].device_idles()
    assert again == whole
    assert sample(PROMPTS[3:], offset=3)[0] == whole[6:]
    assert sample([])[0] == []


def test_any_of_the_eos_ends_a_response(engine):
    one, _ = engine(8)(PROMPTS)
    several, calls = engine(8, eos_ids=(2, 5, 11))(PROMPTS)
    for ids, more in zip(several, one, strict=True):
        ends = [i for i, token in enumerate(more) if token in (2, 5, 11)]
        assert ids == (more[: ends[0] + 1] if ends else more)
    cut = [ids[-1] not in (2, 5, 11) for ids in several]
    assert calls[0].truncated.tolist() == cut
