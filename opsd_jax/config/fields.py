"""The list of every config field: for `opsd-jax train --help` and for docs/config.md.

python -m opsd_jax.config.fields > docs/config.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from opsd_jax.config.run_options import RunOptions
from opsd_jax.data.options import SourceOptions
from opsd_jax.models.options import DecoderOptions, PretrainedOptions
from opsd_jax.options import Field, describe
from opsd_jax.stages import ALGORITHMS

INTRODUCTION = """\
# Config fields

Made by `python -m opsd_jax.config.fields > docs/config.md`; a test keeps it current.

A config file has a function `get_config()` that starts from `opsd_jax.config.default()` and changes
what it needs. On the command line `--config.FIELD=VALUE` changes one more field. A field with
"required" in place of a default has to be given.
"""


def all_fields() -> Iterator[tuple[str, list[Field]]]:
    """Yields the title and the fields of each part of a config."""
    top: list[Field] = []
    parts: dict[str, list[Field]] = {}
    for field in describe(RunOptions):
        section = field.name.partition(".")[0]
        if section not in ("model", "sections"):
            (parts.setdefault(section, []) if "." in field.name else top).append(field)
    yield "The run", top
    yield "Model: a Hugging Face directory (`pretrained`)", [*describe(PretrainedOptions, "model")]
    yield "Model: the reference decoder (`decoder`, `preset`)", [*describe(DecoderOptions, "model")]
    yield "Data", parts.pop("data")
    sources = "Data: a source of `config.data.train`, `heldout` or `exclude` (`source`)"
    yield sources, [*describe(SourceOptions, "data.train.NAME")]
    for name, algorithm in ALGORITHMS.items():
        yield f"Stage: {name}", [*describe(algorithm.options, name)]
    for name, fields in parts.items():
        yield name.capitalize(), fields


def _default(value: Any) -> str:
    return "required" if value is dataclasses.MISSING else repr(value)


def for_help() -> str:
    """The fields as text for `--help`: the option with its default, then what it does."""
    lines = ["fields of the config, with their defaults:"]
    for title, fields in all_fields():
        lines += ["", f"{title.replace('`', '')}:"]
        for field in fields:
            bounds = f" ({field.bounds})" if field.bounds else ""
            default = _default(field.default)
            lines.append(f"  --config.{field.name}={default}")
            lines.append(f"      {field.description}{bounds}")
    return "\n".join(lines)


def for_page() -> str:
    """The fields as Markdown for docs/config.md."""
    lines = [INTRODUCTION.rstrip()]
    for title, fields in all_fields():
        lines += ["", f"## {title}", "", "| field | type | default | expected | what it does |"]
        lines.append("|---|---|---|---|---|")
        for field in fields:
            code = f"`{field.name}`", f"`{field.kind}`", f"`{_default(field.default)}`"
            cells = [*code, field.bounds, field.description]
            escaped = (cell.replace("|", "&#124;").replace("\n", " ") for cell in cells)
            lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(for_page(), end="")
