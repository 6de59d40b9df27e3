"""The fields of the config section `model`, for models with random or pretrained parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from opsd_jax.models.presets import PRESETS
from opsd_jax.models.rope import RopeScaling
from opsd_jax.options import option, parse, required, with_default

DTYPES = ("float32", "bfloat16")
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
TPU_ONLY = {"cache": "paged", "attention": "splash"}  # field -> its form that only TPUs run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The fields that `DecoderOptions` and `PretrainedOptions` have in common."""

    make: str = required(
        "Function that takes this section and returns an opsd_jax.policy.Model.",
        expects="'package.module:function'",
    )
    dtype: str = option(
        "float32", "Data type of activations, matmuls and the cache.", choices=DTYPES
    )
    param_dtype: str = option("float32", "Data type of the parameters.", choices=DTYPES)
    remat: str = option(
        "none",
        "What each layer stores for the backward pass, which recomputes the rest: 'none' stores "
        "all activations, 'full' only the layer's input, 'attention' also the output of splash "
        "attention, 'products' also the outputs of all matmuls.",
        choices=("none", "full", "attention", "products"),
    )
    sequence_parallel: bool = option(
        False, "Shard the activations between layers over `tensor`, along the tokens."
    )
    context_parallel: bool = option(
        False,
        "Shard the tokens of a row over `tensor` within layers too, instead of the heads, while "
        "training: for rows too long for a device, with `tensor` above 1. Each layer then gathers "
        "its weights.",
        added=True,
    )
    attention: str = option(
        "auto",
        "Attention over whole rows: 'dense', 'splash' (a TPU kernel that never stores the [T, T] "
        "weights), or 'auto': 'splash' on a TPU if the kernel supports head_dim.",
        choices=("auto", "dense", "splash"),
    )
    scan_unroll: int = option(
        1,
        "Number of layers that one iteration of the scan over layers runs; divides num_layers.",
        at_least=1,
    )
    cache: str = option(
        "auto",
        "Cache of keys and values: 'dense', 'paged' (a TPU kernel that reads only the filled "
        "pages), or 'auto': 'paged' on a TPU if the kernel supports the sizes.",
        choices=("auto", "dense", "paged"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOptions(ModelOptions):
    """The config section `model` for a decoder with random initial parameters."""

    make: str = with_default(ModelOptions, "make", "opsd_jax.models.decoder:from_config")
    vocab_size: int = required("Number of tokens in the vocabulary.", at_least=1)
    hidden_size: int = required("Width of the hidden states.", at_least=1)
    intermediate_size: int = required("Width of the hidden layer of each MLP.", at_least=1)
    num_layers: int = required("Number of layers.", at_least=1)
    num_heads: int = required("Number of query heads; a multiple of num_kv_heads.", at_least=1)
    num_kv_heads: int = required("Number of key-value heads.", at_least=1)
    head_dim: int = required(
        "Size of each head.",
        expects="an even number above 0, because rotary embeddings rotate pairs of components",
        check=lambda size: size > 0 and size % 2 == 0,
    )
    rope_theta: float = option(1e6, "Base of the rotary position embeddings.", above=0)
    rope_scaling: RopeScaling = option(
        RopeScaling(), "Scaling of the rotary embeddings to a longer context."
    )
    rms_norm_eps: float = option(1e-6, "Constant that RMSNorm adds to the mean square.", above=0)
    qk_norm: bool = option(True, "Normalise the queries and keys of each head, as Qwen3 does.")
    attention_bias: bool = option(False, "Add biases to queries, keys and values, as Qwen2.5 does.")
    tie_word_embeddings: bool = option(False, "Use the token embedding as the output head.")
    layer_types: tuple[str, ...] = option(
        (),
        "Attention of each layer: 'full_attention' or 'sliding_attention'; () for full attention "
        "in all layers.",
        expects="() or, for each layer, 'full_attention' or 'sliding_attention'",
        check=lambda types: {*types} <= {FULL, SLIDING},
        added=True,
    )
    sliding_window: int = option(
        0,
        "Tokens that a token attends to in a layer with sliding attention, itself included; 0 if "
        "there is no such layer.",
        at_least=0,
        added=True,
    )
    rope_local_theta: float = option(
        0.0,
        "Base of the rotary embeddings in layers with sliding attention, which are not scaled; 0 "
        "for those of the other layers.",
        at_least=0,
        added=True,
    )
    query_scalar: float = option(
        0.0,
        "Attention scores are divided by the square root of this number; 0 for head_dim.",
        at_least=0,
        added=True,
    )
    activation: str = option(
        "silu",
        "Activation of the MLP: 'silu' or 'gelu', in the approximation with tanh.",
        choices=("silu", "gelu"),
        added=True,
    )
    norm_offset: bool = option(
        False, "RMSNorm multiplies by 1 plus its scale, as Gemma does.", added=True
    )
    post_norms: bool = option(
        False, "Normalise the outputs of attention and MLP as well, as Gemma does.", added=True
    )
    scale_embeddings: bool = option(
        False, "Multiply embeddings by the square root of hidden_size, as Gemma does.", added=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedOptions(ModelOptions):
    """The config section `model` for a pretrained model in a Hugging Face directory.

    The sizes come from the `config.json` in that directory.
    """

    make: str = with_default(ModelOptions, "make", "opsd_jax.models.pretrained:from_config")
    dtype: str = option(
        "auto",
        "Data type of activations, matmuls and the cache; 'auto' is 'float32' on CPUs, which "
        "compute in bfloat16 slowly, and 'bfloat16' elsewhere.",
        choices=("auto", *DTYPES),
    )
    # param_dtype stays float32: an update of relative size 1e-6 is lost on a bfloat16 parameter,
    # which has 8 significant bits.
    remat: str = with_default(ModelOptions, "remat", "full")
    path: str = option(
        "",
        "Directory with a Hugging Face config.json and *.safetensors, or a name on the Hugging "
        "Face Hub, such as 'Qwen/Qwen3-0.6B' or 'Qwen/Qwen3-0.6B@REVISION'.",
    )
    max_positions: int = option(
        0,
        "Most tokens of a prompt with its response; 0 takes max_position_embeddings from "
        "config.json. A larger value allows sequences that the model was not trained on.",
        at_least=0,
        added=True,
    )
    preset: str = option(
        "",
        "Preset whose sizes `opsd-jax plan` uses if `path` is empty.",
        choices=("", *PRESETS),
    )


def default_dtype(platform: str) -> str:
    """Returns the data type that `dtype = "auto"` stands for on a platform, such as "cpu"."""
    return "float32" if platform == "cpu" else "bfloat16"


Options = TypeVar("Options", bound=ModelOptions)


def parse_model(cls: type[Options], section: Any) -> Options:
    """Parses the config section `model`, or returns it unchanged if it is already parsed.

    Args:
      cls: the class of the options.
      section: the section as it is in the config, or an instance of `cls`, which is returned.

    Raises:
      ConfigError: a field of the section is invalid.
    """
    return section if isinstance(section, cls) else parse(cls, section, "model")
