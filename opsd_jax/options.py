"""Typed options: dataclasses whose fields declare a type, default value, bounds and description.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SamplingOptions:
        temperature: float = option(1.0, "Sampling temperature; 0 is greedy.", at_least=0)

`section` turns options into the `ConfigDict` that config files and `--config.FIELD=VALUE` change.
`parse` checks such a section and turns it back into the dataclass, which is what the rest of the
package takes. `describe` lists the fields for `--help` and docs/config.md.

An options class may define `check(field)`, which `parse` calls with the place of the section in the
config. It raises `ConfigError` (see `fail`) where two fields do not go together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from ml_collections import ConfigDict

Options = TypeVar("Options")
Entry = TypeVar("Entry")


class ConfigError(ValueError):
    """Raised for an invalid configuration. The message names the field, its value and the fix."""


def fail(field: str, value: Any, expected: str) -> NoReturn:
    """Raises a ConfigError for a config field with an invalid value.

    Args:
      field: path of the field, without "config.", such as "model.dtype".
      value: the value found.
      expected: the valid values, as a phrase that follows the word "expected".

    Raises:
      ConfigError: always.
    """
    raise ConfigError(f"config.{field} is {value!r}; expected {expected}.")


# Files whose names `resolve` must not import, with the packages that are trusted nevertheless.
_untrusted: list[tuple[Any, Collection[str]]] = []


@contextlib.contextmanager
def names_from(file: Any, trusted: Collection[str]) -> Iterator[None]:
    """Context manager in which `resolve` imports only from opsd_jax and from trusted packages.

    A run's work directory may come from somebody else, and importing a module runs its code.

    Args:
      file: the file that names the objects, for the error.
      trusted: names of packages.
    """
    _untrusted.append((file, trusted))
    try:
        yield
    finally:
        _untrusted.pop()


def package_of(dotted: str) -> str:
    """Returns the top-level package in a dotted name such as "package.module:name"."""
    return re.split("[.:]", dotted, maxsplit=1)[0]


def resolve(dotted: str) -> Any:
    """Imports and returns the object with a dotted name such as "package.module:name".

    Raises:
      ValueError: the object cannot be imported, or is not trusted (see `names_from`). The message
        says why.
    """
    module, _, name = dotted.partition(":")
    package = package_of(dotted)
    for file, trusted in _untrusted:
        if package not in ("opsd_jax", *trusted):
            raise ValueError(
                f"{dotted!r} is not imported, because only {file} names it; expected a name in "
                f"opsd_jax. To import it, and run its code, pass --trust {package}."
            )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{dotted!r} cannot be imported ({error}); expected the name of an object, in the form "
            "'package.module:name'."
        ) from error
    # A module of opsd_jax also holds what it imports, such as `subprocess`.
    if _untrusted and package == "opsd_jax" and package_of(_home(found)) != "opsd_jax":
        raise ValueError(f"{dotted!r} is not defined in opsd_jax; expected a name that is.")
    return found


def _home(found: Any) -> str:
    """Returns the name of the module that defines a module, a class, a function or an instance."""
    return getattr(found, "__name__" if inspect.ismodule(found) else "__module__", "")


def import_function(dotted: str, field: str) -> Any:
    """Imports the object that a config field refers to, such as "package.module:function".

    Args:
      dotted: the name.
      field: the config field, for the error.

    Raises:
      ConfigError: the object cannot be imported.
    """
    try:
        return resolve(dotted)
    except ValueError as error:
        raise ConfigError(f"config.{field}: {error}") from error


def look_up(table: Mapping[str, Entry], name: str, cls: type[Entry], field: str) -> Entry:
    """Returns `table[name]`, or imports the entry if `name` has the form "package.module:NAME".

    Args:
      table: name -> entry.
      name: a key of the table, or "package.module:NAME" of another entry.
      cls: the class of the entries.
      field: the config field with the name, for the error.

    Raises:
      ConfigError: there is no such entry.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        fail(field, name, f"one of {', '.join(map(repr, table))}, or 'package.module:NAME'")
    found = import_function(name, field)
    if not isinstance(found, cls):
        fail(
            field,
            name,
            f"the name of an instance of {cls.__module__}.{cls.__name__}, but it names {found!r}",
        )
    return found


