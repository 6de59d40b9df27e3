"""The sampling rule: which words are left, their probabilities, and both log-probabilities."""

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
    """Word -> probability, word by word in float64."""
    words = [word for word in range(len(logits)) if word not in forbidden]
    words = sorted(words, key=lambda word: (-logits[word], word))[: top_k or None]
    mass = np.exp(np.float64(logits[words]) / temperature)
    mass /= mass.sum()
    kept, reached = [], 0.0
    for word, share in zip(words, mass, strict=True):
        if (kept and reached >= top_p) or share < min_p * mass[0]:
            break
        kept.append((word, share))
        reached += share
    total = sum(share for _, share in kept)
    return {word: share / total for word, share in kept if share > 0}


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
def test_what_is_drawn_is_the_distribution(logits, temperature, options):
    """20,000 draws: no other word, every log-probability right, chi-square with a fixed seed."""
    n = 20_000
    drawn = draws(logits, n, temperature=temperature, **options)
    expected = distribution(logits, temperature, **options)
    assert set(drawn.token.tolist()) <= expected.keys()
    right = np.log([expected[word] for word in drawn.token.tolist()])
    np.testing.assert_allclose(drawn.sampling_logprob, right, atol=2e-6, rtol=2e-6)
    untouched = log_softmax(logits.astype(np.float64))[drawn.token]
    np.testing.assert_allclose(drawn.model_logprob, untouched, atol=2e-6, rtol=2e-6)
    often = [word for word, share in expected.items() if share * n >= 5]
    if len(often) > 1:
        among = np.isin(drawn.token, often)
        observed = [np.sum(drawn.token == word) for word in often]
        shares = np.array([expected[word] for word in often])
        assert stats.chisquare(observed, shares / shares.sum() * among.sum()).pvalue > 1e-3


def test_changed_sampling_parameters_do_not_recompile(logits):
    draws(logits, 8)
    with jax.no_tracing(True):
        for options in OPTIONS:
            draws(logits, 8, temperature=0.5, stop=(1, 2), **options)
        draws(logits, 8, temperature=0.0)


@pytest.mark.parametrize("size", [7, 33, 250, 1000, 4096])
def test_blocks_of_any_size(size):
    """Vocabularies that 128 divides or not: the frequencies of groups of words."""
    n, logits = 20_000, np.random.default_rng(size).normal(0, 1.5, size).astype(np.float32)
    drawn = draws(logits, n)
    p = np.exp(log_softmax(logits.astype(np.float64)))
    observed = np.bincount(drawn.token, minlength=size)
    order = np.argsort(p)  # words in groups of at least 10 expected draws
    group = np.minimum((np.cumsum(p[order]) * n // 10).astype(int), n // 10 - 1)
    groups = lambda x: np.array([s for s in np.bincount(group, x[order])])
    kept = groups(p) > 0
    assert stats.chisquare(groups(observed)[kept], groups(p)[kept] * n).pvalue > 1e-3
    right = log_softmax(logits.astype(np.float64))[drawn.token]
    np.testing.assert_allclose(drawn.model_logprob, right, atol=5e-6)


def test_of_equal_words_the_first_are_kept():
    equal = np.zeros(6, np.float32)
    drawn = draws(equal, 64, top_k=2)
    assert set(drawn.token.tolist()) == {0, 1}
    np.testing.assert_allclose(drawn.sampling_logprob, np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(drawn.model_logprob, np.log(1 / 6), rtol=1e-6)
    assert set(draws(equal, 64, top_p=0.5).token.tolist()) == {0, 1, 2}
    some = np.array([1, 0, 0, 0, -3, 0], np.float32)
    assert set(draws(some, 256, top_k=3).token.tolist()) == {0, 1, 2}


def test_a_word_s_probability_decides_whatever_the_scale():
    """Logits far from 0, very flat, very steep, and with words that cannot occur."""
    for scale, shift in itertools.product((1e-6, 1.0, 1e3), (-1e4, 0.0, 1e4)):
        logits = (np.random.default_rng(1).normal(0, scale, 64) + shift).astype(np.float32)
        logits[5:9] = -np.inf
        for options in ({}, {"top_k": 4}, {"top_p": 0.5}, {"temperature": 0.0}):
            drawn = draws(logits, 200, **options)
            assert not set(drawn.token.tolist()) & {5, 6, 7, 8}
            assert np.isfinite(drawn.model_logprob).all()
            assert np.isfinite(drawn.sampling_logprob).all()


def test_greedy_takes_the_likeliest_under_any_options(logits):
    best = int(logits.argmax())
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"forbidden": (best,)}):
        drawn = draws(logits, 4, temperature=0.0, **options)
        allowed = np.where(np.isin(np.arange(V), options.get("forbidden", ())), -np.inf, logits)
        np.testing.assert_array_equal(drawn.token, allowed.argmax())
        np.testing.assert_array_equal(drawn.sampling_logprob, 0)
        right = log_softmax(logits.astype(np.float64))[allowed.argmax()]
        np.testing.assert_allclose(drawn.model_logprob, right, atol=1e-6)
    equal = draws(np.zeros(256, np.float32), 2, temperature=0.0)
    np.testing.assert_array_equal(equal.token, 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}], ids=str)
def test_a_vocabulary_on_several_devices(options):
    """Rows over four devices and words over two: the same words as on one."""
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
        ({"temperature": -1.0}, "temperature is -1.0; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; expected 0, for all"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a mass in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p is 1.5; expected a share in \[0, 1\]"),
        ({"stop": (40,)}, "stop has the word 40; the vocabulary has 40"),
        ({"forbidden": (-1,)}, "forbidden has the word -1"),
        ({"forbidden": range(V)}, "forbidden has every word"),
    ],
)
def test_what_is_out_of_bounds_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampling.params(V, **{"stop": (), **options})
