"""The paged cache equals the dense one. Its TPU kernel runs in the Pallas interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from opsd_jax import config as config_lib
from opsd_jax.models import architecture, attention, decoder, paged, rope
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout

B, S, H, K, C = 8, 1024, 8, 4, 128
# Edge cases: one key, the end of a page, the start of the next page, a full row, and the end of a
# block of 512 tokens. The rows at -1 are inactive.
POSITIONS = np.array([0, 255, 256, -1, 1023, 511, 700, -1])[:, None]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Runs the kernel in Pallas' generic interpreter.

    The interpreter for TPUs does not support views of a memory with another shape. The generic one
    in jax 0.10.2 reads the shape of each index, which an integer does not have.
    """
    monkeypatch.setattr(jax._src.literals.TypedInt, "shape", (), raising=False)
    with pltpu.force_tpu_interpret_mode(True):
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(paged, "BLOCK_TOKENS", 512)


def filled(dtype, positions=None):
    """Returns one query per row, and keys and values with their positions, by default all S."""
    keys = jax.random.split(jax.random.key(0), 3)
    positions = np.broadcast_to(np.arange(S), (B, S)) if positions is None else positions
    T = positions.shape[1]
    k, v = (jax.random.normal(key, (B, T, K, C)).astype(dtype) for key in keys[:2])
    q = 3 * jax.random.normal(keys[2], (B, 1, H, C))
    return q.astype(dtype), k, v, jnp.asarray(positions)


def reference(q, k, v, positions):
    mask = np.arange(S)[None, None] <= positions[..., None]
    return attention.dense(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)


# In float32 the orders of summation differ. In bfloat16, neighbouring numbers differ by up to 2^-7
# of their size. The dense form also rounds the scaled query and the weights, so its result may be
# the neighbouring number.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 1, 4), (8, 1, 1)])
def test_the_kernel_equals_dense_attention(dtype, tolerance, shape):
    q, k, v, at = filled(dtype)

    @jax.jit
    def run(q, k, v, at, positions):
        cache = paged.write(paged.init(B, S, K, C, dtype), k, v, at)
        return paged.attend(q, cache, positions)

    if shape is None:
        out = run(q, k, v, at, jnp.asarray(POSITIONS))
    else:
        mesh = mesh_lib.make_mesh(shape, jax.devices()[: np.prod(shape)])
        heads, rows = NamedSharding(mesh, paged.HEADS), mesh_lib.rows(mesh)
        where = (heads, heads, heads, rows, rows)
        with jax.set_mesh(mesh):
            out = run(*jax.device_put((q, k, v, at, POSITIONS), where))
        assert out.sharding.is_equivalent_to(heads, out.ndim)
    active = POSITIONS[:, 0] >= 0
    expected = np.float32(reference(q, k, v, POSITIONS))
    np.testing.assert_allclose(
        np.float32(out)[active], expected[active], rtol=tolerance, atol=tolerance
    )
    assert (np.float32(out)[~active] == 0).all()


@pytest.mark.parametrize("window", [1, 7, 300])
def test_the_kernel_with_a_window_equals_dense_attention(window):
    q, k, v, at = filled("float32")
    cache = paged.write(paged.init(B, S, K, C, "float32"), k, v, at)
    attend = jax.jit(functools.partial(paged.attend, window=window, scale=0.1))
    out = attend(q, cache, jnp.asarray(POSITIONS))
    mask = attention.mask(jnp.arange(S)[None], jnp.asarray(POSITIONS), window)
    expected = attention.dense(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, 0.1)
    active = POSITIONS[:, 0] >= 0
    np.testing.assert_allclose(out[active], expected[active], rtol=1e-5, atol=1e-5)


def test_without_an_active_row_the_output_is_zero():
    q, k, v, at = filled("float32")
    cache = paged.write(paged.init(B, S, K, C, "float32"), k, v, at)
    assert (jax.jit(paged.attend)(q, cache, jnp.full((B, 1), -1)) == 0).all()


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_writing_changes_only_the_given_positions(shape):
    positions = np.array([[3, -1, 300], [-1, -1, -1], *[[255, 256, 1023]] * 6])
    _, k, v, at = filled("float32", positions)
    cache = paged.init(B, S, K, C, "float32")
    cache["pages"] += 5
    if shape is None:
        after = jax.jit(paged.write)(cache, k, v, at)
    else:
        mesh = mesh_lib.make_mesh(shape)
        with jax.set_mesh(mesh):
            pages = jax.device_put(cache["pages"], NamedSharding(mesh, paged.PAGES))
            after = jax.jit(paged.write)({**cache, "pages": pages}, k, v, at)
    keys, values = map(np.array, paged.dense(after, "float32"))
    for b, t in np.argwhere(positions >= 0):
        np.testing.assert_array_equal(keys[b, :, :, positions[b, t]], k[b, t])
        np.testing.assert_array_equal(values[b, :, positions[b, t]], v[b, t])
        keys[b, :, :, positions[b, t]] = values[b, :, positions[b, t]] = 5
    assert (keys == 5).all()
    assert (values == 5).all()


