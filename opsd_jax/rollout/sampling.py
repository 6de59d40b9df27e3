"""Sampling parameters, and functions that draw the next token from logits.

A draw inverts the cumulative distribution with two uniform numbers per row: the first chooses a
block of the vocabulary, the second a token within that block. The Gumbel trick needs one random
number per token of the vocabulary, which costs more than a small model's forward pass.

Shapes: B rows, V tokens in the vocabulary, R blocks of N = V / R tokens.
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
    """Parameters of the distribution that tokens are sampled from.

    All fields are arrays and are traced, so changing their values never recompiles. Build them
    with `params`. The distribution is softmax(logits / temperature), restricted in this order:

    1. Forbidden tokens have probability 0.
    2. `top_k` keeps the k most likely tokens.
    3. `top_p` keeps the smallest set of the most likely remaining tokens whose mass reaches p.
    4. `min_p` keeps the tokens at least `min_p` times as likely as the most likely one.

    The result is normalised again. Among equally likely tokens at a cutoff, the lowest ids stay.
    A token that is at most e^-87 times as likely as the most likely one is never sampled.

    Attributes:
      temperature: float32 scalar. 0 means greedy decoding.
      top_k: int32 scalar. 0 disables it.
      top_p: float32 scalar in (0, 1]. 1 disables it.
      min_p: float32 scalar in [0, 1]. 0 disables it.
      stop: bool [V], the tokens that end a response.
      forbidden: bool [V], the tokens that are never sampled.

    Reference:
      top_p: Holtzman et al., arXiv 1904.09751. min_p: Nguyen et al., arXiv 2407.01082.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    stop: Array
    forbidden: Array


def folded_key(seed: int, *data: int) -> jax.Array:
    """Creates a PRNG key from a seed in [0, 2^32), and folds each number in `data` into it.

    The transfers to the device are explicit, so `jax.transfer_guard` allows them.
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
    """Creates sampling parameters. By default, tokens follow the model's own distribution.

    Args:
      vocab_size: V, the number of logits that the model returns.
      stop: ids of the tokens that end a response.
      temperature, top_k, top_p, min_p: see `SamplingParams`.
      forbidden: ids of the tokens that are never sampled.

    Returns:
      The parameters as NumPy arrays.

    Raises:
      ValueError: a parameter or a token id is out of bounds, or every token is forbidden.
    """
    for name, value, is_valid, expected in (
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or a number above 0"),
        ("top_k", top_k, top_k >= 0, "0 (keep all tokens) or a number above 0"),
        ("top_p", top_p, 0 < top_p <= 1, "a probability in (0, 1]"),
        ("min_p", min_p, 0 <= min_p <= 1, "a fraction in [0, 1]"),
    ):
        if not is_valid:
            raise ValueError(f"{name} is {value}; expected {expected}.")
    forbidden_V = _token_mask("forbidden", forbidden, vocab_size)
    if forbidden_V.all():
        raise ValueError(
            f"forbidden contains all {vocab_size} tokens of the vocabulary; expected at least "
            "one token that is not forbidden."
        )
    return SamplingParams(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
        stop=_token_mask("stop", stop, vocab_size),
        forbidden=forbidden_V,
    )


def _token_mask(name: str, ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns a bool mask [V] that is True at the given token ids."""
    mask_V = np.zeros(vocab_size, bool)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} contains the token id {token}; expected ids from 0 to {vocab_size - 1}."
            )
        mask_V[token] = True
    return mask_V


class Drawn(NamedTuple):
    """One sampled token per row, with its log-probability under two distributions.

    Attributes:
      token: int32 [B].
      model_logprob: float32 [B], under softmax(logits): temperature 1, no restriction.
      sampling_logprob: float32 [B], under the distribution that the token was drawn from. 0 for
        greedy decoding.
    """

    token: jax.Array
    model_logprob: jax.Array
    sampling_logprob: jax.Array


