"""Directories in which compiled programs outlive a process."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import platform

import jax
from etils import epath

from opsd_jax.options import fail
from opsd_jax.parallel import aot, hosts
from opsd_jax.storage.executables import Executables
from opsd_jax.storage.files import Path, in_bucket

logger = logging.getLogger(__name__)

AUTO = "auto"
NAME = "compiled"


def use_cache(option: str, workdir: Path | None) -> None:
    """Lets JAX save the programs that it compiles in a directory, and read them there.

    Call it before anything is compiled. What cannot be read or written is compiled as usual, with a
    warning.

    Args:
      option: `config.compilation_cache`. With "auto", a directory that JAX has been given, as by
        the environment variable JAX_COMPILATION_CACHE_DIR, is kept.
      workdir: the work directory of the run; None for a command that shares no directory.
    """
    given = jax.config.values["jax_compilation_cache_dir"]
    if option == AUTO and given:
        return
    if option == AUTO:
        shared = workdir is not None and (hosts.count() > 1 or in_bucket(workdir))
        option = str(workdir.parent / NAME if workdir and shared else _of_this_machine())
        logger.info("opsd-jax: keeping compiled programs in %s (config.compilation_cache)", option)
    jax.config.update("jax_compilation_cache_dir", option or None)


def saved_programs(directory: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context manager in which a run reads compiled programs.

    Args:
      directory: `config.executables`.

    Raises:
      ConfigError: there is no such directory.
    """
    if not directory:
        return contextlib.nullcontext()
    path = epath.Path(directory)
    if not path.is_dir():
        expected = "a directory that `opsd-jax plan --executables` wrote"
        fail("executables", directory, expected)
    return aot.loading(Executables(path, jax.devices()).load)


def _of_this_machine() -> pathlib.Path:
    """Returns a directory in the user's cache, for machines with this processor."""
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    info = pathlib.Path("/proc/cpuinfo")  # a home directory may be shared with other processors
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    processor = f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    return pathlib.Path(caches) / "opsd_jax" / NAME / processor
