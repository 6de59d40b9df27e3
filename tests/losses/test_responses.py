"""Rows with several responses: all losses equal those of one response per row, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from opsd_jax import losses
from opsd_jax.losses import responses

T, V = 24, 11
# The tokens of the responses of each row: (first column of the mask, number of tokens) each, after
# the column at which the response starts.
ROWS = [[(0, 2, 3), (5, 8, 1), (9, 9, 12)], [(0, 0, 7)], [], [(0, 1, 4), (6, 6, 18)]]
K = 4


def layout():
    """Returns `mask` [B, T] and `starts` [B, K] of ROWS, and the mask [N, T] of each response."""
    mask, starts = np.zeros((len(ROWS), T), bool), np.full((len(ROWS), K), T, np.int32)
    places, apart = [], []
    for b, row in enumerate(ROWS):
        for k, (start, first, count) in enumerate(row):
            mask[b, first : first + count] = True
            starts[b, k] = start
            places.append((b, k))
            apart.append(np.isin(np.arange(T), np.arange(first, first + count)))
    return mask, starts, places, np.array(apart)


MASK, STARTS, PLACES, APART = layout()
INDEX = np.array([b for b, _ in PLACES])  # the row of each response


def spread(values, fill=0.0):
    """Puts the numbers [N] of the responses at their places in an array [B, K]."""
    out = np.full(STARTS.shape, fill, np.asarray(values).dtype)
    for value, place in zip(values, PLACES, strict=True):
        out[place] = value
    return out


def joined(values):
    """Joins the values [N, T] of the responses, each 0 outside of its mask, to rows [B, T]."""
    out = np.zeros((len(ROWS), T), np.asarray(values).dtype)
    for row, value in zip(INDEX, values, strict=True):
        out[row] += value
    return out


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    n = len(PLACES)
    return {
        "student": rng.normal(size=(len(ROWS), T, V)).astype(np.float32),
        "teacher": rng.normal(size=(len(ROWS), T, V)).astype(np.float32),
        "tokens": rng.integers(0, V, (len(ROWS), T)),
        "behaviour": rng.uniform(-4, -1, (len(ROWS), T)).astype(np.float32),
        "advantages": rng.normal(size=n).astype(np.float32),
        "weight": rng.uniform(0.5, 2, n).astype(np.float32),
        "outcome": np.arange(n) % 3,
    }


@pytest.mark.parametrize("aggregation", ["sequence", "token", "fixed"])
def test_token_weights_are_those_of_each_response(arrays, aggregation):
    weight = arrays["weight"].astype(np.float64)
    counts = APART.sum(1)
    divisor = {"sequence": counts, "token": 1 + 0 * counts, "fixed": 5 + 0 * counts}[aggregation]
    total = (weight * (counts if aggregation == "token" else 1)).sum()
    found, found_total = losses.token_weights(
        MASK, spread(arrays["weight"]), aggregation=aggregation, length=5, starts=STARTS
    )
    np.testing.assert_allclose(found, joined((weight / divisor)[:, None] * APART), rtol=1e-6)
    np.testing.assert_allclose(found_total, total, rtol=1e-6)
    plain = losses.token_weights(MASK, aggregation=aggregation, length=5, starts=STARTS)[1]
    assert float(plain) == (counts.sum() if aggregation == "token" else len(PLACES))


@pytest.mark.parametrize("kind", ["uniform", "linear", "exponential", "sigmoid"])
def test_position_weights_count_from_the_start_of_each_response(kind):
    n, t = APART.sum(1, keepdims=True), np.cumsum(APART, 1) - 1.0
    fraction = t / np.maximum(n - 1, 1)
    weights = {
        "uniform": 1 + 0 * t,
        "linear": 1 + 2 * fraction,
        "exponential": np.exp(2.0 * fraction),
        "sigmoid": 0.25 + 0.75 / (1 + np.exp(-(t / n - 0.3) / 0.1)),
    }[kind] * APART
    expected = joined(weights * n / weights.sum(1, keepdims=True))
    found = losses.position_weights(MASK, kind, late=3.0, starts=STARTS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_positions_and_copies_match_the_responses():
    expected = joined(APART * (np.cumsum(APART, 1) - 1))
    found = responses.positions(jnp.asarray(MASK), STARTS)
    np.testing.assert_array_equal(np.where(MASK, found, 0), expected)
    numbers = np.arange(1, len(PLACES) + 1)
    copied = responses.of_tokens(jnp.asarray(spread(numbers, 0)), STARTS, T)
    np.testing.assert_array_equal(np.where(MASK, copied, 0), joined(APART * numbers[:, None]))


def packed_and_apart(loss, arrays):
    """Returns the loss, its weight and its gradient, for ROWS and for one response per row.

    `loss` is `(logits, array of tokens -> its rows, array of responses -> its form, mask, starts)`.
    """

    def value(logits, tokens, form, mask, starts):
        found = loss(logits, tokens, form, mask, starts)
        return found.sum, found.weight

    run = jax.value_and_grad(value, has_aux=True)
    (total, weight), gradient = run(
        arrays["student"], lambda x: x, spread, jnp.asarray(MASK), jnp.asarray(STARTS)
    )
    (total_1, weight_1), gradient_1 = run(
        arrays["student"][INDEX], lambda x: x[INDEX], lambda x: x, jnp.asarray(APART), None
    )
    np.testing.assert_allclose(total, total_1, rtol=1e-5)
    np.testing.assert_allclose(weight, weight_1, rtol=1e-6)
    np.testing.assert_allclose(gradient, joined3(gradient_1), rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


def joined3(gradient):
    out = np.zeros((len(ROWS), T, V), np.float32)
    np.add.at(out, INDEX, np.asarray(gradient))
    return out


OPSD = [
    losses.OPSD(gate=(1, 0.5, 2)),
    losses.OPSD(gate=(1, 0.5, 2), divergence="reverse_kl,forward_kl,jsd", position="linear"),
    losses.OPSD(gate=(1, 1, 1), aggregation="token", skip_first=1, first_only=4),
    losses.OPSD(gate=(1, 1, 1), importance_cap=2.0, position="sigmoid", clip=0.5),
]


@pytest.mark.parametrize("options", OPSD, ids=range(len(OPSD)))
def test_opsd_equals_one_response_per_row(arrays, options):
    def loss(student, tokens, form, mask, starts):
        return losses.opsd(
            student=student,
            teacher=tokens(arrays["teacher"]),
            mask=mask,
            outcomes=tuple(form(arrays["outcome"] == i) for i in range(3)),
            tokens=tokens(arrays["tokens"]),
            behaviour_logprobs=tokens(arrays["behaviour"]),
            row_weight=form(arrays["weight"]),
            starts=starts,
            options=options,
        )

    packed_and_apart(loss, arrays)


POLICY = [
    losses.PRESETS["grpo"]._replace(kl_coefficient=0.0),
    losses.PRESETS["gspo"],
    losses.PRESETS["dapo"],
    losses.PRESETS["dr_grpo"]._replace(length=7.0),
]


@pytest.mark.parametrize("options", POLICY, ids=["grpo", "gspo", "dapo", "dr_grpo"])
def test_policy_gradients_equal_one_response_per_row(arrays, options):
    def loss(student, tokens, form, mask, starts):
        return losses.policy_gradient(
            student=student,
            tokens=tokens(arrays["tokens"]),
            mask=mask,
            advantages=form(arrays["advantages"]),
            behaviour_logprobs=tokens(arrays["behaviour"]),
            row_weight=form(arrays["weight"]),
            starts=starts,
            options=options,
        )

    packed_and_apart(loss, arrays)


def test_sft_and_the_joint_loss_equal_one_response_per_row(arrays):
    def sft(student, tokens, form, mask, starts):
        return losses.sft(
            student=student,
            tokens=tokens(arrays["tokens"]),
            mask=mask,
            row_weight=form(arrays["weight"]),
            aggregation="sequence",
            starts=starts,
        )

    def joint(student, tokens, form, mask, starts):
        return losses.joint(
            student=student,
            teacher=tokens(arrays["teacher"]),
            tokens=tokens(arrays["tokens"]),
            mask=mask,
            advantages=form(arrays["advantages"]),
            outcomes=tuple(form(arrays["outcome"] == i) for i in range(3)),
            behaviour_logprobs=tokens(arrays["behaviour"]),
            starts=starts,
        )[0]

    packed_and_apart(sft, arrays)
    packed_and_apart(joint, arrays)


def test_arguments_of_the_wrong_shape_are_named(arrays):
    common = {"student": arrays["student"], "tokens": arrays["tokens"], "mask": MASK}
    with pytest.raises(ValueError, match=r"row_weight has shape \[4\]; expected \[4, 4\], the sh"):
        losses.sft(**common, row_weight=np.ones(4), starts=STARTS)
    with pytest.raises(ValueError, match=r"starts has dtype float32 and shape \[4, 4\]; expected"):
        losses.sft(**common, starts=STARTS.astype(np.float32))
    with pytest.raises(ValueError, match=r"starts has dtype int32 and shape \[3, 4\]; expected"):
        losses.sft(**common, starts=STARTS[:3])
    with pytest.raises(ValueError, match=r"advantages has shape \[4, 5\]; expected \[4, 24\]"):
        losses.policy_gradient(
            **common,
            advantages=np.ones((4, 5)),
            behaviour_logprobs=arrays["behaviour"],
            starts=STARTS,
        )


def test_checkify_finds_starts_that_do_not_ascend(arrays):
    given = {"student": arrays["student"], "tokens": arrays["tokens"], "mask": MASK}
    checked = checkify.checkify(jax.jit(lambda starts: losses.sft(**given, starts=starts).sum))
    checked(jnp.asarray(STARTS))[0].throw()
    for wrong in (STARTS[:, ::-1], STARTS + MASK.shape[1], STARTS - MASK.shape[1]):
        with pytest.raises(checkify.JaxRuntimeError, match="starts of a row do not ascend; expect"):
            checked(jnp.asarray(wrong))[0].throw()
