"""A cache of compiled rollout engines, one per engine shape."""

from __future__ import annotations

import functools

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout.engine import Engine, EngineShape, shape_for
from opsd_jax.rollout.layout import Sampler

MAX_ENGINES = 8  # kept per `Engines`


class Engines:
    """Compiles the rollout engines of a model on demand, and caches the most recently used ones."""

    def __init__(self, sampler: Sampler, pad_id: int):
        """Creates an empty cache of engines, without compiling anything.

        Args:
          sampler: the model.
          pad_id: the token id of padding.
        """
        self._sampler, self._pad_id = sampler, pad_id
        self._engine = functools.lru_cache(maxsize=MAX_ENGINES)(self._compile)

    def __call__(
        self,
        *,
        slots: int,
        group_size: int,
        rollouts: int,
        prompt_tokens: int,
        response_tokens: int,
        continues: bool = False,
        speculation: int = 0,
        pool_tokens: int = 0,
    ) -> Engine:
        """Returns an engine for the given sizes, and compiles the engine if it is not cached.

        `shape_for` computes the shape of the engine.

        Args:
          slots: maximum number of decoding slots.
          group_size: rollouts per prompt.
          rollouts: rollouts per call of the engine.
          prompt_tokens: maximum length of a prompt, in tokens.
          response_tokens: maximum length of a response, in tokens.
          continues: whether rollouts can continue from tokens of an earlier call.
          speculation: tokens that speculation guesses per forward pass; 0 turns it off.
          pool_tokens: number of tokens that a paged cache holds; see `EngineShape`.
        """
        return self._engine(
            shape_for(
                slots=slots,
                group_size=group_size,
                rollouts=rollouts,
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                shards=mesh_lib.row_shards(self._sampler.layout.mesh),
                continues=continues,
                speculation=speculation,
                pool_tokens=pool_tokens,
            )
        )

    def _compile(self, shape: EngineShape) -> Engine:
        """Compiles an engine of the given shape."""
        layout = self._sampler.layout
        return Engine(self._sampler.model, layout.abstract, layout.mesh, shape, pad_id=self._pad_id)
