"""The layout of the parameters for decoding."""

import jax
import numpy as np

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout.layout import decode_layout


def test_the_layout_moves_only_parameters_that_differ(model, params):
    mesh = mesh_lib.make_mesh((1, 4, 2))
    placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
    abstract = abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed))
    layout = decode_layout(model, abstract, mesh)
    moved = layout.convert(placed)
    for leaf, there in zip(jax.tree.leaves(moved), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(leaf, there)
        assert "fsdp" not in str(leaf.sharding.spec)
    same = [a is b for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(placed), strict=True)]
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(placed)]
    assert same == ["fsdp" not in str(spec) for spec in specs]
    agree = model._replace(decode_rules=None)
    again = decode_layout(agree, abstract, mesh).convert(placed)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(placed), strict=True))