def draw(logits_BxV: jax.Array, keys_B: jax.Array, sampling_params: SamplingParams) -> Drawn:
    """Draws one token per row from the distribution that the sampling parameters describe.

    Args:
      logits_BxV: float32 logits.
      keys_B: one PRNG key per row.
      sampling_params: parameters of the distribution.

    Returns:
      The tokens and their log-probabilities.
    """

    def from_model(logits_BxV):
        token_B, log_total_B = _sample(logits_BxV, keys_B)
        logprob_B = _at(logits_BxV, token_B) - log_total_B
        return Drawn(token_B, logprob_B, logprob_B)

    def restricted(logits_BxV):
        allowed_BxV = jnp.where(sampling_params.forbidden[None], -jnp.inf, logits_BxV)
        kept_BxV = _restrict(allowed_BxV / sampling_params.temperature, sampling_params)
        token_B, kept_log_total_B = _sample(kept_BxV, keys_B)
        logit_B = _at(logits_BxV, token_B)
        model_logprob_B = logit_B - jax.nn.logsumexp(logits_BxV, axis=-1)
        sampling_logprob_B = logit_B / sampling_params.temperature - kept_log_total_B
        return Drawn(token_B, model_logprob_B, sampling_logprob_B)

    def greedy(logits_BxV):
        token_B = _argmax(jnp.where(sampling_params.forbidden[None], -jnp.inf, logits_BxV))
        logprob_B = _at(logits_BxV, token_B) - jax.nn.logsumexp(logits_BxV, axis=-1)
        return Drawn(token_B, logprob_B, jnp.zeros_like(logprob_B))

    is_unrestricted = (
        (sampling_params.temperature == 1)
        & (sampling_params.top_k == 0)
        & (sampling_params.top_p == 1)
        & (sampling_params.min_p == 0)
        & ~jnp.any(sampling_params.forbidden)
    )
    branch = jnp.where(sampling_params.temperature == 0, 2, jnp.where(is_unrestricted, 0, 1))
    return jax.lax.switch(branch, (from_model, restricted, greedy), logits_BxV)


