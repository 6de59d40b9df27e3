"""opsd_jax as an engine of benchmarks/rollout.py, which runs this script."""

import itertools

import jax
import rollout_protocol

from opsd_jax.models import decoder
from opsd_jax.models.architecture import DecoderConfig
from opsd_jax.parallel.mesh import abstract_of, make_mesh, tree_shardings
from opsd_jax.policy import Model, Params
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import RUNNING, Engine, EngineShape
from opsd_jax.rollout.layout import Layout, decode_layout


def sampler(model: Model, shape: EngineShape) -> tuple[Engine, Layout, Params]:
    """Returns the engine on one device, the layout for decoding, and random parameters."""
    mesh = make_mesh((1, 1, 1), jax.devices())
    params = jax.jit(model.init)(jax.random.key(0))
    abstract = abstract_of(params, tree_shardings(mesh, model.rules, params))
    layout = decode_layout(model, abstract, mesh)
    return Engine(model, layout.abstract, layout.mesh, shape), layout, params


def engine(
    vocabulary: int,
    lengths: list[int],
    static: bool = False,
    capacity: int = 0,
    carry_over: int = 0,
):
    """Samples with 32 slots that are refilled from a queue, or in static batches.

    Args:
      vocabulary: number of tokens in the vocabulary.
      lengths: the number of tokens to sample for each request.
      static: sample static batches of 32, each to its longest length.
      capacity: tokens that the cache holds per row. The default value is what the requests need.
      carry_over: requests in flight beyond `lengths`. A repetition ends once as many rollouts have
        ended as `lengths` has, and the next one continues the others.
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
    rows, P = rollout_protocol.ROWS, rollout_protocol.PROMPT
    shape = EngineShape(
        rows, rows // 4, P, (capacity or P + max(lengths)) - P, continues=carry_over > 0
    )
    refilled, layout, params = sampler(model, shape)
    options = {"sampling_params": sampling.params(vocabulary, stop=())}
    if carry_over:
        return carrying(refilled, layout.convert(params), vocabulary, lengths, carry_over, options)
    prompts = rollout_protocol.prompts(vocabulary, len(lengths))
    repetitions = itertools.count()

    def run():
        key = jax.random.key(next(repetitions))
        made, steps = [0] * len(lengths), 0
        at_once = rows if static else len(lengths)
        decoded = layout.convert(params)
        for start in range(0, len(lengths), at_once):
            some = slice(start, start + at_once)
            budgets = [[length] for length in lengths[some]]
            ids = [[i] for i in range(len(lengths))][some]
            for ended in refilled(decoded, prompts[some], ids, key=key, budgets=budgets, **options):
                steps += ended.steps
                for response in ended.responses:
                    made[start + response.prompt] = len(response.tokens)
        return {"tokens": made, "sampled": sum(made), "steps": steps}

    return run


def carrying(refilled: Engine, params, vocabulary, lengths, carry_over, options):
    """Returns a function like `run` in `engine`, whose rollouts go on in the next repetition."""
    count = len(lengths)
    prompts = rollout_protocol.prompts(vocabulary, count)
    waiting = itertools.cycle(range(count))  # the next requests
    flight: list = []  # (request, response so far) of each rollout that goes on
    repetitions = itertools.count()

    def run():
        flight.extend((next(waiting), None) for _ in range(count + carry_over - len(flight)))
        requests = [request for request, _ in flight]
        begun = {(i, 0): response for i, (_, response) in enumerate(flight) if response}
        before = sum(len(response.tokens) for response in begun.values())
        after, steps, done = {}, 0, 0

        def enough(responses):
            nonlocal done
            done += len(responses)
            return done >= count

        for ended in refilled(
            params,
            [prompts[request] for request in requests],
            [[i] for i in range(len(requests))],
            key=jax.random.key(next(repetitions)),
            budgets=[[lengths[request]] for request in requests],
            begun=begun,
            enough=enough,
            **options,
        ):
            steps += ended.steps
            after |= {response.prompt: response for response in ended.responses}
        flight[:] = [
            (requests[i], response)
            for i, response in sorted(after.items())
            if response.stop == RUNNING
        ]
        sampled = sum(len(response.tokens) for response in after.values()) - before
        return {"tokens": lengths, "sampled": sampled, "steps": steps}

    return run


if __name__ == "__main__":
    rollout_protocol.serve(engine)
