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
    "llama-3.1-8b": _sizes(4096, 14_336, 32, 32, 8, 128, 128_256, False, **_llama3(8.0)),
    "llama-3.2-1b": _sizes(2048, 8192, 16, 32, 8, 64, 128_256, True, **_llama3(32.0)),
    "llama-3.2-3b": _sizes(3072, 8192, 28, 24, 8, 128, 128_256, True, **_llama3(32.0)),
}
