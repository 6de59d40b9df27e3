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


def reference(x):
    """The checksum in NumPy: the sum of the words, each times an odd number of its position."""
    x = np.asarray(x)
    words = x.reshape(-1).view(f"u{x.dtype.itemsize}").astype(np.uint64)
    mixed = (np.arange(words.size, dtype=np.uint64) * 2_654_435_769) % 2**32
    return int((words * ((mixed ^ (mixed >> 15)) | 1) % 2**32).sum() % 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_that_of_numpy(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)) * 9, dtype)
    assert checksums({"a": {"b": x}}) == {"a/b": f"{dtype}:{reference(x):08x}"}


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "tensor"), P(("data", "fsdp"), "tensor")])
def test_a_checksum_does_not_depend_on_the_sharding(spec):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), jnp.float32)
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
    swapped = x[::-1]
    assert changed(before, checksums({"x": jnp.asarray(swapped)})) == ["x"]


def test_only_arrays_of_both_sides_and_one_dtype_are_compared():
    now = checksums({"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)})
    assert changed({"a": "bfloat16:0", "b": "bfloat16:0", "c": "float32:0"}, now) == ["b"]
