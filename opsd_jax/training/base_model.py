"""Identifies the base model of an adapter, which is useless with any other model."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.policy import Params
from opsd_jax.storage import files
from opsd_jax.storage.files import Path, RecordError
from opsd_jax.storage.foreign import listed
from opsd_jax.training.checksum import checksums, paths

NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Base(NamedTuple):
    """The base model of an adapter: its parameters, and what identifies it."""

    params: Params
    model: BaseModel


class BaseModel(NamedTuple):
    """What identifies a base model. It is saved with adapters of the model.

    Attributes:
      name: where its parameters come from, for messages.
      checksums: path -> checksum of each parameter, as float32.
      path: its directory or its name on the Hub; "" if it has none.
      adapter: what the adapter's values mean (`LoRA.about`).
    """

    name: str
    checksums: dict[str, str]
    path: str = ""
    adapter: Mapping[str, Any] = NOTHING

    def check(self, saved: Mapping[str, Any], place: Any) -> None:
        """Checks that an adapter was trained for this model.

        Args:
          saved: the fields of the `BaseModel` that was saved with the adapter.
          place: the file or directory of the adapter, for the error.

        Raises:
          RecordError: the model has other parameters. The message names some of them.
        """
        there = saved["checksums"]
        different = [path for path, value in self.checksums.items() if there.get(path) != value]
        different += sorted(there.keys() - self.checksums.keys())
        if different:
            raise RecordError(
                f"{place} has an adapter of another base model: {saved['name']} had other values "
                f"of {listed(different, count=3)} than {self.name} has now. Expected the base "
                "model with which the adapter was trained."
            )


def read(file: Path) -> BaseModel:
    """Reads the `BaseModel` that was saved in a file."""
    return BaseModel(**files.read_json(file))


def identify(
    params: Params,
    name: str,
    path: str = "",
    adapter: Mapping[str, Any] = NOTHING,
) -> BaseModel:
    """Returns what identifies a model. All processes of a run must call it together.

    The values count, not the dtype that holds them: bfloat16 and float32 arrays of equal values
    have the same checksums.

    Args:
      params: its parameters.
      name, path, adapter: as in `BaseModel`.
    """
    found: dict[str, str] = {}
    # One array at a time, so that only one is held in float32 as well.
    for name_of, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        found |= checksums({name_of: leaf.astype(jnp.float32)})
    return BaseModel(name, found, path, dict(adapter))
