"""Speculative decoding: drafts from a rollout's own text, verified in one forward pass.

A draft is a guess of a rollout's next K tokens. It continues the last tokens as an earlier
occurrence of them in the prompt or the response was continued, and needs no second model. One
forward pass over the last token and the K guesses gives the logits after each of them. The tokens
are sampled from these logits in order, for as long as the guesses were right: a pass samples at
least 1 and at most K + 1 tokens.

This is rejection sampling with a proposal that puts all its mass on the guess x. It accepts x with
probability min(1, p(x) / 1) = p(x), and otherwise samples from p without x, normalised. Both follow
from one sample of p: it equals x with probability p(x), and if it differs, it has the other
distribution. So the tokens are distributed as without speculation. The sample is drawn with the
random numbers of its token's index in the response, as in `slots.decode`, so even the tokens are
the same, up to the rounding of a forward pass of another shape.

Shapes: S slots, T token columns, K guesses, N = K + 1 tokens per forward pass, H tokens of a prompt
and its response, V vocabulary size.

References:
  Leviathan et al., arXiv 2211.17192: the rejection sampling. Drafts from the prompt are known as
  prompt lookup decoding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opsd_jax.parallel.program import DECODE_STEPS
from opsd_jax.policy import Cache, Model, Params, Policy
from opsd_jax.rollout import sampling
from opsd_jax.rollout.sampling import Array
from opsd_jax.rollout.slots import (
    STOP_EOS,
    STOP_LENGTH,
    Chunk,
    Rows,
    Slots,
    empty_chunk,
    length_axes,
)

NGRAM = 3  # the most tokens for which an earlier occurrence is compared with the end of the text
# A pass of more than 127 tokens would be a prefill to `decoder.Decoder` with splash attention.
MOST_GUESSES = 31


def check(model: Model, guesses: int) -> None:
    """Raises ValueError if rollouts of the model cannot be sampled with speculation.

    Args:
      model: the model that samples.
      guesses: K, the number of tokens to guess in each forward pass.

    Raises:
      ValueError: the number is out of bounds, or the cache is paged or a state that cannot forget a
        wrong guess.
    """
    if not 0 < guesses <= MOST_GUESSES:
        raise ValueError(f"speculation is {guesses}; expected 1 to {MOST_GUESSES} guesses.")
    if model.ragged:
        raise ValueError(
            "the cache of the model is paged (`Model.ragged`), and its kernel takes one token of "
            "each row at a time"
        )
    if any(axis < 0 for axis in jax.tree.leaves(length_axes(model.policy))):
        raise ValueError(
            "the cache of the model has arrays without an axis for positions, such as a recurrent "
            "state, which cannot forget a wrong guess"
        )


def drafts(history_SxH: Array, position_S: Array, guesses: int) -> jax.Array:
    """Guesses the next tokens of each row from an earlier occurrence of its last tokens.

    The occurrence is the one that shares the most tokens with the end of the text, up to NGRAM.
    Among equals it is the last one. The guess repeats what followed it. Where that reaches the end
    of the text, it goes on from the occurrence again, so a text with a period is continued for any
    number of tokens. Without an occurrence, the guess repeats the last token.

    Args:
      history_SxH: int32, the token at each position. Later positions may have any value.
      position_S: int32, the position of the last token; -1 for an empty slot.
      guesses: K, the number of tokens to guess.

    Returns:
      int32 [S, K]. For an empty slot, any tokens of `history_SxH`.
    """
    history_SxH, H = jnp.asarray(history_SxH), history_SxH.shape[1]
    end_Sx1 = position_S[:, None]
    at_1xH = jnp.arange(H)[None]
    shared_SxH = jnp.zeros(history_SxH.shape, jnp.int32)
    is_equal_SxH = at_1xH < end_Sx1
    for j in range(NGRAM):
        # Compare the token j before each position with the token j before the end.
        last_Sx1 = jnp.take_along_axis(history_SxH, jnp.maximum(end_Sx1 - j, 0), axis=1)
        before_SxH = jnp.roll(history_SxH, j, axis=1)
        is_equal_SxH &= (at_1xH >= j) & (before_SxH == last_Sx1)
        shared_SxH += is_equal_SxH
    best_S = jnp.max(shared_SxH * H + at_1xH, axis=1, where=shared_SxH > 0, initial=-1)
    found_Sx1 = jnp.where(best_S < 0, position_S - 1, best_S % H)[:, None]
    offset_SxK = jnp.arange(guesses)[None] % jnp.maximum(end_Sx1 - found_Sx1, 1)
    return jnp.take_along_axis(history_SxH, jnp.maximum(found_Sx1 + 1 + offset_SxK, 0), axis=1)


def decode(
    policy: Policy,
    params: Params,
    slots: Slots,
    key: jax.Array,
    sampling_params: sampling.SamplingParams,
    history_SxH: jax.Array,
    *,
    steps: int,
    guesses: int,
) -> tuple[Slots, Chunk]:
    """Samples tokens for the rollout in each nonempty slot, several in one forward pass.

    The tokens are those of `slots.decode`; see the top of this file.

    Args:
      policy, params: the model. `check` has to accept it.
      slots: the state. The cache has room for `steps + guesses` more tokens of each rollout, or for
        all tokens within its budget.
      key: scalar PRNG key for this training step and purpose.
      sampling_params: the distribution that tokens are sampled from.
      history_SxH: int32, the token at each position of each rollout, up to its last token. Later
        positions may have any value. H is at least the length of a prompt and its response.
      steps: decoding returns when a rollout has this many new tokens, or all have stopped.
      guesses: K, the number of tokens to guess in each forward pass.

    Returns:
      `(slots, chunk)`: the new state, in which slots whose rollout stopped are empty, and the
      sampled tokens. T is `steps + guesses`, and `chunk.steps` is the number of forward passes.
    """
    S = len(slots.rows.token)
    keys_S = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.rows.rollout_id)
    empty = empty_chunk(steps + guesses, S)

    def is_unfinished(carry):
        _, (rows, _), _, chunk = carry
        return jnp.all(chunk.drawn < steps) & jnp.any(rows.position >= 0)

    def step(carry):
        t, slots, history_SxH, chunk = carry
        with jax.named_scope("drafts"):
            drafts_SxK = drafts(history_SxH, slots.rows.position, guesses)
        cache, sampled, fits_SxN = _sample(
            policy, params, slots, keys_S, sampling_params, drafts_SxK
        )
        # The next drafts read these tokens only up to the last one that counts.
        next_SxN = slots.rows.position[:, None] + jnp.arange(1, guesses + 2)[None]
        row_Sx1 = jnp.arange(S)[:, None]
        history_SxH = history_SxH.at[row_Sx1, next_SxN].set(sampled.token, mode="drop")
        rows, chunk = _record(slots.rows, chunk, sampled, fits_SxN, drafts_SxK, sampling_params)
        return t + 1, Slots(rows, cache), history_SxH, chunk

    with jax.named_scope(DECODE_STEPS):
        first = jnp.int32(0), slots, history_SxH, empty
        t, after, _, chunk = jax.lax.while_loop(is_unfinished, step, first)
    return after, chunk._replace(steps=t)


def _sample(
    policy: Policy,
    params: Params,
    slots: Slots,
    keys_S: jax.Array,
    sampling_params: sampling.SamplingParams,
    drafts_SxK: jax.Array,
) -> tuple[Cache, sampling.Drawn, Array]:
    """Samples the tokens after the last token of each row and after each guess.

    Returns:
      `(cache, sampled, fits_SxN)`: the cache after the forward pass; the sampled tokens, each field
      [S, N]; and bool, whether a token is within the budget of a rollout.
    """
    rows, (S, K) = slots.rows, drafts_SxK.shape
    ahead_1xN = jnp.arange(K + 1)[None]
    inputs_SxN = jnp.concatenate([jnp.asarray(rows.token)[:, None], drafts_SxK], axis=1)
    index_SxN = rows.drawn[:, None] + ahead_1xN  # of each sampled token, in its response
    fits_SxN = (rows.position[:, None] >= 0) & (index_SxN < rows.budget[:, None])
    # Guesses past the budget are padding, so the cache needs no entries for them.
    positions_SxN = jnp.where(fits_SxN, rows.position[:, None] + ahead_1xN, -1)
    with jax.named_scope("forward"):
        # A wrong guess leaves entries in the cache, at positions after the last token that counts.
        # No later pass attends to them: it begins at the first of these positions and, before it
        # attends to the cache, it stores entries of its own for all positions that it attends to.
        hidden_SxNxD, cache = policy.forward(params, inputs_SxN, positions_SxN, slots.cache)
        logits_SxNxV = policy.unembed(params, hidden_SxNxD)
    with jax.named_scope("draw"):
        keys_SxN = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_S, index_SxN)
        logits_BxV = logits_SxNxV.reshape(S * (K + 1), -1)  # the rows of `sampling.draw`
        sampled = sampling.draw(logits_BxV, keys_SxN.reshape(-1), sampling_params)
    return cache, sampling.Drawn(*(x.reshape(S, K + 1) for x in sampled)), fits_SxN


def _record(
    rows: Rows,
    chunk: Chunk,
    sampled: sampling.Drawn,
    fits_SxN: Array,
    drafts_SxK: jax.Array,
    sampling_params: sampling.SamplingParams,
) -> tuple[Rows, Chunk]:
    """Adds the tokens of one forward pass to the chunk, advances rows, and frees stopped slots.

    Args:
      rows, chunk: the state before the forward pass.
      sampled, fits_SxN: the results of `_sample`.
      drafts_SxK: the guesses.
      sampling_params: the distribution that tokens are sampled from.
    """
    S, N = sampled.token.shape
    eos_SxN = jnp.asarray(sampling_params.stop)[sampled.token]
    # A token counts if the guesses before it were right and none of them ended the response.
    goes_on_SxK = (sampled.token[:, :-1] == drafts_SxK) & ~eos_SxN[:, :-1]
    reached_SxN = jnp.pad(jnp.cumprod(goes_on_SxK, axis=1), ((0, 0), (1, 0)), constant_values=1)
    kept_SxN = fits_SxN & (reached_SxN > 0)
    kept_S = jnp.sum(kept_SxN, axis=1)
    drawn_S = rows.drawn + kept_S
    eos_S = jnp.any(kept_SxN & eos_SxN, axis=1)
    full_S = (rows.position >= 0) & (drawn_S >= rows.budget)
    # Tokens that do not count are overwritten by the next pass, or stay behind the last token.
    at_SxN = chunk.drawn[:, None] + jnp.arange(N)[None]
    put = lambda column, new: column.at[at_SxN, jnp.arange(S)[:, None]].set(new, mode="drop")
    chunk = Chunk(
        put(chunk.tokens, sampled.token),
        put(chunk.model_logprobs, sampled.model_logprob),
        put(chunk.sampling_logprobs, sampled.sampling_logprob),
        chunk.drawn + kept_S,
        jnp.where(eos_S, STOP_EOS, jnp.where(full_S, STOP_LENGTH, chunk.stop)),
        chunk.read + jnp.maximum(rows.position, 0),
    )
    last_S = jnp.take_along_axis(sampled.token, jnp.maximum(kept_S - 1, 0)[:, None], axis=1)[:, 0]
    goes_on_S = (rows.position >= 0) & ~eos_S & ~full_S
    position_S = jnp.where(goes_on_S, rows.position + kept_S, -1)
    return rows._replace(token=last_S, position=position_S, drawn=drawn_S), chunk
