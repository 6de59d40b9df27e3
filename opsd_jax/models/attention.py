"""Grouped-query attention in plain JAX and with the Pallas splash attention kernel for TPUs.

Shapes: B rows, T queries, S keys, H query heads, K key-value heads, G = H / K, C head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from opsd_jax.models.quantised import Quantised
from opsd_jax.parallel.mesh import ROWS, on_each_device
from opsd_jax.policy import segment_ids

# The name under which `jax.checkpoint` policies find the output of splash attention.
CHECKPOINT_NAME = "attention"
LANES = 128  # The kernel needs numbers of tokens and head sizes that are multiples of this.
# The number of queries and of keys in a block. The kernel's working set fits into the VMEM of a
# v5e, and the kernel skips almost half of the blocks of a long row because of the causal mask.
BLOCK = 512
# Dense attention without a cache: the smallest number of queries in a block, and the most blocks.
LEAST_QUERIES, MOST_BLOCKS = 128, 8


def mask(key_positions_BxS: jax.Array, positions_BxT: jax.Array) -> jax.Array:
    """Returns the causal mask, bool [B, T, S]: True if 0 <= key position <= query position."""
    return (key_positions_BxS[:, None] >= 0) & (
        key_positions_BxS[:, None] <= positions_BxT[..., None]
    )


def dense(
    q_BxTxHxC: jax.Array,
    k_BxKxCxS: jax.Array | Quantised,
    v_BxKxSxC: jax.Array | Quantised,
    mask_BxTxS: jax.Array,
) -> jax.Array:
    """Computes masked attention with plain JAX operations and a float32 softmax.

    Args:
      q_BxTxHxC: Queries.
      k_BxKxCxS: Keys, of the same dtype as the queries or with a scale for each key.
      v_BxKxSxC: Values, likewise.
      mask_BxTxS: bool, which keys each query attends to.

    Returns:
      The output [B, T, H, C]. It is finite but meaningless for a query without any key.
    """
    B, T, H, C = q_BxTxHxC.shape
    k_BxKxCxS, k_scale = _apart(k_BxKxCxS, q_BxTxHxC.dtype)
    v_BxKxSxC, v_scale = _apart(v_BxKxSxC, q_BxTxHxC.dtype)
    K = k_BxKxCxS.shape[1]
    # All queries that share a key-value head become one dimension. XLA:CPU runs the resulting
    # batched matmul far faster than an einsum that keeps heads and queries apart.
    q_BxKxGxTxC = q_BxTxHxC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4) * (C**-0.5)
    q_BxKxQxC = q_BxKxGxTxC.reshape(B, K, -1, C)
    scores = jnp.einsum("bkqc,bkcs->bkqs", q_BxKxQxC, k_BxKxCxS, preferred_element_type=jnp.float32)
    if k_scale is not None:
        scores *= k_scale  # [B, K, 1, S]
    scores = scores.reshape(B, K, H // K, T, -1)
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, -1, scores.shape[-1])
    if v_scale is not None:
        weights *= v_scale.swapaxes(2, 3)  # [B, K, 1, S]
    out = jnp.einsum("bkqs,bksc->bkqc", weights.astype(v_BxKxSxC.dtype), v_BxKxSxC)
    return out.reshape(B, K, H // K, T, C).transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def _apart(x: jax.Array | Quantised, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Returns values in `dtype` and their scale, or the array itself and None."""
    return (x.values.astype(dtype), x.scale) if isinstance(x, Quantised) else (x, None)


def causal(
    q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, positions_BxT: jax.Array
) -> jax.Array:
    """Computes causal attention with plain JAX operations, within each sequence of a row.

    Blocks of queries attend to the keys up to their own end, so a long row has only little more
    than half of the [T, T] scores.

    Args:
      q_BxTxHxC: Queries.
      k_BxTxKxC: Keys.
      v_BxTxKxC: Values.
      positions_BxT: int32, -1 for padding; 0 begins a sequence. The positions of a sequence must
        ascend along a row.

    Returns:
      The output [B, T, H, C]. It is finite but meaningless at padding.
    """
    T, segment_BxT = q_BxTxHxC.shape[1], segment_ids(positions_BxT)
    k_BxKxCxT, v_BxKxTxC = k_BxTxKxC.transpose(0, 2, 3, 1), v_BxTxKxC.swapaxes(1, 2)
    size = max(LEAST_QUERIES, -(-T // MOST_BLOCKS))

    def block(start: int) -> jax.Array:
        end = min(start + size, T)
        mask_BxQxS = mask(positions_BxT[:, :end], positions_BxT[:, start:end])
        mask_BxQxS &= segment_BxT[:, None, :end] == segment_BxT[:, start:end, None]
        return dense(
            q_BxTxHxC[:, start:end], k_BxKxCxT[..., :end], v_BxKxTxC[:, :, :end], mask_BxQxS
        )

    return jnp.concatenate([block(start) for start in range(0, T, size)], axis=1)


def splash(
    q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, positions_BxT: jax.Array
) -> jax.Array:
    """Computes causal attention with the Pallas splash attention kernel, within each sequence.

    The kernel never stores a [T, T] array, and it skips the blocks above the diagonal. With a mesh
    in context, rows are sharded over `data` and `fsdp` and heads over `tensor`, and each device
    computes its own part.

    Args:
      q_BxTxHxC: Queries.
      k_BxTxKxC: Keys.
      v_BxTxKxC: Values.
      positions_BxT: int32, -1 for padding; 0 begins a sequence. The positions of a sequence must
        ascend along a row, because the kernel masks by column.

    Returns:
      The output [B, T, H, C]. It is finite but meaningless at padding.
    """

    def local(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT):
        T, H, C = q_BxTxHxC.shape[1:]
        padded = -(-T // LANES) * LANES
        block = max(size for size in range(LANES, BLOCK + 1, LANES) if padded % size == 0)
        sizes = splash_attention_kernel.BlockSizes(*(block,) * 8)
        causal = splash_attention_mask.CausalMask((padded, padded))
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([causal] * H),
            block_sizes=sizes,
            residual_checkpoint_name=CHECKPOINT_NAME,
        )

        def heads_first(x_BxTxHxC):
            x_BxTxHxC = jnp.pad(x_BxTxHxC, ((0, 0), (0, padded - T), (0, 0), (0, 0)))
            return x_BxTxHxC.swapaxes(1, 2)

        q_BxHxTxC, k_BxKxTxC, v_BxKxTxC = map(
            heads_first, (q_BxTxHxC * (C**-0.5), k_BxTxKxC, v_BxTxKxC)
        )
        # Neither the sequences nor the padding attend to one another.
        segment_BxT = jnp.pad(
            segment_ids(positions_BxT), ((0, 0), (0, padded - T)), constant_values=-1
        )
        segments = splash_attention_kernel.SegmentIds(segment_BxT, segment_BxT)
        out_BxHxTxC = jax.vmap(kernel)(q_BxHxTxC, k_BxKxTxC, v_BxKxTxC, segments)
        return out_BxHxTxC.swapaxes(1, 2)[:, :T]

    heads = P(ROWS, None, "tensor")
    local = on_each_device(local, (heads, heads, heads, P(ROWS)), heads)
    return local(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT)
