"""The parameters and the logits of each kind of teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from opsd_jax.models import decoder
from opsd_jax.stages import teacher as teacher_lib
from opsd_jax.training.state import init_state
from opsd_jax.training.step import make_train_step

STEPS = 7


def section(kind, rate=0.05, every=3):
    return teacher_lib.TeacherOptions(kind=kind, rate=rate, every=every)


@pytest.fixture
def weights(params):
    return {"embedding": params["embedding"], "norm": params["norm"]}


def run(weights, kind, *, dtype=jnp.float32, skipped=(), **options):
    """Returns the initial state and the state after each of STEPS train steps.

    The batches of the steps in `skipped` have no weight, so these steps are skipped.
    """

    def loss(params, teacher, row):
        squares = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(params))
        return row["weight"] * squares, (row["weight"], {})

    teacher = teacher_lib.make_teacher(section(kind, **options))
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(loss, optimizer, teacher), donate_argnums=0)
    state = init_state(jax.tree.map(lambda x: x.astype(dtype), weights), optimizer, teacher)
    states = [jax.tree.map(np.asarray, state)]
    for i in range(STEPS):
        row = {"weight": jnp.full(1, 0.0 if i in skipped else 1.0)}
        state, _ = step(state, ({"count": np.int32(1), "rows": row},))
        states.append(jax.tree.map(np.asarray, state))
    assert not np.array_equal(states[-1]["params"]["norm"], states[0]["params"]["norm"])
    return states


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("kind", ["frozen", "trust_region"])
def test_frozen_is_unchanged_to_the_bit(weights, kind):
    states = run(weights, kind)
    assert all(equal(state["teacher"], states[0]["params"]) for state in states)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ema_is_a_recurrence_in_float32(weights, dtype):
    """The expected average is computed in float64 from the parameters after each update. The
    tolerance is the rounding error of one addition per step.
    """
    states = run(weights, "ema", dtype=dtype, rate=0.1, skipped=(2, 5))
    expected = jax.tree.map(lambda x: x.astype(np.float64), states[0]["params"])
    for i, state in enumerate(states[1:]):
        if i not in (2, 5):
            expected = jax.tree.map(
                lambda t, p: 0.9 * t + 0.1 * p.astype(np.float64), expected, state["params"]
            )
        for got, want in zip(
            jax.tree.leaves(state["teacher"]), jax.tree.leaves(expected), strict=True
        ):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7)
    assert equal(states[3]["teacher"], states[2]["teacher"])  # step 2 is skipped


def test_refresh_copies_after_every_few_updates(weights):
    states = run(weights, "refresh", every=3)
    copied = [0, 0, 0, 3, 3, 3, 6, 6]
    for state, of in zip(states, copied, strict=True):
        assert equal(state["teacher"], states[of]["params"])
        if of:
            assert not equal(state["teacher"], states[0]["params"])


def test_refreshing_often_warns():
    assert "from at most 39 updates ago" in teacher_lib.warning(section("refresh", every=39))
    assert "from at most 1 updates ago" in teacher_lib.warning(section("live"))
    assert teacher_lib.warning(section("refresh", every=40)) == ""
    assert teacher_lib.warning(section("ema", every=1)) == ""


def test_live_keeps_no_teacher(weights):
    assert all(state["teacher"] is None for state in run(weights, "live"))


@pytest.fixture(scope="module")
def sequences():
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 1, 32)
    return {"tokens": tokens, "positions": jnp.broadcast_to(jnp.arange(20), (2, 20))}


def logits(model, kind, params, teacher, sequences, **options):
    head = teacher_lib.make_head(model.policy, section(kind, **options))
    made = head(params, teacher, sequences)
    return np.asarray(made.unembed(made.params, made.hidden))


@pytest.mark.parametrize("kind", teacher_lib.TEACHERS)
def test_logits_of_each_kind(model, params, score, sequences, kind):
    other = jax.tree.map(lambda x: 1.1 * x, params)
    of = lambda p: np.asarray(score(p, sequences["tokens"], sequences["positions"]))
    expected = {
        "live": of(params),
        "trust_region": 0.7 * of(other) + 0.3 * of(params),
    }.get(kind, of(other))
    got = logits(model, kind, params, None if kind == "live" else other, sequences, rate=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_tokens_with_probability_zero_keep_it_in_a_mixture(model, params, sequences):
    def unembed(params, hidden):
        logits = model.policy.unembed(params, hidden)
        return jnp.where(jnp.arange(logits.shape[-1]) == 2, -jnp.inf, logits)

    without_2 = model._replace(policy=model.policy._replace(unembed=unembed))
    other = jax.tree.map(lambda x: 1.1 * x, params)
    mixed = logits(without_2, "trust_region", params, other, sequences, rate=0.25)
    assert np.all(mixed[..., 2] == -np.inf)
    expected = logits(model, "trust_region", params, other, sequences, rate=0.25)
    np.testing.assert_array_equal(np.delete(mixed, 2, -1), np.delete(expected, 2, -1))


@pytest.mark.parametrize("kind", teacher_lib.TEACHERS)
def test_no_gradient_flows_into_a_teacher(model, params, sequences, kind):
    head = teacher_lib.make_head(model.policy, section(kind))

    def total(params, teacher):
        made = head(params, teacher, sequences)
        return jnp.sum(made.unembed(jax.lax.stop_gradient(made.params), made.hidden))

    for leaf in jax.tree.leaves(jax.grad(total)(params, params)):
        np.testing.assert_array_equal(leaf, 0)


def test_a_teacher_stored_in_bfloat16_has_the_same_logits(sequences):
    """The matmuls of a bfloat16 model cast float32 weights, so a teacher can be cast once."""
    config = tiny_config.decoder(dtype="bfloat16", num_layers=2, scan_unroll=1)
    model = decoder.from_config(config)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    whole, kept = (
        teacher_lib.make_teacher(section("frozen"), *keep).init(params)
        for keep in ((), (model.decode_params,))
    )
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size(kept) < 0.51 * size(whole)
    made = [logits(model, "frozen", params, teacher, sequences) for teacher in (whole, kept)]
    np.testing.assert_array_equal(*made)
    copied = teacher_lib.make_teacher(section("refresh", every=1), model.decode_params)
    again = copied.update(kept, params, jnp.int32(1), jnp.bool_(True))
    assert equal(again, kept)