class Bounds(NamedTuple):
    """The description of an options field, and the bounds on its value.

    Attributes:
      description: one line for `--help` and docs/config.md.
      at_least, above, at_most, below: numeric bounds; None for no bound.
      choices: the values that a string may have, as a tuple or the keys of a table; () for any
        string.
      expects: the valid values as a phrase, or a function that returns it, if the other attributes
        do not describe them.
      check: whether a value is one that `expects` describes; None if nothing or other code checks.
      omit: names of the fields of a nested NamedTuple that the config leaves out.
      finite: whether infinity is refused.
      prepare: `(section, its place)`, called before the section is parsed, for example to import
        what it names; None for nothing.
      added: whether a config that an earlier version saved may lack the field. Its default value
        then has to be what that version did.
    """

    description: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    expects: str | Callable[[], str] = ""
    check: Callable[[Any], bool] | None = None
    omit: tuple[str, ...] = ()
    finite: bool = True
    prepare: Callable[[Any, str], None] | None = None
    added: bool = False

    def text(self) -> str:
        """Returns the bounds as a phrase, such as "at least 1", or "" if there are none."""
        if self.expects:
            return self.expects if isinstance(self.expects, str) else self.expects()
        if len(self.choices) == 2:
            return " or ".join(map(repr, self.choices))
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is not None and high is not None:
            brackets = "(" if self.at_least is None else "[", ")" if self.at_most is None else "]"
            return f"a number in {brackets[0]}{_number(low)}, {_number(high)}{brackets[1]}"
        numeric = (
            ("at least", self.at_least),
            ("a number above", self.above),
            ("at most", self.at_most),
            ("a number below", self.below),
        )
        return "".join(f"{phrase} {_number(b)}" for phrase, b in numeric if b is not None)

    def expected(self, value: Any) -> str:
        """Returns the valid values as a phrase, such as "at least 1", or "" if `value` is valid."""
        if self.check is not None and not self.check(value):
            return self.text()
        if self.choices:
            return "" if value in self.choices else self.text()
        if not isinstance(value, int | float):
            return ""
        if math.isnan(value):
            return "a number"
        if self.finite and not abs(value) < sys.float_info.max:  # JSON has this for infinity
            return "a finite number"
        good = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return "" if good else self.text()


def _number(value: float) -> str:
    power = math.log2(value) if value > 1024 else 0.0
    return f"2^{power:.0f}" if power and power == int(power) else f"{value:g}"


_NO_BOUNDS = Bounds("")


def option(default: Any, description: str, **bounds: Any) -> Any:
    """Declares a field of an options dataclass, with its default value and description.

    Args:
      default: the default value. A nested options dataclass or NamedTuple becomes a subsection.
      description: one line that says what the field does, with its unit.
      bounds: bounds on the value, as the other attributes of `Bounds`.
    """
    metadata = {"bounds": Bounds(description, **bounds)}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(description: str, **bounds: Any) -> Any:
    """Declares a required field of an options dataclass: a field without a default value.

    See `option` for the arguments.
    """
    return dataclasses.field(metadata={"bounds": Bounds(description, **bounds)})


def with_default(cls: Any, name: str, default: Any) -> Any:
    """Redeclares a field of a base class with a different default value.

    Args:
      cls: the base class, an options dataclass.
      name: the field.
      default: the default value.
    """
    return dataclasses.field(default=default, metadata=cls.__dataclass_fields__[name].metadata)


def _is_tuple_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _is_options_class(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, Any, Bounds]]:
    """Returns the type, the default value (or MISSING) and the `Bounds` of each field, by name."""
    if _is_tuple_class(cls):
        return _tuple_fields(cls)
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = hints[field.name], default, field.metadata.get("bounds", _NO_BOUNDS)
    return found


