"""Sampling from the host: prompts of token ids in, ragged responses out, one device call ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Params, Policy
from opsd_jax.rollout import sampler


class SamplerShape(NamedTuple):
    """The shapes of one sampling program, all fixed before it is compiled.

    Attributes:
      prompts: prompts a call, N.
      prompt_tokens: the longest prompt, P.
      group_size: rollouts of each prompt, G.
      response_tokens: the budget of a response, L; a rollout that fills it is truncated.
    """

    prompts: int
    prompt_tokens: int
    group_size: int
    response_tokens: int


class Call(NamedTuple):
    """The rollouts of one device call, on the host; those of a prompt stand next to each other.

    Attributes:
      first: the index of the first of its prompts, of all that were given.
      responses: int32 arrays, the sampled ids with EOS, as the device drew them.
      logprobs: float32 arrays, behaviour log-probability of each token.
      truncated: bool [n], cut at the budget.
      device_idles: says whether the device has nothing to do now: no further call, or it is done.
    """

    first: int
    responses: list[np.ndarray]
    logprobs: list[np.ndarray]
    truncated: np.ndarray
    device_idles: Callable[[], bool]


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad_id: int):
    """Prompts in the form that sampling and scoring take: int32 `(tokens, positions)`, [N, width].

    Raises:
      ValueError: a prompt is longer than `width`.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for i, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; between 1 and {width} fit.")
        tokens[i, width - len(ids) :] = ids
        positions[i, width - len(ids) :] = np.arange(len(ids))
    return tokens, positions


def _is_done(call: sampler.Samples | None) -> bool:
    """Whether the device has made the samples of a call, if there is one."""
    return call is None or call.tokens.is_ready()  # type: ignore[attr-defined]


class Engine:
    """Samples responses of one shape. The program compiles here, once."""

    def __init__(
        self,
        policy: Policy,
        abstract_params: Params,
        mesh: jax.sharding.Mesh,
        shape: SamplerShape,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        """Compiles.

        Args:
          policy: the model.
          abstract_params: the parameters' shapes, with shardings.
          mesh: where they lie.
          shape: of a call.
          eos_ids: each of them ends a response.
          pad_id: fills arrays.
          top_k: sample from the `top_k` likeliest words; 0 for all.
          top_p: of these, from the fewest likeliest whose mass reaches it; 1 for all.
        """
        self.shape, self._pad_id = shape, pad_id
        rows, whole = mesh_lib.rows(mesh), mesh_lib.replicated(mesh)
        N, P, G, L = shape

        def arg(sharding, dtype, *dims):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        key = jax.eval_shape(lambda: jax.random.key(0))
        args = (
            abstract_params,
            arg(rows, np.int32, N, P),
            arg(rows, np.int32, N, P),
            arg(rows, np.int32, N * G),
            arg(whole, key.dtype),
            arg(whole, np.float32),
            arg(whole, np.int32, len(eos_ids)),
            arg(whole, np.int32),
            *((arg(whole, np.float32),) if top_p < 1 else ()),
        )
        self._rule = (
            np.array(eos_ids, np.int32),
            np.int32(pad_id),
            *((np.float32(top_p),) if top_p < 1 else ()),
        )
        self._shardings = tuple(a.sharding for a in args[1:])
        program = jax.jit(
            lambda *a: sampler.generate(policy, *a, top_k=top_k, max_new_tokens=L),
            out_shardings=rows,
        )
        with jax.set_mesh(mesh):
            self._generate = program.lower(*args).compile()

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        temperature: float,
        offset: int = 0,
    ) -> Iterator[Call]:
        """G rollouts of each prompt, in order, a `Call` at a time. The device gets its next call
        before the last one is handed out.

        Args:
          params: the policy's.
          prompts: token ids, any number; the last call is filled up and what fills it dropped.
          key: PRNG key of this step and purpose; rollout j of prompt i has the id
            (offset + i) * G + j, which with the key chooses its random numbers.
          temperature: of sampling, 0 for greedy.
          offset: of the prompts' numbers.

        Raises:
          ValueError: a prompt is longer than the shape's.
        """
        N, P, G, _ = self.shape

        def sample(first: int) -> sampler.Samples:
            ids = list(prompts[first : first + N])
            arrays = left_pad(ids + ids[-1:] * (N - len(ids)), P, self._pad_id)
            rollout_ids = np.arange((offset + first) * G, (offset + first + N) * G, dtype=np.int32)
            arguments = (*arrays, rollout_ids, key, np.float32(temperature), *self._rule)
            return self._generate(params, *jax.device_put(arguments, self._shardings))

        starts = range(0, len(prompts), N)
        ahead = sample(0) if starts else None
        for first in starts:
            call, ahead = ahead, sample(first + N) if first + N in starts else None
            samples = jax.device_get(call)
            rows = range(min(N, len(prompts) - first) * G)
            lengths = samples.lengths
            yield Call(
                first,
                responses=[samples.tokens[row, : lengths[row]] for row in rows],
                logprobs=[samples.logprobs[row, : lengths[row]] for row in rows],
                truncated=samples.stop[: len(rows)] == sampler.STOP_LENGTH,
                device_idles=functools.partial(_is_done, ahead),
            )
