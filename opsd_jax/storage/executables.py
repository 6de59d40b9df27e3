"""Compiled programs in a directory, which `opsd-jax plan` writes and a run reads.

A file has one line of JSON, which says what the program was compiled with, and then the program.
Its name contains a hash of the compiler, the devices and the program before compilation, so a run
reads exactly the programs that it would compile. Reading a file executes code, so read only your
own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

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
            "libtpu": _version("libtpu"),
            "device": devices[0].device_kind,
            "devices": len(devices),
            "places": " ".join(filter(None, map(_place, devices))),
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
            header = to_json(self._compiler | {"order": _order(compiled)}).encode()
            self._file(key, lowered).write_bytes(header + b"\n" + payload)

    def load(self, key: ProgramKey, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        """Returns a program that `save` wrote, and logs whether there is one.

        Returns None if the directory does not have the program, compiled with the same versions for
        the same devices, or if it cannot be read.
        """
        file = self._file(key, lowered)
        try:
            header, _, payload = file.read_bytes().partition(b"\n")
            by_id = {device.id: device for device in self._devices}
            loaded = serialize_executable.deserialize_and_load(
                payload,
                lowered.in_tree,
                lowered.out_tree,
                execution_devices=[by_id[number] for number in json.loads(header)["order"]],
            )
        except FileNotFoundError:
            mine = ", ".join(f"{name} {value}" for name, value in self._compiler.items() if value)
            logger.info(
                "%s: compiling it, because %s does not have it for %s", key, self._directory, mine
            )
            return None
        except Exception as error:  # every backend has errors of its own
            logger.warning("%s: compiling it, because of %s: %s", key, file, reason(error))
            return None
        logger.info("%s: loaded from %s", key, file)
        return loaded

    def _file(self, key: ProgramKey, lowered: jax.stages.Lowered) -> Path:
        """Returns the file of a program, whose name has a hash of the program."""
        text = to_json(self._compiler) + lowered.as_text()
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._directory / f"{str(key).replace(' ', '_')}-{digest}.xla"


def _order(compiled: jax.stages.Compiled) -> list[int]:
    """Returns the ids of a program's devices, in the order of its mesh."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding))
    return [device.id for device in next(meshes).devices.flat]


def _place(device: jax.Device) -> str:
    """Returns the coordinates of a TPU in its topology, and its slice; "" for another device."""
    coords = getattr(device, "coords", None)
    return "" if coords is None else f"{getattr(device, 'slice_index', 0)}:{tuple(coords)}"


def _version(package: str) -> str:
    """Returns the version of an installed package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
