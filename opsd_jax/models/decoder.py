"""The reference decoder: the shapes of Qwen3, Qwen2.5 and Llama 3 at any size, in Flax NNX.

RMSNorm before every part, rotary positions, grouped-query attention (Qwen3's queries and keys are
normalised, Qwen2.5's have biases), SwiGLU. The parameters of the layers are stacked on a leading
axis, [L, ...]: whole rows run the layers in a scan, so the program does not grow with depth; what
goes on from a cache unrolls them, since a scan would copy the cache that it returns.

Shapes: B batch, T tokens, S cache slots, D hidden, H heads, K key-value heads, G = H / K,
C head size, F intermediate size, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from opsd_jax import policy as policy_lib
from opsd_jax.models import architecture, attention, paged, rope, safetensors, weights
from opsd_jax.models.architecture import DecoderConfig
from opsd_jax.models.options import DTYPES, DecoderOptions
from opsd_jax.options import parse
from opsd_jax.parallel.mesh import ROWS, constrain, path_name

# Which dimension of which parameter lies along which mesh axis (opsd_jax/parallel/mesh.py). The
# layers are stacked, so the leading dimension of theirs is depth.
DECODER_RULES = (
    (r"embedding", P("tensor", "fsdp")),
    (r"head", P("fsdp", "tensor")),
    (r"layers/(q|k|v)", P(None, "fsdp", "tensor", None)),
    (r"layers/(q|k|v)_bias", P(None, "tensor", None)),
    (r"layers/o", P(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)", P(None, "fsdp", "tensor")),
    (r"layers/down", P(None, "tensor", "fsdp")),
    (r"(layers/\w+_)?norm", P()),
)
# While rollouts are sampled: whole but for `tensor`, so that no step gathers a weight.
DECODE_RULES = tuple(
    (name, P(*(None if axis == "fsdp" else axis for axis in spec))) for name, spec in DECODER_RULES
)
CACHE_RULES = ((r"\d+/(k|v)", P(ROWS, "tensor")), (r"\d+/pages", paged.PAGES))  # of init_cache

# What `config.remat` keeps of a layer for its backward pass, besides its input.
_keep_attention = jax.checkpoint_policies.save_only_these_names(attention.KEPT)
KEPT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _keep_attention,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keep_attention
    ),
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis, computed in float32, in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale).astype(x.dtype)


def write(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT):
    """A layer's cache with keys and values at their positions; those at -1 are written nowhere."""
    if "pages" in cache:
        return paged.write(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT)
    length = cache["k"].shape[-1]
    slot_BxT = jnp.where(positions_BxT < 0, length, positions_BxT)  # out of bounds: dropped
    row_Bx1 = jnp.arange(len(slot_BxT))[:, None]
    return {
        "k": cache["k"].at[row_Bx1, :, :, slot_BxT].set(k_BxTxKxC, mode="drop"),
        "v": cache["v"].at[row_Bx1, :, slot_BxT].set(v_BxTxKxC, mode="drop"),
    }


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

        def zeros(*shape):
            return nnx.Param(jnp.zeros(shape, config.param_dtype))

        self.attention_norm, self.mlp_norm = ones(D), ones(D)
        self.q, self.k, self.v = weight(D, D, H, C), weight(D, D, K, C), weight(D, D, K, C)
        if config.attention_bias:
            self.q_bias, self.k_bias, self.v_bias = zeros(H, C), zeros(K, C), zeros(K, C)
        if config.qk_norm:
            self.q_norm, self.k_norm = ones(C), ones(C)
        self.o = weight(H * C, H, C, D, scale=depth)
        self.gate, self.up = weight(D, D, F), weight(D, D, F)
        self.down = weight(F, F, D, scale=depth)

    def attention(self, x_BxTxD, positions_BxT, table, cache):
        config = self.config
        w = lambda param: param[...].astype(config.dtype)

        def project(out_BxTxHxC):
            # One dimension to sum over: of two, XLA:CPU would transpose and copy both operands.
            B, T, H, C = out_BxTxHxC.shape
            return out_BxTxHxC.reshape(B, T, H * C) @ w(self.o).reshape(H * C, -1)

        q_BxTxHxC = jnp.einsum("btd,dhc->bthc", x_BxTxD, w(self.q))
        k_BxTxKxC = jnp.einsum("btd,dkc->btkc", x_BxTxD, w(self.k))
        v_BxTxKxC = jnp.einsum("btd,dkc->btkc", x_BxTxD, w(self.v))
        if config.attention_bias:
            q_BxTxHxC += w(self.q_bias)[None, None]
            k_BxTxKxC += w(self.k_bias)[None, None]
            v_BxTxKxC += w(self.v_bias)[None, None]
        if config.qk_norm:
            q_BxTxHxC = rms_norm(q_BxTxHxC, self.q_norm[...], config.rms_norm_eps)
            k_BxTxKxC = rms_norm(k_BxTxKxC, self.k_norm[...], config.rms_norm_eps)
        q_BxTxHxC = rope.rotate(q_BxTxHxC, table)
        k_BxTxKxC = rope.rotate(k_BxTxKxC, table)
        if cache is None and config.attention == "splash":
            out_BxTxHxC = attention.splash(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT)
            return project(out_BxTxHxC), (k_BxTxKxC, v_BxTxKxC)
        if cache is None:
            k_BxKxCxS, v_BxKxSxC = k_BxTxKxC.transpose(0, 2, 3, 1), v_BxTxKxC.swapaxes(1, 2)
            key_positions = positions_BxT
        elif "pages" in cache:
            cache = write(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT)
            if q_BxTxHxC.shape[1] == 1:  # decoding
                out_Bx1xHxC = paged.attend(q_BxTxHxC, cache, positions_BxT)
                return project(out_Bx1xHxC), cache
            k_BxKxCxS, v_BxKxSxC = paged.dense(cache)
            key_positions = jnp.arange(v_BxKxSxC.shape[2])[None]
        else:
            cache = write(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT)
            k_BxKxCxS, v_BxKxSxC = cache["k"], cache["v"]
            key_positions = jnp.arange(k_BxKxCxS.shape[-1])[None]
        mask_BxTxS = (key_positions[:, None] >= 0) & (
            key_positions[:, None] <= positions_BxT[..., None]
        )
        out_BxTxHxC = attention.dense(q_BxTxHxC, k_BxKxCxS, v_BxKxSxC, mask_BxTxS)
        return project(out_BxTxHxC), cache or (k_BxTxKxC, v_BxTxKxC)

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
        """Final hidden states [B, T, D]; with a cache, also the cache with these tokens in it.

        With splash attention several tokens that go into a cache are the first of their rows.
        """
        config = self.config
        words = self.embedding[...].astype(config.dtype)
        if cache is None:
            # Rows lie over `fsdp`, and so does the width of the embedding: a device looks up its
            # part of it for all of these rows, and an all-to-all gives each its own. By itself the
            # partitioner, where rows lie over `data` too, gathers the gradient of all on each.
            split = P("data", None, "fsdp")
            x_BxTxD = constrain(words[constrain(tokens_BxT, P("data"))], split)
        else:
            x_BxTxD = words[tokens_BxT]
        table = rope.table(positions_BxT, config.head_dim, config.rope_theta, config.rope_scaling)
        graphdef, stacked = nnx.split(self.layers)
        begins = cache is not None and config.attention == "splash" and tokens_BxT.shape[1] > 1
        if cache is None or begins:
            stream = P(ROWS, "tensor" if config.sequence_parallel and cache is None else None)
            x_BxTxD = constrain(x_BxTxD, stream)

            def layer(x_BxTxD, weights):
                x_BxTxD, kv = nnx.merge(graphdef, weights)(x_BxTxD, positions_BxT, table)
                return constrain(x_BxTxD, stream), kv if begins else None

            if config.remat != "none":
                layer = jax.checkpoint(layer, policy=KEPT[config.remat], prevent_cse=False)
            with jax.named_scope("layers"):
                x_BxTxD, kv = jax.lax.scan(layer, x_BxTxD, stacked, unroll=config.scan_unroll)
            if begins:
                k_LxBxTxKxC, v_LxBxTxKxC = kv
                cache = tuple(
                    write(layer_cache, k_LxBxTxKxC[i], v_LxBxTxKxC[i], positions_BxT)
                    for i, layer_cache in enumerate(cache)
                )
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
        """An empty cache, as `config.cache` says: per layer pages (opsd_jax/models/paged.py), or
        keys [B, K, C, S] (slots last, the layout that the product with one query reads straight
        through) and values [B, K, S, C].
        """
        K, C, dtype = self.config.num_kv_heads, self.config.head_dim, self.config.dtype

        def layer():
            if self.config.cache == "paged":
                return paged.init(batch, length, K, C, dtype)
            return {
                "k": jnp.zeros((batch, K, C, length), dtype),
                "v": jnp.zeros((batch, K, length, C), dtype),
            }

        return tuple(layer() for _ in range(self.config.num_layers))


