"""Builds a `Model` from a directory with a Hugging Face `config.json` and safetensors files.

    config.model = config_lib.pretrained("/models/Qwen3-1.7B")  # or "Qwen/Qwen3-1.7B"

`config.json` gives the sizes. An export copies the tokenizer, the chat template and the generation
config from the directory.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from opsd_jax.models import architecture, decoder, safetensors, weights
from opsd_jax.models.architecture import DecoderConfig
from opsd_jax.models.options import (
    ModelOptions,
    PretrainedOptions,
    default_dtype,
    parse_model,
)
from opsd_jax.models.presets import PRESETS
from opsd_jax.models.rope import RopeScaling
from opsd_jax.models.safetensors import CODES, StoredTensor, WeightsError
from opsd_jax.options import ConfigError, fields_of
from opsd_jax.parallel import aot
from opsd_jax.policy import Model, Params
from opsd_jax.storage import hub
from opsd_jax.storage.foreign import listed, read_object

CONFIG = "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Patterns of the other files in a directory that belong to the model.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates",
)  # fmt: skip


def from_config(options: PretrainedOptions | Mapping[str, Any]) -> Model:
    """Builds the pretrained model in the directory `options.path`, without reading its weights.

    The function reads `config.json` and the headers of the safetensors files. `Model.load` reads
    the weights. `opsd-jax plan` needs only `config.json`, and a preset can replace it.

    Args:
      options: The config section `model`, parsed or as it is in the config.

    Raises:
      ConfigError: A field of the section has a value that is not supported.
      ValueError: `open_model` does not accept the directory.
    """
    options = parse_model(PretrainedOptions, options)
    planned = aot.is_planned()
    fields = {name: getattr(options, name) for name in fields_of(ModelOptions)}
    if options.dtype == "auto":
        fields["dtype"] = default_dtype("tpu" if aot.on_tpu() else jax.default_backend())
    if options.preset and not options.path and planned:
        return decoder.model(_preset(options.preset, **fields))
    if not options.path:
        raise ConfigError(
            "config.model.path is ''; expected a directory with a Hugging Face config.json and "
            "*.safetensors, or the name of a model on the Hugging Face Hub. Pass, for example, "
            "--config.model.path=Qwen/Qwen3-1.7B. Only `opsd-jax plan` accepts a preset without a "
            "path."
        )
    kind = hub.SIZES if planned else hub.MODEL
    directory = hub.local(options.path, kind, "config.model.path")
    if not directory.is_dir():
        raise ConfigError(
            f"config.model.path is {options.path!r}; expected a directory on this machine, or "
            "the name of a model on the Hugging Face Hub, such as 'Qwen/Qwen3-1.7B'."
        )
    model = (_without_weights if planned else open_model)(directory, **fields)
    return model._replace(max_positions=options.max_positions or model.max_positions)


def _preset(name: str, **options: Any) -> DecoderConfig:
    """Returns the `DecoderConfig` of a preset. `options` are the fields that it does not set."""
    sizes = {**PRESETS[name]}
    if "rope_scaling" in sizes:
        sizes["rope_scaling"] = RopeScaling(**sizes["rope_scaling"])
    return DecoderConfig(**sizes, **options)


def is_preset(options: PretrainedOptions) -> bool:
    """Returns whether the model in `options.path` is the preset that a plan uses without a path.

    Raises:
      ConfigError: the directory has no valid `config.json`.
    """
    if not (options.path and options.preset):
        return False
    directory = hub.local(options.path, hub.SIZES, "config.model.path")
    return architecture.from_json(directory / CONFIG) == _preset(options.preset)


def open_model(directory: pathlib.Path, **options: Any) -> Model:
    """Checks `config.json` and the safetensors headers in a directory, and builds the model.

    Args:
      directory: A Hugging Face directory.
      options: Fields of `DecoderConfig` that `config.json` does not decide.

    Raises:
      ValueError: `config.json` cannot be read, or the decoder does not support one of its fields.
      WeightsError: A safetensors file is missing or damaged, or tensors are missing, unexpected or
        of the wrong shape. The message lists them.
    """
    config = architecture.from_json(directory / CONFIG, **options)
    model, layouts = _model_of(config, directory), architecture.layouts(config)
    stored = _text_tensors(directory)
    expected = weights.all_layouts(jax.eval_shape(model.init, jax.random.key(0)), layouts)
    check_tensors(stored, expected, directory)

    def load(abstract: Params) -> Params:
        weights.check_sums(directory)
        check_tied(stored, expected, directory)
        return weights.load(stored, abstract, layouts)

    return model._replace(
        load=load,
        save=functools.partial(_save, directory, stored, layouts),
    )


def _without_weights(directory: pathlib.Path, **options: Any) -> Model:
    """Builds the model that `config.json` describes. Arguments and errors as for `open_model`."""
    return _model_of(architecture.from_json(directory / CONFIG, **options), directory)


def _model_of(config: DecoderConfig, directory: pathlib.Path) -> Model:
    """Builds the model with the given sizes, which `config.json` in the directory describes."""
    positions = architecture.max_positions(directory / CONFIG)
    return decoder.model(config)._replace(max_positions=positions)


def _text_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of the text model in a directory, by the names that it has alone.

    The other tensors of a model of text and images are left out.
    """
    stored = safetensors.tensors_of(directory)
    for prefix in ("language_model.model.", "model.language_model."):
        text = {
            f"model.{name.removeprefix(prefix)}": tensor
            for name, tensor in stored.items()
            if name.startswith(prefix)
        }
        head = stored.get(HEAD) or stored.get(f"language_model.{HEAD}")
        if text:
            return text | ({HEAD: head} if head else {})
    return stored


def check_tensors(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, weights.TensorLayout],
    directory: pathlib.Path,
) -> None:
    """Raises WeightsError if the stored tensors do not match the sizes in `config.json`.

    Args:
      stored: The tensors in the safetensors files, by name.
      expected: The tensors that the model needs, by name.
      directory: The directory of the files, for the error message, which lists the wrong tensors.
    """
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            # Older files contain the rotary frequencies. A model with tied embeddings may contain
            # the output head as well, which `check_tied` compares.
            if not name.endswith("rotary_emb.inv_freq") and name != HEAD:
                problems.append(f"{name} of shape {list(tensor.shape)} is unexpected")
        elif tensor.shape != expected[name].shape:
            shape = list(expected[name].shape)
            problems.append(f"{name} has shape {list(tensor.shape)}; expected {shape}")
        elif tensor.code not in safetensors.DTYPES:
            codes = list(safetensors.DTYPES)
            problems.append(f"{name} is stored as {tensor.code}; expected one of {codes}")
    if problems:
        raise WeightsError(
            f"the weights in {directory} do not match the {CONFIG} there:\n  "
            + listed(problems, "\n  ")
        )


def check_tied(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, weights.TensorLayout],
    directory: pathlib.Path,
) -> None:
    """Raises WeightsError if the embeddings are tied but a stored output head differs from them.

    See `check_tensors` for the arguments.
    """
    if HEAD in expected or HEAD not in stored:
        return
    head, embedding = stored[HEAD], stored[EMBEDDING]
    same_form = (head.code, head.shape) == (embedding.code, embedding.shape)
    if not same_form or any(
        head.read(start, count).tobytes() != embedding.read(start, count).tobytes()
        for start, count in _ranges(head)
    ):
        raise WeightsError(
            f"the tensor {HEAD} in {head.file} differs from {EMBEDDING}, but tie_word_embeddings "
            f"is true in {directory / CONFIG}. Set tie_word_embeddings to false, or remove {HEAD}."
        )


def _ranges(stored: StoredTensor) -> list[tuple[int, int]]:
    """Splits a flattened tensor into (start, count) ranges of at most `weights.PIECE` bytes."""
    total, step = math.prod(stored.shape), weights.PIECE // stored.dtype.itemsize
    return [(start, min(step, total - start)) for start in range(0, total, step)]


