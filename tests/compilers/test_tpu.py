"""Programs that XLA:TPU compiles without a TPU; the slow tests need the extra `tpu`."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from opsd_jax.planning import costs, hlo

D, V, CHUNK = 4096, 151_936, 512


def test_collectives_are_found_in_loops_and_outside():
    text = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[2]{0} parameter(1)
  %all-reduce.1 = (f32[8,4], f32[2]) all-reduce-start(%p, %q), replica_groups=[2,8]<=[16]
}

%body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = f32[8,4]{1,0} parameter(0)
  %call.1 = f32[8,4]{1,0} call(%p), to_apply=%inner
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[2,4]) -> f32[8,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %all-gather.1 = bf16[16,4]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
  %while.1 = (s32[], f32[8,4]) while(%tuple), condition=%cond, body=%body.2, OP_NAME
}
"""
    text = text.replace("OP_NAME", 'metadata={op_name="jit(f)/jvp()/loss_chunks/while"}')
    loop = hlo.Loop("loss_chunks", None)
    found = costs.collectives(hlo.Program(text))
    assert [(c.op, c.elements, c.bytes, c.devices, c.loops) for c in found] == [
        ("all-gather", 64, 128, 4, ()),
        ("all-reduce", 32, 136, 8, (loop,)),  # two arrays as one
    ]


def test_collectives_within_fusions_count_once():
    """A collective can span three fusions; a reduce-scatter is a fusion of a sum and a slice."""
    gather = "all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}"
    overlapped = f"{gather}, backend_config={{{{'async_collective_fusion_config':1}}}}"
    text = f"""HloModule jit_f

%begins (p: bf16[4,8]) -> bf16[16,8] {{
  %p = bf16[4,8] parameter(0)
  %all-gather.1 = bf16[16,8] {overlapped}
  ROOT %c = bf16[16,8] custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {{
  %p = bf16[4,8] parameter(0)
  %all-gather.2 = bf16[16,8] {overlapped}
  ROOT %t = (bf16[4,8], bf16[16,8]) tuple(%p, %all-gather.2)
}}

%ends (p: bf16[4,8]) -> bf16[16,8] {{
  %p = bf16[4,8] parameter(0)
  %all-gather.3 = bf16[16,8] {overlapped}
  ROOT %c = bf16[16,8] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter (p: f32[16,8]) -> f32[4,8] {{
  %p = f32[16,8] parameter(0)
  %all-reduce.1 = f32[16,8] all-reduce(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %piece = f32[4,8] dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={{4,8}}
}}

%all-reduce-scatter.1.clone (p: f32[16,8], q: f32[16]) -> (f32[4,8], f32[4]) {{
  %p = f32[16,8] parameter(0)
  %q = f32[16] parameter(1)
  %all-reduce.2 = (f32[16,8], f32[16]) all-reduce(%p, %q), replica_groups=[2,8]<=[16]
  %i = u32[] partition-id()
  %one = f32[16,8] get-tuple-element(%all-reduce.2), index=0
  %other = f32[16] get-tuple-element(%all-reduce.2), index=1
  %piece = f32[4,8] dynamic-slice(%one, %i, %i), dynamic_slice_sizes={{4,8}}
  %part = f32[4] dynamic-slice(%other, %i), dynamic_slice_sizes={{4}}
  ROOT %t = (f32[4,8], f32[4]) tuple(%piece, %part)
}}

ENTRY %main (p: bf16[4,8], q: f32[16,8], r: f32[16]) -> f32[4,8] {{
  %p = bf16[4,8] parameter(0)
  %q = f32[16,8] parameter(1)
  %r = f32[16] parameter(2)
  %e = (f32[4,8], f32[4]) fusion(%q, %r), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %a = bf16[16,8] fusion(%p), kind=kCustom, calls=%begins
  %b = (bf16[4,8], bf16[16,8]) fusion(%p), kind=kCustom, calls=%async_collective_fusion
  %c = bf16[16,8] fusion(%p), kind=kCustom, calls=%ends
  ROOT %d = f32[4,8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter
}}
"""
    found = costs.collectives(hlo.Program(text))
    assert [(c.op, c.elements, c.bytes, c.devices) for c in found] == [
        ("reduce-scatter", 128, 576, 8),
        ("all-gather", 128, 256, 4),
        ("reduce-scatter", 128, 512, 4),
    ]


