"""The sizes of a decoder, and how a Hugging Face `config.json` says them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp

from opsd_jax.models import attention, paged
from opsd_jax.models.rope import TYPES, RopeScaling
from opsd_jax.parallel.aot import on_tpu

# What `architectures` says -> whether queries and keys are normalised, and have biases.
ARCHITECTURES = {
    "Qwen3ForCausalLM": (True, False),
    "Qwen2ForCausalLM": (False, True),
    "LlamaForCausalLM": (False, False),
}
# The fields of a rope scaling, by its type.
FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
    ),
    "llama3": (
        "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    ),
}  # fmt: skip
# Ours -> theirs; all of them have to be there.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; the names are those of a Hugging Face `config.json` where it has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True  # normalise queries and keys, head by head
    attention_bias: bool = False  # of queries, keys and values
    tie_word_embeddings: bool = False
    dtype: Any = jnp.float32  # of activations, matrix products and the cache
    param_dtype: Any = jnp.float32
    remat: str = "none"  # what each layer keeps for the backward pass
    sequence_parallel: bool = False  # between layers tokens lie over `tensor`
    attention: str = "dense"  # without a cache: "dense", or "splash" (opsd_jax/models/attention.py)
    scan_unroll: int = 1  # layers that one turn of the scan runs; must divide num_layers
    cache: str = "dense"  # of keys and values: "dense", or "paged" (opsd_jax/models/paged.py)

    # Given as "auto", `attention` and `cache` become what TPUs have if it takes the sizes, on TPUs.

    def __post_init__(self):
        paged_fits = paged.fits(self.num_kv_heads, self.head_dim)
        splash_fits = self.head_dim % attention.LANES == 0
        for name, form, fits in (
            ("cache", "paged", paged_fits),
            ("attention", "splash", splash_fits),
        ):
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, form if fits and on_tpu() else "dense")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads is {self.num_heads}, which model.num_kv_heads = "
                f"{self.num_kv_heads} does not divide: every key-value head serves as many heads."
            )
        if self.num_layers % self.scan_unroll:
            raise ValueError(
                f"model.scan_unroll is {self.scan_unroll}, which does not divide model.num_layers "
                f"= {self.num_layers}."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary positions need it even.")
        if self.attention == "splash" and not splash_fits:
            raise ValueError(
                f"model.attention is 'splash', with model.head_dim = {self.head_dim}; its kernel "
                f"takes multiples of {attention.LANES}. Choose 'dense'."
            )
        if self.cache == "paged" and not paged_fits:
            raise ValueError(
                f"model.cache is 'paged', with model.head_dim = {self.head_dim} and "
                f"model.num_kv_heads = {self.num_kv_heads}; its kernel takes head sizes that are "
                "multiples of 128 and 1, 2, 4 or a multiple of 8 key-value heads. Choose 'dense'."
            )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: it cannot be read or holds something else; names the file.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def from_json(path: pathlib.Path, **options: Any) -> DecoderConfig:
    """The sizes in a Hugging Face `config.json`.

    Args:
      path: of the file.
      options: the fields of `DecoderConfig` that the file does not decide: dtypes, remat, unroll,
        forms of the cache and of attention.

    Raises:
      ValueError: it cannot be read, a field is missing or says what the decoder cannot do; names
        the file, the field, the value and what was expected.
    """
    # null is as good as absent; as many key-value heads as heads, where the file does not say.
    there = {name: value for name, value in read_json(path).items() if value is not None}
    if "num_attention_heads" in there:
        there.setdefault("num_key_value_heads", there["num_attention_heads"])
    try:
        return _sizes_in(there, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _sizes_in(there: dict[str, Any], options: dict[str, Any]) -> DecoderConfig:
    named = there.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if architecture not in ARCHITECTURES:
        raise _unexpected("architectures", named, f"one of {', '.join(ARCHITECTURES)}")
    qk_norm, attention_bias = ARCHITECTURES[architecture]
    for field, value in (
        ("hidden_act", "silu"),
        ("attention_bias", attention_bias),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        if there.get(field, value) != value:
            raise _unexpected(field, there[field], f"{value!r}: the decoder has nothing else")
    sizes: dict[str, Any] = {ours: _integer(there, theirs) for ours, theirs in SIZES.items()}
    _check_window(there, sizes["num_layers"])
    # Older files have rope_theta and rope_scaling, newer ones both of them in rope_parameters.
    rope = there.get("rope_scaling") or there.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _unexpected("rope_scaling", rope, "an object, the same for all layers")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unexpected("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    # Qwen3's head size is 128 where the file does not say; the others' fills the hidden size.
    head_dim = 128 if qk_norm else sizes["hidden_size"] // sizes["num_heads"]
    if there.get("head_dim") is not None:
        head_dim = _integer(there, "head_dim")
    return DecoderConfig(
        **sizes,
        head_dim=head_dim,
        rope_theta=_number({"rope_theta": 10_000.0, **there, **rope}, "rope_theta"),
        rope_scaling=_rope_scaling(rope, there.get("max_position_embeddings")),
        rms_norm_eps=_number({"rms_norm_eps": 1e-6, **there}, "rms_norm_eps"),
        qk_norm=qk_norm,
        attention_bias=attention_bias,
        tie_word_embeddings=bool(there.get("tie_word_embeddings")),
        **options,
    )


def _unexpected(field: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{field} is {json.dumps(value)}; expected {expected}.")


def _integer(there: dict[str, Any], field: str) -> int:
    value = there.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unexpected(field, value, "an integer above 0")
    return value


def _number(there: dict[str, Any], field: str) -> float:
    value = there.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _unexpected(field, value, "a number above 0")
    return float(value)


def _check_window(there: dict[str, Any], num_layers: int) -> None:
    """Raises ValueError if a layer attends to a window only."""
    types = there.get("layer_types")
    if types is not None and set(types) != {"full_attention"}:
        raise _unexpected("layer_types", sorted(set(types)), "'full_attention' alone")
    sliding = there.get("use_sliding_window") and there.get("sliding_window") is not None
    if types is None and sliding and there.get("max_window_layers", 28) < num_layers:
        raise _unexpected("use_sliding_window", True, "false: every layer attends to all tokens")


def _rope_scaling(rope: dict[str, Any], context: int | None) -> RopeScaling:
    """The scaling that `rope` says, of a model for texts of `context` tokens."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in TYPES:
        raise _unexpected("rope_type", rope_type, f"one of {', '.join(TYPES)}")
    for field, value in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        if rope.get(field, value) != value:
            raise _unexpected(field, rope[field], f"{json.dumps(value)}: there is nothing else")
    rope = {"original_max_position_embeddings": context, **rope}
    fields: dict[str, Any] = {
        name: (_integer if name == "original_max_position_embeddings" else _number)(rope, name)
        for name in FIELDS[rope_type]
        if name in ("factor", "original_max_position_embeddings") or rope.get(name) is not None
    }
    return RopeScaling(rope_type, **fields)


def to_json(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """What a `config.json` says of a decoder, for weights that are stored as `dtype`.

    Raises:
      ValueError: no architecture has both normalised and biased queries.
    """
    kind = (config.qk_norm, config.attention_bias)
    architecture = next((name for name, has in ARCHITECTURES.items() if has == kind), None)
    if architecture is None:
        raise ValueError(
            "model.qk_norm and model.attention_bias are both True; expected one of them at most: "
            f"{', '.join(ARCHITECTURES)} have no other."
        )
    scaling = config.rope_scaling
    rope = {name: getattr(scaling, name) for name in FIELDS[scaling.rope_type]}
    if not rope.get("attention_factor"):
        rope.pop("attention_factor", None)  # absent, it follows from the factor
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": scaling.rope_type, **rope} if rope else None,
        # No part of the model; readers that reserve room for a context want a number.
        "max_position_embeddings": int(
            max(32_768, scaling.factor * scaling.original_max_position_embeddings)
        ),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,  # absent, Llama's would be 1 and 2
        "eos_token_id": None,
        "torch_dtype": dtype,
    }
