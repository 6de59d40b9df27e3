"""Compiled programs that a plan writes and a run reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax.options import ConfigError
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.run import compilation
from opsd_jax.storage.executables import Executables

KEY = ProgramKey(ProgramKind.DECODE, 64)


@pytest.fixture(scope="module")
def sharding():
    return NamedSharding(mesh_lib.make_mesh((8, 1, 1)), P("data"))


@pytest.fixture
def lowered(sharding):
    """A function `factor -> Lowered` of a program on 8 devices that donates its first argument."""

    def lowered(factor=2.0):
        step = lambda state, x: ({"x": factor * state["x"] + jnp.sum(x)}, x)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=({"x": sharding}, sharding))
        array = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)
        return jitted.lower({"x": array}, array)

    return lowered


@pytest.fixture
def saved(tmp_path, lowered):
    executables = Executables(epath.Path(tmp_path / "compiled"), jax.devices())
    executables.save(KEY, lowered(), lowered().compile())
    return executables


def test_a_saved_program_is_loaded(saved, lowered, sharding, monkeypatch, caplog):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    x = jax.device_put(np.arange(16, dtype=np.float32), sharding)
    state = {"x": jax.device_put(np.ones(16, np.float32), sharding)}
    with aot.loading(saved.load), caplog.at_level("INFO", "opsd_jax"):
        program = aot.compiled(KEY, lowered())
    out, _ = program(state, x)
    np.testing.assert_array_equal(out["x"], 2 + np.full(16, x.sum()))
    assert out["x"].sharding.is_equivalent_to(sharding, 1)
    assert state["x"].is_deleted()
    assert caplog.messages[0].startswith("decode in 64: loaded from ")


def test_another_program_is_compiled(saved, lowered, caplog):
    """The name is the same, but the program is not."""
    with aot.loading(saved.load), caplog.at_level("INFO", "opsd_jax"):
        assert aot.compiled(KEY, lowered(3.0)) is not None
    assert "decode in 64: compiling it, because" in caplog.text
    assert "does not have it" in caplog.text


def test_a_program_of_another_compiler_is_not_loaded(saved, lowered, monkeypatch, caplog):
    monkeypatch.setattr(jax, "__version__", "0.1.2")
    other = Executables(saved._directory, jax.devices()[:4])
    with caplog.at_level("INFO", "opsd_jax"):
        assert other.load(KEY, lowered()) is None
    assert "does not have it for jax 0.1.2, jaxlib" in caplog.text
    assert "devices 4" in caplog.text


def test_the_order_of_the_devices_is_kept(tmp_path):
    """A mesh orders the devices by their connections, not by their numbers."""
    devices = [jax.devices()[i] for i in (3, 1, 7, 5, 0, 2, 6, 4)]
    sharding = NamedSharding(jax.sharding.Mesh(np.array(devices), ("data",)), P("data"))
    array = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=sharding)
    lowered = jax.jit(jnp.cumsum, out_shardings=sharding).lower(array)
    saved = Executables(epath.Path(tmp_path), jax.devices())
    saved.save(KEY, lowered, lowered.compile())
    program = saved.load(KEY, lowered)
    out = program(jax.device_put(np.arange(8, dtype=np.int32), sharding))
    np.testing.assert_array_equal(out, np.cumsum(np.arange(8)))
    assert [shard.device for shard in out.addressable_shards] == [
        shard.device for shard in jax.device_put(np.arange(8), sharding).addressable_shards
    ]


def test_a_damaged_program_is_compiled(saved, lowered, caplog):
    (file,) = saved._directory.iterdir()
    file.write_bytes(file.read_bytes()[:-200])
    assert saved.load(KEY, lowered()) is None
    assert f"compiling it, because of {file}" in caplog.text


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config.executables is .*nowhere.*--executables"):
        compilation.saved_programs(str(tmp_path / "nowhere"))
    with compilation.saved_programs(""):
        pass
