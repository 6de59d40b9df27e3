"""Compiles a decoding step for a TPU with tokamax's paged attention in place of JAX's.

    pip install tokamax==0.0.17    # Python 3.12 or 3.13, with the extra `tpu` of this package
    python benchmarks/tokamax_kernel.py jax|tokamax ARGUMENT ...

The arguments are those of tests/compilers/compile_decode.py, whose output follows the CPU-seconds
of the compilation. benchmarks/README.md has results. tokamax's kernel writes the new keys and
values itself. "moved" then counts the whole cache as a result of each of its calls, although they
update the cache in place. "moved_outside" leaves the results of kernels out.
"""

import pathlib
import sys
import time

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "compilers"))

import compile_decode

from opsd_jax.models import paged
from opsd_jax.models.quantised import to_int8
from opsd_jax.parallel.mesh import ROWS, on_each_device
from opsd_jax.planning import costs, hlo


def write(cache, k_Bx1xKxC, v_Bx1xKxC, positions_Bx1):
    """Keeps the new keys and values for `attend`."""
    return {**cache, "new": (k_Bx1xKxC, v_Bx1xKxC)}


def attend(q_Bx1xHxC, cache, positions_Bx1):
    """Writes the new keys and values into `cache`, which is changed, and attends over it."""
    specs = paged._specs({name: x for name, x in cache.items() if name != "new"})
    changed = {name: spec for name, spec in specs.items() if name != "table"}
    local = on_each_device(
        attend_on_device, (*(paged.HEADS,) * 3, specs, P(ROWS)), (paged.HEADS, changed)
    )
    out_Bx1xHxC, new = local(q_Bx1xHxC, *cache.pop("new"), cache, positions_Bx1)
    cache.update(new)
    return out_Bx1xHxC


def attend_on_device(q_Bx1xHxC, k_Bx1xKxC, v_Bx1xKxC, cache, positions_Bx1):
    from tokamax._src.ops.batched_rpa.kernel import configs, wrapper  # the public one wants a TPU

    scales, N = cache.get("scales"), cache["pages"].shape[0]
    B, _, H, C = q_Bx1xHxC.shape
    K = k_Bx1xKxC.shape[2]
    if scales is not None:
        kv = jnp.stack([k_Bx1xKxC, v_Bx1xKxC], axis=3)
        scales = paged.calibrate(scales, kv.reshape(B, 1, 2 * K, C), positions_Bx1 >= 0)
        by_head = scales.reshape(B, 1, K, 2, C)
        kv = to_int8(kv, by_head)
        k_Bx1xKxC, v_Bx1xKxC = kv[..., 0, :], kv[..., 1, :]
        k_scale, v_scale = (jnp.repeat(by_head[..., i, :], H // K, axis=2) for i in (0, 1))
        q_Bx1xHxC = (q_Bx1xHxC * k_scale).astype(q_Bx1xHxC.dtype)
    position_B = positions_Bx1[:, 0]
    order_B = jnp.argsort(position_B < 0)
    out_BxHxC, pages = wrapper.ragged_paged_attention(
        *(x[order_B, 0] for x in (q_Bx1xHxC, k_Bx1xKxC, v_Bx1xKxC)),
        cache["pages"],
        jnp.maximum(position_B[order_B] + 1, 1),
        (cache["table"][order_B] % N).reshape(-1),
        jnp.arange(B + 1, dtype=jnp.int32),
        jnp.full(3, jnp.sum(position_B >= 0, dtype=jnp.int32)),  # all rows decode
        sm_scale=C**-0.5,
        # Its kernels for prefill are compiled too. Small blocks keep their compilation short.
        prefill_block_sizes=configs.BlockSizes(16, 16, 256, 1, 2),
        **({} if scales is None else {"k_scale": 1.0, "v_scale": 1.0}),
    )
    out_Bx1xHxC = out_BxHxC[jnp.argsort(order_B)][:, None]
    out_Bx1xHxC = jnp.where(position_B[:, None, None, None] < 0, 0, out_Bx1xHxC)
    if scales is None:
        return out_Bx1xHxC, {"pages": pages}
    return (out_Bx1xHxC * v_scale).astype(out_BxHxC.dtype), {"pages": pages, "scales": scales}


def timed(compiled):
    def run(*arguments):
        start = time.process_time()
        done, *rest = compiled(*arguments)
        seconds = time.process_time() - start
        accesses = costs.accesses(hlo.Program(done.as_text(), lightest=True))
        moved = sum(a.read + (0 if " custom-call(" in a.line else a.written) for a in accesses)
        print(f"CPU-seconds {seconds:.1f}, moved_outside {moved / 2**30:.4f}")
        return done, *rest

    return run


if __name__ == "__main__":
    kernel = sys.argv.pop(1)
    if kernel == "tokamax":
        paged.write, paged.attend = write, attend
    compile_decode.compiled = timed(compile_decode.compiled)
    compile_decode.main(compile_decode.arguments())
