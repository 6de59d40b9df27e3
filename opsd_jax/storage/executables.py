"""Compiled programs in a directory, which `opsd-jax plan` writes and a run reads.

A file has one line of JSON, which says what the program was compiled with, and then the program.
Its name contains a hash of the program before compilation, so a run reads exactly the programs that
it would compile. Reading a file executes code, so read only your own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from opsd_jax.parallel.program import ProgramKey
from opsd_jax.storage.files import Path, reason, to_json, writing

logger = logging.getLogger(__name__)


class Executables:
    """Compiled programs in a directory, for the devices that a run uses."""

    def __init__(self, directory: Path, devices: Sequence[jax.Device]):
        """Reads and writes nothing yet.

        Args:
          directory: the directory.
          devices: all devices of the run.
        """
        self._directory, self._devices = directory, devices
        self._compiler = {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "device": devices[0].device_kind,
            "devices": len(devices),
        }

    def save(
        self, key: ProgramKey, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled
    ) -> None:
        """Writes a compiled program. Creates the directory if it is missing.

        Args:
          key: which program it is.
          lowered: the program before compilation.
          compiled: the program.

        Raises:
          RecordError: the file cannot be written.
        """
        payload, *_ = serialize_executable.serialize(compiled)
        with writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            header = to_json(self._compiler).encode()
            self._file(key, lowered).write_bytes(header + b"\n" + payload)

    def load(self, key: ProgramKey, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        """Returns a program that `save` wrote, and logs whether there is one.

        Returns None if the directory does not have the program, if it was compiled with other
        versions of JAX or for other devices, or if it cannot be read.
        """
        file = self._file(key, lowered)
        try:
            header, _, payload = file.read_bytes().partition(b"\n")
            self._check(json.loads(header))
            loaded = serialize_executable.deserialize_and_load(
                payload, lowered.in_tree, lowered.out_tree, execution_devices=self._devices
            )
        except FileNotFoundError:
            logger.info("%s: compiling it, because %s does not have it", key, self._directory)
            return None
        except Exception as error:  # every backend has errors of its own
            logger.warning("%s: compiling it, because of %s: %s", key, file, reason(error))
            return None
        logger.info("%s: loaded from %s", key, file)
        return loaded

    def _file(self, key: ProgramKey, lowered: jax.stages.Lowered) -> Path:
        """Returns the file of a program, whose name has a hash of the program."""
        digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
        return self._directory / f"{str(key).replace(' ', '_')}-{digest}.xla"

    def _check(self, compiler: dict[str, Any]) -> None:
        """Raises ValueError if a program was compiled with other versions or for other devices."""
        mine = self._compiler
        different = [name for name in mine if compiler.get(name) != mine[name]]
        if different:
            changes = (f"{name} {compiler.get(name)}, not {mine[name]}" for name in different)
            raise ValueError(f"it was compiled for {' and '.join(changes)}")
