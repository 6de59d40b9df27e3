"""The reference decoder in Flax NNX: Qwen3, Qwen2.5, Llama 3 and Gemma 3 at any size.

Every layer has grouped-query attention with rotary embeddings and a gated MLP, each after an
RMSNorm. Options add the normalised queries and keys of Qwen3, the biases of Qwen2.5, and the
sliding windows and the norms after attention and MLP of Gemma 3.

The parameters of all layers are stacked along a leading axis, [L, ...]. Without a cache, a scan
runs the layers, so the size of the program doesn't depend on the depth. Decoding with a cache
unrolls the layers, because a scan would copy the whole cache at every step.

Shapes: B batch, T tokens, S cache entries, D hidden size, H query heads, K key-value heads,
G = H / K, C head size, F MLP size, V vocabulary size, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from opsd_jax import policy as policy_lib
from opsd_jax.models import architecture, attention, paged, peft, rope, safetensors, weights
from opsd_jax.models.architecture import DecoderConfig
from opsd_jax.models.lora import LowRank
from opsd_jax.models.options import DecoderOptions, parse_model
from opsd_jax.models.quantised import QuantisationOptions, Quantised, is_quantised, quantise
from opsd_jax.parallel.mesh import ROWS, constrain, path_name

# The sharding of the parameters (`Model.rules`). The first dimension of "layers/..." is the layer.
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
# For sampling, weights are sharded over `tensor` only, so that no decoding step gathers a weight.
# A scale of a weight in 8 bits is sharded like the weight, except along axes that matmuls contract.
DECODE_RULES = (
    (r"layers/(o|down)/scale", P()),
    *(
        (rf"{name}(/values|/scale)?", P(*(None if axis == "fsdp" else axis for axis in spec)))
        for name, spec in DECODER_RULES
    ),
)
# With `context_parallel`, every layer gathers its weights, so they are split along one dimension.
CONTEXT_RULES = (
    *(
        (name, P(*(("fsdp", "tensor") if axis == "fsdp" else None for axis in spec)))
        for name, spec in DECODER_RULES
        if name.startswith("layers/")
    ),
    *DECODER_RULES,
)
# The axes that matmuls contract. These weights are the ones that `config.int8_weights` quantises,
# and `head` or, with tied embeddings, `embedding`.
CONTRACTED = {
    **dict.fromkeys(("layers/q", "layers/k", "layers/v", "layers/gate", "layers/up"), (1,)),
    "layers/o": (1, 2),
    "layers/down": (1,),
}
# The sharding of the cache that `Decoder.init_cache` creates.
CACHE_RULES = (
    (r"\d+/(k|v)(/values|/scale)?", P(ROWS, "tensor")),
    (r"pages/\d+", paged.PAGES),
    (r"rows/\d+/scales", paged.SCALES),
    (r"table", paged.TABLE),
)

# For each value of `config.remat` except "none": what a layer stores besides its input.
_save_attention = jax.checkpoint_policies.save_only_these_names(attention.CHECKPOINT_NAME)
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save_attention,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _save_attention
    ),
}

ACTIVATIONS: dict[str, Any] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
}

LayerCache = dict[str, Any]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: bool = False) -> jax.Array:
    """Applies RMSNorm over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Args:
      x: Input [..., D] of any float dtype.
      scale: Scale [D].
      eps: Constant that is added to the mean square.
      offset: Whether 1 is added to the scale.

    Returns:
      `x / rms(x) * scale`, computed in float32 and returned in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    if offset:
        scale += 1
    return (x32 * scale).astype(x.dtype)


def product(x: jax.Array, weight: jax.Array | Quantised | LowRank) -> jax.Array:
    """Multiplies x [B, T, D] by a weight [D, ...].

    On one device, all tokens become one dimension. Otherwise the gradient of the weight would sum
    over two dimensions, for which XLA:CPU transposes and copies an operand. On several devices B
    and T may be sharded over different axes, so they stay apart.
    """
    if isinstance(weight, LowRank):
        return product(x, weight.weight) + product(product(weight.dropped(x), weight.a), weight.b)
    if isinstance(weight, Quantised):
        return weight.scaled(product(x, weight.values.astype(x.dtype))).astype(x.dtype)
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.tensordot(x, weight, axes=1)
    size, *outer = weight.shape
    return (x.reshape(-1, size) @ weight.reshape(size, -1)).reshape(*x.shape[:-1], *outer)


