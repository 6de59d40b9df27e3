"""Grouped-query attention: written out, and by the splash attention kernel that comes with JAX.

Shapes: B rows, T queries, S keys, H heads, K key-value heads, G = H / K, C head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel.mesh import ROWS, on_each_device

KEPT = "attention"  # the name of splash attention's results among what remat may keep
LANES = 128  # tokens come in multiples of this
# Queries and keys of a block. The kernel's working set stays within a v5e's VMEM, and a causal mask
# has nothing to do in close to half of the blocks of a long row.
BLOCK = 512


def dense(
    q_BxTxHxC: jax.Array, k_BxKxCxS: jax.Array, v_BxKxSxC: jax.Array, mask_BxTxS: jax.Array
) -> jax.Array:
    """Attention [B, T, H, C], softmax in float32; a query with no key gets finite nonsense."""
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


def splash(
    q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, positions_BxT: jax.Array
) -> jax.Array:
    """Attention [B, T, H, C] of each token to those of its row up to itself, on TPUs.

    The positions that are not padding (-1) have to ascend along a row: the kernel knows columns.
    Nothing of [T, T] is made, and blocks above the diagonal are skipped. With a mesh in context,
    rows lie over `data` and `fsdp` and heads over `tensor`, and every device computes its own.
    A query of padding gets finite nonsense.
    """

    def local(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT):
        T, H, C = q_BxTxHxC.shape[1:]
        padded = -(-T // LANES) * LANES
        block = max(size for size in range(LANES, BLOCK + 1, LANES) if padded % size == 0)
        sizes = splash_attention_kernel.BlockSizes(*(block,) * 8)
        mask = splash_attention_mask.CausalMask((padded, padded))
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask] * H),
            block_sizes=sizes,
            residual_checkpoint_name=KEPT,
        )

        def heads_first(x_BxTxHxC):
            x_BxTxHxC = jnp.pad(x_BxTxHxC, ((0, 0), (0, padded - T), (0, 0), (0, 0)))
            return x_BxTxHxC.swapaxes(1, 2)

        q_BxHxTxC, k_BxKxTxC, v_BxKxTxC = map(
            heads_first, (q_BxTxHxC * (C**-0.5), k_BxTxKxC, v_BxTxKxC)
        )
        # Tokens and padding do not see each other.
        segment_BxT = jnp.pad(positions_BxT, ((0, 0), (0, padded - T)), constant_values=-1) >= 0
        segment_BxT = segment_BxT.astype(jnp.int32)
        segments = splash_attention_kernel.SegmentIds(segment_BxT, segment_BxT)
        out_BxHxTxC = jax.vmap(kernel)(q_BxHxTxC, k_BxKxTxC, v_BxKxTxC, segments)
        return out_BxHxTxC.swapaxes(1, 2)[:, :T]

    heads = P(ROWS, None, "tensor")
    local = on_each_device(local, (heads, heads, heads, P(ROWS)), heads)
    return local(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT)
