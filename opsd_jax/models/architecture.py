"""Defines `DecoderConfig` and converts it from and to the Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from opsd_jax.models import attention, paged
from opsd_jax.models.options import DecoderOptions
from opsd_jax.models.rope import TYPES, RopeScaling
from opsd_jax.options import ConfigError, check_bounds
from opsd_jax.parallel.aot import on_tpu
from opsd_jax.storage.foreign import read_object


class Architecture(NamedTuple):
    """Decoder options that the name of a Hugging Face architecture determines.

    Attributes:
      qk_norm: Whether the queries and keys of each head are normalised.
      attention_bias: Whether queries, keys and values have biases.
      head_dim: The head size if `config.json` has no head_dim; None for hidden_size / num_heads.
    """

    qk_norm: bool
    attention_bias: bool
    head_dim: int | None = None


# The supported values of the field `architectures`. A new family of decoders is one more entry.
ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture(qk_norm=True, attention_bias=False, head_dim=128),
    "Qwen2ForCausalLM": Architecture(qk_norm=False, attention_bias=True),
    "LlamaForCausalLM": Architecture(qk_norm=False, attention_bias=False),
}
# The fields of `rope_scaling` that each `rope_type` uses.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
    ),
    "llama3": (
        "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    ),
}  # fmt: skip
# The field of `DecoderConfig` -> the field of `config.json`. All of them are required.
SIZE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
# The largest values of fields of `config.json`, far above those of any model. Work that is done
# for each layer, before the weights are compared with the sizes, would take hours beyond them.
LARGEST = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 10_000,
    "max_position_embeddings": 2**40,
    "original_max_position_embeddings": 2**40,
}
LARGEST_INTEGER, LARGEST_NUMBER = 2**24, 1e15  # of all other fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(DecoderOptions):
    """Validated decoder options, with each "auto" replaced by a specific implementation.

    Attributes:
      int8_weights: Whether `Model.decode_params` rounds the weights of matmuls to 8 bits.
      int8_cache: Whether the cache has keys and values in 8 bits.

    The constructor replaces "auto" in `attention` and `cache` by the TPU kernel if programs are
    compiled for TPUs and the kernel supports the sizes, and by "dense" otherwise.

    Raises:
      ConfigError: A field is out of bounds, two sizes don't fit together, or a kernel doesn't
        support them.
    """

    int8_weights: bool = False
    int8_cache: bool = False

    def __post_init__(self):
        """Validates the fields and replaces each "auto" by a specific implementation."""
        check_bounds(self, "model")
        self._check_sizes()
        splash_fits = self.head_dim % attention.LANES == 0
        paged_fits = paged.fits(self.num_kv_heads, self.head_dim)
        if self.attention == "auto":
            form = "splash" if splash_fits and on_tpu() else "dense"
            object.__setattr__(self, "attention", form)
        if self.cache == "auto":
            object.__setattr__(self, "cache", "paged" if paged_fits and on_tpu() else "dense")
        if self.attention == "splash" and not splash_fits:
            raise ConfigError(
                f"model.attention is 'splash' with model.head_dim = {self.head_dim}; the splash "
                f"kernel needs a head_dim that is a multiple of {attention.LANES}. Set "
                "model.attention to 'dense'."
            )
        if self.cache == "paged" and not paged_fits:
            raise ConfigError(
                f"model.cache is 'paged' with model.head_dim = {self.head_dim} and "
                f"model.num_kv_heads = {self.num_kv_heads}; the kernel needs a head_dim that is a "
                "multiple of 128, and 1, 2, 4 or a multiple of 8 key-value heads. Set model.cache "
                "to 'dense'."
            )

    def _check_sizes(self) -> None:
        """Checks that num_kv_heads divides num_heads, and that other fields fit together."""
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads is {self.num_heads}; expected a multiple of model.num_kv_heads = "
                f"{self.num_kv_heads}."
            )
        if self.context_parallel and self.remat == "none":
            raise ConfigError(
                "model.context_parallel is True with model.remat = 'none', which would store the "
                "gathered weights of all layers. Set model.remat to 'full' or 'attention'."
            )
        if self.num_layers % self.scan_unroll:
            raise ConfigError(
                f"model.scan_unroll is {self.scan_unroll}; expected a divisor of model.num_layers "
                f"= {self.num_layers}."
            )


def from_json(path: pathlib.Path, **options: Any) -> DecoderConfig:
    """Reads a `DecoderConfig` from a Hugging Face `config.json`.

    Args:
      path: The file.
      options: Fields of `DecoderConfig` that the file doesn't decide: dtype, param_dtype, remat,
        sequence_parallel, context_parallel, attention, scan_unroll and cache.

    Raises:
      ConfigError: The file can't be read, a field is missing, or the decoder doesn't support the
        value of a field. The message names the file, the field, its value and what was expected.
    """
    # A field that is null counts as absent.
    fields = {name: value for name, value in read_object(path).items() if value is not None}
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    try:
        return _from_fields(fields, options)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def max_positions(path: pathlib.Path) -> int:
    """Returns the most tokens of a sequence according to a `config.json`; 0 if it doesn't say.

    RoPE scaling of type "linear" extends `max_position_embeddings`, and "yarn" extends
    `original_max_position_embeddings`. For "llama3", `max_position_embeddings` is the extended
    number.

    Raises:
      ConfigError: The file can't be read, or the value of a field is not a possible size.
    """
    fields = {name: value for name, value in read_object(path).items() if value is not None}
    name = "max_position_embeddings"
    try:
        if name not in fields:
            return 0
        positions = _integer(fields, name)
        scaling = _rope_scaling(_rope(fields), positions)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if scaling.rope_type == "linear":
        return int(positions * scaling.factor)
    if scaling.rope_type == "yarn":
        return max(positions, int(scaling.original_max_position_embeddings * scaling.factor))
    return positions


def _from_fields(fields: dict[str, Any], options: dict[str, Any]) -> DecoderConfig:
    """Converts the fields of a `config.json` to a `DecoderConfig`, or raises ValueError."""
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise _unexpected("architectures", names, f"one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    for field, value in (
        ("hidden_act", "silu"),
        ("attention_bias", architecture.attention_bias),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        if fields.get(field, value) != value:
            raise _unexpected(field, fields[field], _only(value))
    sizes: dict[str, Any] = {ours: _integer(fields, theirs) for ours, theirs in SIZE_FIELDS.items()}
    _check_window(fields, sizes["num_layers"])
    head_dim = architecture.head_dim or sizes["hidden_size"] // sizes["num_heads"]
    if fields.get("head_dim") is not None:
        head_dim = _integer(fields, "head_dim")
    rope = _rope(fields)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unexpected("partial_rotary_factor", rope["partial_rotary_factor"], _only(1.0))
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _unexpected("tie_word_embeddings", tied, "true or false")
    theta = _number({"rope_theta": 10_000.0, **fields, **rope}, "rope_theta")
    if theta <= 1:
        raise _unexpected("rope_theta", theta, "a number above 1")
    return DecoderConfig(
        **sizes,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(rope, fields.get("max_position_embeddings")),
        rms_norm_eps=_number({"rms_norm_eps": 1e-6, **fields}, "rms_norm_eps"),
        qk_norm=architecture.qk_norm,
        attention_bias=architecture.attention_bias,
        tie_word_embeddings=tied,
        **options,
    )


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns `rope_scaling` or `rope_parameters` of a `config.json`, or {} if it has neither.

    Older files have rope_theta and rope_scaling. Newer files have both in rope_parameters.
    """
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _unexpected("rope_scaling", rope, "a single object that applies to all layers")
    return rope


