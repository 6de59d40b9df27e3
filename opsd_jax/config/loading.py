"""Reads a config from a file, applies overrides, and saves it as JSON."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

import opsd_jax
from opsd_jax.config.run_options import RunOptions, parse_run, run_section
from opsd_jax.data.options import SECTIONS
from opsd_jax.models.options import DecoderOptions, PretrainedOptions
from opsd_jax.options import ConfigError, describe, fields_of
from opsd_jax.stages import ALGORITHMS, algorithm_of
from opsd_jax.storage import hub

# Fields that a resumed run may change. They decide where the run computes and which files it keeps,
# but not its results.
FREE = (
    "mesh", "decode_mesh", "pool.", "checkpoints.", "max_without_signal", "model.max_positions",
    "compilation_cache", "executables", "wandb_project",
)  # fmt: skip

# Fields that an earlier version lacks, with default values that mean what that version did.
ADDED = {
    field.name: [*field.default] if isinstance(field.default, tuple) else field.default
    for field in (
        *describe(RunOptions),
        *describe(PretrainedOptions, "model"),
        *describe(DecoderOptions, "model"),
    )
    if field.added
}
# The same for fields of a stage.
ADDED_TO_STAGES = {
    field.name: field.default
    for algorithm in ALGORITHMS.values()
    for field in describe(algorithm.options)
    if field.added
}


def packaged() -> dict[str, pathlib.Path]:
    """Returns the paths of the config files that come with the package, by name."""
    package = pathlib.Path(opsd_jax.__file__).parent
    for directory in (package / "configs", package.parent / "configs"):
        if found := {path.stem: path for path in sorted(directory.glob("*.py"))}:
            return found
    return {}


def load(
    name: str | pathlib.Path,
    overrides: Mapping[str, str] | None = None,
    earlier: Callable[[], Mapping[str, Any]] = dict,
    *,
    data: bool = True,
    platform: str = "",
) -> RunOptions:
    """Loads a config file, applies overrides, and returns the checked options.

    What the config names on the Hugging Face Hub is downloaded, and its commit added to the name.

    Args:
      name: a Python file, or the name of a packaged config such as "quickstart".
      overrides: dotted field -> text, as on the command line.
      earlier: returns the flat config of the run that is resumed. A name on the hub without a
        revision stands for the commit that the run began with.
      data: whether the model and the data are used: whether to download them, and to check the
        sources of `config.data` too.
      platform: where the run computes; see `parse_run`.

    Raises:
      ConfigError: the file cannot be loaded, or a field is unknown or has an invalid value.
    """
    config = read(name)
    for field, text in (overrides or {}).items():
        override(config, field, text)
    if data:
        _pin(config, earlier)
    if not config.data.tokenizer:
        config.data.tokenizer = config.model.get("path", "")
    options = parse_run(config, platform)
    if data:
        options.data.check_sources("data")
    return options


def _pin(config: ConfigDict, earlier: Callable[[], Mapping[str, Any]]) -> None:
    """Downloads what a config names on the Hugging Face Hub, and adds the commit to each name.

    See `load` for the arguments.

    Raises:
      ConfigError: something cannot be downloaded.
    """

    def pin(section: Any, name: str, kind: str, field: str) -> None:
        if not isinstance(section, ConfigDict) or not isinstance(path := section.get(name), str):
            return
        if hub.is_name(path, kind):
            recorded = earlier().get(f"{field}.{name}")
            if isinstance(recorded, str) and recorded.partition("@")[0] == path:
                path = recorded
        section[name] = hub.pinned(path, kind, f"config.{field}.{name}")

    pin(config.model, "path", hub.MODEL, "model")
    pin(config.data, "tokenizer", hub.TOKENIZER, "data")
    for sources in SECTIONS:
        for name, source in config.data.get(sources, {}).items():
            pin(source, "path", hub.DATASET, f"data.{sources}.{name}")


def path_of(name: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a config file: `name`, or the packaged config of that name."""
    path = pathlib.Path(name)
    return path if path.is_file() else packaged().get(str(name), path)


