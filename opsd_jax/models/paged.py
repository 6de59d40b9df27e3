"""A paged key-value cache, and attention over it with JAX's Pallas kernel for TPUs.

For each row, the kernel reads only the blocks of pages that hold tokens. The cost of a decoding
step therefore depends on the filled length of the cache, not on its full length. Every row owns its
pages, in order, so there is no page table.

The cache of a layer is {"pages": [B, N, PAGE, 2K, C]}. Along the axis 2K the keys and values of a
token alternate: k0, v0, k1, v1, ... With a mesh in context, rows are sharded over `data` and `fsdp`
and heads over `tensor`, and each device writes and reads its own part.

Shapes: B rows, T tokens, N pages, S = N * PAGE entries, H query heads, K key-value heads,
C head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel.mesh import ROWS, on_each_device

# Tokens per page. The kernel copies a page in one transfer, of 128 KiB to 1 MiB. Smaller pages need
# more transfers. Larger pages waste more memory on the last page of a row.
PAGE = 256
# The largest block of pages, in tokens and in bytes. The kernel copies one block while it computes
# with another, and it reads whole blocks. Judging by the compiled instructions for v5p and v5e, a
# token takes 0.6 times as long in a block of 2,048 tokens as in one of 512, and a copy of 2 MiB
# hides the latency of its first byte. Larger blocks read more entries that are not filled.
BLOCK_TOKENS, BLOCK_BYTES = 2048, 2 << 20
# Rows per step of the kernel's grid. Each row is computed with the queries of all rows of the step:
# 32 rows, which the kernel's own table has for prefill, need 2.6 times the instructions of 4 rows.
# With fewer rows, the overhead of a grid step dominates.
QUERIES = 4

PAGES = P(ROWS, None, None, "tensor")  # The sharding of `pages`.
HEADS = P(ROWS, None, "tensor")  # The sharding of queries, keys and values [B, T, heads, C].


def fits(num_kv_heads: int, head_dim: int) -> bool:
    """Returns whether the kernel supports `num_kv_heads` heads of size `head_dim` per device."""
    return head_dim % 128 == 0 and (num_kv_heads in (1, 2, 4) or num_kv_heads % 8 == 0)


def init(
    batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> dict[str, jax.Array]:
    """Returns an empty paged cache for one layer, with room for `length` tokens per row.

    The length is rounded up to whole pages.
    """
    shape = (batch, -(-length // PAGE), PAGE, 2 * num_kv_heads, head_dim)
    return {"pages": jnp.zeros(shape, dtype)}


def pages_per_block(pages: jax.Array) -> int:
    """Returns the number of cache pages that the kernel copies as one block.

    Args:
      pages: The pages of one device, [B, N, PAGE, 2K, C].
    """
    _, N, page, heads, C = pages.shape
    page_bytes = page * heads * C * pages.dtype.itemsize
    return max(1, min(BLOCK_TOKENS // page, BLOCK_BYTES // page_bytes, N))


def write(
    cache: dict[str, jax.Array],
    k_BxTxKxC: jax.Array,
    v_BxTxKxC: jax.Array,
    positions_BxT: jax.Array,
) -> dict[str, jax.Array]:
    """Returns a layer's paged cache, updated with new keys and values at the given positions.

    Keys and values of padding, at position -1, are dropped.
    """

    def local(pages, k_BxTxKxC, v_BxTxKxC, positions_BxT):
        B, N, page, heads, C = pages.shape
        kv_BxTx2KxC = jnp.stack([k_BxTxKxC, v_BxTxKxC], axis=3).reshape(B, -1, heads, C)
        entry_BxT = jnp.where(positions_BxT < 0, N * page, positions_BxT)  # out of bounds: dropped
        at = jnp.arange(B)[:, None], entry_BxT // page, entry_BxT % page
        return pages.at[at].set(kv_BxTx2KxC, mode="drop")

    local = on_each_device(local, (PAGES, HEADS, HEADS, P(ROWS)), PAGES)
    return {"pages": local(cache["pages"], k_BxTxKxC, v_BxTxKxC, positions_BxT)}


def dense(cache: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Converts a layer's paged cache to dense keys [B, K, C, S] and values [B, K, S, C]."""

    def local(pages):
        B, N, page, heads, C = pages.shape
        kv_BxSxKx2xC = pages.reshape(B, N * page, heads // 2, 2, C)
        return kv_BxSxKx2xC[..., 0, :].transpose(0, 2, 3, 1), kv_BxSxKx2xC[..., 1, :].swapaxes(1, 2)

    by_head = P(ROWS, "tensor")
    return on_each_device(local, (PAGES,), (by_head, by_head))(cache["pages"])


def attend(
    q_Bx1xHxC: jax.Array, cache: dict[str, jax.Array], positions_Bx1: jax.Array
) -> jax.Array:
    """Computes causal attention over a paged cache, with one query token per row.

    Args:
      q_Bx1xHxC: Queries.
      cache: The cache of a layer, in which the keys and values of the queries are stored already.
      positions_Bx1: int32. A row at -1 is inactive: its output is 0, and the kernel skips it.

    Returns:
      The output [B, 1, H, C].

    Raises:
      ValueError: The kernel does not support the number of key-value heads of one device.
    """

    def local(q_Bx1xHxC, pages, positions_Bx1):
        B, N, page, heads, C = pages.shape
        if not fits(heads // 2, C):
            raise ValueError(
                f"model.cache is 'paged', but each device has {heads // 2} key-value heads of size "
                f"{C}; expected 1, 2, 4 or a multiple of 8 heads, and a size that is a multiple of "
                "128. Set model.cache to 'dense', or change the size of `tensor` in decode_mesh."
            )
        position_B = positions_Bx1[:, 0]
        # The kernel processes the first `num_seqs` rows, each with at least one key. The active
        # rows are therefore sorted to the front, and an inactive row gets a length of 1.
        order_B = jnp.argsort(position_B < 0, stable=True)
        active = jnp.sum(position_B >= 0, dtype=jnp.int32)
        out_BxHxC = ragged_paged_attention(
            q_Bx1xHxC[order_B, 0],
            pages.reshape(B * N, page, heads, C),
            kv_lens=jnp.maximum(position_B[order_B] + 1, 1),
            page_indices=(order_B[:, None] * N + jnp.arange(N)[None]).astype(jnp.int32),
            cu_q_lens=jnp.arange(B + 1, dtype=jnp.int32),
            num_seqs=jnp.maximum(active, 1)[None],
            sm_scale=C**-0.5,
            num_kv_pages_per_block=pages_per_block(pages),
            num_queries_per_block=min(QUERIES, B),
        )
        out_BxHxC = out_BxHxC[jnp.argsort(order_B)]
        return jnp.where(position_B[:, None, None] < 0, 0, out_BxHxC)[:, None]

    local = on_each_device(local, (HEADS, PAGES, P(ROWS)), HEADS)
    return local(q_Bx1xHxC, cache["pages"], positions_Bx1)
