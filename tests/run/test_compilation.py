"""Where compiled programs are cached."""

import os

import jax
import pytest
from etils import epath

from opsd_jax.parallel import hosts
from opsd_jax.run import compilation

LOCAL, BUCKET = epath.Path("/runs/a"), epath.Path("gs://bucket/runs/a")


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    """JAX without a directory, and a user's cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def used(option, workdir=LOCAL):
    compilation.use_cache(option, workdir)
    return jax.config.jax_compilation_cache_dir


def test_auto_is_the_users_cache_on_one_machine(tmp_path):
    assert used("auto").startswith(f"{tmp_path}/opsd_jax/compiled/")


def test_auto_is_beside_the_work_directory_on_several_machines(monkeypatch):
    assert used("auto", BUCKET) == "gs://bucket/runs/compiled"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(hosts, "count", lambda: 4)
    assert used("auto") == "/runs/compiled"


def test_auto_keeps_the_directory_that_jax_has():
    jax.config.update("jax_compilation_cache_dir", "/mine")
    assert used("auto") == "/mine"


def test_a_directory_or_none_replaces_it():
    jax.config.update("jax_compilation_cache_dir", "/mine")
    assert used("/other") == "/other"
    assert used("") is None


def test_an_evaluation_uses_no_directory_of_the_run(monkeypatch):
    """The work directory may come from somebody else."""
    monkeypatch.setattr(hosts, "count", lambda: 4)
    assert used("auto", None).startswith(f"{os.environ['XDG_CACHE_HOME']}/opsd_jax/compiled/")
