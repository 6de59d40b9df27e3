"""The decoder's cache in pages, and decoding from it with the Pallas kernel that comes with JAX.

The kernel reads, of each row, the blocks of pages that hold its tokens: a step costs what is
filled, not what fits. Every row owns its pages, in order, so there is no table to keep.

A layer's cache is {"pages": [B, N, PAGE, 2K, C]}, a token's keys and values in turns: k0, v0, k1,
v1, ... With a mesh in context, rows lie over `data` and `fsdp`, heads over `tensor`, and every
device writes and reads its own.

Shapes: B rows, T tokens, N pages, S = N * PAGE slots, H heads, K key-value heads, C head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel.mesh import ROWS, on_each_device

# Tokens of a page, which the kernel copies in one piece, of 128 KiB to 1 MiB. With fewer it has
# more copies to start; with more a row's last page has more room that is never filled.
PAGE = 256
# The kernel copies one block while it computes with another, and reads whole blocks. By its
# instructions as compiled for v5p and v5e, 2,048 tokens take 0.6 of the time a token that 512 do,
# and the copy of 2 MiB outlasts the wait for its first byte; a longer block reads more in vain.
BLOCK_TOKENS, BLOCK_BYTES = 2048, 2 << 20
# Rows of a grid step. Each is computed with the queries of all: 32, as the kernel's table has for
# prefill, take 2.6 times the instructions that 4 do. With fewer the grid steps themselves cost.
QUERIES = 4

PAGES = P(ROWS, None, None, "tensor")  # where a cache's pages lie
HEADS = P(ROWS, None, "tensor")  # and [B, T, heads, C]


def fits(num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel takes these sizes: the key-value heads are those of one device."""
    return head_dim % 128 == 0 and (num_kv_heads in (1, 2, 4) or num_kv_heads % 8 == 0)


def init(batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: Any):
    """An empty cache of a layer, for rows of `length` tokens, rounded up to whole pages."""
    shape = (batch, -(-length // PAGE), PAGE, 2 * num_kv_heads, head_dim)
    return {"pages": jnp.zeros(shape, dtype)}


def pages_per_block(pages: jax.Array) -> int:
    """How many pages of a device's own part of a cache the kernel reads at once."""
    _, N, page, heads, C = pages.shape
    page_bytes = page * heads * C * pages.dtype.itemsize
    return max(1, min(BLOCK_TOKENS // page, BLOCK_BYTES // page_bytes, N))


def write(cache, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, positions_BxT: jax.Array):
    """The cache with keys and values at their positions; those at -1 are written nowhere."""

    def local(pages, k_BxTxKxC, v_BxTxKxC, positions_BxT):
        B, N, page, heads, C = pages.shape
        kv_BxTx2KxC = jnp.stack([k_BxTxKxC, v_BxTxKxC], axis=3).reshape(B, -1, heads, C)
        slot_BxT = jnp.where(positions_BxT < 0, N * page, positions_BxT)  # out of bounds: dropped
        at = jnp.arange(B)[:, None], slot_BxT // page, slot_BxT % page
        return pages.at[at].set(kv_BxTx2KxC, mode="drop")

    local = on_each_device(local, (PAGES, HEADS, HEADS, P(ROWS)), PAGES)
    return {"pages": local(cache["pages"], k_BxTxKxC, v_BxTxKxC, positions_BxT)}


def dense(cache) -> tuple[jax.Array, jax.Array]:
    """All keys, [B, K, C, S], and values, [B, K, S, C], of the cache."""

    def local(pages):
        B, N, page, heads, C = pages.shape
        kv_BxSxKx2xC = pages.reshape(B, N * page, heads // 2, 2, C)
        return kv_BxSxKx2xC[..., 0, :].transpose(0, 2, 3, 1), kv_BxSxKx2xC[..., 1, :].swapaxes(1, 2)

    by_head = P(ROWS, "tensor")
    return on_each_device(local, (PAGES,), (by_head, by_head))(cache["pages"])


def attend(q_Bx1xHxC: jax.Array, cache, positions_Bx1: jax.Array) -> jax.Array:
    """Attention [B, 1, H, C] of a query a row, to the keys of the row up to its position.

    A row at -1 gets zeros, and nothing is read for it.
    """

    def local(q_Bx1xHxC, pages, positions_Bx1):
        B, N, page, heads, C = pages.shape
        if not fits(heads // 2, C):
            raise ValueError(
                f"model.cache is 'paged', and a device has {heads // 2} key-value heads of {C}; "
                "its kernel takes 1, 2, 4 or a multiple of 8, of a multiple of 128. Choose "
                "'dense', or another size of `tensor` for decode_mesh."
            )
        position_B = positions_Bx1[:, 0]
        # The kernel takes so many rows from the first on, of one key at least: live ones go first.
        order_B = jnp.argsort(position_B < 0, stable=True)
        live = jnp.sum(position_B >= 0, dtype=jnp.int32)
        out_BxHxC = ragged_paged_attention(
            q_Bx1xHxC[order_B, 0],
            pages.reshape(B * N, page, heads, C),
            kv_lens=jnp.maximum(position_B[order_B] + 1, 1),
            page_indices=(order_B[:, None] * N + jnp.arange(N)[None]).astype(jnp.int32),
            cu_q_lens=jnp.arange(B + 1, dtype=jnp.int32),
            num_seqs=jnp.maximum(live, 1)[None],
            sm_scale=C**-0.5,
            num_kv_pages_per_block=pages_per_block(pages),
            num_queries_per_block=min(QUERIES, B),
        )
        out_BxHxC = out_BxHxC[jnp.argsort(order_B)]
        return jnp.where(position_B[:, None, None] < 0, 0, out_BxHxC)[:, None]

    local = on_each_device(local, (HEADS, PAGES, P(ROWS)), HEADS)
    return local(q_Bx1xHxC, cache["pages"], positions_Bx1)
