"""How a config is read from a file, changed by arguments, and kept as JSON."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from opsd_jax.config import ConfigError

if TYPE_CHECKING:
    from opsd_jax.storage.files import Path


def load(
    path: str | pathlib.Path, overrides: dict[str, str] | None = None, *, data: bool = True
) -> ConfigDict:
    """The config of a file's `get_config()`, with overrides, checked.

    Args:
      path: a Python file.
      overrides: dotted field -> text, as on the command line.
      data: whether its sources have to be there.

    Raises:
      ConfigError: names the file or field, and what was expected.
    """
    from opsd_jax.config.checks import validate  # which knows this module

    path = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location("opsd_jax_user_config", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"--config: there is no Python file {path}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a field that is not there: ConfigDict suggests the nearest
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {config!r}; expected a ConfigDict.")
    config.lock()
    for field, text in (overrides or {}).items():
        override(config, field, text)
    if not config.data.tokenizer:
        config.data.tokenizer = config.model.get("path", "")
    validate(config, data=data)
    return config


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets the dotted `field` from `text`, in the type that it has.

    Raises:
      ConfigError: there is no such field (suggests the nearest), or the text is of another type.
    """
    section, name = config, field
    while "." in name:
        head, name = name.split(".", 1)
        if head not in section or not isinstance(section[head], ConfigDict):
            raise _unknown(config, field)
        section = section[head]
    if name not in section:
        raise _unknown(config, field)
    old = section[name]
    if isinstance(old, ConfigDict):
        fields = f"set one of {', '.join(old)} in it" if old else "its fields are the config file's"
        raise ConfigError(f"--config.{field} is a section; {fields}.")
    try:
        section[name] = _parse(text, type(old))
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"--config.{field}={text}: expected {type(old).__name__}, such as {old!r}."
        ) from None


def _parse(text: str, kind: type) -> Any:
    """`text` as a value of the type, strictly: 3 is a float too, 3.0 is no int."""
    if kind is str:
        return text
    if kind is float:
        return float(text)  # "inf" too
    value = ast.literal_eval(text.capitalize() if kind is bool else text)
    if type(value) is not kind:
        raise ValueError(text)
    return value


def _unknown(config: ConfigDict, field: str) -> ConfigError:
    known = list(flatten(config))
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    last = [k for k in known if k.rsplit(".", 1)[-1] == field.rsplit(".", 1)[-1]]
    hint = f" Did you mean --config.{(near or last)[0]}?" if near or last else ""
    return ConfigError(f"--config.{field}: there is no such field.{hint}")


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value, of all sections; an empty one is {}, infinity the largest float: JSON,
    in which a workdir keeps a config, has none.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.") if value else {prefix + name: {}}
        else:
            if isinstance(value, float) and math.isinf(value):
                value = math.copysign(sys.float_info.max, value)
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON, a line a field."""
    return json.dumps(flatten(config), indent=1, sort_keys=True, allow_nan=False) + "\n"


def from_flat(flat: dict[str, Any]) -> ConfigDict:
    """The config that `flatten` flattened."""
    config = ConfigDict()
    for field, value in flat.items():
        *sections, name = field.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[name] = tuple(value) if isinstance(value, list) else value
    return config.lock()


def identity(config: ConfigDict) -> dict[str, Any]:
    """The fields of `flatten` that a run may not change when it goes on: what it computes, and not
    where, or what it keeps.
    """
    free = ("mesh", "decode_mesh", "pool.", "checkpoints.", "wandb_project")
    return {field: value for field, value in flatten(config).items() if not field.startswith(free)}


def check_same(config: ConfigDict, saved: ConfigDict, workdir: Path) -> None:
    """Raises ConfigError that lists the fields in which the `saved` config of a workdir differs, of
    those that may not (`identity`).
    """
    there, now = identity(saved), identity(config)
    different = [
        f"  {field}: {there.get(field, 'absent')!r} there, {now.get(field, 'absent')!r} now"
        for field in sorted(there.keys() | now.keys())
        if there.get(field, workdir) != now.get(field, workdir)
    ]
    if different:
        raise ConfigError(
            f"{workdir} holds a run of another config:\n" + "\n".join(different) + "\n"
            "Give the same config to go on with it, or another --workdir."
        )
