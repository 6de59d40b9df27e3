"""Policies made from Flax modules: the same numbers as those of a hand-written policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from opsd_jax import from_linen, from_nnx

V, D = 12, 8


def attend(x, positions, cache):
    """Adds to each token the mean of the tokens up to its position; returns the new cache."""
    if cache is None:
        stored, where = x, positions
    else:
        rows = jnp.arange(len(x))[:, None]
        index = jnp.where(positions >= 0, positions, cache["x"].shape[1])
        stored = cache["x"].at[rows, index].set(x, mode="drop")
        cache, where = {"x": stored}, jnp.arange(stored.shape[1])[None]
    seen = (where[:, None] >= 0) & (where[:, None] <= positions[:, :, None])
    mean = seen @ stored / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    return x + mean, cache


class Linen(linen.Module):
    def setup(self):
        init = linen.with_partitioning(linen.initializers.normal(1.0), (None, "tensor"))
        self.embedding = self.param("embedding", init, (V, D))
        self.head = linen.Dense(V)

    def __call__(self, tokens, positions, cache=None):
        return attend(self.embedding[tokens], positions, cache)

    def unembed(self, hidden):
        return self.head(hidden)

    def init_cache(self, batch, length):
        return {"x": jnp.zeros((batch, length, D))}


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Param(jnp.zeros((V, D)))
        self.head = nnx.Linear(D, V, rngs=rngs)

    __call__ = lambda self, tokens, positions, cache=None: attend(
        self.embedding[...][tokens], positions, cache
    )
    unembed = lambda self, hidden: self.head(hidden)
    init_cache = lambda self, batch, length: {"x": jnp.zeros((batch, length, D))}


def test_a_linen_module_is_the_same_policy_as_an_nnx_module():
    policy, init = from_linen(Linen())
    other, _ = from_nnx(lambda rngs: NNX(rngs))
    params = jax.jit(init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "embedding": (V, D),
        "head": {"bias": (V,), "kernel": (D, V)},
    }
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    positions = jnp.array([[0, 1, 2, 3], [0, 1, -1, -1]])
    hidden, none = policy.forward(params, tokens, positions)
    assert none is None
    np.testing.assert_array_equal(hidden, other.forward(params, tokens, positions)[0])
    logits = policy.unembed(params, hidden)
    np.testing.assert_array_equal(logits, other.unembed(params, hidden))
    cache = policy.init_cache(2, 6)
    for i in range(4):
        column, cache = policy.forward(params, tokens[:, i : i + 1], positions[:, i : i + 1], cache)
        present = positions[:, i] >= 0
        # A mean of at most four numbers, in another order.
        np.testing.assert_allclose(column[present, 0], hidden[present, i], rtol=1e-6, atol=1e-6)


def test_a_linen_module_with_other_variables_is_refused():
    class Cached(Linen):
        def setup(self):
            super().setup()
            self.stored = self.variable("cache", "x", jnp.zeros, (1,))

    with pytest.raises(ValueError, match=r"collections \['cache'\]; expected only 'params'"):
        from_linen(Cached())
