"""Defines `DecoderConfig` and converts it from and to the Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from opsd_jax.models import attention, paged, weights
from opsd_jax.models.options import FULL, SLIDING, DecoderOptions
from opsd_jax.models.rope import TYPES, RopeScaling
from opsd_jax.options import ConfigError, check_bounds
from opsd_jax.parallel.aot import on_tpu
from opsd_jax.storage.foreign import read_object


class Architecture(NamedTuple):
    """What the name of a Hugging Face architecture determines.

    Attributes:
      model_type: The field of this name in `config.json`.
      options: Fields of `DecoderOptions` with the values that all its models have. All others have
        their default values, or come from `config.json`.
      head_dim: The head size if `config.json` has no head_dim; None for hidden_size / num_heads.
      defaults: Default values of other fields of `config.json`.
      only: Fields of `config.json` -> the only values that the decoder supports.
      windows: Whether layers may have sliding windows.
      names: Parameters of a layer -> the names of their tensors, where they differ from
        `weights.LAYER_LAYOUT`.
    """

    model_type: str
    options: Mapping[str, Any]
    head_dim: int | None = None
    defaults: Mapping[str, Any] = {}
    only: Mapping[str, Any] = {}
    windows: bool = False
    names: Mapping[str, str] = {}


_SILU = {"hidden_act": "silu"}
# The supported values of the field `architectures`. A new family of decoders is one more entry.
ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        {"qk_norm": True, "attention_bias": False},
        head_dim=128,
        only=_SILU,
        windows=True,
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", {"qk_norm": False, "attention_bias": True}, only=_SILU, windows=True
    ),
    "LlamaForCausalLM": Architecture(
        "llama", {"qk_norm": False, "attention_bias": False}, only=_SILU
    ),
    "MistralForCausalLM": Architecture(
        "mistral", {"qk_norm": False, "attention_bias": False}, only=_SILU, windows=True
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        {
            "qk_norm": True,
            "attention_bias": False,
            "activation": "gelu",
            "norm_offset": True,
            "post_norms": True,
            "scale_embeddings": True,
        },
        head_dim=256,
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
            "sliding_window_pattern": 6,
        },
        only={
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        windows=True,
        names={
            "attention_post_norm": "post_attention_layernorm.weight",
            "mlp_norm": "pre_feedforward_layernorm.weight",
            "mlp_post_norm": "post_feedforward_layernorm.weight",
        },
    ),
}
# A model of text and images -> its text model, which alone is read. Its config is `text_config`.
TEXT_MODELS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
SHARED_FIELDS = ("torch_dtype", "dtype", "eos_token_id", "bos_token_id", "pad_token_id")
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

    @property
    def slides(self) -> tuple[bool, ...]:
        """Whether each layer has sliding attention."""
        types = self.layer_types or (FULL,) * self.num_layers
        return tuple(kind == SLIDING for kind in types)

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
        if len(self.layer_types) not in (0, self.num_layers):
            raise ConfigError(
                f"model.layer_types has {len(self.layer_types)} entries; expected one for each of "
                f"model.num_layers = {self.num_layers}, or ()."
            )
        if any(self.slides) != bool(self.sliding_window):
            has = "has" if any(self.slides) else "has no"
            raise ConfigError(
                f"model.sliding_window is {self.sliding_window}, but model.layer_types {has} "
                f"{SLIDING!r}; expected a number above 0 exactly if a layer has a sliding window."
            )
        if self.context_parallel and self.sliding_window:
            raise ConfigError(
                "model.context_parallel is True with model.sliding_window = "
                f"{self.sliding_window}; expected False, because it supports no sliding windows."
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
    fields = _fields(path)
    try:
        return _from_fields(fields, options)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _fields(path: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of a `config.json` that are not null, which counts as absent."""
    return {
        name: value for name, value in text_fields(read_object(path)).items() if value is not None
    }