def _tuple_fields(cls: Any) -> dict[str, tuple[Any, Any, Bounds]]:
    """Returns the type, default value and `Bounds` of each field of a NamedTuple, by name.

    The section "Attributes:" of its docstring has the descriptions. The metadata of an annotation,
    as in `Annotated[float, Range(0, 1)]`, describes the valid values as a string.

    Raises:
      TypeError: the docstring does not describe a field.
    """
    _, _, listed = inspect.cleandoc(cls.__doc__).partition("Attributes:\n")
    about = dict(re.findall(r"^  (\w+): (.+(?:\n    .+)*)", listed, re.MULTILINE))
    fields = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if name not in about:
            raise TypeError(
                f"the docstring of {cls.__name__} does not describe the field {name!r}; add it to "
                'the section "Attributes:".'
            )
        description = " ".join(about[name].split())
        kind, bounds = hint, ""
        if typing.get_origin(hint) is typing.Annotated:
            kind, bounds = typing.get_args(hint)[:2]
        fields[name] = (
            kind,
            cls._field_defaults.get(name, dataclasses.MISSING),
            Bounds(description[0].upper() + description[1:], expects=str(bounds)),
        )
    return fields


def section(options: Any, omit: tuple[str, ...] = ()) -> ConfigDict:
    """Converts options to a `ConfigDict` that accepts new values, but no new fields.

    Sections where users choose the field names accept new fields as well; see `lock`.

    Args:
      options: an instance of an options dataclass or a NamedTuple.
      omit: names of fields to leave out.

    Returns:
      The config section, with one field for each option and a subsection for nested options.
    """
    config = ConfigDict()
    for name, (_, _, bounds) in _fields(options.__class__).items():
        if name not in omit:
            config[name] = _plain(getattr(options, name), bounds.omit)
    return lock(config, options)


def lock(config: ConfigDict, options: Any) -> ConfigDict:
    """Locks a config against new fields, except in sections where users choose the field names.

    Args:
      config: the config of `options`, from `section`; changed in place.
      options: an instance of an options dataclass or a NamedTuple.

    Returns:
      The argument `config`.
    """
    config.lock()
    for name in fields_of(options.__class__):
        value = getattr(options, name)
        if name not in config or not isinstance(config[name], ConfigDict):
            continue
        if isinstance(value, Mapping) and not isinstance(value, ConfigDict):
            config[name].unlock()
        elif dataclasses.is_dataclass(value):
            lock(config[name], value)
    return config


def fields_of(cls: type) -> list[str]:
    """Returns the field names of an options dataclass or a NamedTuple."""
    return list(_fields(cls))


def _plain(value: Any, omit: tuple[str, ...] = ()) -> Any:
    if isinstance(value, ConfigDict):
        return value.copy_and_resolve_references()
    if isinstance(value, Mapping):
        return ConfigDict({name: _plain(item) for name, item in value.items()})
    if dataclasses.is_dataclass(value) or _is_tuple_class(type(value)):
        return section(value, omit)
    return value


def parse(
    cls: type[Options], config: Mapping[str, Any], field: str, *, whole: bool = True
) -> Options:
    """Checks a section of the config and converts it to typed options.

    Args:
      cls: the class of the options: an options dataclass or a NamedTuple.
      config: the section.
      field: path of the section in the config, for error messages; "" for the whole config.
      whole: whether no field may be missing, and the fields have to fit each other. False is for
        a section that does not run: a missing field then has its default value, and each field is
        checked on its own.

    Returns:
      An instance of `cls`.

    Raises:
      ConfigError: a field is missing, unknown, of the wrong type or out of bounds, or two fields
        contradict each other. The message names the field, its value and what was expected.
    """
    return _parse_section(cls, config, field, (), whole)


def _parse_section(cls: Any, config: Any, field: str, omit: tuple[str, ...], whole: bool) -> Any:
    known = {name: about for name, about in _fields(cls).items() if name not in omit}
    place = f"{field}." if field else ""
    if not isinstance(config, Mapping | ConfigDict):
        fail(field, config, f"a section with the fields {', '.join(known)}")
    for name in config:
        if name not in known:
            raise ConfigError(
                f"config.{place}{name}: there is no such field; expected one of {', '.join(known)}."
            )
    values = {}
    for name, (kind, default, bounds) in known.items():
        if name not in config:
            if default is dataclasses.MISSING:
                raise ConfigError(
                    f"config.{place}{name} is missing, and it has no default value. Set it. Its "
                    f"description: {bounds.description}"
                )
            if whole and not bounds.added:
                raise ConfigError(
                    f"config.{place}{name} is missing. Set it, for example to its default value, "
                    f"{default!r}."
                )
            values[name] = default
            continue
        if bounds.prepare is not None:
            bounds.prepare(config[name], f"{place}{name}")
        value = _typed(kind, config[name], f"{place}{name}", bounds, whole)
        if expected := bounds.expected(value):
            fail(f"{place}{name}", value, expected)
        values[name] = value
    options = cls(**values)
    check = getattr(options, "check", None) if whole else None
    if check is not None and _is_tuple_class(cls):
        try:
            check()
        except ValueError as error:
            raise ConfigError(f"config.{field}: {error}") from None
    elif check is not None:
        check(field)
    return options


