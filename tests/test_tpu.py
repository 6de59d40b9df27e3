"""What XLA:TPU makes of it, on a machine without a TPU (slow: needs the extra `tpu`)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from opsd_jax.parallel import hlo

D, V, CHUNK = 4096, 151_936, 512


def test_collectives_are_found_in_loops_and_outside():
    text = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[8,4]) -> f32[8,4] {
  %all-reduce.1 = (f32[8,4]{1,0}, f32[2]{0}) all-reduce-start(%p, %q), to_apply=%add
}

%body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %fusion.1 = f32[8,4]{1,0} fusion(%p), kind=kCustom, calls=%inner
}

ENTRY %main (p: f32[2,4]) -> f32[8,4] {
  %all-gather.1 = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%p), dimensions={0}
  %while.1 = (s32[], f32[8,4]) while(%tuple), condition=%cond, body=%body.2
}
"""
    found = hlo.collectives(text)
    assert [(c.op, c.elements, c.in_loop) for c in found] == [
        ("all-reduce", 32, True),
        ("all-gather", 64, False),
    ]


def compiled(script, *arguments):
    """What a script beside this file prints."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install 'opsd-jax[tpu]'")
    quiet = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
    }
    path = pathlib.Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x4", "v5e:4x4"])
@pytest.mark.parametrize(("mesh", "tensor"), [("1x16x1", 1), ("4x4x1", 1), ("1x4x4", 4)])
def test_no_collective_of_the_heads_size_in_the_loop_over_chunks(topology, mesh, tensor):
    """Both heads are gathered once before it, and the gradient of one is reduced once after it."""
    seen = compiled("compile_losses.py", topology, mesh, "ours")
    # With the vocabulary split, a chunk's gradient of the hidden states is summed over its parts.
    assert seen["largest_in_loop"] <= (CHUNK * D if tensor > 1 else 0)
    assert seen["of_head_size"] == 3
    assert seen["largest_outside"] == D * V // tensor
    # Two heads in bfloat16, the gradient of one in float32, three arrays of a chunk's logits; and
    # half a GiB for what is as large as the hidden states of a device (at most 0.5 GiB in all).
    assert seen["temp_gib"] < ((2 + 2 + 4) * D * V + 3 * 4 * CHUNK * V) / tensor / 2**30 + 0.5


@pytest.mark.slow
def test_the_check_can_fail():
    """A plain scan over chunks does hold one."""
    seen = compiled("compile_losses.py", "v5p:2x2x4", "1x16x1", "plain")
    assert seen["largest_in_loop"] >= D * V


@pytest.mark.slow
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_weights_are_written_into_the_parameters_in_place(param_dtype):
    seen = compiled("compile_weights.py", "v5p:2x2x1", "1x2x2", param_dtype)
    assert seen["in_place"]
    assert seen["temp_mib"] <= 32  # a piece's