def text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the text model of a `config.json`, which may have others beside it."""
    name, text = TEXT_MODELS.get(_name(fields)), fields.get("text_config")
    if name is None or not isinstance(text, dict):
        return fields
    rest = {field: fields[field] for field in SHARED_FIELDS if field in fields}
    return {**rest, **text, "architectures": [name]}


def _name(fields: dict[str, Any]) -> str:
    """Returns the only name in `architectures`; "" if there is not exactly one."""
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    return name if isinstance(name, str) else ""


def _architecture(fields: dict[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """Returns the architecture of a `config.json`, and its fields with default values."""
    name = _name(fields)
    if name not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *TEXT_MODELS))
        raise _unexpected("architectures", fields.get("architectures"), f"one of {known}")
    fields = {**ARCHITECTURES[name].defaults, **fields}
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    return ARCHITECTURES[name], fields


def max_positions(path: pathlib.Path) -> int:
    """Returns the most tokens of a sequence according to a `config.json`; 0 if it doesn't say.

    RoPE scaling of type "linear" extends `max_position_embeddings`, and "yarn" extends
    `original_max_position_embeddings`. For "llama3", `max_position_embeddings` is the extended
    number.

    Raises:
      ConfigError: The file can't be read, or the value of a field is not a possible size.
    """
    fields = _fields(path)
    name = "max_position_embeddings"
    try:
        if name not in fields:
            return 0
        positions = _integer(fields, name)
        scaling = _rope_scaling(_rope(_architecture(fields)[1])[0], positions)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if scaling.rope_type == "linear":
        return int(positions * scaling.factor)
    if scaling.rope_type == "yarn":
        return max(positions, int(scaling.original_max_position_embeddings * scaling.factor))
    return positions


def _from_fields(fields: dict[str, Any], options: dict[str, Any]) -> DecoderConfig:
    """Converts the fields of a `config.json` to a `DecoderConfig`, or raises ValueError."""
    architecture, fields = _architecture(fields)
    only = {
        "attention_bias": architecture.options["attention_bias"],
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        **architecture.only,
    }
    for field, value in only.items():
        if fields.get(field, value) != value:
            raise _unexpected(field, fields[field], _only(value))
    sizes: dict[str, Any] = {ours: _integer(fields, theirs) for ours, theirs in SIZE_FIELDS.items()}
    head_dim = architecture.head_dim or sizes["hidden_size"] // sizes["num_heads"]
    if fields.get("head_dim") is not None:
        head_dim = _integer(fields, "head_dim")
    rope, local_theta = _rope(fields)
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
        rope_local_theta=local_theta,
        rms_norm_eps=_number({"rms_norm_eps": 1e-6, **fields}, "rms_norm_eps"),
        query_scalar=(
            _number(fields, "query_pre_attn_scalar") if "query_pre_attn_scalar" in fields else 0.0
        ),
        **_windows(fields, architecture, sizes["num_layers"]),
        **architecture.options,
        tie_word_embeddings=tied,
        **options,
    )


def _rope(fields: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Returns the rotary embeddings that a `config.json` describes.

    Older files have rope_theta and rope_scaling. Newer files have both in rope_parameters, in two
    objects if sliding attention has other embeddings. Older files then have rope_local_base_freq.

    Returns:
      `rope_scaling` or `rope_parameters`, {} if the file has neither; and the base in layers with
      sliding attention, 0 if it is that of the others.
    """
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    local = {name: fields[name] for name in ("rope_local_base_freq",) if name in fields}
    if isinstance(rope, dict) and local and {*rope} & {FULL, SLIDING}:
        kinds = [rope.get(kind) or {} for kind in (FULL, SLIDING)]
        if not all(isinstance(kind, dict) for kind in kinds):
            raise _unexpected("rope_parameters", rope, "an object for each kind of layers")
        rope, sliding = kinds
        if sliding.get("rope_type", "default") != "default":
            raise _unexpected(f"rope_parameters.{SLIDING}", sliding, 'the rope_type "default"')
        local["rope_local_base_freq"] = sliding.get("rope_theta", local["rope_local_base_freq"])
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _unexpected("rope_scaling", rope, "a single object that applies to all layers")
    return rope, _number(local, "rope_local_base_freq") if local else 0.0


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


