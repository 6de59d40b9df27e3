"""Checksums of arrays: the same for any sharding, and different after any change of a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.training.checksum import changed, checksums

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "bool", "float8_e4m3fn"]


def odd(index, level):
    mixed = (np.asarray(index, np.uint64) + (level << 28)) * 2_654_435_769 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2_654_435_769 % 2**32
    return (mixed ^ (mixed >> 15)) | 1


def reference(x):
    """The checksum in NumPy: the sum of the words, each times odd numbers of its row and column."""
    x = np.asarray(x)
    words = x.reshape(-1, x.shape[-1]).view(f"u{x.dtype.itemsize}").astype(np.uint64)
    words ^= words >> 16
    row, column = np.indices(words.shape)
    rows = len(words)
    if rows % 64 == 0:
        words = words * odd(row // (rows // 8), 0) % 2**32
        row %= rows // 8
        words = words * odd(row // (rows // 64), 1) % 2**32
        row %= rows // 64
    return int((words * odd(row, 2) % 2**32 * odd(column, 3) % 2**32).sum() % 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 48, 6), (9,)])
def test_a_checksum_is_that_of_numpy(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 9, dtype)
    assert checksums({"a": {"b": x}}) == {"a/b": f"{dtype}:{reference(x):08x}"}


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "tensor"), P(("data", "fsdp"), "tensor")])
@pytest.mark.parametrize("shape", [(8, 16), (128, 16), (16, 8, 4)])
def test_a_checksum_does_not_depend_on_the_sharding(spec, shape):
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    mesh = mesh_lib.make_mesh((2, 2, 2))
    assert checksums([jax.device_put(x, NamedSharding(mesh, spec))]) == checksums([x])


def test_every_changed_word_is_seen():
    x = np.random.default_rng(2).normal(size=(4, 9)).astype(np.float32)
    before = checksums({"x": jnp.asarray(x)})
    for i in range(x.size):
        for bit in (0, 12, 31):
            other = x.copy()
            other.reshape(-1).view(np.uint32)[i] ^= np.uint32(1 << bit)
            assert changed(before, checksums({"x": jnp.asarray(other)})) == ["x"]
    negated = x * np.where(np.arange(9) < 2, -1, 1)[None]  # changes only signs, of two columns
    for other in (x[::-1], x[:, ::-1], negated.astype(np.float32)):
        assert changed(before, checksums({"x": jnp.asarray(other)})) == ["x"]


def test_each_row_and_each_column_has_a_factor_of_its_own():
    ones = np.eye(128, dtype=np.int32)
    for matrices in (ones[:, :, None], ones[:, None, :]):
        sums = checksums([jnp.asarray(matrix) for matrix in matrices])
        assert len(set(sums.values())) == 128


def test_only_arrays_of_both_sides_and_one_dtype_are_compared():
    now = checksums({"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)})
    assert changed({"a": "bfloat16:0", "b": "bfloat16:0", "c": "float32:0"}, now) == ["b"]
