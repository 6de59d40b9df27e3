"""Weights and caches in 8 bits equal what their values and scales stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens

from opsd_jax.models import attention, decoder
from opsd_jax.models.quantised import (
    LARGEST,
    QuantisationOptions,
    Quantised,
    quantise,
    to_int8,
)
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout

is_quantised = lambda leaf: isinstance(leaf, Quantised)


def exact(tree):
    """Replaces each quantised array by the float32 array that it stands for."""
    value = lambda x: x.values * x.scale if is_quantised(x) else x
    return jax.tree.map(value, tree, is_leaf=is_quantised)


@pytest.mark.parametrize("axes", [0, (1, 2), -1])
def test_an_array_is_rounded_to_the_nearest_multiple_of_its_scale(axes):
    x = np.random.default_rng(0).standard_normal((5, 6, 7)) ** 3
    x[:, 2] = 0.0
    found = quantise(jnp.asarray(x, jnp.float32), axes)
    scale = np.abs(x).max(axis=axes, keepdims=True) / 127
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    # Half a scale, and the rounding of the quotient in float32.
    assert (np.abs(exact(found) - x) <= 0.5001 * scale).all()
    assert np.abs(found.values).max() == LARGEST
    assert (np.asarray(found.values)[:, 2] == 0).all()


def test_values_beyond_the_range_of_a_scale_are_clipped():
    x = jnp.asarray([-300.0, -1.0, 0.0, 1.2, 300.0])
    np.testing.assert_array_equal(to_int8(x, jnp.asarray(0.5)), [-127, -2, 0, 2, 127])
    np.testing.assert_array_equal(to_int8(x, jnp.asarray(0.0)), np.zeros(5))


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def config(request, shared_config):
    section = shared_config.model.copy_and_resolve_references()
    section.update({"tie_word_embeddings": request.param, "attention_bias": True})
    return decoder.config_of(section)


def logits(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = model.policy.init_cache(*tokens.shape)
    hidden, _ = model.policy.forward(params, tokens, positions, cache)
    return model.policy.unembed(params, hidden)


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_model_computes_with_the_rounded_weights(config, unrolled):
    plain = decoder.model(config)
    model = plain.quantised(QuantisationOptions(weights="int8"))
    params = plain.init(jax.random.key(0))
    rounded = model.decode_params(params)
    given = model.unrolled(rounded) if unrolled else rounded
    tokens = random_tokens(0, (2, 9))
    expected = logits(plain, exact(rounded), tokens)
    np.testing.assert_allclose(logits(model, given, tokens), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - logits(plain, params, tokens)).max() > 1e-3
    # All matmuls: in each layer q, k, v, o, gate, up and down, and the head.
    assert sum(map(is_quantised, jax.tree.leaves(rounded, is_leaf=is_quantised))) == 8


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2)])
def test_one_program_rounds_and_moves_the_weights(config, shape):
    plain = decoder.model(config)
    model = plain.quantised(QuantisationOptions(weights="int8"))
    mesh = mesh_lib.make_mesh(shape, jax.devices()[:4])
    params = plain.init(jax.random.key(0))
    placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, plain.rules, params))
    abstract = abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed))
    layout = decode_layout(model, abstract, mesh)
    rounded = layout.convert(placed)
    jax.tree.map(np.testing.assert_array_equal, rounded, jax.jit(model.decode_params)(params))
    assert rounded["layers"]["o"].values.sharding.spec[1] == "tensor"


def test_the_cache_has_a_scale_for_each_token_and_head(config):
    """Decoding attends to the keys and values that the cache stands for."""
    plain = decoder.model(dataclasses.replace(config, num_layers=1))
    model = plain.quantised(QuantisationOptions(cache="int8"))
    params = plain.init(jax.random.key(0))
    tokens, everywhere = random_tokens(0, (3, 9)), jnp.broadcast_to(jnp.arange(9), (3, 9))
    parts = [slice(0, 4), *(slice(t, t + 1) for t in range(4, 9))]
    cache, hidden = model.policy.init_cache(3, 12), []
    for part in parts:
        h, cache = model.policy.forward(params, tokens[:, part], everywhere[:, part], cache)
        hidden.append(h)
    _, kept = plain.policy.forward(params, tokens, everywhere, plain.policy.init_cache(3, 12))
    for name, axis in (("k", 2), ("v", 3)):
        found, expected = exact(cache[0][name]), kept[0][name]
        scale = np.abs(expected).max(axis=axis, keepdims=True) / 127
        assert (np.abs(found - expected) <= 0.501 * scale).all()
    # With one layer, a full-precision cache with these keys and values gives the same result.
    at = everywhere[:, -1:]
    last, _ = plain.policy.forward(params, tokens[:, -1:], at, exact(cache))
    rounded = jnp.concatenate(hidden, axis=1)[:, -1:]
    np.testing.assert_allclose(rounded, last, rtol=0.02, atol=0.02)


def test_attention_applies_the_scales():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(2, 3, 4, 8), quantise(draw(2, 2, 8, 10), 2), quantise(draw(2, 2, 10, 8), 3)
    mask = jnp.asarray(rng.random((2, 3, 10)) < 0.7)
    found = attention.dense(q, k, v, mask)
    expected = attention.dense(q, exact(k), exact(v), mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rollouts_do_not_depend_on_slots_or_devices(config):
    plain = decoder.model(config)
    model = plain.quantised(QuantisationOptions(weights="int8", cache="int8"))
    params, seen = jax.jit(plain.init)(jax.random.key(0)), []
    for shape, slots in (((1, 1, 1), 2), ((1, 1, 1), 8), ((2, 2, 2), 8)):
        mesh = mesh_lib.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
        placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, plain.rules, params))
        abstract = abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed))
        layout = decode_layout(model, abstract, mesh)
        size = EngineShape(slots, mesh_lib.row_shards(mesh), 8, 16)
        engine = Engine(model, layout.abstract, mesh, size, cache_lengths=(24,))
        ended = engine(
            layout.convert(placed),
            [[1, 2, 3, 4], [5], [7, 8, 9, 10, 11, 12]],
            [[0, 1], [2, 3], [4, 5]],
            key=jax.random.key(0),
            sampling_params=sampling.params(model.vocab_size, stop=(2,)),
        )
        responses = [r for batch in ended for r in batch.responses]
        seen.append({(r.prompt, r.member): r.tokens.tolist() for r in responses})
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 6
