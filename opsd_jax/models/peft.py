"""Adapters in the format of Hugging Face PEFT: `adapter_config.json`, `adapter_model.safetensors`.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [rank, inputs]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [outputs, rank]

PEFT multiplies the product by `lora_alpha / r`, as `opsd_jax.models.lora` does.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from opsd_jax.models import safetensors, weights
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.models.weights import LAYER_LAYOUT, TensorLayout
from opsd_jax.policy import AdapterFiles, Params
from opsd_jax.storage.foreign import listed, read_object, shown

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
FACTORS = {"a": "lora_A", "b": "lora_B"}
BASE = "base.json"  # in an export of opsd_jax: the checksums of the arrays of the base model
_NAME = re.compile(r"base_model\.model\.model\.layers\.\d+\.([\w.]+)\.lora_[AB]\.weight")
# Name of a module in a layer, such as "self_attn.q_proj" -> the path of its parameter.
MODULES = {
    suffix.removesuffix(".weight"): f"layers/{name}"
    for name, (suffix, stored, _) in LAYER_LAYOUT.items()
    if len(stored) == 2
}
# Fields of `adapter_config.json` -> the values that are supported.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}


class About(NamedTuple):
    """The part of `adapter_config.json` that says how an adapter is applied.

    Attributes:
      rank: the rank of the adapter.
      alpha: its product is multiplied by alpha / rank.
      paths: the parameters that it adapts.
      base: name or directory of its base model; "" if the file does not say.
      checksums: path -> checksum of the arrays of its base model, which an export of opsd_jax
        contains; {} if there are none.
    """

    rank: int
    alpha: float
    paths: tuple[str, ...]
    base: str
    checksums: dict[str, str]


def layouts_of(path: str, shape: tuple[int, ...]) -> list[TensorLayout]:
    """Returns the `TensorLayout`s of a factor of an adapter, one per layer.

    Args:
      path: the path of the factor, such as "layers/q/a".
      shape: its shape.
    """
    matrix, _, factor = path.rpartition("/")
    suffix, (outputs, inputs), _ = LAYER_LAYOUT[matrix.removeprefix("layers/")]
    module = suffix.removesuffix(".weight")
    names: dict[int | None, str] = {
        i: f"base_model.model.model.layers.{i}.{module}.{FACTORS[factor]}.weight"
        for i in range(shape[0])
    }
    if factor == "a":
        return weights.layouts_from(names, ("r", inputs), f"{inputs}r", shape[1:])
    return weights.layouts_from(names, (outputs, "r"), f"r{outputs}", shape[1:])


def about(directory: pathlib.Path) -> About:
    """Reads `adapter_config.json` and the header of `adapter_model.safetensors`.

    Raises:
      WeightsError: a file is missing or damaged, or the adapter is of a kind that is not supported.
    """
    for name in (CONFIG, FILE):
        if not (directory / name).is_file():
            raise WeightsError(
                f"{directory} has no {name}; expected an adapter in the format of Hugging Face "
                f"PEFT, with {CONFIG} and {FILE}."
            )
    config = read_object(directory / CONFIG)
    for field, supported in SUPPORTED.items():
        value = config.get(field, supported[0])
        if value not in supported:
            raise WeightsError(
                f"{directory / CONFIG}: {field} is {shown(value)}; expected {supported[0]!r}, the "
                "only kind of adapter that is supported."
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
        raise WeightsError(
            f"{directory / CONFIG}: r is {shown(rank)} and lora_alpha {shown(alpha)}; expected "
            "numbers above 0."
        )
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # rsLoRA divides by the square root of the rank
    base = config.get("base_model_name_or_path")
    return About(
        rank,
        float(alpha),
        _paths(directory / FILE),
        base if isinstance(base, str) else "",
        read_object(directory / BASE) if (directory / BASE).exists() else {},
    )


def _paths(file: pathlib.Path) -> tuple[str, ...]:
    """Returns the parameters that the adapter in a file adapts."""
    found = set()
    for name in safetensors.tensors_in(file):
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in MODULES:
            raise WeightsError(
                f"{file}: the tensor {shown(name, 200)} is not supported; expected adapters of "
                f"{', '.join(MODULES)}."
            )
        found.add(MODULES[match[1]])
    return tuple(sorted(found))


def load(abstract: Params, directory: pathlib.Path) -> Params:
    """Implements `AdapterFiles.load` for the reference decoder.

    Raises:
      WeightsError: a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    stored = safetensors.tensors_in(directory / FILE)
    expected = weights.all_layouts(abstract, layouts_of)
    weights.check_sums(directory)
    problems = [f"{name} is unexpected" for name in stored if name not in expected]
    for name, layout in expected.items():
        if name not in stored:
            problems.append(f"{name} is missing")
        elif stored[name].shape != layout.shape:
            shape = list(stored[name].shape)
            problems.append(f"{name} has shape {shape}; expected {list(layout.shape)}")
        elif stored[name].code not in safetensors.DTYPES:
            problems.append(f"{name} is stored as {stored[name].code}")
    if problems:
        raise WeightsError(
            f"the adapter in {directory} does not fit the model:\n  " + listed(problems, "\n  ")
        )
    return weights.load(stored, abstract, layouts_of)


def save(
    adapter: Params,
    directory: pathlib.Path,
    about: Mapping[str, Any],
    checksums: Mapping[str, str],
) -> None:
    """Implements `AdapterFiles.save` for the reference decoder. Writes float32.

    Raises:
      WeightsError: the directory is not empty, or cannot be written.
    """
    module = {path: name for name, path in MODULES.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(module[path].rpartition(".")[2] for path in adapter),
        **about,
    }
    codes = dict.fromkeys(weights.all_layouts(adapter, layouts_of), "F32")
    files = {CONFIG: config, BASE: dict(checksums)}
    weights.save(adapter, directory, codes, files, layouts_of, FILE)


FILES = AdapterFiles(about, load, save)