def read(name: str | pathlib.Path) -> ConfigDict:
    """Calls `get_config()` of a Python file, and returns the config, locked but not yet checked.

    Args:
      name: a Python file, or the name of a packaged config such as "quickstart".

    Raises:
      ConfigError: there is no such file, or it does not return a config.
    """
    path = path_of(name)
    spec = importlib.util.spec_from_file_location("opsd_jax_user_config", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"--config {name}: there is no such Python file; expected a file that defines "
            f"get_config(), or one of the packaged configs: {', '.join(packaged())}."
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # for an unknown field, ConfigDict suggests the nearest one
        raise ConfigError(
            f"the config file {path} failed with {type(error).__name__}: {error}{_hint(error)}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {config!r}; expected a ConfigDict.")
    return config.lock()


def _hint(error: Exception) -> str:
    """Returns a hint if `error` comes from a config file of version 0.1.0, and "" otherwise.

    There, `default()` had the sizes of the quickstart's model.
    """
    key = re.search(r'Key "(\w+)" does not exist', str(error))
    if key is None or key[1] not in {*fields_of(DecoderOptions)} - {*fields_of(PretrainedOptions)}:
        return ""
    return (
        " The default model is the one in the directory config.model.path. For a model with random "
        "parameters, first set config.model = config_lib.decoder(...) with its sizes."
    )


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets one field of a config in place. Parses `text` as the type of the field.

    Args:
      config: the config.
      field: the dotted name of the field.
      text: the new value, as on the command line.

    Raises:
      ConfigError: there is no such field (the message suggests the nearest), or the text has
        another type.
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
        expected = (
            f"one of its fields, {', '.join(f'--config.{field}.{inner}' for inner in old)}"
            if old
            else "no override, because only the config file can add fields to it"
        )
        raise ConfigError(f"--config.{field} is a section; expected {expected}.")
    try:
        section[name] = _parse(text, type(old))
    except (ValueError, SyntaxError):
        example = "(1, 2) or ('a', 'b')" if old == () else repr(old)
        raise ConfigError(
            f"--config.{field} is {text!r}; expected {type(old).__name__}, such as {example}."
        ) from None


def _parse(text: str, kind: type) -> Any:
    """Parses text as a value of type `kind`. Accepts "3" as a float, but not "3.0" as an int."""
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
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == field.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(field, same_name, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    nearest = f"Did you mean --config.{near[0]}?" if near else ""
    hint = nearest or "Expected one of the fields that `opsd-jax train --help` lists."
    return ConfigError(f"--config.{field}: there is no such field. {hint}")


def flatten(config: ConfigDict | RunOptions, prefix: str = "") -> dict[str, Any]:
    """Flattens a config to a dict. Its keys are dotted field names, such as "model.path".

    The values are JSON-ready: an empty section becomes {}, a tuple becomes a list, and infinity
    becomes the largest float.
    """
    if isinstance(config, RunOptions):
        config = run_section(config)
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.") if value else {prefix + name: {}}
        else:
            if isinstance(value, float) and math.isinf(value):
                value = math.copysign(sys.float_info.max, value)
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_json(config: ConfigDict | RunOptions) -> str:
    """Returns the config as JSON text with one field per line."""
    return json.dumps(flatten(config), indent=1, sort_keys=True, allow_nan=False) + "\n"


def from_flat(flat: Mapping[str, Any]) -> ConfigDict:
    """Builds a config from a dict with dotted field names. This is the inverse of `flatten`."""
    config = ConfigDict()
    for field, value in flat.items():
        *sections, name = field.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        empty = ConfigDict() if value == {} else value
        section[name] = tuple(value) if isinstance(value, list) else empty
    return config.lock()


def missing_fields(config: ConfigDict) -> list[str]:
    """Returns the names of the fields that a saved config lacks, except fields of `model`."""
    stages = [name for name in config.stages if "algorithm" in config.get(name, {})]
    known = [field for field in describe(RunOptions) if field.name != "sections"]
    for name in stages:
        algorithm = algorithm_of(config[name].algorithm, f"{name}.algorithm")
        known += describe(algorithm.options, name)
    flat = flatten(config)
    there = {*flat, *(name[:i] for name in flat for i, char in enumerate(name) if char == ".")}
    return [field.name for field in known if field.name not in there and not field.added]


def as_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a flat config without added fields that have their default values."""
    stages = [name.removesuffix(".algorithm") for name in config if name.endswith(".algorithm")]
    added = ADDED | {
        f"{stage}.{field}": value for stage in stages for field, value in ADDED_TO_STAGES.items()
    }
    return {
        field: value
        for field, value in config.items()
        if field not in added or value != added[field]
    }


def identity(config: ConfigDict | RunOptions) -> dict[str, Any]:
    """Returns a flat dict of the config fields that must not change when a run is resumed.

    Added fields with their default values are left out.
    """
    flat = as_before(flatten(config))
    stages = {field.removesuffix(".algorithm") for field in flat if field.endswith(".algorithm")}
    free = (*FREE, *(f"{name}." for name in stages - set(flat["stages"])))
    return {field: value for field, value in flat.items() if not field.startswith(free)}


def check_same(
    config: ConfigDict | RunOptions, saved: ConfigDict | RunOptions, workdir: Any
) -> None:
    """Raises ConfigError if a run with the config `saved` cannot be resumed with `config`.

    The configs must agree in all fields of `identity`. The message lists the fields that differ.
    """
    there, now = identity(saved), identity(config)
    different = [
        f"  {field}: {there.get(field, 'absent')!r} there, {now.get(field, 'absent')!r} now"
        for field in sorted(there.keys() | now.keys())
        if there.get(field, workdir) != now.get(field, workdir)
    ]
    if different:
        raise ConfigError(
            f"{workdir} holds a run with a different config:\n" + "\n".join(different) + "\n"
            "To resume that run, use the same config. To start a new run, pass another --workdir. "
            f"To go on from one of its checkpoints, also pass --fork {workdir}/STAGE."
        )
