"""The sampling rule: which word comes next, and how likely it was. All of it is traced.

A draw takes two uniform numbers a row and inverts the distribution: running sums over blocks of
words, then within one block. Noise for every word (the Gumbel trick) costs more than a small model.

Shapes: B rows, V words, R blocks of N = V / R words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class SamplingParams(NamedTuple):
    """How words are drawn: arrays, so that another rule is no other program.

    That is from softmax(logits / temperature) without forbidden words, cut to the `top_k`
    likeliest, of these to the fewest likeliest whose mass reaches `top_p`, of these to the words
    that are at least `min_p` times as likely as the likeliest; summing to 1 again. Of equal words
    at the edge the first stay. Words that are e^-87 times as likely as the likeliest, or less, do
    not come.

    Attributes:
      temperature: float32, 0 for the likeliest word.
      top_k: int32, 0 for all.
      top_p: float32 in (0, 1], 1 for all.
      min_p: float32 in [0, 1], 0 for all.
      stop: bool [V], the words that end a response.
      forbidden: bool [V], the words that never come.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    stop: Array
    forbidden: Array


def folded_key(seed: int, *data: int) -> jax.Array:
    """Returns the PRNG key of a seed in [0, 2^32), with each of `data` folded in, in order.

    Its transfers to the device are explicit (`jax.transfer_guard`).
    """
    seed_, *data_ = jax.device_put([np.uint32(x) for x in (seed, *data)])
    return functools.reduce(jax.random.fold_in, data_, jax.random.key(seed_))


