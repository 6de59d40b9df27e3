"""The reference decoder: the Qwen3 shape at any size, in Flax NNX.

RMSNorm before every part, rotary positions, grouped-query attention with normalised queries and
keys, SwiGLU. The parameters of the layers are stacked on a leading axis, [L, ...]: without a cache
the layers run in a scan, so the program does not grow with depth; with one they are unrolled, since
a scan would copy the cache that it returns.

Shapes: B batch, T tokens, S cache slots, D hidden, H heads, K key-value heads, G = H / K,
C head size, F intermediate size, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import PartitionSpec as P

from opsd_jax import policy as policy_lib

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Which dimension of which parameter lies along which mesh axis (opsd_jax/parallel/mesh.py). The
# layers are stacked, so the leading dimension of theirs is depth.
DECODER_RULES = (
    (r"embedding", P("tensor", "fsdp")),
    (r"head", P("fsdp", "tensor")),
    (r"layers/(q|k|v)", P(None, "fsdp", "tensor", None)),
    (r"layers/o", P(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)", P(None, "fsdp", "tensor")),
    (r"layers/down", P(None, "tensor", "fsdp")),
    (r"(layers/\w+_)?norm", P()),
)


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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    dtype: Any = jnp.float32  # of activations, matrix products and the cache
    param_dtype: Any = jnp.float32
    remat: bool = False  # recompute each layer's activations in the backward pass
    scan_unroll: int = 1  # layers that one turn of the scan runs; must divide num_layers

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"model.{field.name} is {value}; it must be at least 1.")
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


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis, computed in float32, in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale).astype(x.dtype)


def rope_table(positions_BxT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, ...]:
    """Cosines and sines, each [B, T, 1, C / 2] in float32, of the rotary angles."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    # Not an einsum: a TPU's matrix unit would round the positions to bfloat16.
    angle = positions_BxT[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rope(x_BxTxNxC: jax.Array, table: tuple[jax.Array, ...]) -> jax.Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), the halves of C as the pairs."""
    cos, sin = table
    a, b = jnp.split(x_BxTxNxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxC.dtype)


def attend(
    q_BxTxHxC: jax.Array, k_BxKxCxS: jax.Array, v_BxKxSxC: jax.Array, mask_BxTxS: jax.Array
) -> jax.Array:
    """Grouped-query attention, softmax in float32; a query with no key gets finite nonsense."""
    B, T, H, C = q_BxTxHxC.shape
    K = k_BxKxCxS.shape[1]
    # The heads and queries that share keys go into one dimension: plain batched products, which
    # XLA:CPU runs far faster than an einsum that keeps the two apart.
    q_BxKxGxTxC = q_BxTxHxC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4) * (C**-0.5)
    q_BxKxQxC = q_BxKxGxTxC.reshape(B, K, -1, C)
    scores = jnp.einsum("bkqc,bkcs->bkqs", q_BxKxQxC, k_BxKxCxS, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, H // K, T, -1)
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxKxSxC.dtype)
    out = jnp.einsum("bkqs,bksc->bkqc", weights.reshape(B, K, -1, scores.shape[-1]), v_BxKxSxC)
    return out.reshape(B, K, H // K, T, C).transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


class Block(nnx.Module):
    """One layer: attention and SwiGLU, each on a normalised input and added to the residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F = config.hidden_size, config.intermediate_size
        H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
        # Variance 1/fan_in; the two that write to the residual are scaled down with depth.
        depth = (2 * config.num_layers) ** -0.5

        def weight(fan_in, *shape, scale=1.0):
            init = jax.random.normal(rngs.params(), shape, jnp.float32) * (scale * fan_in**-0.5)
            return nnx.Param(init.astype(config.param_dtype))

        def ones(size):
            return nnx.Param(jnp.ones(size, config.param_dtype))

        self.attention_norm, self.mlp_norm = ones(D), ones(D)
        self.q, self.k, self.v = weight(D, D, H, C), weight(D, D, K, C), weight(D, D, K, C)
        self.q_norm, self.k_norm = ones(C), ones(C)
        self.o = weight(H * C, H, C, D, scale=depth)
        self.gate, self.up = weight(D, D, F), weight(D, D, F)
        self.down = weight(F, F, D, scale=depth)

    def attention(self, x_BxTxD, positions_BxT, table, cache):
        config = self.config
        w = lambda param: param[...].astype(config.dtype)
        q_BxTxHxC = jnp.einsum("btd,dhc->bthc", x_BxTxD, w(self.q))
        k_BxTxKxC = jnp.einsum("btd,dkc->btkc", x_BxTxD, w(self.k))
        v_BxTxKxC = jnp.einsum("btd,dkc->btkc", x_BxTxD, w(self.v))
        q_BxTxHxC = rms_norm(q_BxTxHxC, self.q_norm[...], config.rms_norm_eps)
        k_BxTxKxC = rms_norm(k_BxTxKxC, self.k_norm[...], config.rms_norm_eps)
        q_BxTxHxC = rope(q_BxTxHxC, table)
        k_BxTxKxC = rope(k_BxTxKxC, table)
        if cache is None:
            k_BxKxCxS, v_BxKxSxC = k_BxTxKxC.transpose(0, 2, 3, 1), v_BxTxKxC.swapaxes(1, 2)
            key_positions = positions_BxT
        else:
            # A token's slot is its position; padding (-1) is sent out of bounds and dropped.
            length = cache["k"].shape[-1]
            slot_BxT = jnp.where(positions_BxT < 0, length, positions_BxT)
            row_Bx1 = jnp.arange(len(slot_BxT))[:, None]
            k_BxKxCxS = cache["k"].at[row_Bx1, :, :, slot_BxT].set(k_BxTxKxC, mode="drop")
            v_BxKxSxC = cache["v"].at[row_Bx1, :, slot_BxT].set(v_BxTxKxC, mode="drop")
            cache = {"k": k_BxKxCxS, "v": v_BxKxSxC}
            key_positions = jnp.arange(length)[None]
        mask_BxTxS = (key_positions[:, None] >= 0) & (
            key_positions[:, None] <= positions_BxT[..., None]
        )
        out_BxTxHxC = attend(q_BxTxHxC, k_BxKxCxS, v_BxKxSxC, mask_BxTxS)
        return jnp.einsum("bthc,hcd->btd", out_BxTxHxC, w(self.o)), cache

    def mlp(self, x_BxTxD):
        w = lambda param: param[...].astype(self.config.dtype)
        gate_BxTxF = jnp.einsum("btd,df->btf", x_BxTxD, w(self.gate))
        up_BxTxF = jnp.einsum("btd,df->btf", x_BxTxD, w(self.up))
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate_BxTxF) * up_BxTxF, w(self.down))

    def __call__(self, x_BxTxD, positions_BxT, table, cache=None):
        eps = self.config.rms_norm_eps
        with jax.named_scope("attention"):
            y, cache = self.attention(
                rms_norm(x_BxTxD, self.attention_norm[...], eps), positions_BxT, table, cache
            )
            x_BxTxD += y
        with jax.named_scope("mlp"):
            x_BxTxD += self.mlp(rms_norm(x_BxTxD, self.mlp_norm[...], eps))
        return x_BxTxD, cache


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head. Run it through `Policy`: see `from_config`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        normal = lambda *shape: jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param((normal(V, D) * D**-0.5).astype(config.param_dtype))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = nnx.Param(jnp.ones(D, config.param_dtype))
        if not config.tie_word_embeddings:
            self.head = nnx.Param((normal(D, V) * D**-0.5).astype(config.param_dtype))

    def __call__(self, tokens_BxT, positions_BxT, cache=None):
        """Final hidden states [B, T, D]; with a cache, also the cache with these tokens in it."""
        config = self.config
        x_BxTxD = self.embedding[...].astype(config.dtype)[tokens_BxT]
        table = rope_table(positions_BxT, config.head_dim, config.rope_theta)
        graphdef, stacked = nnx.split(self.layers)
        if cache is None:

            def layer(x_BxTxD, weights):
                return nnx.merge(graphdef, weights)(x_BxTxD, positions_BxT, table)[0], None

            layer = jax.checkpoint(layer) if config.remat else layer
            x_BxTxD, _ = jax.lax.scan(layer, x_BxTxD, stacked, unroll=config.scan_unroll)
        else:
            updated = []
            for i, layer_cache in enumerate(cache):
                block = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], stacked))
                x_BxTxD, layer_cache = block(x_BxTxD, positions_BxT, table, layer_cache)
                updated.append(layer_cache)
            cache = tuple(updated)
        return rms_norm(x_BxTxD, self.norm[...], config.rms_norm_eps), cache

    def unembed(self, hidden):
        """Float32 logits [..., V] of hidden states [..., D]."""
        tied = self.config.tie_word_embeddings
        head_DxV = self.embedding[...].T if tied else self.head[...]
        return jnp.einsum(
            "...d,dv->...v",
            hidden,
            head_DxV.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def init_cache(self, batch, length):
        """An empty cache: per layer, keys [B, K, C, S] (slots last, the layout that the product
        with one query reads straight through) and values [B, K, S, C].
        """
        K, C, dtype = self.config.num_kv_heads, self.config.head_dim, self.config.dtype
        return tuple(
            {
                "k": jnp.zeros((batch, K, C, length), dtype),
                "v": jnp.zeros((batch, K, length, C), dtype),
            }
            for _ in range(self.config.num_layers)
        )


def from_config(config: ml_collections.ConfigDict) -> policy_lib.Model:
    """The decoder of a config's `model` section.

    Raises:
      ValueError: sizes that do not fit together; names the field.
    """
    sizes = {f.name: config[f.name] for f in dataclasses.fields(DecoderConfig)}
    for name in ("dtype", "param_dtype"):
        if sizes[name] not in DTYPES:
            raise ValueError(f"model.{name} is {sizes[name]!r}; expected one of {list(DTYPES)}.")
        sizes[name] = DTYPES[sizes[name]]
    decoder = DecoderConfig(**sizes)
    policy, init = policy_lib.from_nnx(lambda rngs: Decoder(decoder, rngs=rngs))
    return policy_lib.Model(policy, init, DECODER_RULES, decoder.vocab_size)