def _unexpected(field: str, value: Any, expected: str) -> ValueError:
    """Returns a ValueError that names a field of `config.json`, its value and the valid values."""
    text = json.dumps(value)
    if len(text) > 200:
        text = f"{text[:197]}..."
    return ValueError(f"{field} is {text}; expected {expected}.")


def _only(value: Any) -> str:
    """Returns a phrase such as "1.0, the only value that the decoder supports", for an error."""
    return f"{json.dumps(value)}, the only value that the decoder supports"


def _integer(fields: dict[str, Any], name: str) -> int:
    """Returns the field `name`. Raises ValueError for a value that is not a possible size."""
    value = fields.get(name)
    largest = LARGEST.get(name, LARGEST_INTEGER)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise _unexpected(name, value, f"an integer above 0 and at most {largest:,}")
    return value


def _number(fields: dict[str, Any], name: str) -> float:
    """Returns the field `name`. Raises ValueError for a value that is not a positive number."""
    value: Any = fields.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= LARGEST_NUMBER:  # false for NaN
        raise _unexpected(name, value, f"a number above 0 and at most {LARGEST_NUMBER:g}")
    return float(value)


def _check_window(fields: dict[str, Any], num_layers: int) -> None:
    """Raises ValueError if any layer in a `config.json` uses sliding-window attention."""
    types = fields.get("layer_types")
    if types is not None:
        other = (
            [kind for kind in types if kind != "full_attention"]
            if isinstance(types, list)
            else types
        )
        if other or not types:
            raise _unexpected("layer_types", other, 'a list with only "full_attention"')
    elif fields.get("use_sliding_window") and fields.get("sliding_window") is not None:
        first = fields.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise _unexpected("max_window_layers", first, "an integer")
        if first < num_layers:
            raise _unexpected("use_sliding_window", True, _only(False))