def params(
    vocab_size: int,
    *,
    stop: Iterable[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    forbidden: Iterable[int] = (),
) -> SamplingParams:
    """Returns sampling parameters as NumPy arrays, by default for the model's own distribution.

    Raises:
      ValueError: a number or a word is out of bounds, or every word is forbidden; names it.
    """
    for name, value, holds, expected in (
        ("temperature", temperature, 0 <= temperature < math.inf, "0, for the likeliest, or more"),
        ("top_k", top_k, top_k >= 0, "0, for all, or more"),
        ("top_p", top_p, 0 < top_p <= 1, "a mass in (0, 1]"),
        ("min_p", min_p, 0 <= min_p <= 1, "a share in [0, 1]"),
    ):
        if not holds:
            raise ValueError(f"{name} is {value}; expected {expected}.")

    def mask(name: str, words: Iterable[int]) -> np.ndarray:
        marked = np.zeros(vocab_size, bool)
        for word in words:
            if not 0 <= word < vocab_size:
                raise ValueError(f"{name} has the word {word}; the vocabulary has {vocab_size}.")
            marked[word] = True
        return marked

    never = mask("forbidden", forbidden)
    if never.all():
        raise ValueError("forbidden has every word of the vocabulary; expected one that may come.")
    return SamplingParams(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
        stop=mask("stop", stop),
        forbidden=never,
    )


class Drawn(NamedTuple):
    """A word a row, and two log-probabilities of it.

    Attributes:
      token: int32 [B].
      model_logprob: float32 [B], under softmax(logits): temperature 1, nothing cut or forbidden.
      sampling_logprob: float32 [B], under the distribution that the rule draws from; 0 if greedy.
    """

    token: jax.Array
    model_logprob: jax.Array
    sampling_logprob: jax.Array


def draw(logits_BxV: jax.Array, keys_B: jax.Array, sampling_params: SamplingParams) -> Drawn:
    """Draws a word a row by the rule, from float32 logits and a PRNG key for each row."""

    def plain(logits_BxV):
        token_B, total_B = _pick(logits_BxV, keys_B)
        logprob_B = _at(logits_BxV, token_B) - total_B
        return Drawn(token_B, logprob_B, logprob_B)

    def shaped(logits_BxV):
        allowed_BxV = jnp.where(sampling_params.forbidden[None], -jnp.inf, logits_BxV)
        kept_BxV = _cut(allowed_BxV / sampling_params.temperature, sampling_params)
        token_B, kept_total_B = _pick(kept_BxV, keys_B)
        logit_B = _at(logits_BxV, token_B)
        model_logprob_B = logit_B - jax.nn.logsumexp(logits_BxV, axis=-1)
        return Drawn(token_B, model_logprob_B, logit_B / sampling_params.temperature - kept_total_B)

    def greedy(logits_BxV):
        token_B = _likeliest(jnp.where(sampling_params.forbidden[None], -jnp.inf, logits_BxV))
        logprob_B = _at(logits_BxV, token_B) - jax.nn.logsumexp(logits_BxV, axis=-1)
        return Drawn(token_B, logprob_B, jnp.zeros_like(logprob_B))

    is_plain = (
        (sampling_params.temperature == 1)
        & (sampling_params.top_k == 0)
        & (sampling_params.top_p == 1)
        & (sampling_params.min_p == 0)
        & ~jnp.any(sampling_params.forbidden)
    )
    which = jnp.where(sampling_params.temperature == 0, 2, jnp.where(is_plain, 0, 1))
    return jax.lax.switch(which, (plain, shaped, greedy), logits_BxV)


def _blocks(x_BxV: jax.Array) -> jax.Array:
    """[B, R, N]. The blocks split with the vocabulary, if that lies on several devices."""
    B, V = x_BxV.shape
    R = math.gcd(V, 128)
    return x_BxV.reshape(B, R, V // R)


def _at(x_BxN: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxN, index_B[:, None], axis=1)[:, 0]


def _block(x_BxRxN: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxRxN, index_B[:, None, None], axis=1)[:, 0]


def _likeliest(x_BxV: jax.Array) -> jax.Array:
    """The first of the largest, int32 [B]: jnp.argmax by blocks, which XLA:CPU runs faster."""
    x_BxRxN = _blocks(x_BxV)
    block_B = jnp.argmax(x_BxRxN.max(axis=-1), axis=-1)
    inside_B = jnp.argmax(_block(x_BxRxN, block_B), axis=-1)
    return (block_B * x_BxRxN.shape[-1] + inside_B).astype(jnp.int32)


def _pick(x_BxV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A word drawn from softmax(x), int32 [B], and log(sum(exp(x)))."""
    share_Bx2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    top_B = x_BxV.max(axis=-1)
    x_BxRxN = _blocks(x_BxV)
    mass_BxR = jnp.exp(x_BxRxN - top_B[:, None, None]).sum(axis=-1)
    block_B = _invert(mass_BxR, share_Bx2[:, 0])
    inside_B = _invert(jnp.exp(_block(x_BxRxN, block_B) - top_B[:, None]), share_Bx2[:, 1])
    token_B = (block_B * x_BxRxN.shape[-1] + inside_B).astype(jnp.int32)
    return token_B, top_B + jnp.log(mass_BxR.sum(axis=-1))


def _invert(mass_BxN: jax.Array, share_B: jax.Array) -> jax.Array:
    """Where the running sum passes a share of the whole, among those with a mass."""
    sums_BxN = jnp.cumsum(mass_BxN, axis=-1)
    possible_BxN = mass_BxN > 0
    whole_Bx1 = jnp.max(sums_BxN, axis=-1, keepdims=True, where=possible_BxN, initial=0)
    return jnp.argmax(possible_BxN & (sums_BxN > share_B[:, None] * whole_Bx1), axis=-1)


def _cut(x_BxV: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """-inf where a word is not among those that `top_k`, `top_p` and `min_p` keep."""

    def top_k(mass_BxV):
        count = lambda kept: jnp.sum(kept, axis=-1)
        edge_B = _edge(mass_BxV, lambda kept: count(kept) >= sampling_params.top_k)
        room_B = sampling_params.top_k - count(mass_BxV > edge_B[:, None])
        return _keep(mass_BxV, edge_B, room_B)

    def top_p(mass_BxV):
        within = lambda kept: jnp.sum(mass_BxV, axis=-1, where=kept)
        wanted_B = sampling_params.top_p * mass_BxV.sum(axis=-1)
        edge_B = _edge(mass_BxV, lambda kept: within(kept) >= wanted_B)
        missing_B = wanted_B - within(mass_BxV > edge_B[:, None])
        return _keep(mass_BxV, edge_B, jnp.maximum(1, jnp.ceil(missing_B / edge_B)))

    same = lambda mass_BxV: mass_BxV
    mass_BxV = jnp.exp(x_BxV - x_BxV.max(axis=-1, keepdims=True))
    mass_BxV = jax.lax.cond(sampling_params.top_k > 0, top_k, same, mass_BxV)
    mass_BxV = jax.lax.cond(sampling_params.top_p < 1, top_p, same, mass_BxV)
    return jnp.where((mass_BxV > 0) & (mass_BxV >= sampling_params.min_p), x_BxV, -jnp.inf)


def _edge(mass_BxV: jax.Array, enough) -> jax.Array:
    """The largest mass m_B such that `enough(mass >= m)`, by bisection, or the least there is.

    Floats above 0 are ordered as the integers with their bits are: 30 halvings settle it, where
    sorting 151,936 words takes far longer. `enough` maps bool [B, V] to bool [B].
    """
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    B = len(mass_BxV)

    def halve(_, bounds):
        low_B, high_B = bounds  # of the edge's bits; low holds, but perhaps for the first
        middle_B = low_B + (high_B - low_B + 1) // 2
        holds_B = enough(mass_BxV >= as_float(middle_B)[:, None])
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B - 1)

    smallest = jax.lax.bitcast_convert_type(jnp.finfo(jnp.float32).tiny, jnp.int32)
    bounds = jnp.broadcast_to(smallest, B), jnp.broadcast_to(one, B)
    return as_float(jax.lax.fori_loop(0, 30, halve, bounds)[0])


def _keep(mass_BxV: jax.Array, edge_B: jax.Array, room_B: Array) -> jax.Array:
    """The masses above the edge and the first `room_B` of those on it; 0 elsewhere."""
    blocks_BxRxN = _blocks(mass_BxV)
    on_edge_BxRxN = blocks_BxRxN == edge_B[:, None, None]
    count_BxR = jnp.sum(on_edge_BxRxN, axis=-1)

    def first(blocks_BxRxN):
        before_BxR = jnp.cumsum(count_BxR, axis=-1) - count_BxR
        nth_BxRxN = before_BxR[..., None] + jnp.cumsum(on_edge_BxRxN, axis=-1)
        late_BxRxN = on_edge_BxRxN & (nth_BxRxN > room_B[:, None, None])
        return jnp.where(late_BxRxN, 0, blocks_BxRxN)

    crowded = jnp.any(jnp.sum(count_BxR, axis=-1) > room_B)
    blocks_BxRxN = jax.lax.cond(crowded, first, lambda blocks_BxRxN: blocks_BxRxN, blocks_BxRxN)
    mass_BxV = blocks_BxRxN.reshape(mass_BxV.shape)
    return jnp.where(mass_BxV >= edge_B[:, None], mass_BxV, 0)
