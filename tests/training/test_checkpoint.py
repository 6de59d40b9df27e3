"""Restoring checkpoints: on other devices, with other sharding rules, and damaged ones."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.storage.files import RecordError
from opsd_jax.training.checkpoint import Checkpoints, restore_params, save_params
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.state import abstract_state, init_state


@pytest.fixture(scope="module")
def optimizer(shared_config):
    return make_optimizer(shared_config.rlvr.optimizer, 10)


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


def test_a_restoration_is_silent(saved, caplog):
    expected, directory = saved
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, expected))
    with Checkpoints(directory) as checkpoints:
        step, _ = checkpoints.restore(abstract)
    assert (step, caplog.messages) == (7, [])


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


def damage(file, kind, rng):
    """Changes a file: flips a bit, or zeroes 20 bytes or a page, somewhere in it."""
    content = bytearray(file.read_bytes())
    at = int(rng.integers(len(content)))
    if kind == "bit":
        content[at] ^= 1 << int(rng.integers(8))
    else:
        width = {"bytes": 20, "page": 4096}[kind]
        content[at : at + width] = bytes(len(content[at : at + width]))
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["bit", "bytes", "page"])
def test_a_damaged_checkpoint_is_never_restored_as_other_values(tmp_path, kind):
    """What is restored was saved. A checkpoint with other values is moved aside by name."""
    rng = np.random.default_rng(0)
    states = {
        step: {
            "step": jnp.int32(step),
            "params": {"w": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)},
            "teacher": {"w": jnp.asarray(rng.normal(size=(64, 48)), jnp.bfloat16)},
        }
        for step in (1, 2)
    }
    with Checkpoints(tmp_path / "saved") as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    abstract = mesh_lib.abstract_of(states[1], jax.tree.map(lambda leaf: leaf.sharding, states[1]))
    fell_back = 0
    for i in range(12):
        copy = shutil.copytree(tmp_path / "saved", tmp_path / f"{kind}{i}" / "checkpoints")
        found = sorted((copy / "2").rglob("d/*"), key=lambda file: file.stat().st_size)
        damage(found[-1], kind, rng)
        with Checkpoints(copy) as checkpoints:
            step, state = checkpoints.restore(abstract)
        jax.tree.map(np.testing.assert_array_equal, states[step], state)
        fell_back += step == 1
        if step == 1:
            (reason,) = (copy.parent / "damaged").glob("*.txt")
            assert f"{copy / '2'} cannot be restored" in reason.read_text()
    assert fell_back >= 6  # the others hit bytes that hold no values, or equal ones


def test_damaged_parameters_are_an_error_that_names_them(tmp_path):
    params = {"a": jnp.arange(4096, dtype=jnp.float32), "b": jnp.ones(3)}
    abstract = mesh_lib.abstract_of(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    save_params(tmp_path / "params", params)
    restored = restore_params(tmp_path / "params", abstract)
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    save_params(tmp_path / "other", params | {"a": params["a"].at[7].set(-7)})
    shutil.rmtree(tmp_path / "params")
    shutil.copytree(tmp_path / "other", tmp_path / "params")
    message = r"params cannot be restored \(the values of a differ from the saved values\)"
    with pytest.raises(RecordError, match=message):
        restore_params(tmp_path / "params", abstract)
    (tmp_path / "params.checksums.json").unlink()  # as in a run of version 0.1.0
    restore_params(tmp_path / "params", abstract)
