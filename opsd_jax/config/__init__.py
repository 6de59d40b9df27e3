"""Functions for config files: `default()` and a function for each kind of section.

A config file has a function `get_config()` that starts from `default()` and changes what it needs.
The config is locked, so a field that does not exist is an error. On the command line,
`--config.opsd.gate=all` changes one more field. docs/config.md lists every field.
"""

from typing import Any

from opsd_jax.config.sections import (
    decoder,
    default,
    distillation,
    lora,
    objective,
    optimizer,
    preset,
    pretrained,
    rope_scaling,
    source,
    verifier,
)
from opsd_jax.options import ConfigError

__all__ = [
    "ConfigError",
    "decoder",
    "default",
    "distillation",
    "lora",
    "objective",
    "optimizer",
    "preset",
    "pretrained",
    "rope_scaling",
    "source",
    "verifier",
]

_MOVED = {  # names of version 0.1.0
    "LARGE": "pretrained(...) and preset(...) have its values as defaults",
    "REQUEST": "it is a part of the default value of config.data.prompt",
    "import_function": "it is opsd_jax.options.import_function",
}


def __getattr__(name: str) -> Any:
    hint = f": {_MOVED[name]}" if name in _MOVED else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}.")
