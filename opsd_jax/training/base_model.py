"""Identifies the base model of an adapter, which is useless with any other model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.policy import Params
from opsd_jax.storage.files import RecordError
from opsd_jax.storage.foreign import listed
from opsd_jax.training.checksum import checksums, paths


class Base(NamedTuple):
    """The base model of an adapter: its parameters, and what identifies it."""

    params: Params
    model: BaseModel


class BaseModel(NamedTuple):
    """What identifies a base model. It is saved with adapters of the model.

    Attributes:
      name: where its parameters come from, for messages.
      checksums: path -> checksum of each parameter, as float32.
    """

    name: str
    checksums: dict[str, str]

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


def identify(params: Params, name: str) -> BaseModel:
    """Returns what identifies a model. All processes of a run must call it together.

    The values count, not the dtype that holds them: bfloat16 and float32 arrays of equal values
    have the same checksums.

    Args:
      params: its parameters.
      name: where they come from, for messages.
    """
    found = {}
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        (found[path],) = checksums({path: leaf.astype(jnp.float32)}).values()
    return BaseModel(name, found)
