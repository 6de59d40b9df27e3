"""The plan of a run: its programs, costs and table, and its advice if the run does not fit."""

import dataclasses
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
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.planning import costs, hlo, liveness, programs, table
from opsd_jax.planning.keys import Part, PhaseKey, PhaseKind
from opsd_jax.planning.phases import Phase
from opsd_jax.planning.plan import Plan
from opsd_jax.stages import opsd, rlvr

PAPERS = CONFIGS / "qwen3_8b_opsd_v5p32.py"
GIB = 2**30
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'opsd-jax[tpu]'"
)


def printed(config, topology, *arguments):
    """Runs `opsd-jax plan`; returns what it prints and the exit code."""
    command = [sys.executable, "-m", "opsd_jax", "plan", "--config", str(config)]
    command += ["--topology", topology, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.stdout, done.returncode


def planned(config, topology, *changes):
    """Runs `opsd-jax plan --json`; returns the plan and the exit code."""
    changes = [f"--config.{change}" for change in changes]
    text, code = printed(config, topology, "--json", *changes)
    return json.loads(text), code


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    """The directory in which the plan `tiny` saves its programs."""
    return tmp_path_factory.mktemp("executables")


@pytest.fixture(scope="module")
def tiny(executables):
    saving = "--json", "--executables", str(executables)
    text, code = printed(SUPPORT / "tiny_pod.py", "v5e:2x2", *saving)
    return json.loads(text), code


@needs_compiler
@pytest.mark.slow
def test_a_plan_saves_every_program(tiny, executables):
    names = {program["name"].rpartition(": ")[2] for program in tiny[0]["programs"]}
    files = list(executables.iterdir())
    assert {file.name.rpartition("-")[0].replace("_", " ") for file in files} == names
    for file in files:
        header, _, program = file.read_bytes().partition(b"\n")
        assert json.loads(header)["device"] == tiny[0]["chip"]
        assert len(program) > 10_000


@needs_compiler
@pytest.mark.slow
def test_a_plan_accounts_for_every_program_of_the_run(tiny):
    plan, code = tiny
    assert code == 0
    assert plan["fits"]
    assert plan["devices"] == 4
    assert abs(plan["hbm"] / GIB - 15.75) < 0.01
    names = [program["name"] for program in plan["programs"]]
    decoding = lambda n: ["start", "prefill", f"insert into {n}", f"decode in {n}"]
    of_memos, of_closed = decoding(1024 + 2 * 128), decoding(1024 + 3 * 128)
    of_engine = ["start", "prefill", "insert into 1024", "decode in 1024"]
    assert names == [
        "reshard",
        *(f"opsd rollouts: {name}" for name in of_engine),
        *(f"opsd memos: {name}" for name in of_memos),
        *(f"opsd memos, closed: {name}" for name in of_closed),
        "opsd: train step",
        "opsd: probe",
        *(f"evaluation: {name}" for name in of_engine),
    ]
    phases = {phase["name"]: phase for phase in plan["phases"]}
    parameters = 2 * (256 * 2048) + 2 * (3 * 256 * 512 + 2 * 256 * 512 + 2 * 256 * 256)
    parts = phases["opsd step"]["parts"]
    # All parameters except the norms are split over the four devices.
    assert abs(parts["parameters"] / parameters - 1) < 0.01
    assert abs(parts["optimizer"] / parameters / 2 - 1) < 0.01
    assert abs(parts["teacher"] / parameters * 2 - 1) < 0.02
    cache = 8 * 1024 * 2 * 2 * 2 * 128 * 2 / 4  # rows, tokens, layers, kv, heads, size, bytes
    table = 8 * 4 * 4 / 2  # rows, pages of 256 tokens, bytes; split over fsdp
    assert phases["opsd rollouts"]["parts"]["cache"] == cache + table


@needs_compiler
@pytest.mark.slow
def test_operations_are_counted_with_their_loops(tiny):
    """A step has 2 microbatches of 4 rows, each with three student passes and one teacher pass.

    The student's passes are forward, recomputation and backward (twice the forward operations). The
    last matmul of a layer is not recomputed, because the backward pass does not need its result.
    """
    step = next(p for p in tiny[0]["programs"] if p["name"] == "opsd: train step")
    layer = 3 * 256 * 512 + 2 * 256 * 512 + 2 * 256 * 256  # mlp, q and o, k and v
    student = 8 * 1024 * 2 * (2 * (4 * layer - 256 * 512))
    teacher = 8 * 1280 * 2 * 2 * layer
    head = 8 * 1024 * 2 * 256 * 2048 * 4  # each device has at most one chunk
    attention = 8 * 4 * 128 * 2 * (1024**2 / 2 * (2 * 2 + 3 + 4) * 2 + 1280**2 / 2 * 2 * 2)
    expected = (student + teacher + head + attention) / 4
    assert abs(step["flops"] / expected - 1) < 0.02


@needs_compiler
@pytest.mark.slow
def test_a_run_that_does_not_fit_gets_its_largest_parts_and_advice():
    """The cache takes 32 GiB per chip. Programs that the compiler refuses are still counted."""
    changes = "opsd.slots=65536", "opsd.prompts=65536", "opsd.max_rows=8"
    changes = [f"--config.{change}" for change in changes]
    text, code = printed(SUPPORT / "tiny_pod.py", "v5e:2x2", *changes)
    assert code == 1
    assert "It fits." not in text
    refused = r"refuses opsd rollouts: decode in 1024: it needs (\S+) GiB"
    assert float(re.search(refused, text)[1]) > 15.75
    memory = text.partition("  opsd rollouts ")[2].partition("  opsd memos ")[0]
    # The temporaries of the refused program do not include a copy of the cache.
    assert float(re.search(r"temporaries\s+([\d.]+)", memory)[1]) < 16
    assert "DOES NOT FIT, by" in memory
    assert "opsd rollouts does not fit. Its largest parts:\n    32.00 GiB  cache" in text
    assert "To reduce it: a smaller opsd.slots or opsd.response_tokens" in text


@needs_compiler
@pytest.mark.slow
def test_slices_differ_along_data():
    def run(*meshes):
        command = [sys.executable, str(SUPPORT / "plan_slices.py"), *meshes]
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    # In a slice of 4 x 4, an axis of size 8 has to be split over both axes of the torus.
    assert run("2x8x2", "2x8x2", "v5e:4x4") == [[0] * 16, [1] * 16]
    assert run("2x2x2", "2x2x2") == [[0] * 4, [1] * 4]
    assert run("4x2x1", "1x2x4") == [[0] * 2] * 2 + [[1] * 2] * 2
    assert "data = 1; expected a multiple of 2, the number of slices" in run("1x8x1", "1x8x1")
    assert "tensor = 8, which spans several slices; expected a size" in run("2x2x2", "1x1x8")


@needs_compiler
@pytest.mark.pod
def test_the_papers_run_fits_and_no_loop_moves_a_weight():
    """Qwen3-8B OPSD on 16 v5p chips, 32 rollouts of up to 8,192 tokens with memos as context."""
    plan, code = planned(PAPERS, "v5p:2x2x4")
    assert code == 0
    assert max(phase["total"] for phase in plan["phases"]) < plan["hbm"]
    assert 0 < plan["largest_collective"]["decode_steps"] < plan["smallest_weight"]
    assert plan["largest_collective"]["loss_chunks"] < plan["smallest_weight"]


@needs_compiler
@pytest.mark.pod
def test_a_step_of_64_rows_of_4096_tokens_takes_less_than_a_plain_one():
    """A plain train step needs 15.1 GiB of temporaries."""
    plan, code = planned(
        PAPERS, "v5p:2x2x4", "mesh=(1,16,1)", "opsd.microbatch=16",
        "opsd.prompts=64", "opsd.slots=64", "opsd.contexts=('solution',)",
        "opsd.response_tokens=3072", "opsd.buckets=(4096,)", "opsd.teacher_prompt_tokens=1024",
        "opsd.teacher_buckets=(4096,)",
    )  # fmt: skip
    assert code == 0
    step = next(p for p in plan["programs"] if p["name"] == "opsd: train step")
    assert step["temporaries"] < 15.1 * GIB
    assert step["temp_size_in_bytes"] < 15.1 * GIB
    # The live bytes that we read from the program equal the compiler's, except for padding.
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
def test_the_error_gives_the_memory_that_a_program_needs(message, gib):
    assert programs.memory_needed(message) == (gib and gib * GIB)


def test_the_command_reports_a_missing_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["plan", "--config", str(SUPPORT / "tiny_pod.py"), "--topology", "v5e:2x2"]
    assert main.main(arguments) == 2
    assert "is not installed. Run: pip install 'opsd-jax[tpu]'" in capsys.readouterr().err


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
    """A plan makes the same checks as a run, except for the checks of the data."""
    arguments = ["plan", "--config", str(SUPPORT / "tiny_pod.py"), "--topology", "v5e:2x2"]
    arguments += [f"--config.{field}={value}", "--config.opsd.contexts=('memo',)"]
    if field == "model.sequence_parallel":
        arguments += ["--config.opsd.buckets=(512, 1023)"]
        field = "opsd: the padded lengths of its buckets"
    assert main.main(arguments) == 2
    text = capsys.readouterr().err
    assert re.search(rf"config.{field} (is|are) .*; expected (a multiple|multiples) of", text)


@needs_compiler
def test_an_unknown_topology_is_refused(capsys):
    arguments = ["plan", "--config", str(SUPPORT / "tiny_pod.py"), "--topology", "v5x:2"]
    assert main.main(arguments) == 2
    assert "--topology v5x:2: " in capsys.readouterr().err


CONFIG = tiny_config.quickstart()
with CONFIG.unlocked():
    CONFIG.rl = CONFIG.opsd
    CONFIG.rl.update({"updates": 1, "slots": 256, "microbatch": 32})
OPTIONS = tiny_config.stage_options(tiny_config.quickstart().opsd, contexts=("memo",), slots=256)
SAMPLINGS = {sampling.name: sampling for sampling in opsd.ALGORITHM.sampling(OPTIONS)}
PHASES = {
    PhaseKey("rl", PhaseKind.RESHARD): "reshard",
    **{PhaseKey("rl", PhaseKind.SAMPLING, name): f"rl {name}: prefill" for name in SAMPLINGS},
    PhaseKey("rl", PhaseKind.STEP): "rl: train step",
    PhaseKey("rl", PhaseKind.PROBE_SAMPLING, "memos"): "rl memos: prefill",
    PhaseKey("rl", PhaseKind.PROBE): "rl: probe",
    PhaseKey("evaluation", PhaseKind.EVALUATION): "rl rollouts: prefill",
}
PLAN = Plan(
    config=loading.flatten(CONFIG),
    topology="v5e:2x2", slices=1, devices=4, chip="TPU v5 lite", hbm=10 * GIB,
    mesh={"data": 1, "fsdp": 4, "tensor": 1}, decode_mesh={"data": 1, "fsdp": 4, "tensor": 1},
    response_length=0.5, seconds_at_best=5400.0, seconds_in_turn=9000.0,
    phases=[
        Phase(
            key, times=7, parts={Part.PARAMETERS: GIB}, programs=[program],
            seconds_at_best=1.0, seconds_in_turn=2.0,
            useful_tokens=0.615 if key.kind is PhaseKind.STEP else None,
            sampling=SAMPLINGS.get(
                "rollouts" if key.kind is PhaseKind.EVALUATION else key.sampling
            ),
            row_fields=rlvr.ALGORITHM.row_fields if key.kind is PhaseKind.STEP else None,
        )
        for key, program in PHASES.items()
    ],
    programs=[
        programs.ProgramCosts(
            key=ProgramKey(ProgramKind.PREFILL), name=name, compile_seconds=3.0, arguments=GIB,
            temporaries=GIB, temp_size_in_bytes=GIB, refused=False, live_bytes=GIB,
            largest=[{"shape": "f32[4,8]", "made_by": "jit(f)/x", "count": 2, "bytes": GIB}],
            flops=int(1.565e16), hbm_bytes=3.782e13, decode_steps=0, kernel_bytes=0.0,
            seconds={"compute": 1.0, "memory": 1.0, "network": 0.0},
            collectives=[
                {"op": "all-gather", "loops": ["layers"], "times": 4, "bytes": GIB,
                 "largest": GIB // 4, "elements": 9}
            ],
            loops=["layers"], dynamic_loops=frozenset(),
        )
        for name in sorted(set(PHASES.values()))
    ],
    largest_collective={"decode_steps": 5, "loss_chunks": 0}, smallest_weight=77, fits=True,
)  # fmt: skip


def filled(plan, name, part, **changes):
    """Returns a plan in which a part of a phase does not fit."""
    phases = [
        phase._replace(parts={**phase.parts, part: 11.5 * GIB}, **changes)
        if phase.name == name
        else phase
        for phase in plan.phases
    ]
    return plan._replace(phases=phases, fits=False)


def test_the_table_has_every_phase_and_the_loops_of_collectives():
    lines = list(table.lines(PLAN))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for name in map(str, PHASES):
        assert f"  {name:<25}   1.00   9.00 left" in text
        assert f"  {name:<25}      1.0      2.0      7 x" in text
    assert "7 x   62% of its tokens are not padding" in text
    assert "  total: 1.5 to 2.5 hours, or 6 to 10 device-hours\n" in text
    assert "all-gather         4 x, up to 256.0 MiB" in text
    assert "layers" in text
    assert text.endswith("It fits.")
    row = next(line for line in lines if "train step" in line)
    assert row.split()[3:] == ["3", "2.00", "1.00", "15650", "35223", "1"]
    assert "between slices" not in text
    assert "between slices" in "\n".join(table.lines(PLAN._replace(slices=2)))


@pytest.mark.parametrize(
    ("phase", "part", "advice"),
    [
        ("rl reshard", "temporaries", "a decode_mesh with a larger `tensor`"),
        ("rl rollouts", "cache", "a smaller rl.slots or rl.response_tokens; more devices"),
        ("rl rollouts", "weights for sampling", "a decode_mesh with a larger `tensor`"),
        (
            "rl rollouts",
            "temporaries",
            "a smaller rl.slots: a prefill fills a quarter of the slots",
        ),
        (
            "rl rollouts",
            "prompts' cache",
            "a smaller rl.slots: a prefill fills a quarter of the slots",
        ),
        ("rl memos", "cache", "a smaller rl.memo.slots or rl.memo.tokens"),
        ("rl memos, closed", "cache", "a smaller rl.memo.slots or rl.memo.close_tokens"),
        ("rl memos, closed", "temporaries", "a smaller rl.memo.slots"),
        ("rl step", "temporaries", "a smaller rl.microbatch"),
        ("rl step", "batch", "a smaller rl.prompts or rl.group_size, or a larger rl.updates"),
        (
            "rl step",
            "optimizer",
            "rl.optimizer.moment_dtype = 'bfloat16'; "
            "rl.optimizer.second_moment_dtype = 'bfloat16'; a mesh with more devices",
        ),
        ("rl step", "teacher", "a mesh with more devices along `fsdp`"),
        ("rl probe memos", "cache", "a smaller rl.memo.slots or rl.memo.tokens"),
        (
            "rl probe",
            "temporaries",
            "a smaller evaluation.response_tokens; a smaller rl.microbatch",
        ),
        ("rl probe", "batch", "a smaller evaluation.response_tokens or rl.microbatch"),
        ("rl probe", "teacher parameters", "a mesh with more devices along `fsdp`"),
        ("evaluation", "cache", "a smaller evaluation.slots or evaluation.response_tokens"),
        ("evaluation", "temporaries", "a smaller evaluation.slots"),
    ],
)
def test_advice_depends_on_the_largest_part(phase, part, advice):
    text = "\n".join(table.lines(filled(PLAN, phase, Part(part))))
    assert "DOES NOT FIT, by 2.50" in text
    assert "2 x f32[4,8]" in text
    assert f"To reduce it: {advice}" in " ".join(text.split())
    assert max(map(len, text.split("\n"))) <= 100
    for field in re.findall(r"rl\.([\w.]+)", text):
        assert PLAN.config[f"rl.{field}"] is not None


@pytest.mark.parametrize(
    ("part", "phase", "changes", "advice"),
    [
        (
            "temporaries",
            "rl step",
            {"rl.microbatch": 4, "model.remat": "full", "model.sequence_parallel": True},
            "a mesh with a larger `tensor`",
        ),
        (
            "temporaries",
            "rl step",
            {"rl.microbatch": 8, "model.remat": "full", "model.sequence_parallel": False},
            "a smaller rl.microbatch; model.sequence_parallel = True; "
            "a mesh with a larger `tensor`",
        ),
        (
            "optimizer",
            "rl step",
            {
                "rl.optimizer.moment_dtype": "bfloat16",
                "rl.optimizer.second_moment_dtype": "bfloat16",
            },
            "a mesh with more devices along `fsdp`; more devices",
        ),
    ],
)
def test_advice_leaves_out_what_the_config_already_does(part, phase, changes, advice):
    plan = PLAN._replace(config=PLAN.config | changes)
    text = " ".join("\n".join(table.lines(filled(plan, phase, Part(part)))).split())
    assert text.endswith(f"To reduce it: {advice}")


def test_advice_keeps_the_slots_if_a_prefill_has_one_prompt_per_shard():
    few = SAMPLINGS["rollouts"]._replace(slots=16, group_size=1)
    plan = filled(PLAN, "rl rollouts", Part.PROMPT_CACHE, sampling=few)
    text = " ".join("\n".join(table.lines(plan)).split())
    advice = "shorter prompts; a decode_mesh with a larger `tensor`"
    assert text.endswith(f"To reduce it: {advice}")


def test_the_table_leaves_out_loops_that_no_program_has():
    text = "\n".join(table.lines(PLAN._replace(largest_collective={"decode_steps": 5})))
    assert "  elements: at most 5 in the decode loop, the smallest weight has 77" in text
    assert "the loss loop" not in text


def test_the_table_names_the_programs_that_the_compiler_refuses():
    first, *others = PLAN.programs
    refused = dataclasses.replace(first, refused=True, arguments=11 * GIB)
    plan = PLAN._replace(programs=[refused, *others], fits=False)
    text = "\n".join(table.lines(plan))
    assert text.endswith(f"The compiler refuses {first.name}: it needs 12.00 GiB on its own.")


def test_matmuls_are_counted_as_xla_counts_them():
    """XLA's own count is correct for programs without loops, with dots and convolutions."""
    import jax.numpy as jnp

    def f(a, b, c):
        x = jnp.einsum("bij,bjk->bik", a, b)
        return jax.lax.conv_general_dilated(
            x[None], c[None], (2, 1), ((3, 2), (0, 1)), lhs_dilation=(1, 3), rhs_dilation=(2, 1)
        )

    shapes = (5, 16, 32), (5, 32, 64), (5, 3, 7)
    compiled = jax.jit(f).lower(*(jnp.zeros(s) for s in shapes)).compile()
    program = hlo.Program(compiled.as_text())
    counted = sum(matmul.flops for matmul in costs.matmuls(program))
    assert abs(counted / compiled.cost_analysis()["flops"] - 1) < 0.01


def test_the_live_buffers_at_the_peak_are_named():
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
    # The peak is in the loop: its state and the array that its body makes.
    assert [(b.bytes, b.made_by) for b in found] == [(1024, "jit(f)/inner"), (256, "seen")]