def sizes(options: DecoderOptions | Mapping[str, Any]) -> DecoderConfig:
    """The sizes and numerics that the section `model` of a config describes.

    Args:
      options: the section, parsed, or as it stands in the config.

    Raises:
      ConfigError: A field has a value that the decoder does not support. The message names it.
    """
    if not isinstance(options, DecoderOptions):
        options = parse(DecoderOptions, options, "model")
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(DecoderConfig)}
    fields |= {name: DTYPES[fields[name]] for name in ("dtype", "param_dtype")}
    return DecoderConfig(**fields)


def model(config: DecoderConfig) -> policy_lib.Model:
    """The decoder of these sizes, with random initial parameters."""
    stacked, init = policy_lib.from_nnx(lambda rngs: Decoder(config, rngs=rngs))
    is_unrolled = lambda leaf: isinstance(leaf, tuple)

    def unrolled(params: policy_lib.Params) -> policy_lib.Params:
        return {**params, "layers": jax.tree.map(tuple, params["layers"])}

    def forward(params, *arguments):
        # What takes a layer of a stack that was just made is simplified to that layer's array.
        stack = lambda leaf: jnp.stack(leaf) if is_unrolled(leaf) else leaf
        return stacked.forward(jax.tree.map(stack, params, is_leaf=is_unrolled), *arguments)

    policy = stacked._replace(forward=forward)

    def save(params: policy_lib.Params, directory: pathlib.Path, dtype: str = "") -> None:
        dtype = dtype or jnp.dtype(config.param_dtype).name
        codes = dict.fromkeys(weights.all_tensors(params), safetensors.CODES[dtype])
        files = {"config.json": architecture.to_json(config, dtype)}
        weights.save(params, directory, codes, files)

    def decode_params(params: policy_lib.Params) -> policy_lib.Params:
        """All but the norms in the dtype of the products: what every step casts them to."""
        cast = lambda path, leaf: leaf if "norm" in path_name(path) else leaf.astype(config.dtype)
        return jax.tree_util.tree_map_with_path(cast, params)

    return policy_lib.Model(
        policy,
        init,
        DECODER_RULES,
        config.vocab_size,
        decode_rules=DECODE_RULES,
        decode_params=decode_params,
        unrolled=unrolled,
        cache_rules=CACHE_RULES,
        ragged=config.cache == "paged",
        save=save,
    )


def from_config(options: DecoderOptions | Mapping[str, Any]) -> policy_lib.Model:
    """The decoder that the section `model` of a config describes; raises as `sizes` does."""
    return model(sizes(options))
