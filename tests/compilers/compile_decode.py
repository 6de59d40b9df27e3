"""Compiles decoding for a TPU topology without the hardware; test_tpu.py runs it.

    python compile_decode.py TOPOLOGY DATAxFSDPxTENSOR dense|paged
        [--program chunk|step|prefill|insert] [--layers 36] [--int8 weights cache]

The model has Qwen3-8B's shapes, with the parameters in the layout for decoding. There are 64 slots
of 8,192 tokens, and the cache is donated. `chunk`, `prefill` (16 prompts of 1,024 tokens) and
`insert` are programs of the rollout engine; `step` is one greedy decoding step without a loop.
Prints one line of JSON; see `main` for its fields.
"""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from opsd_jax import config as config_lib
from opsd_jax.models import decoder, paged
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.planning import costs, hlo
from opsd_jax.rollout import sampling, slots

B, S, STEPS = 64, 8192, 64
PROMPTS, PROMPT, ROLLOUTS_PER_INSERT = 16, 1024, 4
LENGTHS = (np.arange(B) + 0.5) * (S / B)  # assumed tokens in each row: half full on average


def step(policy, params, cache, token, position):
    hidden, cache = policy.forward(params, token[:, None], position[:, None], cache)
    token = jnp.argmax(policy.unembed(params, hidden[:, 0]), axis=-1).astype(jnp.int32)
    return token, jnp.where(position < 0, -1, position + 1), cache


def chunk(policy, params, cache, token, position, key, sampling_params):
    state = slots.Slots(slots.empty_rows(B)._replace(token=token, position=position), cache)
    return slots.decode(policy, params, state, key, sampling_params, jnp.int32(4), steps=STEPS)


def prefill(policy, params, cache, token, position, tokens, positions):
    return slots.prefill(policy, params, tokens, positions)


def insert(policy, params, cache, token, position, prefilled, values):
    state, rows = slots.Slots(slots.empty_rows(B), cache), slots.Rows(*(values,) * 5)
    return slots.insert(slots.length_axes(policy), state, prefilled, values, values, rows)


def abstract_cache(model, mesh, *sizes):
    shapes = jax.eval_shape(lambda: model.policy.init_cache(*sizes))
    return abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.cache_rules, shapes, "cache"))


def chunk_arguments(model, mesh):
    arguments = jax.random.key(0), sampling.params(151_936, stop=(151_645,))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arguments))
    return abstract_of(shapes, jax.tree.map(lambda _: mesh_lib.replicated(mesh), shapes))


def prefill_arguments(model, mesh):
    prompts = jax.ShapeDtypeStruct((PROMPTS, PROMPT), jnp.int32, sharding=mesh_lib.rows(mesh))
    return prompts, prompts


def insert_arguments(model, mesh):
    values = jax.ShapeDtypeStruct(
        (ROLLOUTS_PER_INSERT,), jnp.int32, sharding=mesh_lib.replicated(mesh)
    )
    return abstract_cache(model, mesh, PROMPTS, PROMPT), values


# Each program, and its arguments after the parameters, the cache, the tokens and the positions.
PROGRAMS = {
    "step": (step, lambda model, mesh: ()),
    "chunk": (chunk, chunk_arguments),
    "prefill": (prefill, prefill_arguments),
    "insert": (insert, insert_arguments),
}


def compiled(model, mesh, name):
    """Returns the program, and the shapes and shardings of its parameters and its cache."""
    shapes = jax.eval_shape(lambda: model.decode_params(model.init(jax.random.key(0))))
    params = abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.decode_rules, shapes))
    cache = abstract_cache(model, mesh, B, S)
    program, more_arguments = PROGRAMS[name]
    row = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=mesh_lib.rows(mesh))
    arguments = params, cache, row, row, *more_arguments(model, mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            lambda *args: program(model.policy, *args),
            donate_argnums=1,
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, slots.Slots(row, cache))
            if name == "insert"
            else None,
        )
        return jitted.lower(*arguments).compile(), params, cache


def kernel_bytes(cache, mesh):
    """Returns the bytes that the kernel reads on a device, in whole blocks of pages per row."""
    rows = LENGTHS[:: mesh_lib.row_shards(mesh)]
    total = 0
    for leaf in cache.pages:
        shape = leaf.sharding.shard_shape(leaf.shape)
        pages = jax.ShapeDtypeStruct(shape, leaf.dtype)
        block = paged.pages_per_block(pages, cache.table.shape[1])
        blocks = np.ceil(rows / (block * paged.PAGE)).sum()
        total += blocks * block * math.prod(shape[1:]) * pages.dtype.itemsize
    return total


def main(arguments) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    mesh = mesh_lib.make_mesh([int(n) for n in arguments.mesh.split("x")], topology.devices)
    sizes = {"cache": arguments.cache, "num_layers": arguments.layers}
    model = decoder.from_config(config_lib.preset("qwen3-8b", **sizes))
    if arguments.int8:
        model = model.quantised(QuantisationOptions(**dict.fromkeys(arguments.int8, "int8")))
    done, params, cache = compiled(model, mesh, arguments.program)
    # No sampling parameter restricts the vocabulary, so the cheapest branch of `draw` runs.
    program, memory = hlo.Program(done.as_text(), lightest=True), done.memory_analysis()
    in_loop = arguments.program == "chunk"
    everything = costs.accesses(program)
    moved = [access for access in everything if bool(access.loops) == in_loop]
    around = [access for access in everything if in_loop and not access.loops]
    kernel = kernel_bytes(cache, mesh) if arguments.cache == "paged" else 0
    collectives = [c.elements for c in costs.collectives(program) if bool(c.loops) == in_loop]
    # A step reads every weight except the embedding, of which it reads one row per slot.
    weights = sum(map(mesh_lib.shard_bytes, jax.tree.leaves(params))) - mesh_lib.shard_bytes(
        params["embedding"]
    )
    leaves = list(map(mesh_lib.shard_bytes, jax.tree.leaves(cache)))
    step_bytes = (
        sum(a.bytes * hlo.trip_count(a.loops[1:]) for a in moved)
        + sum(a.bytes for a in around) / STEPS
        + kernel
    )
    gib = {
        "argument": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "weights": weights,  # weights that a step has to read
        "filled_cache": sum(leaves) * LENGTHS.mean() / S,  # cache entries that a step has to read
        # HBM traffic of a step, including its part of the traffic outside of the chunk's loop.
        "moved": step_bytes,
        "kernel": kernel,  # the kernel's reads, included in "moved"
    }
    seen = {name: round(size / 2**30, 4) for name, size in gib.items()}
    seen["ratio"] = seen["moved"] / (seen["weights"] + seen["filled_cache"])
    seen["largest_collective"] = max(collectives, default=0)  # elements, in the loop
    # Largest write of one instruction, as a fraction of a cache leaf; copying the leaf gives 1.
    seen["largest_write"] = max(access.written for access in moved) / max(leaves)
    if not in_loop:
        everywhere = [a for a in costs.accesses(program, vmem=True) if not a.loops]
        xla = done.cost_analysis()["bytes accessed"]
        seen["account_by_xlas"] = sum(access.bytes for access in everywhere) / xla
    print(json.dumps(seen))


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("topology")
    parser.add_argument("mesh")
    parser.add_argument("cache", choices=("dense", "paged"))
    parser.add_argument("--program", choices=PROGRAMS, default="chunk")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--int8", nargs="*", choices=("weights", "cache"))
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
