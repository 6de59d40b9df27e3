"""Grouped-query attention in plain JAX and with the Pallas splash attention kernel for TPUs.

Shapes: B rows, T queries, S keys, H query heads, K key-value heads, G = H / K, C head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import AxisType, NamedSharding
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


def mask(key_positions_BxS: jax.Array, positions_BxT: jax.Array, window: Any = None) -> jax.Array:
    """Returns the causal mask, bool [B, T, S]: True if 0 <= key position <= query position.

    With a `window`, int or int32 [], the key position must also be above query position - window.
    """
    key_Bx1xS, query_BxTx1 = key_positions_BxS[:, None], positions_BxT[..., None]
    causal = (key_Bx1xS >= 0) & (key_Bx1xS <= query_BxTx1)
    return causal if window is None else causal & (query_BxTx1 - key_Bx1xS < window)


def dense(
    q_BxTxHxC: jax.Array,
    k_BxKxCxS: jax.Array | Quantised,
    v_BxKxSxC: jax.Array | Quantised,
    mask_BxTxS: jax.Array,
    scale: float | None = None,
) -> jax.Array:
    """Computes masked attention with plain JAX operations and a float32 softmax.

    Args:
      q_BxTxHxC: Queries.
      k_BxKxCxS: Keys, of the same dtype as the queries or with a scale for each key.
      v_BxKxSxC: Values, likewise.
      mask_BxTxS: bool, which keys each query attends to.
      scale: Factor of the scores; None for C^-1/2.

    Returns:
      The output [B, T, H, C]. It is finite but meaningless for a query without any key.
    """
    B, T, H, C = q_BxTxHxC.shape
    k_BxKxCxS, k_scale = _apart(k_BxKxCxS, q_BxTxHxC.dtype)
    v_BxKxSxC, v_scale = _apart(v_BxKxSxC, q_BxTxHxC.dtype)
    K = k_BxKxCxS.shape[1]
    # All queries that share a key-value head become one dimension. XLA:CPU runs the resulting
    # batched matmul far faster than an einsum that keeps heads and queries apart.
    q_BxKxGxTxC = q_BxTxHxC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    q_BxKxGxTxC *= scale or C**-0.5
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
    q_BxTxHxC: jax.Array,
    k_BxTxKxC: jax.Array,
    v_BxTxKxC: jax.Array,
    positions_BxT: jax.Array,
    *,
    window: Any = None,
    scale: float | None = None,
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
      window: Number of tokens that a token attends to, int or int32 []; None for all before it.
      scale: Factor of the scores; None for C^-1/2.

    Returns:
      The output [B, T, H, C]. It is finite but meaningless at padding.
    """
    T, segment_BxT = q_BxTxHxC.shape[1], segment_ids(positions_BxT)
    k_BxKxCxT, v_BxKxTxC = k_BxTxKxC.transpose(0, 2, 3, 1), v_BxTxKxC.swapaxes(1, 2)
    size = max(LEAST_QUERIES, -(-T // MOST_BLOCKS))

    def block(start: int) -> jax.Array:
        end = min(start + size, T)
        mask_BxQxS = mask(positions_BxT[:, :end], positions_BxT[:, start:end], window)
        mask_BxQxS &= segment_BxT[:, None, :end] == segment_BxT[:, start:end, None]
        return dense(
            q_BxTxHxC[:, start:end],
            k_BxKxCxT[..., :end],
            v_BxKxTxC[:, :, :end],
            mask_BxQxS,
            scale,
        )

    return jnp.concatenate([block(start) for start in range(0, T, size)], axis=1)


def splash(
    q_BxTxHxC: jax.Array,
    k_BxTxKxC: jax.Array,
    v_BxTxKxC: jax.Array,
    positions_BxT: jax.Array,
    *,
    split_tokens: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Computes causal attention with the Pallas splash attention kernel, within each sequence.

    The kernel never stores a [T, T] array, and it skips the blocks above the diagonal. With a mesh
    in context, rows are sharded over `data` and `fsdp`, and heads over `tensor`. Each device
    computes its own part.

    With `split_tokens`, the tokens of a row are sharded over `tensor` instead of the heads (context
    parallelism, as in section 3.3.2 of the Llama 3 report, arXiv 2407.21783). Each device gathers
    the keys and values of its rows. The later queries of a row attend to more keys, so the devices
    first exchange queries: of 2n chunks of a row, device i of n computes chunks i and 2n - 1 - i.

    Args:
      q_BxTxHxC: Queries.
      k_BxTxKxC: Keys.
      v_BxTxKxC: Values.
      positions_BxT: int32, -1 for padding; 0 begins a sequence. The positions of a sequence must
        ascend along a row, because the kernel masks by column.
      split_tokens: Whether `tensor` shards tokens. Its size must divide T.
      window: Number of tokens that a token attends to; None for all before it. The kernel skips the
        blocks before the window. It excludes `split_tokens`.
      scale: Factor of the scores; None for C^-1/2.

    Returns:
      The output [B, T, H, C]. It is finite but meaningless at padding.
    """
    T, H = q_BxTxHxC.shape[1:3]
    mesh = jax.sharding.get_abstract_mesh()
    tensor = mesh.shape.get("tensor", 1)
    parts = tensor if split_tokens else 1
    size = -(-T // (_chunks(parts) * LANES)) * LANES  # with padding at each device's end
    make_kernel = functools.partial(_kernel, H // (tensor // parts), size, parts, window)
    # The kernel does not scale the scores.
    q_BxTxHxC = (q_BxTxHxC * (scale or q_BxTxHxC.shape[-1] ** -0.5)).astype(q_BxTxHxC.dtype)
    spec = P(ROWS, "tensor") if parts > 1 else P(ROWS, None, "tensor")
    specs = (spec, spec, spec, P(ROWS))
    arrays = (q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, positions_BxT)
    if parts == 1:
        alone = lambda *arrays: _splash_on_device(1, size, make_kernel(), *arrays)
        return on_each_device(alone, specs, spec)(*arrays)
    kernel = make_kernel()
    automatic = mesh.update_axis_types(dict.fromkeys(mesh.manual_axes, AxisType.Auto))
    of_kernel = kernel.manual_sharding_spec(NamedSharding(automatic, P(None, "tensor")))
    together = functools.partial(_splash_on_device, parts, size)
    return on_each_device(together, (of_kernel, *specs), spec)(kernel, *arrays)


def _chunks(parts: int) -> int:
    """Returns the number of chunks of a row: two for each device, or one for a single device."""
    return 2 * parts if parts > 1 else 1


def _splash_on_device(
    parts: int,
    size: int,
    kernel: splash_attention_kernel.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions_BxT: jax.Array,
) -> jax.Array:
    """Computes the attention of a device's queries [B, T / parts, heads, C]; see `splash`.

    Args:
      parts: devices that split the tokens of a row.
      size: tokens of a chunk; a device has two, or one if `parts` is 1.
      kernel: the device's part of the kernel.
      q, k, v: the queries, keys and values of the device.
      positions_BxT: the positions of whole rows.
    """
    tokens, chunks = q.shape[1], _chunks(parts)

    def pad(x_Bxt, value=0):
        padding = (0, chunks * size // parts - tokens)
        axes = ((0, 0), padding, *[(0, 0)] * (x_Bxt.ndim - 2))
        return jnp.pad(x_Bxt, axes, constant_values=value)

    q, k, v = pad(q), pad(k), pad(v)
    # Neither the sequences nor the padding attend to one another.
    of_parts = jnp.split(segment_ids(positions_BxT), parts, axis=1)
    q_segments = kv_segments = jnp.concatenate([pad(x, -1) for x in of_parts], axis=1)
    if parts > 1:
        q, part = _balance(q, parts), jax.lax.axis_index("tensor")
        k, v = (jax.lax.all_gather(x, "tensor", axis=1, tiled=True) for x in (k, v))
        own = jnp.stack([part, chunks - 1 - part])
        q_segments = kv_segments.reshape(-1, chunks, size)[:, own].reshape(len(q), -1)
    segments = splash_attention_kernel.SegmentIds(q_segments, kv_segments)
    out: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)), segments)
    out = out.swapaxes(1, 2)
    return (_balance(out, parts, back=True) if parts > 1 else out)[:, :tokens]


class _CausalMask(splash_attention_mask.CausalMask):
    """A causal mask that compares columns only in blocks that the diagonal crosses.

    The kernel's constructor asks of each block whether it is full or empty. For 131,072 tokens,
    comparing all columns would take minutes.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = self.q_sequence[index[0]], index[1]
        if rows.min() >= columns.stop - 1 or rows.max() < columns.start:
            return np.full((1, 1), rows[0] >= columns.start)  # stands for all of the block
        return super().__getitem__(index)


class _WindowMask(splash_attention_mask.LocalMask):
    """A mask of a sliding window that compares columns only in blocks that an edge crosses."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = self.q_sequence[index[0]], index[1]
        (left, _), first, last = self.window_size, rows.min(), rows.max()
        if columns.start > last or columns.stop - 1 < first - left:
            return np.zeros((1, 1), bool)  # stands for all of the block
        if columns.stop - 1 <= first and columns.start >= last - left:
            return np.ones((1, 1), bool)
        return super().__getitem__(index)


def _kernel(
    heads: int, size: int, parts: int, window: int | None = None
) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel of causal attention, for the queries that `_balance` gives each device.

    Args:
      heads: query heads of a device.
      size: tokens of a chunk; a row has two chunks for each device, or one if `parts` is 1.
      parts: devices that split the queries of a row.
      window: as for `splash`.
    """
    block = max(block for block in range(LANES, BLOCK + 1, LANES) if size % block == 0)
    tokens = size * _chunks(parts)
    mask: Any = _CausalMask((tokens, tokens))
    if window is not None:
        mask = _WindowMask((tokens, tokens), (window - 1, 0), 0)
    if parts > 1:
        chunks = np.arange(tokens, dtype=np.int32).reshape(2 * parts, size)
        mask.q_sequence = np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=CHECKPOINT_NAME,
    )


def _balance(x_Bxt: jax.Array, parts: int, *, back: bool = False) -> jax.Array:
    """Exchanges queries over `tensor`, so that those of all devices have equally many keys.

    Of the 2 * parts chunks of a row, device i has chunks 2 i and 2 i + 1 before the exchange, and
    chunks i and 2 * parts - 1 - i after it. With `back`, it is the other way round.
    """
    is_even = jax.lax.axis_index("tensor") % 2 == 0
    low, high = jnp.split(x_Bxt, 2, axis=1)
    swapped = lambda a, b: (jnp.where(is_even, a, b), jnp.where(is_even, b, a))
    moved = []
    for parity, half in enumerate(swapped(low, high) if back else (low, high)):
        chunks = range(parity, 2 * parts, 2)
        pairs = [(i, min(chunk, 2 * parts - 1 - chunk)) for i, chunk in enumerate(chunks)]
        pairs = [(to, i) for i, to in pairs] if back else pairs
        moved.append(jax.lax.ppermute(half, "tensor", pairs))
    return jnp.concatenate(moved if back else swapped(*moved), axis=1)
