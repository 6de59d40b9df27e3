"""Functions that create config sections from default values and your changes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import losses
from opsd_jax.config.run_options import RunOptions, run_section
from opsd_jax.data.options import SourceOptions
from opsd_jax.models.lora import LoRAOptions
from opsd_jax.models.options import DecoderOptions, PretrainedOptions
from opsd_jax.models.presets import PRESETS
from opsd_jax.models.rope import RopeScaling
from opsd_jax.options import ConfigError, section
from opsd_jax.stages import ALGORITHMS
from opsd_jax.training.optimizer import OptimizerOptions
from opsd_jax.verify.verifiers import VerifierOptions

OWN_DIRECTORY = (
    "make",
    "path",
    "preset",
    "max_positions",
)  # fields of `PretrainedOptions` that a decoder lacks


def default() -> ConfigDict:
    """Returns the config with every field at its default value.

    The stages are SFT, RLVR and OPSD, and each starts from the result of the previous stage. The
    model is a directory (`config.model.path`), and the problems come from files
    (`config.data.train`). A config file starts here and changes what it needs.
    """
    order = RunOptions().stages
    before = dict(itertools.pairwise(reversed(order)))
    stages = {
        name: algorithm.options(init_from=before.get(name, ""))
        for name, algorithm in ALGORITHMS.items()
    }
    return run_section(RunOptions(sections=stages))


def _changed(options: Any, changes: Mapping[str, Any]) -> ConfigDict:
    """Converts options to a config section, and applies changes to its fields."""
    config = section(options)
    config.update(changes)
    return config


def optimizer(**changes: Any) -> ConfigDict:
    """Returns the section `optimizer` of a stage: the AdamW defaults with your changes."""
    return _changed(OptimizerOptions(), changes)


def objective(preset: str, **changes: Any) -> ConfigDict:
    """Returns the section `objective` of an RLVR stage: the options of a preset with your changes.

    Args:
      preset: one of `opsd_jax.losses.PRESETS`, such as "grpo" or "dapo".
      changes: fields of `opsd_jax.losses.PolicyGradient` -> values.

    Raises:
      ConfigError: there is no such preset.
    """
    if preset not in losses.PRESETS:
        known = ", ".join(losses.PRESETS)
        raise ConfigError(
            f"objective({preset!r}): there is no such preset; expected one of {known}."
        )
    return ConfigDict(losses.PRESETS[preset]._asdict() | changes)


def distillation(**changes: Any) -> ConfigDict:
    """Returns the section `loss` of an OPSD stage: the defaults of `losses.OPSD` with your changes.

    `gate` is a field of the stage itself, so it is not in this section.
    """
    options = losses.OPSD()._asdict()
    del options["gate"]
    return ConfigDict(options | changes)


def verifier(kind: str = "maths", **changes: Any) -> ConfigDict:
    """Returns the section `verifier` of a data source, which sets how responses are verified.

    Args:
      kind: a verifier (opsd_jax/verify/verifiers.py), such as "maths" or "choice".
      changes: the other fields -> values.
    """
    return _changed(VerifierOptions(kind=kind), changes)


def source(path: str | pathlib.Path = "", **changes: Any) -> ConfigDict:
    """Returns the config section of a data source, which is a file or directory of problems.

    An example is `source("a.jsonl", columns={"answer": "gold"})`. docs/data.md has an example of
    each field.

    Args:
      path: a .jsonl, .jsonl.gz, .json, .csv, .parquet or .arrow file, or a directory of a dataset.
      changes: the other fields -> values.
    """
    return _changed(SourceOptions(path=os.fspath(path)), changes)


def decoder(**changes: Any) -> ConfigDict:
    """Returns the section `model` for the reference decoder, with random initial parameters.

    Args:
      changes: fields of `DecoderOptions` -> values; the sizes have to be given.

    Raises:
      ConfigError: a size is missing.
    """
    sizes = [
        field.name
        for field in dataclasses.fields(DecoderOptions)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in sizes if name not in changes]:
        raise ConfigError(
            f"decoder(...) lacks {', '.join(missing)}; expected all sizes. configs/quickstart.py "
            "has an example, and preset(NAME) has the sizes of released models."
        )
    given = {name: changes[name] for name in sizes}
    rest = {name: value for name, value in changes.items() if name not in sizes}
    return _changed(DecoderOptions(**given), rest)


def preset(name: str, **changes: Any) -> ConfigDict:
    """Returns the section `model` for a decoder with the sizes of a released model.

    Its parameters are initialised randomly.

    Args:
      name: one of `opsd_jax.models.presets.PRESETS`.
      changes: fields of `decoder` -> values.

    Raises:
      ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; expected one of {', '.join(PRESETS)}.")
    large = dataclasses.asdict(PretrainedOptions())  # how large models run: bfloat16, remat
    options = {name: value for name, value in large.items() if name not in OWN_DIRECTORY}
    return decoder(**{**options, "dtype": "bfloat16", **PRESETS[name], **changes})


def pretrained(path: str | pathlib.Path = "", preset: str = "", **changes: Any) -> ConfigDict:
    """Returns the section `model` for a Hugging Face model directory (config.json, safetensors).

    Args:
      path: the directory; `--config.model.path=...` sets it too.
      preset: the released model whose sizes `opsd-jax plan` takes if there is no path.
      changes: the other fields -> values.
    """
    return _changed(PretrainedOptions(path=os.fspath(path), preset=preset), changes)


def lora(**changes: Any) -> ConfigDict:
    """Returns the section `adapter` for low-rank adapters: the defaults with your changes.

    An example is `lora(rank=32, alpha=64.0, targets=("layers/(q|v)",), dropout=0.05)`.
    """
    return _changed(LoRAOptions(kind="lora"), changes)


def rope_scaling(**changes: Any) -> ConfigDict:
    """Returns the section `rope_scaling` of a decoder, which extends RoPE to a longer context."""
    config = ConfigDict(dataclasses.asdict(RopeScaling()))
    config.update(changes)
    return config
