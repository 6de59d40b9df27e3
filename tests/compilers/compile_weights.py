"""Compiles the loading and saving of weights for a TPU that is not attached; test_tpu.py runs it.

    python compile_weights.py TOPOLOGY DATAxFSDPxTENSOR PARAM_DTYPE

The model is Qwen3-8B, stored in bfloat16. Prints a JSON line with the largest temporary memory of a
program in MiB, and whether every update of a parameter is in place.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from opsd_jax import config as config_lib
from opsd_jax.models import decoder, safetensors, weights
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of


def main(topology: str, shape: str, param_dtype: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = mesh_lib.make_mesh([int(size) for size in shape.split("x")], devices)
    model = decoder.from_config(config_lib.preset("qwen3-8b", param_dtype=param_dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    abstract = abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
    temporaries, in_place = 0, True
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        layout = weights.layouts_of(mesh_lib.path_name(path), leaf.shape)[0]
        pieces = weights.pieces_of(leaf, layout, itemsize=2)
        sharding = NamedSharding(mesh, pieces.piece_spec)
        piece = jax.ShapeDtypeStruct(pieces.shape, jnp.bfloat16, sharding=sharding)
        where = {
            "order": layout.order,
            "mesh": pieces.mesh,
            "specs": (pieces.spec, pieces.piece_spec),
        }
        put = weights.put_piece.lower(leaf, piece, number, number, **where).compile()
        stored = {"rows": pieces.rows, "dtype": safetensors.DTYPES["BF16"]}
        take = weights.take_piece.lower(leaf, number, number, **where, **stored).compile()
        for memory in (put.memory_analysis(), take.memory_analysis()):
            temporaries = max(temporaries, memory.temp_size_in_bytes)
        memory = put.memory_analysis()
        in_place &= memory.alias_size_in_bytes == memory.output_size_in_bytes
    print(json.dumps({"temp_mib": temporaries >> 20, "in_place": bool(in_place)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
