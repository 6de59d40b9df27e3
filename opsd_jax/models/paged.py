"""A paged key-value cache, and attention over it with JAX's Pallas kernel for TPUs.

For each row, the kernel reads only the blocks of pages that hold tokens. The cost of a decoding
step therefore depends on the filled length of the cache, not on its full length.

The cache of a layer is {"pages": [N, PAGE, 2K, C], "table": int32 [B, M]}. The table lists the
pages of each row in order; see `opsd_jax.policy.PagedCache`. Along the axis 2K the keys and values
of a token alternate: k0, v0, k1, v1, ...

With a mesh in context, rows and pages are sharded over `data` and `fsdp` and heads over `tensor`,
and each device writes and reads its own part. Pages are numbered over all devices. Each device has
the same number of pages, so the remainder of a page's number is its index on its device.

In 8 bits, an entry of `pages` stands for its product with a scale in "scales": [B, 2K, C], float32.
The kernel has no argument for such scales. They are applied outside: those of the keys to the
queries, those of the values to the output. So the scales of a row cannot change while it decodes:
its first tokens, in most cases a whole prompt, determine them. See `calibrate`.

Shapes: B rows, T tokens, N pages, M pages of a row, S = M * PAGE entries, H query heads,
K key-value heads, C head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import PartitionSpec as P

from opsd_jax.models.quantised import LARGEST, to_int8
from opsd_jax.parallel.mesh import ROWS, on_each_device
from opsd_jax.policy import PagedCache

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

# The largest number in 8 bits stands for this multiple of the largest value among a row's first
# tokens. Larger values are clipped to it.
HEADROOM = 1.5

PAGES = P(ROWS, None, "tensor")  # The sharding of `pages`.
SCALES = P(ROWS, "tensor")  # The sharding of `scales`.
TABLE = P(ROWS)  # The sharding of `table`.
HEADS = P(ROWS, None, "tensor")  # The sharding of queries, keys and values [B, T, heads, C].


def fits(num_kv_heads: int, head_dim: int, *, int8: bool = False) -> bool:
    """Returns whether the kernel supports `num_kv_heads` heads of size `head_dim` per device."""
    heads, odd = divmod(num_kv_heads, 2 if int8 else 1)
    return (
        head_dim % 128 == 0 and not odd and (heads in (1, 2, 4) or (heads > 0 and heads % 8 == 0))
    )


def init(
    batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> dict[str, jax.Array]:
    """Returns an empty paged cache for one layer, with room for `length` tokens per row.

    The length is rounded up to whole pages, and each row has its own pages. The cache has scales if
    `dtype` is int8.
    """
    heads, M = 2 * num_kv_heads, -(-length // PAGE)
    cache = {
        "pages": jnp.zeros((batch * M, PAGE, heads, head_dim), dtype),
        "table": jnp.arange(batch * M, dtype=jnp.int32).reshape(batch, M),
    }
    if dtype == jnp.int8:
        cache["scales"] = jnp.zeros((batch, heads, head_dim))
    return cache


def join(layers: Sequence[dict[str, jax.Array]]) -> PagedCache:
    """Returns the cache of a model, given the caches of its layers, which have the same table."""
    return PagedCache(
        tuple(layer["pages"] for layer in layers),
        tuple({"scales": layer["scales"]} if "scales" in layer else {} for layer in layers),
        layers[0]["table"],
    )


def split(cache: PagedCache) -> tuple[dict[str, jax.Array], ...]:
    """Returns the caches of a model's layers. This is the inverse of `join`."""
    return tuple(
        {"pages": pages, "table": cache.table, **rows}
        for pages, rows in zip(cache.pages, cache.rows, strict=True)
    )


