"""The plan of a run: what it says, and what it says where a run does not fit."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest
import tiny_config
from paths import CONFIGS, SUPPORT

from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.planning import costs, hlo, liveness, programs, table

PAPERS = CONFIGS / "qwen3_8b_opsd_v5p32.py"
GIB = 2**30
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'opsd-jax[tpu]'"
)


def planned(config, topology, *changes):
    """What the command prints as JSON, and its exit code."""
    command = [sys.executable, "-m", "opsd_jax", "plan", "--config", str(config), "--json"]
    command += ["--topology", topology, *(f"--config.{change}" for change in changes)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout), done.returncode


@pytest.fixture(scope="module")
def tiny():
    return planned(SUPPORT / "tiny_pod.py", "v5e:2x2")


@needs_compiler
@pytest.mark.slow
def test_a_plan_accounts_for_every_program_of_the_run(tiny):
    figures, code = tiny
    assert code == 0
    assert figures["fits"]
    assert figures["devices"] == 4
    assert abs(figures["hbm"] / GIB - 15.75) < 0.01
    names = [program["name"] for program in figures["programs"]]
    decoding = lambda n: ["start", "prefill", f"admit to {n}", f"decode in {n}"]
    of_memos, of_closed = decoding(1024 + 2 * 128), decoding(1024 + 3 * 128)
    of_engine = ["start", "prefill", "admit to 1024", "decode in 1024"]
    assert names == [
        "reshard",
        *(f"opsd rollouts: {name}" for name in of_engine),
        *(f"opsd memos: {name}" for name in of_memos),
        *(f"opsd memos, closed: {name}" for name in of_closed),
        "opsd: train step",
        "opsd: probe",
        *(f"evaluation: {name}" for name in of_engine),
    ]
    phases = {phase["name"]: phase for phase in figures["phases"]}
    parameters = 2 * (256 * 2048) + 2 * (3 * 256 * 512 + 2 * 256 * 512 + 2 * 256 * 256)
    parts = phases["opsd step"]["parts"]
    # All but the norms are cut over the four devices, whole over none; float32, and bfloat16.
    assert abs(parts["parameters"] / parameters - 1) < 0.01
    assert abs(parts["optimizer"] / parameters / 2 - 1) < 0.01
    assert abs(parts["teacher"] / parameters * 2 - 1) < 0.02
    cache = 8 * 1024 * 2 * 2 * 2 * 128 * 2 / 4  # rows, tokens, layers, kv, heads, size, bytes
    assert phases["opsd rollouts"]["parts"]["cache"] == cache


@needs_compiler
@pytest.mark.slow
def test_operations_are_counted_with_their_loops(tiny):
    """A step of 2 microbatches of 4 rows: the student forward, again, back; the teacher forward.

    The product that ends a layer is not computed again: nothing of the backward pass needs it.
    """
    step = next(p for p in tiny[0]["programs"] if p["name"] == "opsd: train step")
    layer = 3 * 256 * 512 + 2 * 256 * 512 + 2 * 256 * 256  # mlp, q and o, k and v
    student = 8 * 1024 * 2 * (2 * (4 * layer - 256 * 512))
    teacher = 8 * 1280 * 2 * 2 * layer
    head = 8 * 1024 * 2 * 256 * 2048 * 4  # the tokens of a device fill one chunk at most
    attention = 8 * 4 * 128 * 2 * (1024**2 / 2 * (2 * 2 + 3 + 4) * 2 + 1280**2 / 2 * 2 * 2)
    expected = (student + teacher + head + attention) / 4
    assert abs(step["flops"] / expected - 1) < 0.02


@needs_compiler
@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_is_large_and_what_to_change():
    """A cache of 32 GiB a chip: what the compiler refuses is accounted for all the same."""
    changes = "opsd.slots=65536", "opsd.prompts=65536", "opsd.max_rows=8"
    figures, code = planned(SUPPORT / "tiny_pod.py", "v5e:2x2", *changes)
    assert code == 1
    assert not figures["fits"]
    refused = next(p for p in figures["programs"] if p["name"] == "opsd rollouts: decode in 1024")
    assert refused["arguments"] + refused["temporaries"] > figures["hbm"]
    phase = next(p for p in figures["phases"] if p["name"] == "opsd rollouts")
    # A device's cache, that of the prompts, and one program's temporaries, less than the cache.
    assert phase["parts"]["temporaries"] < 16 * GIB
    said = "\n".join(table.lines(figures))
    assert "DOES NOT FIT, by" in said
    assert "opsd rollouts does not fit. The largest in it:\n    32.00 GiB  cache" in said
    assert "to change: opsd.slots or opsd.response_tokens smaller" in said


@needs_compiler
@pytest.mark.slow
def test_slices_differ_along_data():
    def run(*meshes):
        command = [sys.executable, str(SUPPORT / "plan_slices.py"), *meshes]
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    # An axis of 8 in a slice of 4 x 4 goes over a part of one of the torus, and has to be split.
    assert run("2x8x2", "2x8x2", "v5e:4x4") == [[0] * 16, [1] * 16]
    assert run("2x2x2", "2x2x2") == [[0] * 4, [1] * 4]
    assert run("4x2x1", "1x2x4") == [[0] * 2] * 2 + [[1] * 2] * 2
    assert "data = 1; expected a multiple of 2, the slices" in run("1x8x1", "1x8x1")
    assert "tensor = 8, over several slices; expected a size" in run("2x2x2", "1x1x8")


@needs_compiler
@pytest.mark.slow
def test_the_papers_run_fits_and_no_loop_moves_a_weight():
    """Qwen3-8B OPSD on 16 chips of v5p, 32 rollouts of up to 8,192 tokens with memos as context."""
    figures, code = planned(PAPERS, "v5p:2x2x4")
    assert code == 0
    assert max(phase["total"] for phase in figures["phases"]) < figures["hbm"]
    assert 0 < figures["largest_collective"]["decode_steps"] < figures["smallest_weight"]
    assert figures["largest_collective"]["loss_chunks"] < figures["smallest_weight"]


@needs_compiler
@pytest.mark.slow
def test_a_step_of_64_rows_of_4096_tokens_takes_less_than_a_plain_one():
    """Whose temporaries are 15.1 GiB."""
    figures, code = planned(
        PAPERS, "v5p:2x2x4", "mesh=(1,16,1)", "opsd.microbatch=16",
        "opsd.prompts=64", "opsd.slots=64", "opsd.contexts=('solution',)",
        "opsd.response_tokens=3072", "opsd.buckets=(4096,)", "opsd.teacher_prompt_tokens=1024",
        "opsd.teacher_buckets=(4096,)",
    )  # fmt: skip
    assert code == 0
    step = next(p for p in figures["programs"] if p["name"] == "opsd: train step")
    assert step["temporaries"] < 15.1 * GIB
    assert step["temp_size_in_bytes"] < 15.1 * GIB
    # What is live by our reading of the program is what the compiler assigns, but for padding.
    assert abs(step["live_bytes"] / step["temporaries"] - 1) < 0.05


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (22.37G) exceeds available HBM (15.75G).",
            22.37,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (2.00T) exceeds available HBM (15.75G).",
            2048,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran "
            "out of memory in memory space hbm. Used 15.76G of 15.75G hbm. Exceeded hbm capacity "
            "by 8.28M.",
            15.76,
        ),
        ("INVALID_ARGUMENT: Used 3 arguments", None),
    ],
)
def test_how_much_memory_was_missing_is_read_off_the_error(message, gib):
    assert programs.memory_needed(message) == (gib and gib * GIB)


def test_without_the_compiler_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["plan", "--config", str(SUPPORT / "tiny_pod.py"), "--topology", "v5e:2x2"]
    assert main.main(arguments) == 2
    assert "is missing: pip install 'opsd-jax[tpu]'" in capsys.readouterr().err


@needs_compiler
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("opsd.microbatch", "3"),
        ("opsd.slots", "5"),
        ("evaluation.slots", "7"),
        ("opsd.memo.slots", "9"),
        ("model.sequence_parallel", "True"),
    ],
)
def test_sizes_that_the_devices_do_not_divide_are_named(capsys, field, value):
    """As before a run, without its data."""
    arguments = ["plan", "--config", str(SUPPORT / "tiny_pod.py"), "--topology", "v5e:2x2"]
    arguments += [f"--config.{field}={value}", "--config.opsd.contexts=('memo',)"]
    if field == "model.sequence_parallel":
        arguments += ["--config.opsd.buckets=(512, 1023)"]
        field = "opsd.buckets with teacher_buckets"
    assert main.main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(rf"config.{field} is .*; expected (a multiple|multiples) of", said)


@needs_compiler
def test_a_topology_that_is_none_is_refused(capsys):
    arguments = ["plan", "--config", str(SUPPORT / "tiny_pod.py"), "--topology", "v5x:2"]
    assert main.main(arguments) == 2
    assert "--topology v5x:2: " in capsys.readouterr().err


PHASES = {
    "rl reshard": "reshard",
    "rl rollouts": "rl rollouts: prefill",
    "rl memos": "rl memos: prefill",
    "rl memos, closed": "rl memos: prefill",
    "rl step": "rl: train step",
    "rl probe memos": "rl memos: prefill",
    "rl probe": "rl: probe",
    "evaluation": "rl rollouts: prefill",
}
CONFIG = tiny_config.quickstart()
with CONFIG.unlocked():
    CONFIG.rl = CONFIG.opsd
    CONFIG.rl.update({"updates": 1, "slots": 256, "microbatch": 32})
FIGURES = {
    "config": loading.flatten(CONFIG),
    "topology": "v5e:2x2", "slices": 1, "devices": 4, "chip": "TPU v5 lite", "hbm": 10 * GIB,
    "mesh": {"data": 1, "fsdp": 4, "tensor": 1}, "decode_mesh": {"data": 1, "fsdp": 4, "tensor": 1},
    "response_length": 0.5, "seconds_at_best": 5400.0, "seconds_in_turn": 9000.0,
    "phases": [
        {
            "name": name, "parts": {"parameters": GIB}, "total": GIB, "programs": [program],
            "seconds_at_best": 1.0, "seconds_in_turn": 2.0, "times": 7,
            **({"useful_tokens": 0.615} if name == "rl step" else {}),
        }
        for name, program in PHASES.items()
    ],
    "programs": [
        {
            "name": name, "compile_seconds": 3.0, "arguments": GIB, "temporaries": GIB,
            "refused": False,
            "largest": [{"shape": "f32[4,8]", "made_by": "jit(f)/x", "count": 2, "bytes": GIB}],
            "flops": 1.565e16, "hbm_bytes": 3.782e13,
            "seconds_at_best": 1.0, "seconds_in_turn": 2.0,
            "collectives": [
                {"op": "all-gather", "loops": ["layers"], "times": 4, "bytes": GIB,
                 "largest": GIB // 4, "elements": 9}
            ],
        }
        for name in sorted(set(PHASES.values()))
    ],
    "largest_collective": {"decode_steps": 5, "loss_chunks": 0}, "smallest_weight": 77,
    "fits": True,
}  # fmt: skip


def test_the_table_names_every_phase_and_where_collectives_stand():
    said = list(table.lines(FIGURES))
    assert max(map(len, said)) <= 100
    text = "\n".join(said)
    for name in PHASES:
        assert f"  {name:<25}   1.00   9.00 left" in text
        assert f"  {name:<25}      1.0      2.0      7 x" in text
    assert "7 x   62% of its tokens are no padding" in text
    assert "  in all 1.5 to 2.5 hours; times 4 devices 6 to 10\n" in text
    assert "all-gather         4 x, up to 256.0 MiB" in text
    assert "layers" in text
    assert text.endswith("It fits.")
    row = next(line for line in said if "train step" in line)
    assert row.split()[3:] == ["3", "2.00", "1.00", "15650", "35223", "1"]
    assert "Between slices" not in text
    assert "Between slices" in "\n".join(table.lines(FIGURES | {"slices": 2}))


@pytest.mark.parametrize(
    ("phase", "part", "advice"),
    [
        ("rl reshard", "temporaries", "decode_mesh with more `tensor`"),
        ("rl rollouts", "cache", "rl.slots or rl.response_tokens smaller; more devices"),
        ("rl rollouts", "weights for sampling", "decode_mesh with more `tensor`"),
        ("rl rollouts", "temporaries", "rl.slots smaller: a prefill takes a quarter of them"),
        ("rl rollouts", "prompts' cache", "rl.slots smaller: a prefill takes a quarter of them"),
        ("rl memos", "cache", "rl.memo.slots or rl.memo.tokens smaller"),
        ("rl memos, closed", "cache", "rl.memo.slots or rl.memo.close_tokens smaller"),
        ("rl memos, closed", "temporaries", "rl.memo.slots smaller"),
        ("rl step", "temporaries", "rl.microbatch smaller"),
        ("rl step", "batch", "rl.prompts or rl.group_size smaller, or more rl.updates"),
        ("rl step", "optimizer", "rl.optimizer.moment_dtype 'bfloat16'; mesh with more devices"),
        ("rl step", "teacher", "mesh with more devices over `fsdp`"),
        ("rl probe memos", "cache", "rl.memo.slots or rl.memo.tokens smaller"),
        ("rl probe", "temporaries", "evaluation.response_tokens smaller; rl.microbatch smaller"),
        ("rl probe", "batch", "evaluation.response_tokens or rl.microbatch smaller"),
        ("rl probe", "the teacher's", "mesh with more devices over `fsdp`"),
        ("evaluation", "cache", "evaluation.slots or evaluation.response_tokens smaller"),
        ("evaluation", "temporaries", "evaluation.slots smaller"),
    ],
)
def test_what_to_change_goes_by_what_is_largest(phase, part, advice):
    figures = copy.deepcopy(FIGURES)
    figures["fits"] = False
    chosen = next(p for p in figures["phases"] if p["name"] == phase)
    chosen["parts"][part] = 11.5 * GIB
    chosen["total"] = 12.5 * GIB
    text = "\n".join(table.lines(figures))
    assert "DOES NOT FIT, by 2.50" in text
    assert "2 x f32[4,8]" in text
    assert f"to change: {advice}" in text
    assert max(map(len, text.split("\n"))) <= 100
    for field in re.findall(r"rl\.([\w.]+)", text):
        assert FIGURES["config"][f"rl.{field}"] is not None


@pytest.mark.parametrize(
    ("part", "phase", "changes", "advice"),
    [
        (
            "temporaries",
            "rl step",
            {"rl.microbatch": 4, "model.remat": "full", "model.sequence_parallel": True},
            "mesh with more `tensor`",
        ),
        (
            "temporaries",
            "rl step",
            {"rl.microbatch": 8, "model.remat": "full", "model.sequence_parallel": False},
            "rl.microbatch smaller; model.sequence_parallel; mesh with more `tensor`",
        ),
        (
            "optimizer",
            "rl step",
            {"rl.optimizer.moment_dtype": "bfloat16"},
            "mesh with more devices over `fsdp`; more devices",
        ),
        (
            "prompts' cache",
            "rl rollouts",
            {"rl.slots": 16, "rl.group_size": 1},
            "shorter prompts; decode_mesh with more `tensor`",
        ),
    ],
)
def test_what_the_config_does_already_is_not_advised(part, phase, changes, advice):
    figures = copy.deepcopy(FIGURES)
    figures["config"] |= changes
    chosen = next(p for p in figures["phases"] if p["name"] == phase)
    chosen["parts"][part], chosen["total"] = 11.5 * GIB, 12.5 * GIB
    assert f"to change: {advice}\n" in "\n".join(table.lines(figures)) + "\n"


def test_a_program_without_such_loops_has_nothing_to_say_of_them():
    text = "\n".join(table.lines(FIGURES | {"largest_collective": {"decode_steps": 5}}))
    assert "  elements: at most 5 in the decode loop; in the smallest weight 77" in text
    assert "the loss's" not in text


def test_what_the_compiler_refuses_is_said():
    figures = copy.deepcopy(FIGURES)
    figures["programs"][0] |= {"refused": True, "arguments": 11 * GIB}
    text = "\n".join(table.lines(figures | {"fits": False}))
    name = figures["programs"][0]["name"]
    assert text.endswith(f"The compiler refuses {name}: by itself it needs 12.00 GiB.")


def test_products_are_counted_as_xla_counts_them():
    """Without loops XLA's own count is right: dots, and convolutions that stand for them."""
    import jax.numpy as jnp

    def f(a, b, c):
        x = jnp.einsum("bij,bjk->bik", a, b)
        return jax.lax.conv_general_dilated(
            x[None], c[None], (2, 1), ((3, 2), (0, 1)), lhs_dilation=(1, 3), rhs_dilation=(2, 1)
        )

    shapes = (5, 16, 32), (5, 32, 64), (5, 3, 7)
    compiled = jax.jit(f).lower(*(jnp.zeros(s) for s in shapes)).compile()
    program = hlo.Program(compiled.as_text())
    counted = sum(product.flops for product in costs.products(program))
    assert abs(counted / compiled.cost_analysis()["flops"] - 1) < 0.01


def test_what_is_live_is_known_by_name():
    text = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64]{0} get-tuple-element(%p), index=1
  %big = f32[256]{0} broadcast(%x), metadata={op_name="jit(f)/inner"}
  %small = f32[64]{0} slice(%big)
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %small)
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %first = f32[128]{0} broadcast(%a), metadata={op_name="jit(f)/first"}
  %seen = f32[64]{0} slice(%first)
  %zero = s32[] constant(0)
  %init = (s32[], f32[64]{0}) tuple(%zero, %seen)
  %loop = (s32[], f32[64]{0}) while(%init), condition=%cond, body=%body
  %second = f32[200]{0} broadcast(%a), metadata={op_name="jit(f)/second"}
  %last = f32[64]{0} get-tuple-element(%loop), index=1
  ROOT %out = f32[64]{0} add(%last, %second)
}
"""
    found = liveness.peak(hlo.Program(text))
    # In the loop: its state and what its body makes. What came before is gone.
    assert [(b.bytes, b.made_by) for b in found] == [(1024, "jit(f)/inner"), (256, "seen")]