def test_only_bytes_read_from_and_written_to_hbm_are_counted():
    text = """HloModule jit_f

%of_a_layer (p0: bf16[4,8,16], p1: bf16[2,8]) -> bf16[2,16] {
  %p0 = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[2,8]{1,0} parameter(1)
  %piece = bf16[1,8,16]{2,1,0} slice(%p0), slice={[1:2], [0:8], [0:16]}
  %weight = bf16[8,16]{1,0} bitcast(%piece)
  ROOT %product = bf16[2,16]{1,0} convolution(%p1, %weight), dim_labels=bf_io->bf
}

%in_place (p0: bf16[2,64,16], p1: s32[2], p2: bf16[2,16]) -> bf16[2,64,16] {
  %p0 = bf16[2,64,16]{2,1,0} parameter(0)
  %p1 = s32[2]{0} parameter(1)
  %p2 = bf16[2,16]{1,0} parameter(2)
  ROOT %scatter.1 = bf16[2,64,16]{2,1,0} scatter(%p0, %p1, %p2), to_apply=%add
}

%small (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %copy.1 = f32[2]{0} copy(%p)
}

%large (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %copy.2 = f32[2]{0} copy(%p)
  ROOT %copy.3 = f32[2]{0} copy(%copy.2)
}

%inner (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %copy.4 = f32[2]{0} copy(%p)
}

%body (p: (bf16[4,8,16], bf16[2,64,16])) -> (bf16[4,8,16], bf16[2,64,16]) {
  %p = (bf16[4,8,16]{2,1,0}, bf16[2,64,16]{2,1,0}) parameter(0)
  %w = bf16[4,8,16]{2,1,0} get-tuple-element(%p), index=0
  %cache = bf16[2,64,16]{2,1,0} get-tuple-element(%p), index=1
  %x = bf16[2,8]{1,0:T(2,128)(2,1)S(1)} constant({...})
  %at = s32[2]{0} constant({...})
  %y = bf16[2,16]{1,0} fusion(%w, %x), kind=kOutput, calls=%of_a_layer
  %new = bf16[2,64,16]{2,1,0} fusion(%cache, %at, %y), kind=kCustom, calls=%in_place
  %out = bf16[2,16]{1,0} custom-call(%at, %y, %new), custom_call_target="tpu_custom_call"
  %a = f32[2]{0} constant({...})
  %z = f32[2]{0} conditional(%at, %a, %a), branch_computations={%small, %large}
  %s = f32[2]{0} while(%z), condition=%cond, body=%inner, "known_trip_count":{"n":"5"}
  ROOT %tuple.1 = (bf16[4,8,16]{2,1,0}, bf16[2,64,16]{2,1,0}) tuple(%w, %new)
}

ENTRY %main (p: bf16[4,8,16]) -> bf16[2,64,16] {
  %p = bf16[4,8,16]{2,1,0} parameter(0)
  %start = (f32[2]{0:S(1)}, f32[2]{0}, u32[]{:S(2)}) copy-start(%q)
  %q = f32[2]{0} iota()
  %loop = (bf16[4,8,16]{2,1,0}, bf16[2,64,16]{2,1,0}) while(%p), condition=%cond, body=%body
}
"""
    moved = costs.accesses(hlo.Program(text))
    layer, row, copy = (2 * 8 * 16, 2 * 2 * 16), 2 * 2 * 16, (8, 8)
    assert [(a.read, a.written, hlo.trip_count(a.loops[1:])) for a in moved if a.loops] == [
        (*layer, 1),  # the slice of the weight; the other operand is in VMEM
        (row + 8 + row, row, 1),  # the replaced rows, their indices and the new rows
        (8 + row, row, 1),  # without the cache
        *[(*copy, 1)] * 2,  # the larger branch
        (*copy, 5),
    ]
    assert [(a.read, a.written) for a in moved if not a.loops] == [(8, 0), (0, 8)]


