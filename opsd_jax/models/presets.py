"""`PRESETS`: the architecture options of released models, by name.

The values are those in the `config.json` file of each model.

`opsd_jax.config.preset` turns one into the config section `model` of a decoder with random initial
parameters. `opsd_jax.config.pretrained` loads released weights from a directory instead.
"""

from __future__ import annotations

from typing import Any

SIZES = (
    "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def _sizes(*values: Any, **more: Any) -> dict[str, Any]:
    """Builds a preset from the SIZES fields (`values`, in that order) and other fields (`more`)."""
    return {**dict(zip(SIZES, values, strict=True)), **more}


_QWEN3 = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "qk_norm": True, "attention_bias": False}
_QWEN2 = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "qk_norm": False, "attention_bias": True}
_QWEN2_LARGE = {**_QWEN2, "rms_norm_eps": 1e-5}
_QWEN2_MATH = {**_QWEN2, "rope_theta": 1e4}
_LLAMA3 = {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "qk_norm": False, "attention_bias": False}


def _llama3(factor: float) -> dict[str, Any]:
    """Returns the fields shared by Llama 3.1 and 3.2, with `factor` as the RoPE scaling factor."""
    return {**_LLAMA3, "rope_scaling": {"rope_type": "llama3", "factor": factor}}


def _gemma3(layers: int, window: int, factor: float = 1.0, scalar: float = 256.0) -> dict[str, Any]:
    """Returns the fields that Gemma 3 models share.

    Args:
      layers: number of layers; every sixth has full attention.
      window: tokens that the others attend to.
      factor: linear scaling of the rotary embeddings of layers with full attention.
      scalar: attention scores are divided by its square root.
    """
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": factor}} if factor > 1 else {}
    return {
        "rope_theta": 1e6,
        "rope_local_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "qk_norm": True,
        "attention_bias": False,
        "layer_types": tuple(kinds),
        "sliding_window": window,
        "query_scalar": scalar,
        "activation": "gelu",
        "norm_offset": True,
        "post_norms": True,
        "scale_embeddings": True,
        **scaling,
    }


# Preset -> the fields of `DecoderOptions` that it sets.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _sizes(1024, 3072, 28, 16, 8, 128, 151_936, True, **_QWEN3),
    "qwen3-1.7b": _sizes(2048, 6144, 28, 16, 8, 128, 151_936, True, **_QWEN3),
    "qwen3-4b": _sizes(2560, 9728, 36, 32, 8, 128, 151_936, True, **_QWEN3),
    "qwen3-8b": _sizes(4096, 12_288, 36, 32, 8, 128, 151_936, False, **_QWEN3),
    "qwen3-14b": _sizes(5120, 17_408, 40, 40, 8, 128, 151_936, False, **_QWEN3),
    "qwen3-32b": _sizes(5120, 25_600, 64, 64, 8, 128, 151_936, False, **_QWEN3),
    "qwen2.5-0.5b": _sizes(896, 4864, 24, 14, 2, 64, 151_936, True, **_QWEN2),
    "qwen2.5-1.5b": _sizes(1536, 8960, 28, 12, 2, 128, 151_936, True, **_QWEN2),
    "qwen2.5-3b": _sizes(2048, 11_008, 36, 16, 2, 128, 151_936, True, **_QWEN2),
    "qwen2.5-7b": _sizes(3584, 18_944, 28, 28, 4, 128, 152_064, False, **_QWEN2),
    "qwen2.5-14b": _sizes(5120, 13_824, 48, 40, 8, 128, 152_064, False, **_QWEN2_LARGE),
    "qwen2.5-32b": _sizes(5120, 27_648, 64, 40, 8, 128, 152_064, False, **_QWEN2_LARGE),
    "qwen2.5-math-1.5b": _sizes(1536, 8960, 28, 12, 2, 128, 151_936, True, **_QWEN2_MATH),
    "qwen2.5-math-7b": _sizes(3584, 18_944, 28, 28, 4, 128, 152_064, False, **_QWEN2_MATH),
    "r1-distill-qwen-1.5b": _sizes(1536, 8960, 28, 12, 2, 128, 151_936, False, **_QWEN2_MATH),
    "r1-distill-qwen-7b": _sizes(3584, 18_944, 28, 28, 4, 128, 152_064, False, **_QWEN2_MATH),
    "r1-distill-qwen-14b": _sizes(5120, 13_824, 48, 40, 8, 128, 152_064, False, **_QWEN2_LARGE),
    "acereason-nemotron-7b": _sizes(3584, 18_944, 28, 28, 4, 128, 152_064, False, **_QWEN2_MATH),
    "acereason-nemotron-14b": _sizes(5120, 13_824, 48, 40, 8, 128, 152_064, False, **_QWEN2_LARGE),
    "gemma-3-270m": _sizes(640, 2048, 18, 4, 1, 256, 262_144, True, **_gemma3(18, 512)),
    "gemma-3-1b": _sizes(1152, 6912, 26, 4, 1, 256, 262_144, True, **_gemma3(26, 512)),
    "gemma-3-4b": _sizes(2560, 10_240, 34, 8, 4, 256, 262_208, True, **_gemma3(34, 1024, 8.0)),
    "gemma-3-12b": _sizes(3840, 15_360, 48, 16, 8, 256, 262_208, True, **_gemma3(48, 1024, 8.0)),
    "gemma-3-27b": _sizes(
        5376, 21_504, 62, 32, 16, 128, 262_208, True, **_gemma3(62, 1024, 8.0, 168.0)
    ),
    "llama-3.1-8b": _sizes(4096, 14_336, 32, 32, 8, 128, 128_256, False, **_llama3(8.0)),
    "llama-3.2-1b": _sizes(2048, 8192, 16, 32, 8, 64, 128_256, True, **_llama3(32.0)),
    "llama-3.2-3b": _sizes(3072, 8192, 28, 24, 8, 128, 128_256, True, **_llama3(32.0)),
}