def _rope_scaling(rope: dict[str, Any], max_position_embeddings: int | None) -> RopeScaling:
    """Converts `rope_scaling` or `rope_parameters` of a `config.json` to a `RopeScaling`.

    Args:
      rope: The value of one of these fields of `config.json`.
      max_position_embeddings: The field with the same name, which is the default value of
        original_max_position_embeddings.
    """
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in TYPES:
        raise _unexpected("rope_type", rope_type, f"one of {', '.join(TYPES)}")
    for field, value in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        if rope.get(field, value) != value:
            raise _unexpected(field, rope[field], _only(value))
    rope = {"original_max_position_embeddings": max_position_embeddings, **rope}
    fields: dict[str, Any] = {
        name: (_integer if name == "original_max_position_embeddings" else _number)(rope, name)
        for name in ROPE_FIELDS[rope_type]
        if name in ("factor", "original_max_position_embeddings") or rope.get(name) is not None
    }
    return RopeScaling(rope_type, **fields)


def to_json(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Converts a `DecoderConfig` to the fields of a Hugging Face `config.json`.

    Args:
      config: The sizes.
      dtype: Name of the data type in which the weights are stored.

    Raises:
      ValueError: No architecture has both qk_norm and attention_bias.
    """
    name = next(
        (
            name
            for name, has in ARCHITECTURES.items()
            if (has.qk_norm, has.attention_bias) == (config.qk_norm, config.attention_bias)
        ),
        None,
    )
    if name is None:
        raise ValueError(
            f"model.qk_norm is {config.qk_norm} and model.attention_bias is "
            f"{config.attention_bias}; expected at most one of them to be True, because no "
            f"architecture that can be exported ({', '.join(ARCHITECTURES)}) has both."
        )
    scaling = config.rope_scaling
    rope = {name: getattr(scaling, name) for name in ROPE_FIELDS[scaling.rope_type]}
    if not rope.get("attention_factor"):
        rope.pop("attention_factor", None)  # Readers derive an absent one from the factor.
    return {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        **{theirs: getattr(config, ours) for ours, theirs in SIZE_FIELDS.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": scaling.rope_type, **rope} if rope else None,
        # Not a property of the model, but some readers allocate memory for this many tokens.
        "max_position_embeddings": int(
            max(32_768, scaling.factor * scaling.original_max_position_embeddings)
        ),
        "tie_word_embeddings": config.tie_word_embeddings,
        # If these were absent, transformers would use 1 and 2 for a Llama model.
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }
