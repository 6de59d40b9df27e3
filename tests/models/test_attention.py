"""Splash attention equals dense attention. Its TPU kernel runs in the Pallas interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from conftest import random_tokens
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from opsd_jax import config as config_lib
from opsd_jax.models import attention, decoder
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import segment_ids

B, H, K, C = 4, 8, 4, 128


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode(True):
        yield


def padded_positions(T):
    """Returns positions of a full row and of rows padded on the left, the right and both sides."""
    positions = np.tile(np.arange(T), (B, 1))
    for row, (left, right) in enumerate([(0, 0), (T // 3, 0), (0, T // 2), (7, 11)]):
        positions[row] -= left
        positions[row, T - right :] = -1
    return jnp.asarray(np.maximum(positions, -1))


def arrays(T, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, H, C), (B, T, K, C), (B, T, K, C), (B, T, H, C))
    q, k, v, g = (
        jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True)
    )
    return 3 * q, k, v, g


def dense(q, k, v, positions):
    mask = (positions[:, None] >= 0) & (positions[:, None] <= positions[..., None])
    return attention.dense(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)


def with_gradients(attend, positions, q, k, v, g):
    """Computes the output of an attention function, 0 at padding, and its gradients."""
    active = (positions >= 0)[..., None, None]

    def total(q, k, v):
        out = jnp.where(active, attend(q, k, v, positions), 0)
        return jnp.sum(out.astype(jnp.float32) * g), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("T", [128, 300])
def test_splash_equals_dense_attention(T):
    """In float32 they differ only by the order of summation.

    In bfloat16 the error of splash attention is at most 1.5 times the error of dense attention.
    """
    positions, given = padded_positions(T), arrays(T, "float32")
    expected = with_gradients(dense, positions, *given)
    for a, b in zip(with_gradients(attention.splash, positions, *given), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    low = [x.astype(jnp.bfloat16) for x in given]
    exact = with_gradients(dense, positions, *(x.astype(jnp.float32) for x in low))
    errors = {
        attend: [
            np.abs(np.asarray(a, np.float32) - b).max()
            for a, b in zip(with_gradients(attend, positions, *low), exact, strict=True)
        ]
        for attend in (attention.splash, dense)
    }
    assert (np.array(errors[attention.splash]) <= 1.5 * np.array(errors[dense])).all()


def shared_positions(T):
    """Returns positions of rows with one to four sequences each, some with padding between them."""
    positions = np.full((B, T), -1)
    for row, lengths in enumerate([(T,), (T // 2, T - T // 2), (40, 1, 20, 50), (3, 90)]):
        start = 0
        for n in lengths:
            positions[row, start : start + n] = np.arange(n)
            start += n + (row == 3)
    return jnp.asarray(positions)


@pytest.mark.parametrize("attend", [attention.splash, attention.causal])
def test_sequences_of_a_row_do_not_attend_to_one_another(attend):
    """Compares with dense attention over each sequence on its own."""
    positions, (q, k, v, _) = shared_positions(160), arrays(160, "float32")
    got = jax.jit(attend)(q, k, v, positions)
    segments = segment_ids(positions)
    assert segments.max(1).tolist() == [1, 2, 4, 2]
    for row in range(B):
        for segment in range(1, int(segments[row].max()) + 1):
            (at,) = np.nonzero(segments[row] == segment)
            own = [x[row, at][None] for x in (q, k, v)]
            expected = dense(*own, positions[row, at][None])
            np.testing.assert_allclose(got[row, at], expected[0], atol=1e-4)


@pytest.mark.parametrize("attend", [attention.splash, attention.causal])
@pytest.mark.parametrize("window", [1, 50, 128, 1000])
def test_a_window_hides_the_tokens_before_it(attend, window):
    """Compares outputs and gradients with dense attention, in rows of several sequences."""
    positions, given = shared_positions(300), arrays(300, "float32")
    segments = segment_ids(positions)

    def expected(q, k, v, positions):
        near = positions[..., None] - positions[:, None] < window
        mask = (positions[:, None] >= 0) & (positions[:, None] <= positions[..., None]) & near
        mask &= segments[:, None] == segments[..., None]
        return attention.dense(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, 0.1)

    got = with_gradients(lambda *given: attend(*given, window=window, scale=0.1), positions, *given)
    for a, b in zip(got, with_gradients(expected, positions, *given), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 4, 2), (2, 2, 2)])
def test_splash_on_a_mesh_equals_dense_attention(shape):
    positions, given = padded_positions(128), arrays(128, "float32")
    expected = with_gradients(dense, positions, *given)
    with jax.set_mesh(mesh_lib.make_mesh(shape)):
        got = with_gradients(attention.splash, positions, *given)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.fixture(scope="module")
def sizes():
    config = tiny_config.decoder(
        num_layers=2, scan_unroll=1, head_dim=128, num_heads=4, num_kv_heads=2, attention="dense"
    )
    return decoder.config_of(config)


@pytest.fixture(scope="module")
def params(sizes):
    return jax.tree.map(lambda x: 2 * x, decoder.model(sizes).init(jax.random.key(1)))


def gradient(sizes, params, positions):
    """Computes a sum over hidden states and its gradient, with rows split as in a train step."""
    policy = decoder.model(sizes).policy
    rows = {
        "tokens": random_tokens(3, positions.shape),
        "positions": positions,
        "weights": jax.random.normal(jax.random.key(2), (*positions.shape, sizes.hidden_size)),
    }

    def loss(params, rows):
        hidden, _ = policy.forward(params, rows["tokens"], rows["positions"])
        active = (rows["positions"] >= 0)[..., None]
        return jnp.sum(jnp.where(active, hidden * rows["weights"], 0))

    of_first = lambda params, batch: jax.value_and_grad(loss)(
        params, jax.tree.map(lambda x: x[0], batch)
    )
    batch = jax.tree.map(lambda x: x[None], rows)
    return jax.jit(mesh_lib.over_data(of_first, batch))(params, batch)


@pytest.mark.parametrize("remat", ["none", "full", "attention", "products"])
def test_attention_and_remat_do_not_change_gradients(sizes, params, remat):
    positions = padded_positions(160)
    expected = gradient(sizes, params, positions)
    got = gradient(dataclasses.replace(sizes, attention="splash", remat=remat), params, positions)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_sequence_parallelism_does_not_change_gradients(sizes, params):
    positions = padded_positions(128)
    expected = gradient(sizes, params, positions)
    for options in ({}, {"attention": "splash"}):
        split = dataclasses.replace(sizes, sequence_parallel=True, remat="full", **options)
        with jax.set_mesh(mesh_lib.make_mesh((2, 2, 2))):
            got = gradient(split, params, positions)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(("form", "shape"), [("dense", (2, 2, 2)), ("splash", (2, 1, 4))])
def test_context_parallelism_does_not_change_gradients(sizes, params, form, shape):
    positions = padded_positions(160)
    positions = positions.at[0].set(jnp.arange(160) % 97)  # two sequences
    expected = gradient(sizes, params, positions)
    split = dataclasses.replace(sizes, context_parallel=True, remat="full", attention=form)
    with jax.set_mesh(mesh_lib.make_mesh(shape)):
        got = gradient(split, params, positions)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_only_columns_along_the_diagonal_are_compared(monkeypatch, parts):
    made = attention._kernel(4, 256, parts)
    monkeypatch.setattr(attention, "_CausalMask", splash_attention_mask.CausalMask)
    expected = attention._kernel(4, 256, parts)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [1, 100, 600, 2000])
def test_only_columns_along_the_edges_of_a_window_are_compared(monkeypatch, window):
    made = attention._kernel(4, 2048, 1, window)
    monkeypatch.setattr(attention, "_WindowMask", splash_attention_mask.LocalMask)
    expected = attention._kernel(4, 2048, 1, window)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_with_windows_have_the_same_gradients_in_both_forms(sizes, params, remat):
    changes = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 9}
    windows = dataclasses.replace(sizes, rope_local_theta=50.0, query_scalar=30.0, **changes)
    positions = padded_positions(160)
    expected = gradient(windows, params, positions)
    splash = dataclasses.replace(windows, attention="splash", remat=remat)
    got = gradient(splash, params, positions)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    (_, other), (_, whole) = gradient(sizes, params, positions), expected
    other, q = other["layers"]["q"], whole["layers"]["q"]
    assert np.abs(other - q).max() > 0.1 * np.abs(q).max()


@pytest.mark.parametrize("cache", ["dense", "paged"])
def test_splash_and_dense_prefill_fill_the_same_cache(sizes, params, cache):
    positions = padded_positions(160)
    tokens, caches = random_tokens(3, positions.shape), []
    for form in ("dense", "splash"):
        policy = decoder.model(dataclasses.replace(sizes, attention=form, cache=cache)).policy
        prefill = jax.jit(
            lambda p, policy=policy: policy.forward(p, tokens, positions, policy.init_cache(B, 256))
        )
        hidden, filled = prefill(params)
        caches.append((jnp.where((positions >= 0)[..., None], hidden, 0), filled))
    for a, b in zip(*map(jax.tree.leaves, caches), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_few_tokens_attend_to_a_cache_that_splash_attention_filled(sizes, params):
    """Speculation continues rows by several tokens at once, from another position in each row."""
    policy = decoder.model(dataclasses.replace(sizes, attention="splash", cache="dense")).policy
    tokens = random_tokens(3, (B, 160))
    everywhere = jnp.broadcast_to(jnp.arange(160), (B, 160))
    begun = np.array([[129], [140], [150], [155]])
    prefill = jax.jit(lambda p, *t: policy.forward(p, *t, policy.init_cache(B, 160)))
    _, cache = prefill(params, tokens, jnp.where(everywhere < begun, everywhere, -1))
    at = jnp.asarray(begun + np.arange(5)[None])
    continued = jnp.take_along_axis(tokens, at, axis=1)
    hidden, _ = jax.jit(policy.forward)(params, continued, at, cache)
    full, _ = jax.jit(policy.forward)(params, tokens, everywhere)
    expected = jnp.take_along_axis(full, at[..., None], axis=1)
    np.testing.assert_allclose(hidden, expected, rtol=1e-3, atol=1e-4)


def test_auto_is_dense_without_a_tpu_and_invalid_options_are_errors():
    assert decoder.config_of(config_lib.preset("qwen3-8b")).attention == "dense"
    with pytest.raises(ValueError, match=r"attention is 'splash' with model.head_dim = 16"):
        decoder.config_of(tiny_config.decoder(attention="splash"))
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of 'auto', 'dense'"):
        decoder.config_of(tiny_config.decoder(attention="flash"))
    with pytest.raises(ValueError, match="remat is 'some'; expected one of 'none', 'full'"):
        decoder.config_of(tiny_config.decoder(remat="some"))
