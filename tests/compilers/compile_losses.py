"""Compiles the OPSD loss and its gradient for a TPU slice, without TPUs; test_tpu.py runs it.

    python compile_losses.py TOPOLOGY DATAxFSDPxTENSOR ours|plain

The shapes are those of Qwen3-8B: 64 responses of 4,096 tokens, hidden states of width 4,096, and a
vocabulary of 151,936. The head is bfloat16, with its rows split over the mesh axis fsdp and its
vocabulary over tensor. `ours` is the loss of this library. `plain` is a scan over chunks without a
partition, which the compiler partitions. The script prints one line of JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax import losses
from opsd_jax.parallel.mesh import AXES, ROWS
from opsd_jax.planning import costs, hlo

B, T, D, V = 64, 4096, 4096, 151_936
CHUNK = 512


def unembed(head, hidden):
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def ours(head, hidden, teacher_head, teacher_hidden, mask, outcomes):
    out = losses.opsd(
        student=losses.Head(unembed, head, hidden),
        teacher=losses.Head(unembed, teacher_head, teacher_hidden),
        mask=mask,
        outcomes=outcomes,
        chunk=CHUNK,
        partition=P(ROWS),
    )
    return out.sum, (out.weight, out.metric("divergence"))


def plain(head, hidden, teacher_head, teacher_hidden, mask, outcomes):
    @jax.checkpoint
    def add(total, states):
        student, teacher = (unembed(*x) for x in zip((head, teacher_head), states, strict=True))
        values = losses.reverse_kl(
            student_logits=student, teacher_logits=jax.lax.stop_gradient(teacher)
        )
        return total + values.sum(), None

    chunks = lambda x: x.reshape(B, T // 32, 32, D).swapaxes(0, 1)
    return jax.lax.scan(add, 0.0, (chunks(hidden), chunks(teacher_hidden)))[0], None


def main(topology: str, shape: str, form: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = tuple(map(int, shape.split("x")))
    mesh = Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)

    def array(dtype, shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    head = array(jnp.bfloat16, (D, V), P("fsdp", "tensor"))
    hidden = array(jnp.bfloat16, (B, T, D), P(ROWS))
    mask, outcome = array(jnp.bool_, (B, T), P(ROWS)), array(jnp.bool_, (B,), P(ROWS))

    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.value_and_grad({"ours": ours, "plain": plain}[form], argnums=(0, 1), has_aux=True),
            out_shardings=(None, (head.sharding, hidden.sharding)),
        )
        compiled = gradient.lower(head, hidden, head, hidden, mask, (outcome,) * 3).compile()
    memory = compiled.memory_analysis()
    found = costs.collectives(hlo.Program(compiled.as_text()))
    largest = lambda looped: max((c.elements for c in found if bool(c.loops) == looped), default=0)
    print(
        json.dumps(
            {
                "temp_gib": memory.temp_size_in_bytes / 2**30,
                "largest_in_loop": largest(True),
                "largest_outside": largest(False),
                "of_head_size": sum(not c.loops and c.elements == D * V // sizes[2] for c in found),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
