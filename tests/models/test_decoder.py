"""The decoder as a `Policy`: padding, the cache, dtypes, rematerialisation and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens

from opsd_jax.models import decoder


def positions_like(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@pytest.fixture(scope="module")
def forward(model):
    return jax.jit(model.policy.forward)


def test_padding_on_either_side_does_not_change_hidden_states(forward, params):
    tokens = random_tokens(0, (3, 9))
    positions = positions_like(tokens)
    hidden, _ = forward(params, tokens, positions)
    for left, right in ((4, 0), (0, 4), (3, 2)):
        pad = ((0, 0), (left, right))
        padded, _ = forward(
            params,
            jnp.pad(tokens, pad, constant_values=7),
            jnp.pad(positions, pad, constant_values=-1),
        )
        np.testing.assert_allclose(padded[:, left : left + 9], hidden, rtol=1e-5, atol=1e-5)
        assert np.isfinite(padded).all()


def test_cached_decoding_equals_the_full_forward(model, forward, params):
    """Prefills left-padded prompts of unequal length, then decodes token by token."""
    tokens = random_tokens(0, (3, 14))
    prompt_lengths = np.array([6, 2, 5])
    full, _ = forward(params, tokens, positions_like(tokens))
    prompt = np.full((3, 6), 9)
    positions = np.full((3, 6), -1)
    for row, n in enumerate(prompt_lengths):
        prompt[row, 6 - n :], positions[row, 6 - n :] = tokens[row, :n], np.arange(n)
    cache = model.policy.init_cache(3, 14)
    hidden, cache = forward(params, jnp.array(prompt), jnp.array(positions), cache)
    for row, n in enumerate(prompt_lengths):
        np.testing.assert_allclose(hidden[row, 6 - n :], full[row, :n], rtol=1e-5, atol=1e-5)
    for t in range(8):
        at = prompt_lengths + t
        token = jnp.array(tokens)[np.arange(3), at][:, None]
        hidden, cache = forward(params, token, jnp.array(at)[:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], full[np.arange(3), at], rtol=1e-5, atol=1e-5)


def test_a_row_at_position_minus_one_does_not_change_the_cache(model, forward, params):
    tokens = random_tokens(0, (2, 4))
    cache = model.policy.init_cache(2, 6)
    _, cache = forward(params, tokens, positions_like(tokens), cache)
    _, after = forward(params, tokens[:, :1], jnp.array([[4], [-1]]), cache)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old[0], new[0])
        np.testing.assert_array_equal(old[1], new[1])


def test_leftovers_of_an_earlier_sequence_in_the_cache_are_ignored(model, forward, params):
    tokens = random_tokens(0, (2, 4))
    fresh = model.policy.init_cache(2, 8)
    used = jax.tree.map(lambda x: x + 5.0, fresh)
    expected, _ = forward(params, tokens, positions_like(tokens), fresh)
    hidden, _ = forward(params, tokens, positions_like(tokens), used)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_has_float32_logits(config, score):
    model_config = config.model.copy_and_resolve_references()
    model_config.dtype = "bfloat16"
    low = decoder.from_config(model_config)
    params = jax.jit(low.init)(jax.random.key(0))
    tokens = random_tokens(0, (2, 5))
    hidden, _ = jax.jit(low.policy.forward)(params, tokens, positions_like(tokens))
    logits = jax.jit(low.policy.unembed)(params, hidden)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact = score(params, tokens, positions_like(tokens))
    # bfloat16 has 8 significant bits, so about a dozen roundings add up to 2^-5 of the scale.
    assert np.abs(logits - exact).max() < 2**-5 * np.abs(exact).max()


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "products"}, {"scan_unroll": 2}])
def test_remat_and_unrolling_do_not_change_gradients(config, model, params, changes):
    model_config = config.model.copy_and_resolve_references()
    model_config.update(changes)
    other = decoder.from_config(model_config)
    tokens = random_tokens(0, (2, 5))

    def loss(params, policy):
        hidden, _ = policy.forward(params, tokens, positions_like(tokens))
        return jnp.square(policy.unembed(params, hidden)).mean()

    expected, got = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, m.policy) for m in (model, other)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_tied_embeddings_replace_the_head(config):
    model_config = config.model.copy_and_resolve_references()
    model_config.tie_word_embeddings = True
    tied = decoder.from_config(model_config)
    params = jax.jit(tied.init)(jax.random.key(0))
    assert "head" not in params
    hidden = jax.random.normal(jax.random.key(1), (3, 16))
    logits = tied.policy.unembed(params, hidden)
    np.testing.assert_allclose(logits, hidden @ params["embedding"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_kv_heads", 3, "num_heads is 4.*num_kv_heads = 3"),
        ("head_dim", 7, "head_dim is 7"),
        ("num_layers", 0, "num_layers is 0"),
        ("dtype", "float16", "dtype is 'float16'; expected 'float32' or 'bfloat16'"),
    ],
)
def test_an_unsupported_size_is_named(config, field, value, message):
    model_config = config.model.copy_and_resolve_references()
    model_config[field] = value
    with pytest.raises(ValueError, match=message):
        decoder.from_config(model_config)
