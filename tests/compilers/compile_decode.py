"""Compiles decoding for TPUs that are not there: run by test_tpu.py.

    python compile_decode.py TOPOLOGY DATAxFSDPxTENSOR dense|paged
        [--program chunk|step|prefill|insert] [--layers 36]

Qwen3-8B's shapes, the parameters as decoding has them, 64 slots of 8,192 tokens, the cache donated.
`chunk`, `prefill` (16 prompts of 1,024 tokens) and `insert` are what rollouts run; `step` takes the
likeliest word, once, without a loop. Prints a JSON line; `main` says what is in it.
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
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.planning import costs, hlo
from opsd_jax.rollout import sampling, slots

B, S, STEPS = 64, 8192, 64
PROMPTS, PROMPT, ADMITTED = 16, 1024, 4
LENGTHS = (np.arange(B) + 0.5) * (S / B)  # of the rows, for the account: half full on average


def step(policy, params, cache, token, position):
    hidden, cache = policy.forward(params, token[:, None], position[:, None], cache)
    token = jnp.argmax(policy.unembed(params, hidden[:, 0]), axis=-1).astype(jnp.int32)
    return token, jnp.where(position < 0, -1, position + 1), cache


def chunk(policy, params, cache, token, position, key, sampling_params):
    state = slots.Slots(slots.empty_rows(B)._replace(token=token, position=position), cache)
    return slots.decode(policy, params, state, key, sampling_params, jnp.int32(4), steps=STEPS)


def prefill(policy, params, cache, token, position, tokens, positions):
    return slots.prefill(policy, params, tokens, positions)


def insert(policy, params, cache, token, position, prefilled, of_each):
    state, rows = slots.Slots(slots.empty_rows(B), cache), slots.Rows(*(of_each,) * 5)
    return slots.insert(slots.length_axes(policy), state, prefilled, of_each, of_each, rows)


def abstract_cache(model, mesh, *sizes):
    shapes = jax.eval_shape(lambda: model.policy.init_cache(*sizes))
    return abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.cache_rules, shapes, "cache"))


def of_chunk(model, mesh):
    of_call = jax.random.key(0), sampling.params(151_936, stop=(151_645,))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, of_call))
    return abstract_of(shapes, jax.tree.map(lambda _: mesh_lib.replicated(mesh), shapes))


def of_prefill(model, mesh):
    prompts = jax.ShapeDtypeStruct((PROMPTS, PROMPT), jnp.int32, sharding=mesh_lib.rows(mesh))
    return prompts, prompts


def insert_arguments(model, mesh):
    of_each = jax.ShapeDtypeStruct((ADMITTED,), jnp.int32, sharding=mesh_lib.replicated(mesh))
    return abstract_cache(model, mesh, PROMPTS, PROMPT), of_each


# The programs, and their arguments beyond those that all have.
PROGRAMS = {
    "step": (step, lambda model, mesh: ()),
    "chunk": (chunk, of_chunk),
    "prefill": (prefill, of_prefill),
    "insert": (insert, insert_arguments),
}


def compiled(model, mesh, name):
    """The program, and the shapes of its parameters and cache with their shardings."""
    shapes = jax.eval_shape(lambda: model.decode_params(model.init(jax.random.key(0))))
    params = abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.decode_rules, shapes))
    cache = abstract_cache(model, mesh, B, S)
    program, more = PROGRAMS[name]
    row = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=mesh_lib.rows(mesh))
    arguments = params, cache, row, row, *more(model, mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            lambda *args: program(model.policy, *args),
            donate_argnums=1,
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, slots.Slots(row, cache))
            if name == "insert"
            else None,
        )
        done = jitted.lower(*arguments).compile()
    return done, params, cache


def kernel_bytes(cache, mesh):
    """What the kernel reads on a device: of each row, whole blocks of pages."""
    rows = LENGTHS[:: mesh_lib.row_shards(mesh)]
    total = 0
    for layer in cache:
        shape = layer["pages"].sharding.shard_shape(layer["pages"].shape)
        pages = jax.ShapeDtypeStruct(shape, layer["pages"].dtype)
        block = paged.pages_per_block(pages)
        blocks = np.ceil(rows / (block * paged.PAGE)).sum()
        total += blocks * block * math.prod(shape[2:]) * pages.dtype.itemsize
    return total


def main(arguments) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    mesh = mesh_lib.make_mesh([int(n) for n in arguments.mesh.split("x")], topology.devices)
    sizes = {"cache": arguments.cache, "num_layers": arguments.layers}
    model = decoder.from_config(config_lib.preset("qwen3-8b", **sizes))
    done, params, cache = compiled(model, mesh, arguments.program)
    # The rule cuts no words: the branch that would look for the likeliest is not taken.
    program, memory = hlo.Program(done.as_text(), lightest=True), done.memory_analysis()
    in_loop = arguments.program == "chunk"
    everything = costs.accesses(program)
    moved = [access for access in everything if bool(access.loops) == in_loop]
    around = [access for access in everything if in_loop and not access.loops]
    kernel = kernel_bytes(cache, mesh) if arguments.cache == "paged" else 0
    collectives = [c.elements for c in costs.collectives(program) if bool(c.loops) == in_loop]
    # Every weight is read but for the embedding, of which a row a slot is.
    weights = sum(map(mesh_lib.shard_bytes, jax.tree.leaves(params))) - mesh_lib.shard_bytes(
        params["embedding"]
    )
    leaves = list(map(mesh_lib.shard_bytes, jax.tree.leaves(cache)))
    of_a_step = (
        sum(a.bytes * hlo.trip_count(a.loops[1:]) for a in moved)
        + sum(a.bytes for a in around) / STEPS
        + kernel
    )
    gib = {
        "argument": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "weights": weights,  # that a step has to read
        "live_cache": sum(leaves) * LENGTHS.mean() / S,  # likewise
        "moved": of_a_step,  # to and from HBM, with its share of what a chunk moves around its loop
        "kernel": kernel,  # of which the kernel's reads
    }
    seen = {name: round(size / 2**30, 4) for name, size in gib.items()}
    seen["ratio"] = seen["moved"] / (seen["weights"] + seen["live_cache"])
    seen["largest_collective"] = max(collectives, default=0)  # in the loop, elements
    # By one instruction of the loop, as a part of a leaf of the cache; 1 would be a copy of it.
    seen["largest_write"] = max(access.written for access in moved) / min(leaves)
    if not in_loop:
        everywhere = [a for a in costs.accesses(program, vmem=True) if not a.loops]
        xla = done.cost_analysis()["bytes accessed"]
        seen["account_by_xlas"] = sum(access.bytes for access in everywhere) / xla
    print(json.dumps(seen))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("topology")
    parser.add_argument("mesh")
    parser.add_argument("cache", choices=("dense", "paged"))
    parser.add_argument("--program", choices=PROGRAMS, default="chunk")
    parser.add_argument("--layers", type=int, default=36)
    main(parser.parse_args())
