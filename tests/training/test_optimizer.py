"""The second moment in bfloat16: right on average, and the same update otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opsd_jax.training.optimizer import (
    OptimizerOptions,
    make_optimizer,
    stochastically_rounded,
    with_rounded_second_moment,
)


def test_rounding_is_right_on_average():
    x = jnp.float32([0, 1, 1 + 2**-9, 1 + 3 * 2**-10, 3.3e-12, 255.9, 1e-40])
    down = x.astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = np.float64(jax.vmap(lambda key: stochastically_rounded(x, key))(keys))
    exact = np.float64(x)
    spacing = np.maximum(exact, np.finfo(np.float32).tiny) * 2.0**-7  # at most
    assert (np.abs(found - exact) <= spacing).all()
    # The deviation of a rounding error is at most half of the spacing.
    np.testing.assert_array_less(np.abs(found.mean(0) - exact), 5 * spacing / 2 / 20_000**0.5)
    assert (found[:, :2] == np.float64(down[:2])).all()  # bfloat16 numbers stay


def test_slow_changes_of_the_moment_are_not_lost():
    """With b2 = 0.999, rounding to the nearest number would stop at a part of the way."""
    adam = optax.scale_by_adam(0.9, 0.999)
    gradient = jnp.ones(512)
    nearest = jnp.zeros(512, jnp.bfloat16)
    rounded = with_rounded_second_moment(adam)
    states = {adam: adam.init(gradient), rounded: rounded.init(gradient)}
    steps = {tx: jax.jit(tx.update) for tx in states}
    for _ in range(2000):
        for tx, state in states.items():
            _, states[tx] = steps[tx](gradient, state)
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
    exact = 1 - 0.999**2000
    assert states[rounded].nu.dtype == jnp.bfloat16
    assert float(states[adam].nu.mean()) == pytest.approx(exact, rel=1e-4)
    # Errors of single roundings, at most 2^-8, are forgotten after 1000 steps.
    assert float(states[rounded].nu.astype(jnp.float32).mean()) == pytest.approx(exact, rel=0.01)
    assert float(nearest.astype(jnp.float32).mean()) < 0.5 * exact


def test_updates_differ_by_the_rounding_of_the_moment():
    params = jax.random.normal(jax.random.key(0), (256,))
    updates = {}
    for dtype in ("parameters", "bfloat16"):
        tx = make_optimizer(OptimizerOptions(second_moment_dtype=dtype, warmup=0), updates=10)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(10):
            gradient = jax.random.normal(jax.random.key(i), (256,))
            updates[dtype], state = update(gradient, state, params)
    difference = np.abs(updates["parameters"] - updates["bfloat16"])
    # An update is proportional to nu^-1/2, and nu has a relative error of at most 2^-7 a step, most
    # of which cancel.
    assert (difference <= 2**-6 * np.abs(updates["parameters"]).max()).all()
    assert difference.any()


def test_by_default_the_optimizer_is_optax_adamw():
    options = OptimizerOptions(learning_rate=0.1, weight_decay=0.01)
    ours = make_optimizer(options, updates=10)
    theirs = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            optax.constant_schedule(0.1),
            options.b1,
            options.b2,
            weight_decay=0.01,
            mu_dtype="float32",
        ),
    )
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    states = ours.init(params), theirs.init(params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(3):
        found, expected = (
            tx.update(params, s, params) for tx, s in zip((ours, theirs), states, strict=True)
        )
        states = found[1], expected[1]
        jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
