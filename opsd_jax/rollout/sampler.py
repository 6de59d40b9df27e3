"""Sampling on the device: one prefill a prompt, G rollouts of it, decoded together until all end.

A sampled token depends on (key, rollout id, its index in the response) and the model alone: not on
its row, the rows beside it, or how many devices there are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.policy import Params, Policy

# Why a rollout ended.
STOP_EOS = 0
STOP_LENGTH = 1  # it filled its budget: truncated


class Samples(NamedTuple):
    """Rollouts as they come from the device, the G of a prompt next to each other.

    Attributes:
      tokens: int32 [N * G, L], the responses, EOS included; padding after them.
      logprobs: float32 [N * G, L], of each token under the distribution it was drawn from: the
        behaviour log-probabilities. 0 after the end.
      lengths: int32 [N * G], tokens in each response, EOS included.
      stop: int32 [N * G], STOP_EOS or STOP_LENGTH.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stop: jax.Array


def draw(
    logits_BxV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int = 0,
    top_p: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A token a row, and its log-probability under the distribution that it is drawn from.

    That is softmax(logits / temperature), without all but the `top_k` likeliest words (0 keeps
    all), then without all but the fewest likeliest of these whose mass reaches `top_p` (None keeps
    all; the likeliest always stays), summing to 1 again. Of equal words the first comes first.

    A temperature of 0 takes the likeliest token, and reports its log-probability at temperature 1.
    """
    greedy = temperature == 0
    logprobs_BxV = jax.nn.log_softmax(logits_BxV / jnp.where(greedy, 1.0, temperature))
    if not top_k and top_p is None:
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, logprobs_BxV)
        token_B = jnp.where(greedy, jnp.argmax(logprobs_BxV, axis=-1), drawn_B).astype(jnp.int32)
        return token_B, jnp.take_along_axis(logprobs_BxV, token_B[:, None], axis=-1)[:, 0]
    V = logits_BxV.shape[-1]
    logprobs_BxK, words_BxK = jax.lax.top_k(logprobs_BxV, min(top_k or V, V))
    logprobs_BxK = jax.nn.log_softmax(logprobs_BxK)
    if top_p is not None:
        mass_BxK = jnp.exp(logprobs_BxK)
        likelier_BxK = jnp.cumsum(mass_BxK, axis=-1) - mass_BxK
        first_BxK = jnp.arange(mass_BxK.shape[-1])[None] == 0
        kept_BxK = first_BxK | (likelier_BxK < top_p)
        logprobs_BxK = jax.nn.log_softmax(jnp.where(kept_BxK, logprobs_BxK, -jnp.inf))
    # A word's noise is its own, whatever its rank: models that rank two words differently stay
    # comparable, and rounding that swaps equal ones changes nothing.
    noise = lambda key, word: jax.random.gumbel(jax.random.fold_in(key, word))
    noise_BxK = jax.vmap(jax.vmap(noise, (None, 0)))(keys_B, words_BxK)
    best_B = jnp.where(greedy, 0, jnp.argmax(logprobs_BxK + noise_BxK, axis=-1))
    take = lambda values_BxK: jnp.take_along_axis(values_BxK, best_B[:, None], axis=-1)[:, 0]
    return take(words_BxK), take(logprobs_BxK)


def generate(
    policy: Policy,
    params: Params,
    tokens_NxP: jax.Array,
    positions_NxP: jax.Array,
    rollout_ids: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    eos_ids: jax.Array,
    pad_id: jax.Array,
    top_p: jax.Array | None = None,
    *,
    top_k: int = 0,
    max_new_tokens: int,
) -> Samples:
    """Samples G responses to each of N prompts. Pure: jit it, `policy`, `top_k` and
    `max_new_tokens` static.

    Args:
      policy, params: the model.
      tokens_NxP, positions_NxP: int32, the prompts, padded on the left: the last column holds the
        last token of each.
      rollout_ids: int32 [N * G], distinct under one key: they choose the random numbers.
      key: a scalar PRNG key, for this step and purpose.
      temperature: float32 scalar, 0 for greedy decoding.
      eos_ids: int32 [E], the tokens that end a response.
      pad_id: int32 scalar, fills `tokens` after the end.
      top_p, top_k: as `draw` has them.
      max_new_tokens: the budget L of a response.

    Returns:
      `Samples`.
    """
    N, P = tokens_NxP.shape
    B, L = len(rollout_ids), max_new_tokens
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rollout_ids)
    repeat = lambda x: jnp.repeat(x, B // N, axis=0)

    def record(t, logits_BxV, done_B, samples):
        """Draws token t of each live row from `logits_BxV` and writes it down."""
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, t)
        token_B, logprob_B = draw(logits_BxV, keys_B, temperature, top_k=top_k, top_p=top_p)
        token_B = jnp.where(done_B, pad_id, token_B)
        ends_B = ~done_B & jnp.isin(token_B, eos_ids)
        samples = Samples(
            tokens=samples.tokens.at[:, t].set(token_B),
            logprobs=samples.logprobs.at[:, t].set(jnp.where(done_B, 0.0, logprob_B)),
            lengths=samples.lengths + ~done_B,
            stop=jnp.where(ends_B, STOP_EOS, samples.stop),
        )
        return t + 1, token_B, done_B | ends_B, samples

    with jax.named_scope("prefill"):
        cache = policy.init_cache(N, P + L)
        hidden_NxPxD, cache = policy.forward(params, tokens_NxP, positions_NxP, cache)
        logits_BxV = repeat(policy.unembed(params, hidden_NxPxD[:, -1]))
        cache = jax.tree.map(repeat, cache)
        prompt_length_B = repeat(positions_NxP[:, -1]) + 1

    empty = Samples(
        tokens=jnp.full((B, L), pad_id, jnp.int32),
        logprobs=jnp.zeros((B, L), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        stop=jnp.full(B, STOP_LENGTH, jnp.int32),
    )
    start = record(jnp.int32(0), logits_BxV, jnp.zeros(B, bool), empty)

    def live(carry):
        (t, _, done_B, _), _ = carry
        return (t < L) & ~jnp.all(done_B)

    def decode(carry):
        (t, token_B, done_B, samples), cache = carry
        position_B = jnp.where(done_B, -1, prompt_length_B + t - 1)
        hidden_Bx1xD, cache = policy.forward(params, token_B[:, None], position_B[:, None], cache)
        logits_BxV = policy.unembed(params, hidden_Bx1xD[:, 0])
        return record(t, logits_BxV, done_B, samples), cache

    with jax.named_scope("decode"):
        (_, _, _, samples), _ = jax.lax.while_loop(live, decode, (start, cache))
    return samples