@functools.cache  # two tests read the same programs
def compiled(script, *arguments):
    """Runs a script in this file's folder; returns the JSON on its last line."""
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
def test_the_loop_over_chunks_has_no_collective_of_the_heads_size(topology, mesh, tensor):
    """Both heads are gathered once before the loop; one gradient is reduced once after it."""
    found = compiled("compile_losses.py", topology, mesh, "ours")
    # If the vocabulary is split, each chunk sums the gradient of its hidden states over the parts.
    assert found["largest_in_loop"] <= (CHUNK * D if tensor > 1 else 0)
    assert found["of_head_size"] == 3
    assert found["largest_outside"] == D * V // tensor
    # Two heads in bfloat16, one gradient in float32 and three arrays of a chunk's logits. Arrays of
    # the size of a device's hidden states take at most another 0.5 GiB.
    assert found["temp_gib"] < ((2 + 2 + 4) * D * V + 3 * 4 * CHUNK * V) / tensor / 2**30 + 0.5


@pytest.mark.slow
def test_a_plain_scan_over_chunks_has_a_collective_of_the_heads_size():
    """This shows that the test above can fail."""
    found = compiled("compile_losses.py", "v5p:2x2x4", "1x16x1", "plain")
    assert found["largest_in_loop"] >= D * V


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "slices"), [("v5p:2x2x4", 1), ("v5p:2x2x2", 2)])
def test_gradients_are_summed_over_data_once_a_step(topology, slices):
    """After the loop over microbatches, and no more than the gradients themselves."""
    found = compiled("compile_step.py", topology, str(slices), "2x8x1")
    moved = [*found["across"], *found["transfers"]]
    assert found["transfers" if slices > 1 else "across"]
    assert not any(in_loop for _, in_loop in moved)
    assert sum(size for size, _ in moved) == pytest.approx(found["gradients"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_weights_are_written_into_the_parameters_in_place(param_dtype):
    found = compiled("compile_weights.py", "v5p:2x2x1", "1x2x2", param_dtype)
    assert found["in_place"]
    assert found["temp_mib"] <= 32  # one slice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "hbm_gib"), [("v5p:2x2x1", "1x1x4", 95), ("v5e:2x4", "2x1x4", 15.75)]
)
def test_decoding_reads_the_weights_and_the_filled_part_of_the_cache(topology, mesh, hbm_gib):
    """Decodes Qwen3-8B with 64 slots of 8,192 tokens, on 4 chips of 95 GiB and 8 of 16 GiB."""
    found = compiled("compile_decode.py", topology, mesh, "paged")
    assert found["argument"] + found["temp"] < hbm_gib
    assert found["ratio"] <= 1.25
    assert found["largest_write"] < 0.1  # the cache is updated in place
    assert found["largest_collective"] <= 64 * D  # hidden states
    # The program copies the weights of queries, keys and values into another layout once a chunk.
    assert found["temp"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "mesh"), [("v5p:2x2x1", "1x1x4"), ("v5e:2x4", "2x1x4")])
def test_8_bits_halve_the_bytes_of_a_decode_step(topology, mesh):
    """A copy of the weights or of the cache in 16 bits would move more than before."""
    arguments = ("compile_decode.py", topology, mesh, "paged")
    plain, int8 = compiled(*arguments), compiled(*arguments, "--int8", "weights", "cache")
    assert int8["moved"] <= 0.55 * plain["moved"]
    assert int8["argument"] <= 0.56 * plain["argument"]
    assert int8["temp"] <= plain["temp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh"), [("v5p:2x2x1", "1x1x4"), ("v5e:2x4", "2x1x4"), ("v5e:2x4", "8x1x1")]
)
def test_inserting_into_slots_moves_four_prompts_but_no_cache_or_weights(topology, mesh):
    found = compiled("compile_decode.py", topology, mesh, "paged", "--program", "insert")
    assert found["largest_collective"] <= 4 * 1024 * 2 * 8 * 128  # one layer
    assert found["temp"] < 0.6  # all layers: 4 * 36 * 4 MiB


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["paged", "dense"])
def test_bytes_are_counted_as_xla_counts_them(cache):
    """For one step, XLA also counts bytes in VMEM, but not the bytes that the kernel reads."""
    arguments = "--program", "step", "--layers", "2"
    found = compiled("compile_decode.py", "v5p:2x2x1", "1x1x4", cache, *arguments)
    assert abs(found["account_by_xlas"] - 1) < 0.02
    # Without a loop around the step the dense cache is copied, which the count shows.
    assert (found["largest_write"] > 0.99) == (cache == "dense")