def _windows(fields: dict[str, Any], architecture: Architecture, num_layers: int) -> dict[str, Any]:
    """Returns the options `layer_types` and `sliding_window` that a `config.json` describes."""
    types, window = fields.get("layer_types"), fields.get("sliding_window")
    if types is None:
        types = [FULL] * num_layers
        if architecture.windows and window is not None:
            types = _window_pattern(fields, architecture, num_layers)
    expected = f"a list with {num_layers} entries {FULL!r} or {SLIDING!r}"
    if not architecture.windows:
        expected = f'a list with only "{FULL}"'
    allowed = {FULL, SLIDING} if architecture.windows else {FULL}
    known = isinstance(types, list) and all(
        isinstance(kind, str) and kind in allowed for kind in types
    )
    if not known or len(types) != num_layers:
        raise _unexpected("layer_types", types, expected)
    if SLIDING not in types:
        return {}
    return {"layer_types": tuple(types), "sliding_window": _integer(fields, "sliding_window")}


def _window_pattern(
    fields: dict[str, Any], architecture: Architecture, num_layers: int
) -> list[str]:
    """Returns the kind of each layer of a `config.json` that does not list them.

    Gemma 3 has full attention in every sixth layer, Qwen in the first `max_window_layers` if it has
    windows at all, and Mistral in none.
    """
    if "sliding_window_pattern" in fields:
        period = _integer(fields, "sliding_window_pattern")
        return [SLIDING if (i + 1) % period else FULL for i in range(num_layers)]
    first = 0
    if architecture.model_type.startswith("qwen"):
        first = fields.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise _unexpected("max_window_layers", first, "an integer")
        first = first if fields.get("use_sliding_window") else num_layers
    return [SLIDING if i >= first else FULL for i in range(num_layers)]


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


def of(config: DecoderConfig) -> str | None:
    """Returns the name of the architecture with the options of a decoder; None if none has them."""
    default = {name: field.default for name, field in DecoderOptions.__dataclass_fields__.items()}
    fixed = {name for has in ARCHITECTURES.values() for name in has.options}
    for name, has in ARCHITECTURES.items():
        options = {field: has.options.get(field, default[field]) for field in fixed}
        windows = has.windows or not config.sliding_window
        if windows and all(getattr(config, field) == value for field, value in options.items()):
            return name
    return None


def layouts(config: DecoderConfig) -> weights.Layouts:
    """Returns the function that maps the parameters of a decoder to stored tensors."""
    name = of(config)
    return weights.renamed(ARCHITECTURES[name].names if name else {})


def to_json(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Converts a `DecoderConfig` to the fields of a Hugging Face `config.json`.

    Args:
      config: The sizes.
      dtype: Name of the data type in which the weights are stored.

    Raises:
      ValueError: No architecture has the options of the decoder.
    """
    name = of(config)
    if name is None:
        raise ValueError(
            f"model.qk_norm is {config.qk_norm} and model.attention_bias is "
            f"{config.attention_bias}, with sliding_window = {config.sliding_window}; expected the "
            f"options of an architecture that can be exported ({', '.join(ARCHITECTURES)})."
        )
    architecture, scaling = ARCHITECTURES[name], config.rope_scaling
    rope = {name: getattr(scaling, name) for name in ROPE_FIELDS[scaling.rope_type]}
    if not rope.get("attention_factor"):
        rope.pop("attention_factor", None)  # Readers derive an absent one from the factor.
    windows: dict[str, Any] = {"sliding_window": None}
    if config.sliding_window:
        windows = {
            "sliding_window": config.sliding_window,
            "use_sliding_window": True,
            "layer_types": list(config.layer_types),
        }
    if config.rope_local_theta:
        windows["rope_local_base_freq"] = config.rope_local_theta
    if config.query_scalar:
        windows["query_pre_attn_scalar"] = config.query_scalar
    return {
        "architectures": [name],
        "model_type": architecture.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in SIZE_FIELDS.items()},
        "head_dim": config.head_dim,
        **architecture.only,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": scaling.rope_type, **rope} if rope else None,
        **windows,
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