def _files(directory: pathlib.Path, dtype: str) -> dict[str, Any]:
    """Returns the files that an export writes in addition to the weights, such as `config.json`.

    Args:
      directory: The directory that the model was loaded from.
      dtype: The new dtype in `config.json`; "" keeps the old dtype.

    Returns:
      Path in the export -> the file to copy, or the value to write as JSON.
    """
    config = architecture.text_fields(read_object(directory / CONFIG))
    if dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return {**_companions(directory), CONFIG: config}


def _companions(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the files of a model directory that COMPANIONS matches, to copy into an export.

    A symbolic link could name any file of this machine, which the export would then contain. Only
    links to files in the directory are followed, and those of a snapshot in the Hugging Face cache,
    whose files are links to `../../blobs`.

    Returns:
      Path in the directory -> the regular file to copy.

    Raises:
      WeightsError: a file is a link to another place, or it is not a regular file.
    """
    places = [directory.resolve()]
    if places[0].parent.name == "snapshots":
        places.append(places[0].parent.parent / "blobs")
    found = {}
    queue = [path for pattern in COMPANIONS for path in sorted(directory.glob(pattern))]
    for path in queue:
        file = pathlib.Path(os.path.realpath(path))
        if not any(file.is_relative_to(place) for place in places):
            raise WeightsError(
                f"{path} is a symbolic link to {file}, outside of the model's directory, so it is "
                "not exported; expected a file in the directory. Replace the link by a copy."
            )
        if file.is_dir() and not path.is_symlink():
            queue += sorted(path.iterdir())
        elif file.is_file():
            found[str(path.relative_to(directory))] = file
        else:
            raise WeightsError(
                f"{path} cannot be exported; expected a regular file, or a directory of such files."
            )
    return found


def _save(
    source: pathlib.Path,
    stored: Mapping[str, StoredTensor],
    layouts: weights.Layouts,
    params: Params,
    directory: pathlib.Path,
    dtype: str = "",
) -> None:
    """Implements `Model.save`: writes parameters to a new Hugging Face directory.

    Args:
      source: The directory that the model was loaded from.
      stored: The tensors in `source`, by name.
      layouts: The tensors of each parameter.
      params: The parameters to write.
      directory: The directory to write. It must be new or empty.
      dtype: The dtype to store; "" keeps the dtype of each tensor.
    """
    codes = {name: CODES[dtype] if dtype else tensor.code for name, tensor in stored.items()}
    weights.save(params, directory, codes, _files(source, dtype), layouts)


def rewrite(source: pathlib.Path, directory: pathlib.Path, dtype: str = "") -> None:
    """Validates a Hugging Face directory and copies it, optionally in another dtype.

    It copies one piece of a tensor at a time, so memory never holds a whole tensor.

    Args:
      source: The directory to read.
      directory: The directory to write. It must be new or empty.
      dtype: The dtype to store: "float32", "bfloat16" or "float16"; "" keeps each tensor's dtype.

    Raises:
      ValueError: `config.json` cannot be read, or the decoder does not support one of its fields.
      WeightsError: A safetensors file is missing or damaged, a tensor does not match `config.json`,
        or `directory` is not empty or cannot be written.
    """
    config = architecture.from_json(source / CONFIG)
    stored, layouts = _text_tensors(source), architecture.layouts(config)
    shapes = jax.eval_shape(decoder.model(config).init, jax.random.key(0))
    expected = weights.all_layouts(shapes, layouts)
    check_tensors(stored, expected, source)
    weights.check_sums(source)
    check_tied(stored, expected, source)
    codes = {name: CODES[dtype] if dtype else stored[name].code for name in expected}
    files = _files(source, dtype)
    with weights.new_directory(directory) as partial:
        table = {name: (codes[name], stored[name].shape) for name in expected}
        with safetensors.writer(partial, table) as put:
            for name in expected:
                for start, count in _ranges(stored[name]):
                    values = stored[name].read(start, count)
                    put(name, start, values.astype(safetensors.DTYPES[codes[name]]))
        weights.add_files(partial, files)