@pytest.mark.parametrize("shape", [None, (2, 2, 1), (8, 1, 1)])
def test_in_8_bits_the_kernel_equals_attention_over_what_they_stand_for(shape):
    q, k, v, at = filled("float32")

    @jax.jit
    def run(q, k, v, at, positions):
        cache = paged.write(paged.init(B, S, K, C, jnp.int8), k, v, at)
        return paged.attend(q, cache, positions), paged.dense(cache, "float32")

    if shape is None:
        out, (keys, values) = run(q, k, v, at, jnp.asarray(POSITIONS))
    else:
        mesh = mesh_lib.make_mesh(shape, jax.devices()[: np.prod(shape)])
        heads, rows = NamedSharding(mesh, paged.HEADS), mesh_lib.rows(mesh)
        with jax.set_mesh(mesh):
            placed = jax.device_put((q, k, v, at, POSITIONS), (heads, heads, heads, rows, rows))
            out, (keys, values) = jax.device_get(run(*placed))
    mask = np.arange(S)[None, None] <= POSITIONS[..., None]
    expected = attention.dense(q, keys, values, mask)
    active = POSITIONS[:, 0] >= 0
    np.testing.assert_allclose(out[active], expected[active], rtol=1e-4, atol=1e-5)
    assert (out[~active] == 0).all()
    # The longest of 1,024 pairs of normal numbers is about 4.5, so a key or value has an error of
    # 1.5 * 4.5 / 127 / sqrt(12) = 0.015. The queries have a deviation of 3, so scores have 0.046.
    exact = reference(q, k, v, POSITIONS)
    rms = lambda x: np.sqrt(np.mean(np.square(x[active])))
    assert 0.01 < rms(out - exact) / rms(exact) < 0.05


def test_the_first_tokens_of_a_row_determine_its_scales():
    positions = np.array([[0, 1, 2], [-1, 0, 1], [-1, -1, -1]])
    keys = jax.random.split(jax.random.key(0), 2)
    k, v = (jax.random.normal(key, (3, 3, K, C)) for key in keys)
    cache = paged.write(paged.init(3, 300, K, C, jnp.int8), k, v, jnp.asarray(positions))
    scales = np.asarray(cache["scales"]).reshape(3, K, 2, C)
    for row, tokens in enumerate([k[0], k[1, 1:]]):
        pairs = np.hypot(tokens[..., : C // 2], tokens[..., C // 2 :]).max(axis=0)
        expected = paged.HEADROOM / 127 * np.tile(pairs, (1, 2))
        np.testing.assert_allclose(scales[row, :, 0], expected, rtol=1e-6)
    expected = paged.HEADROOM / 127 * np.abs(v[0]).max(axis=0)
    np.testing.assert_allclose(scales[0, :, 1], expected, rtol=1e-6)
    assert (scales[2] == 0).all()

    after = paged.write(cache, 1e6 * k[:, :1], v[:, :1], jnp.asarray([[3], [-1], [0]]))
    np.testing.assert_array_equal(after["scales"][:2], cache["scales"][:2])
    assert (after["scales"][2] > 0).all()
    clipped, _ = paged.dense(after, "float32")
    np.testing.assert_allclose(np.abs(clipped[0, :, :, 3]), 127 * scales[0, :, 0], rtol=1e-6)


def test_a_key_stays_in_the_range_of_its_scale_at_any_position():
    k = 3 * jax.random.normal(jax.random.key(0), (1, 1, K, C))
    k = jnp.broadcast_to(k, (1, 512, K, C))
    table = rope.table(jnp.arange(512)[None], C, 1e4, rope.RopeScaling())
    scales = [
        paged.calibrate(jnp.zeros((1, 2 * K, C)), jnp.repeat(x, 2, axis=2), jnp.ones((1, 1), bool))
        for x in jnp.split(rope.rotate(k, table), 512, axis=1)
    ]
    for other in scales[1:]:
        np.testing.assert_allclose(other[:, 0::2], scales[0][:, 0::2], rtol=1e-4)


@pytest.fixture(scope="module")
def sizes(shared_config):
    """Two layers with a head size that the kernel supports."""
    section = shared_config.model.copy_and_resolve_references()
    section.update({"head_dim": 128, "num_heads": 4, "num_kv_heads": 2, "cache": "paged"})
    return decoder.config_of(section)


WINDOWS = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 3}


@pytest.mark.parametrize(
    ("shape", "windows"), [(None, {}), ((1, 2, 2), {}), (None, WINDOWS), ((1, 2, 2), WINDOWS)]
)
def test_prefill_and_decoding_equal_the_full_forward(sizes, shape, windows):
    """Prefills left-padded prompts of unequal length, then decodes; two rows end early."""
    model = decoder.model(dataclasses.replace(sizes, **windows))
    params = jax.jit(model.init)(jax.random.key(1))
    forward = jax.jit(model.policy.forward)
    tokens = random_tokens(0, (4, 9))
    lengths, ends = np.array([6, 2, 5, 1]), np.array([9, 9, 6, 3])
    everywhere = jnp.broadcast_to(jnp.arange(9), (4, 9))
    full, _ = forward(params, tokens, everywhere)
    prompt, positions = np.full((4, 6), 9), np.full((4, 6), -1)
    for row, n in enumerate(lengths):
        prompt[row, 6 - n :], positions[row, 6 - n :] = tokens[row, :n], np.arange(n)

    def run(params, cache):
        hidden, cache = forward(params, jnp.array(prompt), jnp.array(positions), cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(hidden[row, 6 - n :], full[row, :n], rtol=1e-4, atol=1e-5)
        for t in range(4):
            at = np.where(lengths + t < ends, lengths + t, -1)
            token = np.array(tokens)[np.arange(4), at][:, None]
            hidden, cache = forward(params, jnp.array(token), jnp.array(at)[:, None], cache)
            active = at >= 0
            expected = full[np.arange(4), at][active]
            np.testing.assert_allclose(hidden[active, 0], expected, rtol=1e-4, atol=1e-5)
            assert np.isfinite(hidden).all()

    cache = model.policy.init_cache(4, 300)
    assert cache.pages[0].shape == (4 * 2, paged.PAGE, 4, 128)
    if shape is None:
        return run(params, cache)
    mesh = mesh_lib.make_mesh(shape, jax.devices()[:4])
    there = mesh_lib.tree_shardings(mesh, model.rules, params)
    pages = mesh_lib.tree_shardings(mesh, model.cache_rules, cache, "cache")
    with jax.set_mesh(mesh):
        run(jax.device_put(params, there), jax.device_put(cache, pages))


def test_rollouts_equal_those_with_a_dense_cache(sizes):
    """The engine inserts prompts into the pages and refills slots."""
    mesh, seen = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1]), []
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]
    for cache in ("paged", "dense"):
        model = decoder.model(dataclasses.replace(sizes, cache=cache))
        params = jax.jit(model.init)(jax.random.key(1))
        abstract = abstract_of(params, mesh_lib.tree_shardings(mesh, model.rules, params))
        layout = decode_layout(model, abstract, mesh)
        engine = Engine(model, layout.abstract, mesh, EngineShape(2, 1, 8, 6), cache_lengths=(14,))
        ended = engine(
            layout.convert(params),
            prompts,
            [[0, 1], [2, 3], [4]],
            key=jax.random.key(0),
            sampling_params=sampling.params(model.vocab_size, stop=()),
            budgets=[[6, 2], [3, 1], [6]],
        )
        responses = [r for batch in ended for r in batch.responses]
        seen.append([(r.prompt, r.member, r.tokens.tolist()) for r in responses])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 5