def check_bounds(options: Any, place: str) -> None:
    """Raises ConfigError if a field is out of bounds. Use it for options not created by `parse`.

    Args:
      options: an instance of an options dataclass.
      place: what the options are called in the message, such as "model".
    """
    for name, (_, _, bounds) in _fields(options.__class__).items():
        value = getattr(options, name)
        if expected := bounds.expected(value):
            raise ConfigError(f"{place}.{name} is {value!r}; expected {expected}.")


def _typed(kind: Any, value: Any, field: str, bounds: Bounds, whole: bool) -> Any:
    """Converts a config value to the type of its field. Raises ConfigError for a wrong type."""
    if _is_options_class(kind) or _is_tuple_class(kind):
        return _parse_section(kind, value, field, bounds.omit, whole)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            fail(field, value, "a section (a ConfigDict or a dict)")
        return types.MappingProxyType(
            {
                name: _typed(arguments[1], item, f"{field}.{name}", _NO_BOUNDS, whole)
                for name, item in value.items()
            }
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            fail(field, value, f"a tuple of {_type_name(arguments[0], plural=True)}")
        for item in value:
            if not _is_of(arguments[0], item):
                fail(field, tuple(value), f"a tuple of {_type_name(arguments[0], plural=True)}")
        return tuple(value)
    if kind is Any or kind is ConfigDict:
        return value
    if not _is_of(kind, value):
        fail(field, value, _type_name(kind))
    return float(value) if kind is float else value


_TYPE_NAMES = {
    str: ("a string", "strings"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "booleans"),
}


def _type_name(kind: type, plural: bool = False) -> str:
    """Returns the name of a type for an error message, such as "a string" or "strings"."""
    return _TYPE_NAMES.get(kind, (f"a {kind.__name__}", kind.__name__))[plural]


def _is_of(kind: type, value: Any) -> bool:
    """Returns whether `value` has type `kind`. An int is also a valid float, but a bool is not."""
    return type(value) is kind or (kind is float and type(value) is int)


class Field(NamedTuple):
    """A config field, as it appears in `--help` and docs/config.md.

    Attributes:
      name: path of the field in the config, such as "model.dtype".
      kind: its type, as text.
      default: its default value; MISSING if the field is required.
      description: what it does.
      bounds: the bounds on its value, as a phrase; "" for no bounds.
      added: whether a saved config may lack it.
    """

    name: str
    kind: str
    default: Any
    description: str
    bounds: str
    added: bool = False


def describe(cls: type, field: str = "", default: Any = None) -> Iterator[Field]:
    """Yields a `Field` for each field of an options class and of its subsections.

    Args:
      cls: an options dataclass or a NamedTuple.
      field: path of the section in the config; "" for the whole config.
      default: an instance with the default values; None uses the default values of the class.

    Yields:
      One `Field` for each field that has no fields of its own.
    """
    yield from _describe(cls, f"{field}." if field else "", default, ())


def _describe(cls: Any, place: str, instance: Any, omit: tuple[str, ...]) -> Iterator[Field]:
    for name, (kind, default, bounds) in _fields(cls).items():
        if name in omit:
            continue
        value = default if instance is None else getattr(instance, name)
        if _is_options_class(kind) or _is_tuple_class(kind):
            nested = None if value is dataclasses.MISSING else value
            yield from _describe(kind, f"{place}{name}.", nested, bounds.omit)
        else:
            text = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
            text = str(kind).replace("collections.abc.", "") if typing.get_origin(kind) else text
            about = bounds.description, bounds.text(), bounds.added
            yield Field(f"{place}{name}", text, value, *about)
