"""Losses against float64 NumPy written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from opsd_jax import losses

# float32 rounding of a handful of operations on numbers of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def log_softmax64(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def reverse_kl64(student, teacher):
    s, t = log_softmax64(student), log_softmax64(teacher)
    return (np.exp(s) * (s - t)).sum(axis=-1)


@pytest.fixture
def logits(rng):
    return rng.normal(0, 3, (2, 4, 5, 11)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_reverse_kl_value(logits):
    student, teacher = logits
    got = losses.reverse_kl(student_logits=student, teacher_logits=teacher)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reverse_kl64(student, teacher), **TOLERANCE)


def test_reverse_kl_agrees_with_optax(logits):
    s, t = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    got = losses.reverse_kl(student_logits=logits[0], teacher_logits=logits[1])
    # optax's argument order is (log predictions, targets) for KL(targets || predictions).
    expected = optax.losses.kl_divergence(t, jnp.exp(s))
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_reverse_kl_gradient(logits):
    """d KL / d logit_v = S(v) (log S(v) - log T(v) - KL), in float64; and by finite differences."""
    student, teacher = logits
    loss = lambda x: losses.reverse_kl(student_logits=x, teacher_logits=teacher).sum()
    s, t = log_softmax64(student), log_softmax64(teacher)
    kl = (np.exp(s) * (s - t)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.grad(loss)(student), np.exp(s) * (s - t - kl), **TOLERANCE)
    small = jnp.asarray(student[:1, :1]) / 3
    check_grads(
        lambda x: losses.reverse_kl(student_logits=x, teacher_logits=teacher[:1, :1]),
        (small,),
        order=1,
        modes=("rev",),
        atol=1e-2,
        rtol=1e-2,
    )


def test_reverse_kl_of_equal_logits_is_zero(logits):
    equal = losses.reverse_kl(student_logits=logits[0], teacher_logits=logits[0])
    np.testing.assert_array_equal(equal, np.zeros((4, 5)))


def test_impossible_words_add_nothing(logits):
    """Words at -inf on both sides are as good as not there, for values and gradients."""
    student, teacher = logits
    padding = np.full((4, 5, 3), -np.inf, np.float32)
    wide = [np.concatenate([x, padding], axis=-1) for x in (student, teacher)]
    loss = lambda s, t: losses.reverse_kl(student_logits=s, teacher_logits=t).sum()
    np.testing.assert_allclose(loss(*wide), loss(student, teacher), rtol=1e-6)
    gradient = jax.grad(loss)(wide[0], wide[1])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[..., 11:], 0)
    np.testing.assert_allclose(gradient[..., :11], jax.grad(loss)(student, teacher), **TOLERANCE)


def test_a_word_that_only_the_teacher_rules_out_is_infinite(logits):
    student, teacher = logits
    teacher = teacher.copy()
    teacher[0, 0, 0] = -np.inf
    got = losses.reverse_kl(student_logits=student, teacher_logits=teacher)
    assert got[0, 0] == np.inf
    assert np.isfinite(np.asarray(got).ravel()[1:]).all()


def test_reverse_kl_in_bfloat16_is_computed_in_float32(logits):
    low = logits.astype(jnp.bfloat16)
    got = losses.reverse_kl(student_logits=low[0], teacher_logits=low[1])
    expected = reverse_kl64(low[0].astype(np.float64), low[1].astype(np.float64))
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_shapes_that_differ_are_named(logits):
    with pytest.raises(ValueError, match=r"student_logits\[4, 5, 11\].*\[4, 4, 11\]"):
        losses.reverse_kl(student_logits=logits[0], teacher_logits=logits[1][:, :4])


def test_token_logprobs_and_entropy(logits, rng):
    tokens = rng.integers(0, 11, (4, 5))
    expected = np.take_along_axis(log_softmax64(logits[0]), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.token_logprobs(logits[0], tokens), expected, **TOLERANCE)
    np.testing.assert_allclose(
        -losses.token_logprobs(logits[0], tokens),
        optax.losses.softmax_cross_entropy_with_integer_labels(logits[0], tokens),
        **TOLERANCE,
    )
    log_p = log_softmax64(logits[0])
    entropy = losses.entropy(logits[0])
    np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(-1), **TOLERANCE)
    wide = np.concatenate([logits[0], np.full((4, 5, 2), -np.inf, np.float32)], axis=-1)
    np.testing.assert_allclose(losses.entropy(wide), entropy, **TOLERANCE)


def test_group_advantages_by_hand():
    rewards = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    got = losses.group_advantages(rewards, 4)
    # Means 1/4, 1, 1/2; sample deviations 1/2, 0, 1/sqrt(3).
    one, half = 0.75 / 0.5, 0.5 * np.sqrt(3)
    expected = [one, -0.5, -0.5, -0.5, 0, 0, 0, 0, half, half, -half, -half]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.group_advantages(jnp.asarray(rewards), 4), got, rtol=1e-6)


@pytest.mark.parametrize("group_size", [1, 5])
def test_group_advantages_refuses_a_group_size(group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size} for 12 rewards"):
        losses.group_advantages(np.zeros(12), group_size)


def test_clipped_surrogate_by_hand():
    """Ratios 1, 1.5, 0.5 with advantages of both signs, clipped to [0.8, 1.3]."""
    ratio = np.array([1, 1.5, 0.5, 1, 1.5, 0.5])
    advantages = np.array([2, 2, 2, -2, -2, -2], np.float32)
    got = losses.clipped_surrogate(
        logprobs=jnp.log(jnp.asarray(ratio, jnp.float32)),
        behaviour_logprobs=jnp.zeros(6),
        advantages=jnp.asarray(advantages),
        clip_low=0.2,
        clip_high=0.3,
    )
    # min(r A, clip(r) A): a gain is capped, a loss is not.
    np.testing.assert_allclose(got, [-2, -2.6, -1, 2, 3, 1.6], rtol=1e-6)


def test_clipped_surrogate_gradient_is_zero_where_clipped_and_reinforce_at_ratio_one():
    behaviour = jnp.log(jnp.array([1, 1 / 1.5, 2.0], jnp.float32))
    advantages = jnp.array([2.0, 2.0, -2.0])
    loss = lambda logprobs: losses.clipped_surrogate(
        logprobs=logprobs, behaviour_logprobs=behaviour, advantages=advantages
    ).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(3)), [-2, 0, 0], atol=1e-6)


def reductions64(values, mask, row_weight):
    rows = [v[m] for v, m in zip(values, mask, strict=True)]
    token = sum(w * r.sum() for w, r in zip(row_weight, rows, strict=True))
    sequence = sum(w * r.mean() for w, r in zip(row_weight, rows, strict=True) if len(r))
    return {
        losses.token_mean: (token, sum(w * len(r) for w, r in zip(row_weight, rows, strict=True))),
        losses.sequence_mean: (
            sequence,
            sum(w for w, r in zip(row_weight, rows, strict=True) if len(r)),
        ),
    }


@pytest.mark.parametrize("reduce", [losses.token_mean, losses.sequence_mean])
def test_reductions(rng, reduce):
    values = rng.normal(size=(4, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 3, 0, 1])[:, None]
    row_weight = np.array([1, 0.5, 2, 0], np.float32)
    expected = reductions64(values.astype(np.float64), mask, row_weight)[reduce]
    np.testing.assert_allclose(reduce(values, mask, row_weight), expected, **TOLERANCE)
    # What stands at masked places is not looked at.
    spoilt = np.where(mask, values, np.nan)
    np.testing.assert_allclose(reduce(spoilt, mask, row_weight), expected, **TOLERANCE)
    gradient = jax.grad(lambda v: reduce(v, mask, row_weight)[0])(jnp.asarray(values))
    np.testing.assert_array_equal(gradient[~mask], 0)


def test_gates():
    masks = np.eye(3, dtype=bool)
    for name, expected in {"correct": (1, 0, 0), "incorrect": (0, 1, 1), "all": (1, 1, 1)}.items():
        assert losses.parse_gate(name) == expected
        np.testing.assert_array_equal(
            losses.gate_weights(*masks, losses.parse_gate(name)), expected
        )
    assert losses.parse_gate("1, 0.5,0") == (1, 0.5, 0)


@pytest.mark.parametrize("text", ["corect", "1,2", "0,0,0", "1,-1,0", "1,nan,0", "inf,0,0", ""])
def test_a_bad_gate_is_refused(text):
    with pytest.raises(ValueError, match="gate is"):
        losses.parse_gate(text)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("reduce", [losses.token_mean, losses.sequence_mean])
def test_a_row_of_no_weight_may_hold_anything(rng, reduce, bad):
    values = rng.normal(size=(3, 4)).astype(np.float32)
    spoilt = jnp.asarray(values).at[1].set(bad)
    mask, weight = np.ones((3, 4), bool), np.array([1, 0, 2], np.float32)
    np.testing.assert_allclose(reduce(spoilt, mask, weight), reduce(values, mask, weight))
    gradient = jax.grad(lambda v: reduce(v, mask, weight)[0])(spoilt)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.isfinite(gradient).all()
