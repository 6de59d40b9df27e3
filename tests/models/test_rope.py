"""Rotary embeddings with scaling: the frequencies, and decoding with a cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from conftest import random_tokens
from jax.sharding import PartitionSpec as P

from opsd_jax.models import decoder, rope
from opsd_jax.parallel import mesh as mesh_lib

SCALINGS = {
    "linear": rope.RopeScaling("linear", 4.0),
    "llama3": rope.RopeScaling("llama3", 8.0, original_max_position_embeddings=256),
    "yarn": rope.RopeScaling("yarn", 4.0, original_max_position_embeddings=256),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaling_keeps_high_frequencies_and_divides_low_ones(kind):
    plain, _ = rope.frequencies(64, 1e4, rope.RopeScaling())
    scaled, factor = rope.frequencies(64, 1e4, SCALINGS[kind])
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[0], 4 if kind == "linear" else 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[-1], SCALINGS[kind].factor, rtol=1e-6)
    assert (np.diff(ratio) > -1e-6).all()
    assert factor == (1 + 0.1 * math.log(4) if kind == "yarn" else 1)


def test_an_invalid_scaling_is_an_error():
    with pytest.raises(ValueError, match=r"rope_type is 'ntk'; expected one of"):
        rope.RopeScaling("ntk")
    with pytest.raises(
        ValueError, match=r"low_freq_factor is 4.0; expected a value below high_freq"
    ):
        rope.RopeScaling("llama3", 8.0, low_freq_factor=4.0)


@pytest.mark.parametrize("kind", ["biased", "plain", *SCALINGS])
def test_cached_decoding_equals_the_full_forward(kind):
    section = tiny_config.decoder(
        hidden_size=16,
        intermediate_size=32,
        head_dim=8,
        num_layers=2,
        scan_unroll=1,
        qk_norm=False,
        attention_bias=kind == "biased",
    )
    sizes = decoder.config_of(section)
    if kind in SCALINGS:
        sizes = dataclasses.replace(sizes, rope_scaling=SCALINGS[kind])
    model = decoder.model(sizes)
    params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape),
        jax.jit(model.init)(jax.random.key(0)),
    )
    tokens = random_tokens(0, (2, 12))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    forward = jax.jit(model.policy.forward)
    full, _ = forward(params, tokens, positions)
    hidden, cache = forward(params, tokens[:, :7], positions[:, :7], model.policy.init_cache(2, 16))
    np.testing.assert_allclose(hidden, full[:, :7], rtol=1e-5, atol=1e-5)
    for t in range(7, 12):
        at = slice(t, t + 1)
        hidden, cache = forward(params, tokens[:, at], positions[:, at], cache)
        np.testing.assert_allclose(hidden[:, 0], full[:, t], rtol=1e-5, atol=1e-5)
    if kind == "biased":
        shardings = mesh_lib.tree_shardings(mesh_lib.make_mesh((2, 2, 2)), model.rules, params)
        assert shardings["layers"]["k_bias"].spec == P(None, "tensor", None)
        without = jax.tree.map(jnp.zeros_like, params["layers"]["k_bias"])
        params["layers"]["v_bias"] = without
        assert not np.allclose(forward(params, tokens, positions)[0], full, atol=1e-2)