def calibrate(scales_Bx2KxC: jax.Array, kv_BxTx2KxC: jax.Array, filled_BxT: jax.Array) -> jax.Array:
    """Returns the scales of rows: those that they have or, if they are 0, those of new tokens.

    A scale is HEADROOM / 127 times the largest absolute value of a channel over the tokens. For
    keys it is the largest length of the two channels that RoPE rotates into one another, because a
    later position turns one into the other.
    """
    kv = jnp.where(filled_BxT[..., None, None], kv_BxTx2KxC.astype(jnp.float32), 0.0)
    k_BxTxKxC, v_BxTxKxC = kv[:, :, 0::2], kv[:, :, 1::2]
    pairs = jnp.hypot(*jnp.split(k_BxTxKxC, 2, axis=-1))
    largest = jnp.stack([jnp.concatenate([pairs, pairs], axis=-1), jnp.abs(v_BxTxKxC)], axis=3)
    new = HEADROOM / LARGEST * jnp.max(largest, axis=1).reshape(scales_Bx2KxC.shape)
    known = jnp.any(scales_Bx2KxC > 0, axis=(1, 2), keepdims=True)
    return jnp.where(known, scales_Bx2KxC, new)


def check_fits(num_kv_heads: int, head_dim: int, *, int8: bool) -> None:
    """Raises ValueError if the kernel does not support one device's key-value heads."""
    if fits(num_kv_heads, head_dim, int8=int8):
        return
    field, heads = "model.cache is 'paged'", "1, 2, 4 or a multiple of 8"
    if int8:
        field += " and rollout_quantisation.cache is 'int8'"
        heads = "2, 4, 8 or a multiple of 16"
    raise ValueError(
        f"{field}, but each device has {num_kv_heads} key-value heads of size {head_dim}; expected "
        f"{heads} heads, and a size that is a multiple of 128. Set model.cache to 'dense', or "
        "change the size of `tensor` in decode_mesh."
    )