def test_a_paged_cache_has_only_the_full_length(sizes):
    mesh, shape = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1]), EngineShape(1, 1, 8, 260)
    for cache, lengths in (("paged", [268]), ("dense", [128, 192, 268])):
        model = decoder.model(dataclasses.replace(sizes, cache=cache))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        abstract = abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
        assert Engine(model, abstract, mesh, shape).cache_lengths == lengths


def test_an_unsupported_number_of_heads_per_device_is_an_error():
    cache = paged.init(1, 1, 12, 128, "float32")
    with pytest.raises(
        ValueError, match="each device has 12 key-value heads of size 128; expected"
    ):
        paged.attend(jnp.zeros((1, 1, 24, 128)), cache, jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize(("heads", "fits"), [(1, False), (2, True), (6, False), (16, True)])
def test_8_bits_need_an_even_number_of_heads_per_device(heads, fits):
    cache = paged.init(1, 1, heads, 128, jnp.int8)
    attend = lambda: paged.attend(jnp.zeros((1, 1, heads, 128)), cache, jnp.zeros((1, 1), "int32"))
    if fits:
        return attend()
    with pytest.raises(ValueError, match=f"is 'int8', but each device has {heads} key-value heads"):
        attend()


def test_auto_is_paged_on_a_tpu_if_the_kernel_supports_the_sizes(monkeypatch, sizes):
    assert decoder.config_of(config_lib.preset("qwen3-8b")).cache == "dense"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    small = config_lib.preset("qwen2.5-0.5b")
    assert decoder.config_of(config_lib.preset("qwen3-8b")).cache == "paged"
    assert decoder.config_of(config_lib.preset("qwen3-8b", cache="dense")).cache == "dense"
    assert decoder.config_of(small).cache == "dense"  # head_dim is 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "ragged"}, "cache is 'ragged'; expected one of 'auto', 'dense', 'paged'"),
        ({"head_dim": 64}, "cache is 'paged' with model.head_dim = 64"),
        ({"num_heads": 6, "num_kv_heads": 6}, "model.num_kv_heads = 6; the kernel needs"),
    ],
)
def test_an_unsupported_cache_is_an_error(sizes, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sizes, **changes)


def test_config_json_does_not_depend_on_the_cache(sizes):
    dense = dataclasses.replace(sizes, cache="dense")
    assert architecture.to_json(sizes, "float32") == architecture.to_json(dense, "float32")
