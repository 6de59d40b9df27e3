"""Adapters in the format of Hugging Face PEFT: `adapter_config.json`, `adapter_model.safetensors`.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [rank, inputs]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [outputs, rank]

PEFT multiplies the product by `lora_alpha / r`, as `opsd_jax.models.lora` does.
"""

from __future__ import annotations

import math
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from opsd_jax.models import safetensors, weights
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.models.weights import LAYER_LAYOUT, TensorLayout
from opsd_jax.policy import AdapterFiles, Params
from opsd_jax.storage import hub
from opsd_jax.storage.foreign import listed, read_object, shown

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
FACTORS = {"a": "lora_A", "b": "lora_B"}
BASE = "base.json"  # in an export of opsd_jax: the last three fields of `About`
_NAME = re.compile(r"base_model\.model\.model\.layers\.\d+\.([\w.]+)\.lora_[AB]\.weight")
# Name of a module in a layer, such as "self_attn.q_proj" -> the path of its parameter.
MODULES = {
    suffix.removesuffix(".weight"): f"layers/{name}"
    for name, (suffix, stored, _) in LAYER_LAYOUT.items()
    if len(stored) == 2
}
# Fields of `adapter_config.json` that `about` reads, or that do not change what is computed.
READ = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
)  # fmt: skip
# The values of other fields that mean plain LoRA.
PLAIN = {"peft_type": "LORA", "bias": "none"}
# Initial values that leave the base model as it is. PiSSA, OLoRA and others change it.
INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class About(NamedTuple):
    """The part of `adapter_config.json` that says how an adapter is applied.

    Attributes:
      rank: the rank of the adapter.
      alpha: its product is multiplied by alpha / rank.
      paths: the parameters that it adapts.
      base: name or directory of its base model; "" if the file does not say.
      checksums: path -> checksum of the arrays of its base model. An export of opsd_jax contains
        them; {} if there are none.
      param_dtype: `model.param_dtype` of the run that trained it, with which they were computed.
      form: `adapter.base` of that run: "exact" or "int8".
    """

    rank: int
    alpha: float
    paths: tuple[str, ...]
    base: str
    checksums: Mapping[str, str] = types.MappingProxyType({})
    param_dtype: str = "float32"
    form: str = "exact"


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
    for field, value in config.items():
        plain = PLAIN.get(field)
        if field not in READ and value != plain and (plain or value not in (None, False, [], {})):
            raise WeightsError(
                f"{directory / CONFIG}: {field} is {shown(value)}; expected {plain!r}. Only plain "
                "LoRA and rsLoRA are supported."
            )
    init = config.get("init_lora_weights")
    if init not in INITS:
        raise WeightsError(
            f"{directory / CONFIG}: init_lora_weights is {shown(init)}, which changes the base "
            "model; expected an adapter that PEFT converted to plain LoRA."
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    numbers = type(rank) is int and type(alpha) in (int, float)
    if not (numbers and rank > 0 and alpha > 0):
        raise WeightsError(
            f"{directory / CONFIG}: r is {shown(rank)} and lora_alpha {shown(alpha)}; expected "
            "numbers above 0."
        )
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # rsLoRA divides by the square root of the rank
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if not isinstance(base, str):
        raise WeightsError(
            f"{directory / CONFIG}: base_model_name_or_path is {shown(base)}; expected text."
        )
    if revision and hub.is_name(base, hub.MODEL):
        base = f"{base}@{revision}"
    return About(rank, float(alpha), _paths(directory / FILE), base, *_ours(directory / BASE))


def _ours(file: pathlib.Path) -> tuple[Any, ...]:
    """Returns the last three fields of `About`, from a file that may be absent."""
    if not file.exists():
        return ()
    ours = read_object(file)
    known = {"float32", "bfloat16"}, {"exact", "int8"}
    found = ours.get("checksums"), ours.get("param_dtype"), ours.get("form")
    if not isinstance(found[0], dict) or not all(
        isinstance(x, str) and x in names for x, names in zip(found[1:], known, strict=True)
    ):
        raise WeightsError(
            f"{file} is damaged; expected checksums, param_dtype and form. Export the adapter "
            "again."
        )
    return found


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


def save(adapter: Params, directory: pathlib.Path, about: About, dropout: float = 0.0) -> None:
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
        "r": about.rank,
        "lora_alpha": about.alpha,
        "lora_dropout": dropout,
        "base_model_name_or_path": about.base,
    }
    if hub.is_name(about.base, hub.MODEL):
        name, _, revision = about.base.partition("@")
        config |= {"base_model_name_or_path": name, "revision": revision or None}
    base = {
        "checksums": dict(about.checksums),
        "param_dtype": about.param_dtype,
        "form": about.form,
    }
    codes = dict.fromkeys(weights.all_layouts(adapter, layouts_of), "F32")
    files = {CONFIG: config, BASE: base}
    weights.save(adapter, directory, codes, files, layouts_of, FILE)


FILES = AdapterFiles(about, load, save)
