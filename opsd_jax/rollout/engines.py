"""Temporary."""

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout.engine import Engine, shape_for


class Engines:
    def __init__(self, model, layout, pad_id):
        self.model, self._layout, self.pad_id = model, layout, pad_id
        self._made = {}

    def __call__(self, *, slots, group_size, rollouts, prompt_tokens, response_tokens):
        layout = self._layout()
        shape = shape_for(
            slots=slots,
            group_size=group_size,
            rollouts=rollouts,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            shards=mesh_lib.row_shards(layout.mesh),
        )
        if shape not in self._made:
            self._made[shape] = Engine(
                self.model, layout.abstract, layout.mesh, shape, pad_id=self.pad_id
            )
        return self._made[shape]