def write(
    cache: LayerCache, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, positions_BxT: jax.Array
) -> LayerCache:
    """Returns a layer's cache, updated with new keys and values at the given positions.

    Keys and values of padding, at position -1, are dropped.
    """
    if "pages" in cache:
        return paged.write(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT)
    k: Any = k_BxTxKxC
    v: Any = v_BxTxKxC
    if isinstance(cache["k"], Quantised):
        k, v = quantise(k, -1), quantise(v, -1)
    length = jax.tree.leaves(cache["k"])[0].shape[-1]
    entry_BxT = jnp.where(positions_BxT < 0, length, positions_BxT)  # out of bounds, so dropped
    row_Bx1 = jnp.arange(len(entry_BxT))[:, None]
    return {
        "k": jax.tree.map(
            lambda old, new: old.at[row_Bx1, :, :, entry_BxT].set(new, mode="drop"), cache["k"], k
        ),
        "v": jax.tree.map(
            lambda old, new: old.at[row_Bx1, :, entry_BxT].set(new, mode="drop"), cache["v"], v
        ),
    }


class Block(nnx.Module):
    """A decoder layer: attention and an MLP, each with a pre-norm and a residual connection."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F = config.hidden_size, config.intermediate_size
        H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
        # The variance is 1 / fan_in. Matmuls that write to the residual stream are scaled down.
        depth = (2 * config.num_layers) ** -0.5

        def weight(fan_in, *shape, scale=1.0):
            init = jax.random.normal(rngs.params(), shape, jnp.float32) * (scale * fan_in**-0.5)
            return nnx.Param(init.astype(config.param_dtype))

        def zeros(*shape):
            return nnx.Param(jnp.zeros(shape, config.param_dtype))

        def norm(size):
            return nnx.Param(jnp.full(size, not config.norm_offset, config.param_dtype))

        self.attention_norm, self.mlp_norm = norm(D), norm(D)
        if config.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(D), norm(D)
        self.q, self.k, self.v = weight(D, D, H, C), weight(D, D, K, C), weight(D, D, K, C)
        if config.attention_bias:
            self.q_bias, self.k_bias, self.v_bias = zeros(H, C), zeros(K, C), zeros(K, C)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm(C), norm(C)
        self.o = weight(H * C, H, C, D, scale=depth)
        self.gate, self.up = weight(D, D, F), weight(D, D, F)
        self.down = weight(F, F, D, scale=depth)

    def _weight(self, param: nnx.Param) -> Any:
        """Casts a parameter to `config.dtype`, the dtype of the matmuls, unless it is quantised."""
        weight = param.get_value()
        return weight if isinstance(weight, Quantised) else weight.astype(self.config.dtype)

    def _norm(self, x: jax.Array, scale: nnx.Param) -> jax.Array:
        return rms_norm(x, scale[...], self.config.rms_norm_eps, self.config.norm_offset)

    def queries_keys_values(self, x_BxTxD, table):
        """Computes queries, keys and values [B, T, heads, C]. Applies RoPE to queries and keys."""
        config, w = self.config, self._weight
        q_BxTxHxC = product(x_BxTxD, w(self.q))
        k_BxTxKxC = product(x_BxTxD, w(self.k))
        v_BxTxKxC = product(x_BxTxD, w(self.v))
        if config.attention_bias:
            q_BxTxHxC += w(self.q_bias)[None, None]
            k_BxTxKxC += w(self.k_bias)[None, None]
            v_BxTxKxC += w(self.v_bias)[None, None]
        if config.qk_norm:
            q_BxTxHxC = self._norm(q_BxTxHxC, self.q_norm)
            k_BxTxKxC = self._norm(k_BxTxKxC, self.k_norm)
        return rope.rotate(q_BxTxHxC, table), rope.rotate(k_BxTxKxC, table), v_BxTxKxC

    def project(self, out_BxTxHxC):
        """Projects the outputs of the attention heads [B, T, H, C] to the hidden size [B, T, D]."""
        # The matmul sums over one dimension. With two, XLA:CPU would transpose and copy both
        # operands.
        B, T, H, C = out_BxTxHxC.shape
        return product(out_BxTxHxC.reshape(B, T, H * C), self._weight(self.o).reshape(H * C, -1))

    def attention(self, x_BxTxD, positions_BxT, table, cache, split_tokens, slides):
        """Computes causal self-attention within each sequence, or over the cache if there is one.

        With `split_tokens`, `tensor` shards the tokens instead of the heads. `slides` says whether
        the layer has a sliding window: bool [] without a cache, and a Python bool with one.

        Returns:
          `(output, cache)`: the output [B, T, D] and the updated cache. Without a cache, the second
          element is the pair of keys and values, [B, T, K, C] each.
        """
        config = self.config
        q_BxTxHxC, k_BxTxKxC, v_BxTxKxC = self.queries_keys_values(x_BxTxD, table)
        scale = config.query_scalar**-0.5 if config.query_scalar else None
        if cache is None:
            given = q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT
            out_BxTxHxC = self._attend(given, split_tokens, slides, scale)
            return self.project(out_BxTxHxC), (k_BxTxKxC, v_BxTxKxC)
        cache = write(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT)
        window = config.sliding_window if slides else None
        if "pages" in cache and q_BxTxHxC.shape[1] == 1:
            out_BxTxHxC = paged.attend(q_BxTxHxC, cache, positions_BxT, window=window, scale=scale)
            return self.project(out_BxTxHxC), cache
        if "pages" in cache:
            k_BxKxCxS, v_BxKxSxC = paged.dense(cache, q_BxTxHxC.dtype)
        else:
            k_BxKxCxS, v_BxKxSxC = cache["k"], cache["v"]
        length = jax.tree.leaves(k_BxKxCxS)[0].shape[-1]
        mask_BxTxS = attention.mask(jnp.arange(length)[None], positions_BxT, window)
        out_BxTxHxC = attention.dense(q_BxTxHxC, k_BxKxCxS, v_BxKxSxC, mask_BxTxS, scale)
        return self.project(out_BxTxHxC), cache

    def _attend(self, given, split_tokens, slides, scale):
        """Computes attention without a cache. `given` has queries, keys, values and positions."""
        config = self.config
        if config.attention == "dense":  # the compiler gathers the keys and values
            window = None
            if config.sliding_window:
                window = jnp.where(slides, config.sliding_window, jnp.iinfo(jnp.int32).max)
            return attention.causal(*given, window=window, scale=scale)
        whole = functools.partial(attention.splash, split_tokens=split_tokens, scale=scale)
        if not config.sliding_window:
            return whole(*given)
        sliding = functools.partial(attention.splash, window=config.sliding_window, scale=scale)
        return jax.lax.cond(slides, sliding, whole, *given)

    def mlp(self, x_BxTxD):
        """Applies the gated MLP (Shazeer, arXiv 2002.05202)."""
        w = self._weight
        gate_BxTxF, up_BxTxF = product(x_BxTxD, w(self.gate)), product(x_BxTxD, w(self.up))
        return product(ACTIVATIONS[self.config.activation](gate_BxTxF) * up_BxTxF, w(self.down))

    def __call__(self, x_BxTxD, positions_BxT, table, cache=None, split_tokens=False, slides=False):
        """Applies the layer to the residual stream [B, T, D].

        Returns:
          `(stream, cache)`: the new residual stream, and the second result of `attention`.
        """
        with jax.named_scope("attention"):
            y, cache = self.attention(
                self._norm(x_BxTxD, self.attention_norm),
                positions_BxT,
                table,
                cache,
                split_tokens,
                slides,
            )
            x_BxTxD += self._norm(y, self.attention_post_norm) if self.config.post_norms else y
        with jax.named_scope("mlp"):
            y = self.mlp(self._norm(x_BxTxD, self.mlp_norm))
            x_BxTxD += self._norm(y, self.mlp_post_norm) if self.config.post_norms else y
        return x_BxTxD, cache


class Decoder(nnx.Module):
    """A decoder-only transformer: embedding, layers, final norm and output head.

    Use it through the `Policy` of `model`. The three public methods are the functions of `Policy`.
    """

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
        self.norm = nnx.Param(jnp.full(D, not config.norm_offset, config.param_dtype))
        if not config.tie_word_embeddings:
            self.head = nnx.Param((normal(D, V) * D**-0.5).astype(config.param_dtype))

    def __call__(self, tokens_BxT, positions_BxT, cache=None):
        """Returns the hidden states [B, T, D] after the final norm, and the updated cache.

        With splash attention, a call with a cache and at least 128 tokens per row must be the
        first of its rows: the tokens attend to one another and not to the cache.
        """
        config, is_paged = self.config, isinstance(cache, policy_lib.PagedCache)
        x_BxTxD = self._embed(tokens_BxT, shard=cache is None)
        if is_paged:
            cache = paged.split(cache)
        table = self._rope(positions_BxT)
        if cache is None:
            x_BxTxD, _ = self._scan_layers(x_BxTxD, positions_BxT, table, prefill=False)
        elif config.attention == "splash" and tokens_BxT.shape[1] >= attention.LANES:
            x_BxTxD, (k_LxBxTxKxC, v_LxBxTxKxC) = self._scan_layers(
                x_BxTxD, positions_BxT, table, prefill=True
            )
            cache = tuple(
                write(layer_cache, k_LxBxTxKxC[i], v_LxBxTxKxC[i], positions_BxT)
                for i, layer_cache in enumerate(cache)
            )
        else:
            x_BxTxD, cache = self._unrolled_layers(x_BxTxD, positions_BxT, table, cache)
        if is_paged:
            cache = paged.join(cache)
        return rms_norm(x_BxTxD, self.norm[...], config.rms_norm_eps, config.norm_offset), cache

    def _rope(self, positions_BxT):
        """Returns the tables of the rotary embeddings: of full and of sliding attention."""
        config = self.config
        whole = rope.table(positions_BxT, config.head_dim, config.rope_theta, config.rope_scaling)
        if not config.rope_local_theta:
            return whole, whole
        theta = config.rope_local_theta
        return whole, rope.table(positions_BxT, config.head_dim, theta, rope.RopeScaling())

    def _embed(self, tokens_BxT, *, shard: bool):
        """Looks up token embeddings [B, T, D]. If `shard` is True, constrains their sharding."""
        rows = self._embedded(tokens_BxT, shard)
        if self.config.scale_embeddings:
            rows *= jnp.asarray(self.config.hidden_size**0.5, rows.dtype)
        return rows

    def _embedded(self, tokens_BxT, shard):
        """Looks up token embeddings, without the factor of Gemma."""
        embedding_VxD = self.embedding.get_value()
        if isinstance(embedding_VxD, Quantised):
            rows = embedding_VxD[tokens_BxT]
            return (rows.values * rows.scale).astype(self.config.dtype)
        embedding_VxD = embedding_VxD.astype(self.config.dtype)
        if not shard:
            return embedding_VxD[tokens_BxT]
        # The rows of the batch and the width of the embedding are both sharded over `fsdp`. Each
        # device looks up its part of the width for the rows of all devices along `fsdp`, and an
        # all-to-all then gives each device its rows. Without these constraints, if the rows are
        # sharded over `data` as well, the partitioner gathers the gradient of all rows everywhere.
        layout = P("data", None, "fsdp")
        if jax.sharding.get_abstract_mesh().manual_axes:
            # Within a shard_map over `data`, XLA of jax 0.11 aborts on the lookup in a vocabulary
            # that is sharded over `tensor`.
            embedding_VxD = constrain(embedding_VxD, P(None, "fsdp"))
        return constrain(embedding_VxD[constrain(tokens_BxT, P("data"))], layout)

    def _scan_layers(self, x_BxTxD, positions_BxT, table, *, prefill: bool):
        """Applies all layers with `jax.lax.scan`, without a cache.

        Returns:
          The residual stream [B, T, D]. With `prefill` also the keys and values of all layers, both
          [L, B, T, K, C]; None otherwise.
        """
        config = self.config
        graphdef, stacked = nnx.split(self.layers)
        split_tokens = config.context_parallel and not prefill
        split_stream = config.context_parallel or config.sequence_parallel
        stream = P(ROWS, "tensor" if split_stream and not prefill else None)
        x_BxTxD = constrain(x_BxTxD, stream)

        slides_L, tables = jnp.array(config.slides), config.rope_local_theta > 0

        def layer(x_BxTxD, given):
            weights, slides = given
            if split_tokens:
                weights = jax.tree.map(self._gathered, weights, is_leaf=is_quantised)
            block = nnx.merge(graphdef, weights)
            x_BxTxD, kv = block(
                x_BxTxD,
                positions_BxT,
                jax.tree.map(lambda a, b: jnp.where(slides, b, a), *table) if tables else table[0],
                split_tokens=split_tokens,
                slides=slides,
            )
            return constrain(x_BxTxD, stream), kv if prefill else None

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        with jax.named_scope("layers"):
            return jax.lax.scan(layer, x_BxTxD, (stacked, slides_L), unroll=config.scan_unroll)

    def _gathered(self, weight):
        """Gathers a weight of a layer on all devices, in the dtype of the matmuls.

        Its gradient is not gathered. A constraint on the weight would gather that as well.
        """
        gather = jax.custom_vjp(lambda w: constrain(w, P()))
        gather.defvjp(lambda w: (constrain(w, P()), None), lambda _, gradient: (gradient,))
        if isinstance(weight, Quantised):
            return jax.tree.map(lambda x: constrain(x, P()), weight)
        return gather(weight if weight.ndim < 2 else weight.astype(self.config.dtype))

    def _unrolled_layers(self, x_BxTxD, positions_BxT, table, cache):
        """Applies all layers in an unrolled loop. Returns hidden states and the updated caches."""
        graphdef, stacked = nnx.split(self.layers)
        updated = []
        for i, layer_cache in enumerate(cache):
            block = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], stacked))
            slides = self.config.slides[i]
            x_BxTxD, layer_cache = block(
                x_BxTxD, positions_BxT, table[slides], layer_cache, slides=slides
            )
            updated.append(layer_cache)
        return x_BxTxD, tuple(updated)

    def unembed(self, hidden):
        """Computes float32 logits [..., V] from hidden states [..., D]."""
        tied = self.config.tie_word_embeddings
        head_DxV = self.embedding.get_value().T if tied else self.head.get_value()
        values_DxV = head_DxV.values if isinstance(head_DxV, Quantised) else head_DxV
        logits = jnp.einsum(
            "...d,dv->...v",
            hidden,
            values_DxV.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return head_DxV.scaled(logits) if isinstance(head_DxV, Quantised) else logits

    def init_cache(self, batch, length):
        """Returns an empty key-value cache: a `PagedCache`, or a tuple with one dict per layer.

        A paged cache is described in opsd_jax/models/paged.py. A layer of a dense cache has keys
        [B, K, C, S] and values [B, K, S, C]. The keys have their positions last, because the matmul
        with a single query reads this layout sequentially.
        """
        K, C, dtype = self.config.num_kv_heads, self.config.head_dim, self.config.dtype

        int8 = self.config.int8_cache

        def layer() -> LayerCache:
            if self.config.cache == "paged":
                return paged.init(batch, length, K, C, jnp.int8 if int8 else dtype)
            k, v = jnp.zeros((batch, K, C, length), dtype), jnp.zeros((batch, K, length, C), dtype)
            return {"k": quantise(k, 2), "v": quantise(v, 3)} if int8 else {"k": k, "v": v}

        layers = tuple(layer() for _ in range(self.config.num_layers))
        return paged.join(layers) if self.config.cache == "paged" else layers


def config_of(options: DecoderOptions | Mapping[str, Any]) -> DecoderConfig:
    """Converts the config section `model` to a `DecoderConfig`.

    Args:
      options: The section, parsed or as it is in the config.

    Raises:
      ConfigError: The decoder does not support a value. The message names the field.
    """
    return DecoderConfig(**vars(parse_model(DecoderOptions, options)))


def flops(config: DecoderConfig, tokens: float, pairs: float, predicted: float) -> float:
    """Implements `Model.flops`."""
    D, F = config.hidden_size, config.intermediate_size
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    weights_of_layer = D * C * (H + 2 * K) + H * C * D + 3 * D * F
    # A token attends to at most `sliding_window` tokens in some layers. The pairs of all sequences
    # together have this bound only on average, so the figure is an upper bound.
    near = min(pairs, tokens * config.sliding_window)
    attended = sum(near if slides else pairs for slides in config.slides)
    attention_flops = 2 * H * C * attended
    of_layers = config.num_layers * weights_of_layer * tokens + attention_flops
    return 2 * (of_layers + D * config.vocab_size * predicted)


def model(config: DecoderConfig) -> policy_lib.Model:
    """Builds a decoder as a `Model` that initialises its parameters randomly."""
    layouts = architecture.layouts(config)
    stacked, init = policy_lib.from_nnx(lambda rngs: Decoder(config, rngs=rngs))
    is_unrolled = lambda leaf: isinstance(leaf, tuple)
    head = {"embedding": (1,)} if config.tie_word_embeddings else {"head": (0,)}
    contracted = CONTRACTED | head

    def unrolled(params: policy_lib.Params) -> policy_lib.Params:
        return {**params, "layers": jax.tree.map(tuple, params["layers"])}

    def forward(params, *arguments):
        # XLA simplifies stacking arrays and then slicing one out to the array itself.
        stack = lambda leaf: jnp.stack(leaf) if is_unrolled(leaf) else leaf
        return stacked.forward(jax.tree.map(stack, params, is_leaf=is_unrolled), *arguments)

    def save(params: policy_lib.Params, directory: pathlib.Path, dtype: str = "") -> None:
        dtype = dtype or config.param_dtype
        codes = dict.fromkeys(weights.all_layouts(params, layouts), safetensors.CODES[dtype])
        files = {"config.json": architecture.to_json(config, dtype)}
        weights.save(params, directory, codes, files, layouts)

    def decode_params(params: policy_lib.Params) -> policy_lib.Params:
        # The forward pass casts all parameters but the norms to this dtype in any case.
        def prepare(path, leaf):
            name = path_name(path)
            if config.int8_weights and name in contracted:
                return quantise(leaf, contracted[name])
            return leaf if "norm" in name else leaf.astype(config.dtype)

        return jax.tree_util.tree_map_with_path(prepare, params)

    def quantised(options: QuantisationOptions) -> policy_lib.Model:
        weights, cache = options.weights == "int8", options.cache == "int8"
        return model(dataclasses.replace(config, int8_weights=weights, int8_cache=cache))

    return policy_lib.Model(
        stacked._replace(forward=forward),
        init,
        CONTEXT_RULES if config.context_parallel else DECODER_RULES,
        config.vocab_size,
        decode_rules=DECODE_RULES,
        decode_params=decode_params,
        unrolled=unrolled,
        cache_rules=CACHE_RULES,
        ragged=config.cache == "paged",
        save=save,
        quantised=quantised,
        matrices=tuple(
            (name, policy_lib.Matrix(stacked=1, inputs=len(axes)))
            for name, axes in CONTRACTED.items()
        ),
        low_rank=True,
        adapter_files=peft.FILES,
        packs=True,
        flops=functools.partial(flops, config),
    )


def from_config(options: DecoderOptions | Mapping[str, Any]) -> policy_lib.Model:
    """Builds a decoder with random initial parameters from the config section `model`.

    Args:
      options: The section, parsed or as it is in the config.

    Raises:
      ConfigError: The decoder does not support a value. The message names the field.
    """
    return model(config_of(options))
