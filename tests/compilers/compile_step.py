"""Compiles a train step for TPUs, without TPUs, and lists its collectives; test_tpu.py runs it.

    python compile_step.py TOPOLOGY SLICES DATAxFSDPxTENSOR

The step is SFT of Qwen3-8B with 2 of its 36 layers, bfloat16 weights, rows of 2,048 tokens, four
microbatches of two rows per device. The script prints one line of JSON: the bytes of each
collective that joins devices of different `data` and of each transfer between slices, with whether
it is inside a loop; and the bytes of a device's part of the gradients in float32.
"""

import functools
import json
import math
import re
import sys

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax import config as config_lib
from opsd_jax.models import decoder
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.planning import costs, hlo
from opsd_jax.planning.chips import topology_devices
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages import sft
from opsd_jax.training import state as state_lib
from opsd_jax.training import step as step_lib

LAYERS, TOKENS, MICROBATCHES, ROWS = 2, 2048, 4, 2


def groups(line: str, devices: int) -> np.ndarray:
    """Returns the devices of each group of a collective, [groups, devices of a group]."""

    def transposed(text: str) -> np.ndarray:
        """Returns all devices in the order of a text such as "[2,8]T(1,0)"."""
        sizes, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
        array = np.arange(devices).reshape([int(size) for size in sizes.split(",")])
        return array.transpose([int(axis) for axis in order.split(",")] if order else None)

    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", line):
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return np.array([row.split(",") for row in re.findall(r"[\d,]{2,}", listed[1])], int)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return transposed(iota[2]).reshape(-1, int(iota[1]))
    mesh, order, axes = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", line
    ).groups()
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", mesh), strict=True)
    joined = [names.index(axis) for axis in re.findall(r"\w+", axes)]
    array = transposed(order or f"[{devices}]").reshape([int(size) for size in sizes])
    array = np.moveaxis(array, joined, range(-len(joined), 0))
    return array.reshape(-1, np.prod([int(sizes[axis]) for axis in joined]))


def main(topology: str, slices: str, shape: str) -> None:
    devices = topology_devices(topology, int(slices))
    sizes = tuple(map(int, shape.split("x")))
    mesh = mesh_lib.make_mesh(sizes, devices)
    fields = {"num_layers": LAYERS, "attention": "splash", "remat": "attention"}
    fields |= {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = decoder.config_of(config_lib.preset("qwen3-8b", **fields))
    model = decoder.model(config)
    optimizer = optax.adamw(1e-5)
    loss = functools.partial(sft.loss_fn, model.policy, 0)
    batch = batch_lib.pack(
        [],
        buckets=[{"student": TOKENS}],
        microbatch=ROWS * mesh_lib.row_shards(mesh),
        capacity=MICROBATCHES * ROWS * mesh_lib.row_shards(mesh),
        pad_id=0,
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(functools.partial(state_lib.init_state, optimizer=optimizer), params)
    shardings = state_lib.state_shardings(
        state, optimizer, mesh_lib.tree_shardings(mesh, model.rules, params), mesh
    )
    of_batch = step_lib.batch_shardings(batch, mesh)
    step = jax.jit(
        step_lib.make_train_step(loss, optimizer),
        donate_argnums=0,
        in_shardings=(shardings, of_batch),
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )
    state = mesh_lib.abstract_of(state, shardings)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, mesh_lib.abstract_of(batch, of_batch)).compile()
    program = hlo.Program(compiled.as_text())
    of_device = np.arange(len(devices)) // math.prod(sizes[1:])  # its index along `data`
    across = [
        (c.bytes, bool(c.loops))
        for c in costs.collectives(program)
        if np.ptp(of_device[groups(c.line, len(devices))], axis=1).any()
    ]
    # Between slices, the compiler replaces collectives by transfers through the hosts.
    transfers = [
        (hlo.size_of(i.shape), bool(loops))
        for _, i, loops in program.executed()
        if i.op == "send" and "is_host_transfer=true" in i.line
    ]
    gradients = 4 * sum(
        math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state["params"])
    )
    print(json.dumps({"across": across, "transfers": transfers, "gradients": gradients}))


if __name__ == "__main__":
    main(*sys.argv[1:])
