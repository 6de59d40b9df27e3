"""Sampling: which tokens remain, their probabilities, and both log-probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout import sampling

V = 40
OPTIONS = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 1},
    {"top_k": 4, "top_p": 1e-6},
    {"top_k": 100, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"forbidden": (0, 1, 2, 30)},
    {"top_k": 6, "top_p": 0.9, "forbidden": range(0, V, 2)},
]


def distribution(logits, temperature, top_k=0, top_p=1.0, min_p=0.0, forbidden=()):
    """Computes the probability of each token id, token by token in float64."""
    tokens = [token for token in range(len(logits)) if token not in forbidden]
    tokens = sorted(tokens, key=lambda token: (-logits[token], token))[: top_k or None]
    mass = np.exp(np.float64(logits[tokens]) / temperature)
    mass /= mass.sum()
    kept, reached = [], 0.0
    for token, p in zip(tokens, mass, strict=True):
        if (kept and reached >= top_p) or p < min_p * mass[0]:
            break
        kept.append((token, p))
        reached += p
    total = sum(p for _, p in kept)
    return {token: p / total for token, p in kept if p > 0}


@pytest.fixture(scope="module")
def logits():
    logits = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)
    logits[[3, 17]] = -np.inf
    return logits


draw = jax.jit(sampling.draw)


def draws(logits, n, seed=1, stop=(), **options):
    keys = jax.random.split(jax.random.key(seed), n)
    sampling_params = sampling.params(len(logits), stop=stop, **options)
    return jax.device_get(draw(jnp.tile(logits, (n, 1)), keys, sampling_params))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_draws_follow_the_distribution(logits, temperature, options):
    """20,000 draws: no excluded token, correct log-probabilities, chi-square with a fixed seed."""
    n = 20_000
    drawn = draws(logits, n, temperature=temperature, **options)
    expected = distribution(logits, temperature, **options)
    assert set(drawn.token.tolist()) <= expected.keys()
    correct = np.log([expected[token] for token in drawn.token.tolist()])
    np.testing.assert_allclose(drawn.sampling_logprob, correct, atol=2e-6, rtol=2e-6)
    untouched = log_softmax(logits.astype(np.float64))[drawn.token]
    np.testing.assert_allclose(drawn.model_logprob, untouched, atol=2e-6, rtol=2e-6)
    often = [token for token, p in expected.items() if p * n >= 5]
    if len(often) > 1:
        observed = np.array([np.sum(drawn.token == token) for token in often])
        p = np.array([expected[token] for token in often])
        assert stats.chisquare(observed, p / p.sum() * observed.sum()).pvalue > 1e-3


def test_changed_sampling_parameters_do_not_recompile(logits):
    draws(logits, 8)
    with jax.no_tracing(True):
        for options in OPTIONS:
            draws(logits, 8, temperature=0.5, stop=(1, 2), **options)
        draws(logits, 8, temperature=0.0)


@pytest.mark.parametrize("size", [7, 33, 250, 1000, 4096])
def test_blocks_of_any_size(size):
    """Compares frequencies for vocabularies whose size is, or is not, a multiple of 128."""
    n, logits = 20_000, np.random.default_rng(size).normal(0, 1.5, size).astype(np.float32)
    drawn = draws(logits, n)
    p = np.exp(log_softmax(logits.astype(np.float64)))
    observed = np.bincount(drawn.token, minlength=size)
    order = np.argsort(p)  # tokens in bins of at least 10 expected draws
    index = np.minimum((np.cumsum(p[order]) * n // 10).astype(int), n // 10 - 1)
    binned = lambda x: np.bincount(index, x[order])
    kept = binned(p) > 0
    assert stats.chisquare(binned(observed)[kept], binned(p)[kept] * n).pvalue > 1e-3
    correct = log_softmax(logits.astype(np.float64))[drawn.token]
    np.testing.assert_allclose(drawn.model_logprob, correct, atol=5e-6)


def test_ties_at_a_cutoff_keep_the_lowest_ids():
    equal = np.zeros(6, np.float32)
    drawn = draws(equal, 64, top_k=2)
    assert set(drawn.token.tolist()) == {0, 1}
    np.testing.assert_allclose(drawn.sampling_logprob, np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(drawn.model_logprob, np.log(1 / 6), rtol=1e-6)
    assert set(draws(equal, 64, top_p=0.5).token.tolist()) == {0, 1, 2}
    some = np.array([1, 0, 0, 0, -3, 0], np.float32)
    assert set(draws(some, 256, top_k=3).token.tolist()) == {0, 1, 2}


def test_logits_of_any_scale():
    """Logits that are far from 0, very flat or very steep, with tokens that cannot occur."""
    for scale, shift in itertools.product((1e-6, 1.0, 1e3), (-1e4, 0.0, 1e4)):
        logits = (np.random.default_rng(1).normal(0, scale, 64) + shift).astype(np.float32)
        logits[5:9] = -np.inf
        for options in ({}, {"top_k": 4}, {"top_p": 0.5}, {"temperature": 0.0}):
            drawn = draws(logits, 200, **options)
            assert not set(drawn.token.tolist()) & {5, 6, 7, 8}
            assert np.isfinite(drawn.model_logprob).all()
            assert np.isfinite(drawn.sampling_logprob).all()


def test_greedy_takes_the_most_likely_allowed_token(logits):
    best = int(logits.argmax())
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"forbidden": (best,)}):
        drawn = draws(logits, 4, temperature=0.0, **options)
        allowed = np.where(np.isin(np.arange(V), options.get("forbidden", ())), -np.inf, logits)
        np.testing.assert_array_equal(drawn.token, allowed.argmax())
        np.testing.assert_array_equal(drawn.sampling_logprob, 0)
        correct = log_softmax(logits.astype(np.float64))[allowed.argmax()]
        np.testing.assert_allclose(drawn.model_logprob, correct, atol=1e-6)
    equal = draws(np.zeros(256, np.float32), 2, temperature=0.0)
    np.testing.assert_array_equal(equal.token, 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}], ids=str)
def test_a_vocabulary_on_several_devices(options):
    """Rows on four devices and the vocabulary on two give the same tokens as one device."""
    logits = np.random.default_rng(3).normal(0, 2, (8, 256)).astype(np.float32)
    keys = jax.random.split(jax.random.key(4), 8)
    sampling_params = sampling.params(256, stop=(), **options)
    one = draw(logits, keys, sampling_params)
    mesh = mesh_lib.make_mesh((2, 2, 2))
    spec = jax.sharding.PartitionSpec(mesh_lib.ROWS, "tensor")
    split = jax.device_put(logits, jax.sharding.NamedSharding(mesh, spec))
    several = draw(split, jax.device_put(keys, mesh_lib.rows(mesh)), sampling_params)
    np.testing.assert_array_equal(one.token, several.token)
    for a, b in zip(one[1:], several[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1.0; expected 0 \(greedy\)"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, r"top_k is -1; expected 0 \(keep all tokens\)"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a probability in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p is 1.5; expected a fraction in \[0, 1\]"),
        ({"stop": (40,)}, "stop contains the token id 40; expected ids from 0 to 39"),
        ({"forbidden": (-1,)}, "forbidden contains the token id -1"),
        ({"forbidden": range(V)}, "forbidden contains all 40 tokens"),
    ],
)
def test_values_out_of_bounds_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampling.params(V, **{"stop": (), **options})
