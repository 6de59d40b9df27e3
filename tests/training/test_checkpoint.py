"""Restoring checkpoints on other devices and with other sharding rules."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.training.checkpoint import Checkpoints
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.state import abstract_state, init_state


@pytest.fixture(scope="module")
def optimizer(config):
    return make_optimizer(config.rlvr.optimizer, 10)


@pytest.fixture(scope="module")
def saved(model, optimizer, tmp_path_factory):
    """A state sharded over a (2, 2, 2) mesh: as NumPy arrays, and the directory of a checkpoint."""
    mesh = mesh_lib.make_mesh((2, 2, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = mesh_lib.tree_shardings(mesh, model.rules, shapes)
    abstract = abstract_state(mesh_lib.abstract_of(shapes, shardings), optimizer, None, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def random_state(key):
        state = init_state(model.init(key), optimizer)
        keys = iter(jax.random.split(key, len(jax.tree.leaves(state))))
        noise = lambda x: jax.random.normal(next(keys), x.shape).astype(x.dtype)
        return jax.tree.map(noise, state)

    state = jax.jit(random_state, out_shardings=where)(jax.random.key(3))
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(7, state)
    return jax.device_get(state), directory


@pytest.mark.parametrize("rules", ["own", "replicated", "last axis"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 8, 1), (2, 2, 2)])
def test_a_state_is_restored_on_other_devices_with_other_rules(
    model, optimizer, saved, shape, rules
):
    expected, directory = saved
    mesh = mesh_lib.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if rules == "own":
        shardings = mesh_lib.tree_shardings(mesh, model.rules, shapes)
    else:
        # Every last dimension of the small model is a multiple of 8, the number of devices.
        last = lambda leaf: P(*(None,) * (leaf.ndim - 1), mesh_lib.AXES)
        spec = last if rules == "last axis" else lambda leaf: P()
        shardings = jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, spec(leaf)), shapes)
    abstract = abstract_state(mesh_lib.abstract_of(shapes, shardings), optimizer, None, mesh)
    with Checkpoints(directory) as checkpoints:
        step, state = checkpoints.restore(abstract)
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(state))
    same = lambda leaf, wanted: leaf.sharding == wanted.sharding
    assert all(jax.tree.leaves(jax.tree.map(same, state, abstract)))
