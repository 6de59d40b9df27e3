"""A released model: a directory with a `config.json` and safetensors files.

    config.model = config_lib.pretrained("/models/Qwen3-1.7B")

The sizes are the `config.json`'s. Its tokenizer, chat template and generation config go along into
what is exported.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from opsd_jax.models import architecture, decoder, safetensors, weights
from opsd_jax.models.architecture import DecoderConfig
from opsd_jax.models.options import DTYPES, PretrainedOptions
from opsd_jax.models.presets import PRESETS
from opsd_jax.models.rope import RopeScaling
from opsd_jax.models.safetensors import CODES, Stored, WeightsError
from opsd_jax.options import ConfigError, parse
from opsd_jax.parallel import aot
from opsd_jax.policy import Model, Params

CONFIG = "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# What else of a directory belongs to the model.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates",
)  # fmt: skip


def from_config(options: PretrainedOptions | Mapping[str, Any]) -> Model:
    """The model in the directory `options.path`. Its weights are not read yet.

    Args:
      options: the section `model` of a config, parsed, or as it stands in the config.

    Raises:
      ValueError: names the field of the section or of `config.json`, or the file, or lists the
        tensors that are missing, unexpected or of another shape.
    """
    if not isinstance(options, PretrainedOptions):
        options = parse(PretrainedOptions, options, "model")
    fields = {
        "dtype": DTYPES[options.dtype],
        "param_dtype": DTYPES[options.param_dtype],
        "remat": options.remat,
        "sequence_parallel": options.sequence_parallel,
        "attention": options.attention,
        "scan_unroll": options.scan_unroll,
        "cache": options.cache,
    }
    if options.preset and not options.path and aot.is_planned():
        sizes = {**PRESETS[options.preset]}
        if "rope_scaling" in sizes:
            sizes["rope_scaling"] = RopeScaling(**sizes["rope_scaling"])
        return decoder.model(DecoderConfig(**sizes, **fields))
    if not options.path:
        raise ConfigError(
            "config.model.path is ''; expected a directory with a Hugging Face config.json and "
            "*.safetensors, such as --config.model.path=/models/Qwen3-1.7B. Only `opsd-jax plan` "
            "can do with config.model.preset instead."
        )
    directory = pathlib.Path(options.path)
    if not directory.is_dir():
        raise ConfigError(
            f"config.model.path is {options.path!r}; expected a local directory. Download the "
            "model first: opsd_jax downloads nothing."
        )
    return open_model(directory, **fields)


def open_model(directory: pathlib.Path, **options: Any) -> Model:
    """The model in a directory, with its weights checked by their headers.

    Args:
      directory: of a Hugging Face model.
      options: the fields of `DecoderConfig` that its `config.json` does not decide.

    Raises:
      ValueError: as `from_config`.
    """
    sizes = architecture.from_json(directory / CONFIG, **options)
    model = decoder.model(sizes)
    stored = safetensors.tensors_of(directory)
    expected = weights.all_tensors(jax.eval_shape(model.init, jax.random.key(0)))
    check(stored, expected, directory)

    def load(abstract: Params) -> Params:
        check_tied(stored, expected, directory)
        return weights.load(stored, abstract)

    return model._replace(load=load, save=functools.partial(_save, directory, stored))


def check(
    stored: Mapping[str, Stored], expected: Mapping[str, weights.Tensor], directory: pathlib.Path
) -> None:
    """Raises WeightsError that lists all tensors that are not as the `config.json` says."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, there in stored.items():
        if name not in expected:
            # Older files keep the rotary frequencies; tied ones may have the embedding twice.
            if not name.endswith("rotary_emb.inv_freq") and name != HEAD:
                problems.append(f"{name} {list(there.shape)} is unexpected")
        elif there.shape != expected[name].shape:
            problems.append(f"{name} is {list(there.shape)}; expected {list(expected[name].shape)}")
        elif there.code not in safetensors.DTYPES:
            problems.append(
                f"{name} is stored as {there.code}; expected one of {list(safetensors.DTYPES)}"
            )
    if problems:
        raise WeightsError(
            f"the weights in {directory} are not those of its {CONFIG}:\n  " + "\n  ".join(problems)
        )


def check_tied(
    stored: Mapping[str, Stored], expected: Mapping[str, weights.Tensor], directory: pathlib.Path
) -> None:
    """Raises WeightsError if the weights have a head although the embedding is to be the head, and
    it is another.
    """
    if HEAD in expected or HEAD not in stored:
        return
    head, embedding = stored[HEAD], stored[EMBEDDING]
    if head[1:3] != embedding[1:3] or any(
        head.read(start, count).tobytes() != embedding.read(start, count).tobytes()
        for start, count in _ranges(head)
    ):
        raise WeightsError(
            f"{head.file} has a {HEAD} that is not the embedding, but tie_word_embeddings is true "
            f"in {directory / CONFIG}; expected equal ones, none, or tie_word_embeddings false."
        )


def _ranges(stored: Stored) -> list[tuple[int, int]]:
    """(start, count) of a tensor's elements, in pieces that fit into memory."""
    total, step = math.prod(stored.shape), weights.PIECE // safetensors.DTYPES[stored.code].itemsize
    return [(start, min(step, total - start)) for start in range(0, total, step)]


def _files(directory: pathlib.Path, dtype: str) -> dict[str, Any]:
    """What an export has beside the weights: the source's config, and copies."""
    config = architecture.read_json(directory / CONFIG)
    if dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    copies = {path.name: path for name in COMPANIONS for path in sorted(directory.glob(name))}
    return {**copies, CONFIG: config}


def _save(
    source: pathlib.Path,
    stored: Mapping[str, Stored],
    params: Params,
    directory: pathlib.Path,
    dtype: str = "",
) -> None:
    """`Model.save`: what was loaded from `source`, in the dtypes that it has there by default."""
    codes = {name: CODES[dtype] if dtype else there.code for name, there in stored.items()}
    weights.save(params, directory, codes, _files(source, dtype))


def rewrite(source: pathlib.Path, directory: pathlib.Path, dtype: str = "") -> None:
    """Checks the model in a directory and writes it anew, one piece of a tensor after the other.

    Args:
      source: of a Hugging Face model.
      directory: where it is written; absent or empty.
      dtype: of the weights, "float32", "bfloat16" or "float16"; by default those that they have.

    Raises:
      ValueError: as `from_config`, or the directory cannot be written.
    """
    model = decoder.model(architecture.from_json(source / CONFIG))
    stored = safetensors.tensors_of(source)
    expected = weights.all_tensors(jax.eval_shape(model.init, jax.random.key(0)))
    check(stored, expected, source)
    check_tied(stored, expected, source)
    codes = {name: CODES[dtype] if dtype else stored[name].code for name in expected}
    with weights.new_directory(directory) as partial:
        table = {name: (codes[name], stored[name].shape) for name in expected}
        with safetensors.writer(partial, table) as put:
            for name in expected:
                for start, count in _ranges(stored[name]):
                    values = stored[name].read(start, count)
                    put(name, start, values.astype(safetensors.DTYPES[codes[name]]))
        weights.add_files(partial, _files(source, dtype))