def _blocks(x_BxV: jax.Array) -> jax.Array:
    """Reshapes [B, V] to [B, R, N], which splits the vocabulary into R blocks.

    If the vocabulary is sharded, the blocks are sharded.
    """
    B, V = x_BxV.shape
    R = math.gcd(V, 128)
    return x_BxV.reshape(B, R, V // R)


def _at(x_BxN: jax.Array, index_B: jax.Array) -> jax.Array:
    """Takes the element at `index_B` from each row. The result has shape [B]."""
    return jnp.take_along_axis(x_BxN, index_B[:, None], axis=1)[:, 0]


def _block(x_BxRxN: jax.Array, index_B: jax.Array) -> jax.Array:
    """Takes the block at `index_B` from each row. The result has shape [B, N]."""
    return jnp.take_along_axis(x_BxRxN, index_B[:, None, None], axis=1)[:, 0]


def _argmax(x_BxV: jax.Array) -> jax.Array:
    """Returns the index of the largest value in each row, int32 [B].

    It first finds the block, then the index within the block. On CPUs, this is faster than one
    `jnp.argmax`.
    """
    x_BxRxN = _blocks(x_BxV)
    block_B = jnp.argmax(x_BxRxN.max(axis=-1), axis=-1)
    offset_B = jnp.argmax(_block(x_BxRxN, block_B), axis=-1)
    return (block_B * x_BxRxN.shape[-1] + offset_B).astype(jnp.int32)


def _sample(x_BxV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row from softmax(x).

    Returns:
      `(token_B, log_total_B)`: int32 token ids, and log(sum(exp(x))) of each row.
    """
    uniform_Bx2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    max_B = x_BxV.max(axis=-1)
    x_BxRxN = _blocks(x_BxV)
    mass_BxR = jnp.exp(x_BxRxN - max_B[:, None, None]).sum(axis=-1)
    block_B = _invert(mass_BxR, uniform_Bx2[:, 0])
    offset_B = _invert(jnp.exp(_block(x_BxRxN, block_B) - max_B[:, None]), uniform_Bx2[:, 1])
    token_B = (block_B * x_BxRxN.shape[-1] + offset_B).astype(jnp.int32)
    return token_B, max_B + jnp.log(mass_BxR.sum(axis=-1))


def _invert(mass_BxN: jax.Array, fraction_B: jax.Array) -> jax.Array:
    """Returns, for each row, the first index where the cumulative mass exceeds a given fraction.

    `fraction_B` is a fraction of each row's total mass. Indices without mass are never returned,
    whatever the rounding of the cumulative sum.
    """
    sums_BxN = jnp.cumsum(mass_BxN, axis=-1)
    possible_BxN = mass_BxN > 0
    total_Bx1 = jnp.max(sums_BxN, axis=-1, keepdims=True, where=possible_BxN, initial=0)
    return jnp.argmax(possible_BxN & (sums_BxN > fraction_B[:, None] * total_Bx1), axis=-1)


def _restrict(x_BxV: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """Sets to -inf the logits of the tokens that `top_k`, `top_p` or `min_p` excludes."""

    def top_k(mass_BxV):
        count = lambda kept_BxV: jnp.sum(kept_BxV, axis=-1)
        cutoff_B = _cutoff(mass_BxV, lambda kept_BxV: count(kept_BxV) >= sampling_params.top_k)
        ties_kept_B = sampling_params.top_k - count(mass_BxV > cutoff_B[:, None])
        return _keep(mass_BxV, cutoff_B, ties_kept_B)

    def top_p(mass_BxV):
        mass_of = lambda kept_BxV: jnp.sum(mass_BxV, axis=-1, where=kept_BxV)
        wanted_B = sampling_params.top_p * mass_BxV.sum(axis=-1)
        cutoff_B = _cutoff(mass_BxV, lambda kept_BxV: mass_of(kept_BxV) >= wanted_B)
        missing_B = wanted_B - mass_of(mass_BxV > cutoff_B[:, None])
        return _keep(mass_BxV, cutoff_B, jnp.maximum(1, jnp.ceil(missing_B / cutoff_B)))

    unchanged = lambda mass_BxV: mass_BxV
    mass_BxV = jnp.exp(x_BxV - x_BxV.max(axis=-1, keepdims=True))
    mass_BxV = jax.lax.cond(sampling_params.top_k > 0, top_k, unchanged, mass_BxV)
    mass_BxV = jax.lax.cond(sampling_params.top_p < 1, top_p, unchanged, mass_BxV)
    return jnp.where((mass_BxV > 0) & (mass_BxV >= sampling_params.min_p), x_BxV, -jnp.inf)


def _cutoff(mass_BxV: jax.Array, is_enough) -> jax.Array:
    """Returns, for each row, the largest m such that `is_enough(mass >= m)` is true.

    Where it is true for no m, returns the smallest normal float. The search is a bisection.
    Positive floats have the same order as the integers with the same bits, so 30 halvings find the
    exact value. Sorting a vocabulary of 151,936 tokens takes far longer.

    Args:
      mass_BxV: float32 in [0, 1].
      is_enough: maps the mask of the kept tokens, bool [B, V], to bool [B].
    """
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    B = len(mass_BxV)

    def halve(_, bounds):
        low_B, high_B = bounds  # bits of the cutoff; `is_enough` holds at low, unless low is first
        middle_B = low_B + (high_B - low_B + 1) // 2
        holds_B = is_enough(mass_BxV >= as_float(middle_B)[:, None])
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B - 1)

    smallest = jax.lax.bitcast_convert_type(jnp.finfo(jnp.float32).tiny, jnp.int32)
    bounds = jnp.broadcast_to(smallest, B), jnp.broadcast_to(one, B)
    return as_float(jax.lax.fori_loop(0, 30, halve, bounds)[0])


def _keep(mass_BxV: jax.Array, cutoff_B: jax.Array, ties_kept_B: Array) -> jax.Array:
    """Zeroes masses below the cutoff. Of the masses equal to it, keeps the first `ties_kept_B`."""
    blocks_BxRxN = _blocks(mass_BxV)
    ties_BxRxN = blocks_BxRxN == cutoff_B[:, None, None]
    count_BxR = jnp.sum(ties_BxRxN, axis=-1)

    def drop_late_ties(blocks_BxRxN):
        before_BxR = jnp.cumsum(count_BxR, axis=-1) - count_BxR
        nth_BxRxN = before_BxR[..., None] + jnp.cumsum(ties_BxRxN, axis=-1)
        late_BxRxN = ties_BxRxN & (nth_BxRxN > ties_kept_B[:, None, None])
        return jnp.where(late_BxRxN, 0, blocks_BxRxN)

    unchanged = lambda blocks_BxRxN: blocks_BxRxN
    has_late_ties = jnp.any(jnp.sum(count_BxR, axis=-1) > ties_kept_B)
    blocks_BxRxN = jax.lax.cond(has_late_ties, drop_late_ties, unchanged, blocks_BxRxN)
    mass_BxV = blocks_BxRxN.reshape(mass_BxV.shape)
    return jnp.where(mass_BxV >= cutoff_B[:, None], mass_BxV, 0)