def pages_per_block(pages: jax.Array, most: int) -> int:
    """Returns the number of cache pages that the kernel copies as one block.

    Args:
      pages: The pages of one device, [N, PAGE, 2K, C].
      most: M, the largest number of pages of a row.
    """
    _, page, heads, C = pages.shape
    page_bytes = page * heads * C * pages.dtype.itemsize
    return max(1, min(BLOCK_TOKENS // page, BLOCK_BYTES // page_bytes, most))


def write(
    cache: dict[str, jax.Array],
    k_BxTxKxC: jax.Array,
    v_BxTxKxC: jax.Array,
    positions_BxT: jax.Array,
) -> dict[str, jax.Array]:
    """Returns a layer's paged cache, updated with new keys and values at the given positions.

    Keys and values of padding, at position -1, are dropped. If the cache has scales, those of a row
    without any are set, and keys and values beyond the range of their scale are clipped.
    """

    def local(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT):
        N, page, heads, C = cache["pages"].shape
        B, T = positions_BxT.shape
        kv_BxTx2KxC = jnp.stack([k_BxTxKxC, v_BxTxKxC], axis=3).reshape(B, T, heads, C)
        page_BxT = jnp.take_along_axis(cache["table"], jnp.maximum(positions_BxT, 0) // page, 1) % N
        at = jnp.where(positions_BxT < 0, N, page_BxT), positions_BxT % page  # N is dropped
        changed = {}
        if "scales" in cache:
            scales = calibrate(cache["scales"], kv_BxTx2KxC, positions_BxT >= 0)
            changed["scales"] = scales
            kv_BxTx2KxC = to_int8(kv_BxTx2KxC, scales[:, None])
        return {**changed, "pages": cache["pages"].at[at].set(kv_BxTx2KxC, mode="drop")}

    specs = _specs(cache)
    changed = {name: spec for name, spec in specs.items() if name != "table"}
    local = on_each_device(local, (specs, HEADS, HEADS, P(ROWS)), changed)
    return {**cache, **local(cache, k_BxTxKxC, v_BxTxKxC, positions_BxT)}


def _specs(cache: dict[str, jax.Array]) -> dict[str, P]:
    """Returns the sharding of each array of a layer's cache."""
    return {name: {"pages": PAGES, "scales": SCALES, "table": TABLE}[name] for name in cache}


def dense(cache: dict[str, jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Converts a layer's paged cache to dense keys [B, K, C, S] and values [B, K, S, C]."""

    def local(cache):
        N, page, heads, C = cache["pages"].shape
        B, M = cache["table"].shape
        kv_BxSxKx2xC = cache["pages"][cache["table"] % N].reshape(B, M * page, heads // 2, 2, C)
        if "scales" in cache:
            kv_BxSxKx2xC *= cache["scales"].reshape(B, 1, heads // 2, 2, C)
        kv_BxSxKx2xC = kv_BxSxKx2xC.astype(dtype)
        return kv_BxSxKx2xC[..., 0, :].transpose(0, 2, 3, 1), kv_BxSxKx2xC[..., 1, :].swapaxes(1, 2)

    by_head = P(ROWS, "tensor")
    return on_each_device(local, (_specs(cache),), (by_head, by_head))(cache)


def attend(
    q_Bx1xHxC: jax.Array,
    cache: dict[str, jax.Array],
    positions_Bx1: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Computes causal attention over a paged cache, with one query token per row.

    Args:
      q_Bx1xHxC: Queries.
      cache: The cache of a layer, in which the keys and values of the queries are stored already.
      positions_Bx1: int32. A row at -1 is inactive: its output is 0, and the kernel skips it.
      window: Number of tokens that a token attends to; None for all before it.
      scale: Factor of the scores; None for C^-1/2.

    Returns:
      The output [B, 1, H, C].

    Raises:
      ValueError: The kernel does not support the number of key-value heads of one device.
    """

    def local(q_Bx1xHxC, cache, positions_Bx1):
        pages, scaled = cache["pages"], "scales" in cache
        N, _, heads, C = pages.shape
        B, M = cache["table"].shape
        check_fits(heads // 2, C, int8=scaled)
        if scaled:
            # [B, 2K, C] -> the scales of the keys and of the values, [B, 1, H, C] each.
            by_head = cache["scales"].reshape(B, 1, heads // 2, 2, C)
            queries = q_Bx1xHxC.shape[2] // (heads // 2)
            k_scale, v_scale = (jnp.repeat(by_head[..., i, :], queries, axis=2) for i in (0, 1))
            q_Bx1xHxC = (q_Bx1xHxC * k_scale).astype(q_Bx1xHxC.dtype)
        position_B = positions_Bx1[:, 0]
        # The kernel processes the first `num_seqs` rows, each with at least one key. The active
        # rows are therefore sorted to the front, and an inactive row gets a length of 1.
        order_B = jnp.argsort(position_B < 0, stable=True)
        active = jnp.sum(position_B >= 0, dtype=jnp.int32)
        out_BxHxC = ragged_paged_attention(
            q_Bx1xHxC[order_B, 0],
            pages,
            kv_lens=jnp.maximum(position_B[order_B] + 1, 1),
            page_indices=cache["table"][order_B] % N,
            cu_q_lens=jnp.arange(B + 1, dtype=jnp.int32),
            num_seqs=jnp.maximum(active, 1)[None],
            sm_scale=scale or C**-0.5,
            sliding_window=window,
            num_kv_pages_per_block=pages_per_block(pages, M),
            num_queries_per_block=min(QUERIES, B),
            # With scales of 1, the kernel converts the pages to the queries' dtype.
            **({"k_scale": 1.0, "v_scale": 1.0} if scaled else {}),
        )
        out_BxHxC = out_BxHxC[jnp.argsort(order_B)]
        out_Bx1xHxC = jnp.where(position_B[:, None, None] < 0, 0, out_BxHxC)[:, None]
        return (out_Bx1xHxC * v_scale).astype(out_BxHxC.dtype) if scaled else out_Bx1xHxC

    local = on_each_device(local, (HEADS, _specs(cache), P(ROWS)), HEADS)
    return local(q_Bx1xHxC, cache, positions_Bx1)
