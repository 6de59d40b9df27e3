"""opsd_jax as an engine of benchmarks/rollout.py, which runs this script."""

import itertools

import jax
import rollout_protocol

from opsd_jax.models import decoder
from opsd_jax.models.architecture import DecoderConfig
from opsd_jax.parallel.mesh import abstract_of, make_mesh, tree_shardings
from opsd_jax.policy import Model, Params
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import Layout, decode_layout


def sampler(model: Model, shape: EngineShape) -> tuple[Engine, Layout, Params]:
    """Returns the engine on one device, the layout for decoding, and random parameters."""
    mesh = make_mesh((1, 1, 1), jax.devices())
    params = jax.jit(model.init)(jax.random.key(0))
    abstract = abstract_of(params, tree_shardings(mesh, model.rules, params))
    layout = decode_layout(model, abstract, mesh)
    return Engine(model, layout.abstract, layout.mesh, shape), layout, params


def engine(vocabulary: int, lengths: list[int], static: bool = False, capacity: int = 0):
    """Samples with 32 slots that are refilled from a queue, or in static batches.

    Args:
      vocabulary: number of tokens in the vocabulary.
      lengths: the number of tokens to sample for each request.
      static: sample static batches of 32, each to its longest length.
      capacity: tokens that the cache holds per row. The default value is what the requests need.
    """
    m = rollout_protocol.MODEL
    model = decoder.model(
        DecoderConfig(
            vocab_size=vocabulary,
            hidden_size=m["hidden"],
            intermediate_size=m["mlp"],
            num_layers=m["layers"],
            num_heads=m["heads"],
            num_kv_heads=m["kv_heads"],
            head_dim=m["head_dim"],
            rope_theta=m["rope_theta"],
            attention="dense",
            cache="dense",
        )
    )
    room = (capacity or rollout_protocol.PROMPT + max(lengths)) - rollout_protocol.PROMPT
    shape = EngineShape(
        rollout_protocol.ROWS, rollout_protocol.ROWS // 4, rollout_protocol.PROMPT, room
    )
    refilled, layout, params = sampler(model, shape)
    sampling_params = sampling.params(vocabulary, stop=())
    prompts = rollout_protocol.prompts(vocabulary, len(lengths))
    repetitions = itertools.count()

    def run():
        key = jax.random.key(next(repetitions))
        made = [0] * len(lengths)
        at_once = rollout_protocol.ROWS if static else len(lengths)
        decoded = layout.convert(params)
        for start in range(0, len(lengths), at_once):
            some = slice(start, start + at_once)
            budgets = [[length] for length in lengths[some]]
            ids = [[i] for i in range(len(lengths))][some]
            for ended in refilled(
                decoded,
                prompts[some],
                ids,
                key=key,
                sampling_params=sampling_params,
                budgets=budgets,
            ):
                for response in ended.responses:
                    made[start + response.prompt] = len(response.tokens)
        return made

    return run


if __name__ == "__main__":
    rollout_protocol.serve(engine)
