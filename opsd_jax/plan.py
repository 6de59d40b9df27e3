"""A run compiled for TPUs that are not there: whether it fits, what it moves, how long it takes.

Every program of a config's run is compiled by XLA:TPU for a topology, and its text is read: memory
by part and by phase, operations and traffic with loops counted, the collectives and the loops that
they stand in. Times are a roofline: what the chips could do at best, and with nothing overlapped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opsd_jax import config_files
from opsd_jax.data.task import Task
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.evaluation.divergence import DivergenceProbe
from opsd_jax.losses.fused import chunk_tokens
from opsd_jax.parallel import aot, hlo, liveness
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parameters import Parameters
from opsd_jax.rollout.engine import STEPS, Engine, EngineShape, shape_for
from opsd_jax.stages import memos, opsd, rlvr, sft
from opsd_jax.stages.privileged import Privileged
from opsd_jax.stages.stage import Stage
from opsd_jax.training import state as state_lib
from opsd_jax.training.step import compile_train_step

# Without these libtpu looks for the TPUs of this machine, and locks them.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GIB = 2**30
LISTED = 6  # of a program's largest tensors and collectives


class Chip(NamedTuple):
    """What a device can do in a second at best: the makers' figures.

    Attributes:
      flops: operations on bfloat16.
      hbm: bytes to and from its memory.
      ici: bytes to its neighbours on a ring, both ways together.
    """

    flops: float
    hbm: float
    ici: float


# By `device_kind`. A chip of v4 and of TPU7x is two devices here.
CHIPS = {
    "TPU v4": Chip(1.37e14, 6.1e11, 4.5e10),
    "TPU v5 lite": Chip(1.97e14, 8.2e11, 9.0e10),
    "TPU v5": Chip(4.59e14, 2.77e12, 1.8e11),
    "TPU v6 lite": Chip(9.18e14, 1.64e12, 1.8e11),
    "TPU7x": Chip(1.15e15, 3.69e12, 1.0e11),
}
# A run without data: the shapes of its programs do not depend on any.
NO_DATA = Task(
    tokenizer=ByteTokenizer(),
    train=None,
    heldout=None,
    demonstrations=lambda seed: None,
    prompt=lambda problem: [],
    teacher_prompt=lambda problem, context, limit: ([], False),
    verify=lambda problem, response: None,  # type: ignore[arg-type, return-value]
    memo_request=lambda problem, group: [],
    reminder=lambda context, limit: ([], False),
)


class PlanError(Exception):
    """A plan cannot be made."""


class Built(NamedTuple):
    """A program that was compiled.

    Attributes:
      name: what it is called.
      text: its instructions.
      seconds: that the compiler took.
      arguments: bytes on a device, with results that are none of them.
      total: bytes on a device with the temporaries, as the compiler assigns them.
      temp_size: XLA's `temp_size_in_bytes`, which counts some of these twice.
    """

    name: str
    text: str
    seconds: float
    arguments: int
    total: int
    temp_size: int


class Compiler:
    """Compiles what it is given, under a name, and keeps what a plan reads of it."""

    def __init__(self) -> None:
        self.built: list[Built] = []
        self.prefix = ""

    def __call__(self, name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        name, began = self.prefix + name, time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                raise
            self.built.append(_too_large(name, lowered, began, needed))
            return None
        memory: Any = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.built.append(
            Built(
                name=name,
                text=compiled.as_text() or "",
                seconds=time.monotonic() - began,
                arguments=arguments - memory.alias_size_in_bytes,
                total=memory.peak_memory_in_bytes,
                temp_size=memory.temp_size_in_bytes,
            )
        )
        return compiled


def memory_needed(error: str) -> float | None:
    """The bytes that a program needed, of the error that refused it for them; None of others."""
    found = re.search(r"memory required .*\(([\d.]+)G\) exceeds|Used ([\d.]+)G of \S+ hbm", error)
    return float(found[1] or found[2]) * GIB if found else None


def _too_large(name: str, lowered: jax.stages.Lowered, began: float, total: float) -> Built:
    """What is known of a program that the compiler refused for its memory: what it left of it."""
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, str | bool] = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile(options)
        left = list(pathlib.Path(directory).glob("*after_optimizations.txt"))
        text = left[0].read_text() if left else ""
    entry = hlo.Program(text).instructions("ENTRY").values()
    arguments = sum(hlo.size_of(i.shape) for i in entry if i.op == "parameter")
    temporaries = int(total) - arguments
    return Built(name, text, seconds, arguments, int(total), temporaries)


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU topology, such as "v5p:2x2x4", that need not be there.

    Raises:
      PlanError: there is no such topology, or its compiler is not installed.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("XLA's compiler for TPUs is missing: pip install 'opsd-jax[tpu]'.")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    many = {"num_slices": slices} if slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **many)
    except jax.errors.JaxRuntimeError as error:
        expected = "expected such as v5e:4x4, v5p:2x2x4 or v6e:4x4"
        raise PlanError(f"--topology {name}: {error}; {expected}.") from error
    return list(topology.devices)


def hbm_bytes(device: jax.Device) -> float:
    """The memory of a device that programs may use: as the compiler says when they want more."""
    one = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**20, 2**16), jnp.float32, sharding=one)
    try:
        jax.jit(lambda x: jnp.sin(x @ x.T).sum()).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return float(found[1]) * GIB
        raise
    raise PlanError(f"{device.device_kind} has no limit to its memory that the compiler tells.")


def plan(config: ConfigDict, topology: str, *, slices: int = 1, length: float = 0.5) -> dict:
    """The plan of a config's run on a topology, JSON-ready.

    Args:
      config: of the run; paths of data and weights need not exist.
      topology: as `topology_devices`.
      slices: how many of it, connected by the data centre's network.
      length: of responses, as a part of their budget: an assumption of the times.

    Raises:
      PlanError: as `topology_devices`.
      ConfigError: the config does not go with these devices.
    """
    devices = topology_devices(topology, slices)
    device = devices[0]
    if device.device_kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise PlanError(f"--topology {topology}: a {device.device_kind}; expected one of {known}.")
    chip, hbm = CHIPS[device.device_kind], hbm_bytes(device)
    compiler = Compiler()
    with aot.planning(compiler):
        run = _Run(config, devices, compiler, chip, length)
        for name in config.stages:
            run.stage(name)
        run.evaluation()
    found = [collective for program in run.programs for collective in program["collectives"]]
    totals = {name: sum(parts.values()) for name, parts in run.phases.items()}
    return {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "chip": device.device_kind,
        "hbm": hbm,
        "mesh": dict(run.parameters.mesh.shape),
        "decode_mesh": dict(run.parameters.decode_mesh.shape),
        "response_length": length,
        "phases": [
            {"name": name, "parts": parts, "total": totals[name]}
            for name, parts in run.phases.items()
        ],
        "programs": run.programs,
        "largest_collective": {
            loop: max((c["elements"] for c in found if loop in c["loops"]), default=0)
            for loop in ("decode_steps", "loss_chunks")
        },
        "smallest_weight": run.smallest_weight(),
        "times": run.times,
        "fits": max(totals.values()) <= hbm,
    }


class _Run:
    """A config's run as `pipeline.Run` has it, without data: compiles its programs and accounts."""

    def __init__(
        self,
        config: ConfigDict,
        devices: list[jax.Device],
        compiler: Compiler,
        chip: Chip,
        length: float,
    ):
        self.config, self.compiler, self.chip, self.length = config, compiler, chip, length
        self.parameters = Parameters(config, pathlib.Path(), devices)
        self.model, self.mesh = self.parameters.model, self.parameters.mesh
        self.layout = self.parameters.decoding
        self.weights = mesh_lib.shard_bytes(self.parameters.abstract)
        self.programs: list[dict[str, Any]] = []
        self.phases: dict[str, dict[str, float]] = {}
        self.times: dict[str, dict[str, float]] = {}
        # The way to the layout for sampling, if there is one.
        self.reshard = next(iter(self.account({})), None)

    def smallest_weight(self) -> int:
        """The elements of the smallest weight, of stacked ones a layer's. What holds less than a
        thousandth of the parameters, as norms and biases do, is none.
        """
        leaves = jax.tree.leaves(self.parameters.abstract)
        total = sum(leaf.size for leaf in leaves)
        weights = [leaf for leaf in leaves if leaf.size > total / 1000]
        return min(leaf.size // (leaf.shape[0] if leaf.ndim > 2 else 1) for leaf in weights)

    def account(self, given: Mapping[str, int], **options: Any) -> list[dict[str, Any]]:
        """Accounts for what was compiled since the last time, with the turns of loops given, and
        other arguments of `program_figures`.
        """
        new = [
            program_figures(built, self.chip, given, **options)
            for built in self.compiler.built[len(self.programs) :]
        ]
        self.programs += new
        return new

    def engine(
        self, sizes: EngineShape, mean_tokens: float, cuts: bool
    ) -> tuple[Engine, dict[str, dict[str, Any]]]:
        """The engine of these sizes, and the figures of its programs.

        Args:
          sizes: of the engine.
          mean_tokens: in a row of its cache on average.
          cuts: whether the sampling rule looks for the likeliest words.
        """
        begun = len(self.programs)
        engine = Engine(self.model, self.layout.abstract, self.layout.mesh, sizes)
        live = engine.cache_bytes * mean_tokens / engine.lengths[-1] if self.model.ragged else 0.0
        self.account({"decode_steps": STEPS}, kernel_bytes=live, lightest=not cuts)
        return engine, {p["name"].split(": ")[-1]: p for p in self.programs[begun:]}

    def sampling(
        self,
        phase: str,
        resident: Mapping[str, float],
        *,
        slots: int,
        group_size: int,
        rollouts: int,
        prompt_tokens: int,
        response_tokens: int,
        cuts: bool = False,
    ) -> None:
        """Compiles and accounts for the sampling of so many rollouts, beside what is resident."""
        self.compiler.prefix = f"{phase}: "
        sizes = shape_for(
            slots=slots,
            group_size=group_size,
            rollouts=rollouts,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            shards=mesh_lib.row_shards(self.layout.mesh),
        )
        tokens = self.length * response_tokens
        engine, programs = self.engine(sizes, prompt_tokens + tokens / 2, cuts)
        self.phases[phase] = {
            **resident,
            "weights for sampling": self.layout.moved,
            "cache": engine.cache_bytes,
            "prompts' cache": engine.prompts_bytes,
            "temporaries": max(p["temporaries"] for p in programs.values()),
        }
        prefills = -(-rollouts // (group_size * sizes.prompts))
        chunks = rollouts * tokens / (sizes.slots * STEPS)
        decode = programs[f"decode in {engine.lengths[-1]}"]
        prefill = programs["prefill"]
        self.times.setdefault(phase, {}).update(
            {
                bound: prefills * prefill[bound] + chunks * decode[bound]
                for bound in ("seconds_at_best", "seconds_in_turn")
            }
        )

    def stage(self, name: str) -> None:
        """A stage of the config."""
        section, policy = self.config[name], self.model.policy
        keep, seed = self.model.decode_params, 0
        if section.algorithm == "sft":
            stage = sft.stage(section, NO_DATA, policy, seed)
        elif section.algorithm == "rlvr":
            stage = rlvr.stage(section, NO_DATA, policy, None, keep)  # type: ignore[arg-type]
        else:
            privileged = Privileged(section, NO_DATA, section.group_size)
            stage = opsd.stage(section, NO_DATA, policy, None, privileged, keep)  # type: ignore[arg-type]
        optimizer = state_lib.make_optimizer(section.optimizer, stage.steps * stage.updates)
        abstract = state_lib.abstract_state(
            self.parameters.abstract, optimizer, stage.teacher, self.mesh
        )
        resident = {
            "parameters": self.weights,
            "optimizer": mesh_lib.shard_bytes(abstract["opt_state"]),
            "teacher": mesh_lib.shard_bytes(abstract["teacher"]),
        }
        if self.reshard is not None and section.algorithm != "sft":
            self.phases[f"{name} reshard"] = {
                **resident,
                "weights for sampling": self.layout.moved,
                "temporaries": self.reshard["temporaries"],
            }
        if section.algorithm != "sft":
            rollouts = section.prompts * section.group_size
            self.sampling(
                f"{name} rollouts",
                resident,
                slots=section.slots,
                group_size=section.group_size,
                rollouts=rollouts,
                prompt_tokens=section.prompt_tokens,
                response_tokens=section.response_tokens,
            )
        if section.algorithm == "opsd" and "memo" in section.contexts:
            longest = memos.sizes(
                section.memo, NO_DATA, section.prompt_tokens, section.response_tokens
            )
            for which, (prompt, response) in zip(("memos", "memos, closed"), longest, strict=True):
                self.sampling(
                    f"{name} {which}",
                    resident,
                    slots=section.memo.slots,
                    group_size=1,
                    rollouts=section.memo.slots,
                    prompt_tokens=prompt,
                    response_tokens=response,
                )
        self.compiler.prefix = f"{name}: "
        compile_train_step(stage, optimizer, abstract, self.mesh)
        (step,) = self.account(self._turns(section, stage))
        if section.algorithm == "opsd":
            evaluation, weights = self.config.evaluation, self.parameters.abstract
            DivergenceProbe(section, evaluation, NO_DATA, policy, self.mesh, weights)
            turns = {"loss_chunks": self._chunks(section, evaluation.response_tokens)}
            (probe,) = self.account(turns)
            self.phases[f"{name} probe"] = {
                "parameters": self.weights,
                "the teacher's": self.weights,
                "temporaries": probe["temporaries"],
            }
        self.phases[f"{name} step"] = {
            **resident,
            "batch": step["arguments"] - sum(resident.values()),
            "temporaries": step["temporaries"],
        }
        self.times[f"{name} step"] = {
            bound: stage.updates * step[bound] for bound in ("seconds_at_best", "seconds_in_turn")
        }

    def _turns(self, section: ConfigDict, stage: Stage) -> dict[str, int]:
        """The turns of a train step's loops when all rows are active, and as long as assumed."""
        microbatches = len(stage.empty_batch[0]["rows"]["mask"])
        if section.algorithm == "sft":
            wanted = section.buckets[-1]
        else:
            wanted = section.prompt_tokens + int(self.length * section.response_tokens)
        chosen = next(size for size in section.buckets if size >= min(wanted, section.buckets[-1]))
        given = {}
        for b, length in enumerate(section.buckets):
            name = f"bucket_{b}"
            given[name] = microbatches if length == chosen else 0
            given[f"{name}/loss_chunks"] = self._chunks(section, length)
        return given

    def _chunks(self, section: ConfigDict, length: int) -> int:
        """The chunks of the loss of a microbatch of rows of this length, if all count."""
        hidden = jax.eval_shape(
            lambda p: self.model.policy.forward(p, *(jnp.zeros((1, 128), jnp.int32),) * 2)[0],
            self.parameters.abstract,
        )
        chunk = chunk_tokens(section.loss_chunk, hidden.shape[-1], self.model.vocab_size)
        return -(-section.microbatch * length // mesh_lib.row_shards(self.mesh) // chunk)

    def evaluation(self) -> None:
        """The evaluation of a stage's result."""
        section = self.config.evaluation
        problems = section.problems or self.config.data.heldout_problems or 500
        self.sampling(
            "evaluation",
            {"parameters": self.weights},
            slots=section.slots,
            group_size=section.samples,
            rollouts=problems * section.samples,
            prompt_tokens=section.prompt_tokens,
            response_tokens=section.response_tokens,
            cuts=section.top_k > 0 or section.top_p < 1 or section.min_p > 0,
        )


def program_figures(
    built: Built,
    chip: Chip,
    given: Mapping[str, int],
    *,
    kernel_bytes: float = 0.0,
    lightest: bool = False,
) -> dict[str, Any]:
    """The figures of a compiled program, JSON-ready; bytes and operations are of one device.

    Args:
      built: the program.
      chip: of the times.
      given: turns of loops that the program does not say (`hlo.turns`).
      kernel_bytes: that the paged attention kernels of a turn of "decode_steps" read.
      lightest: which branches of conditionals are taken (`hlo.Program`).
    """
    program = hlo.Program(built.text, lightest=lightest)
    live = liveness.peak(program)
    flops = sum(p.flops * hlo.turns(p.loops, given) for p in hlo.products(program)) + sum(
        _splash_flops(program, computation, i) * hlo.turns(loops, given)
        for computation, i, loops in program.executed()
        if i.op == "custom-call"
    )
    moved = float(sum(a.bytes * hlo.turns(a.loops, given) for a in hlo.accesses(program)))
    if "/decode_steps/while" in built.text:
        moved += kernel_bytes * given["decode_steps"]
    found = hlo.collectives(program)
    network = sum(_collective_seconds(c, chip) * hlo.turns(c.loops, given) for c in found)
    seconds = {"compute": flops / chip.flops, "memory": moved / chip.hbm, "network": network}
    return {
        "name": built.name,
        "compile_seconds": built.seconds,
        "arguments": built.arguments,
        "temporaries": built.total - built.arguments,
        "temp_size_in_bytes": built.temp_size,
        "live_bytes": sum(buffer.bytes for buffer in live),
        "largest": _largest_tensors(live),
        "flops": flops,
        "hbm_bytes": moved,
        "seconds": seconds,
        "seconds_at_best": max(seconds.values()),
        "seconds_in_turn": sum(seconds.values()),
        "collectives": _collective_table(found, given),
    }


def _largest_tensors(live: list[liveness.Buffer]) -> list[dict[str, Any]]:
    """The largest of some tensors, those of a shape and origin together."""
    together: dict[tuple[str, str], list[int]] = {}
    for buffer in live:
        together.setdefault((buffer.shape, buffer.made_by), []).append(buffer.bytes)
    largest = sorted(together.items(), key=lambda item: -sum(item[1]))[:LISTED]
    return [
        {"shape": shape, "made_by": made_by, "count": len(sizes), "bytes": sum(sizes)}
        for (shape, made_by), sizes in largest
    ]


def _collective_table(
    found: list[hlo.Collective], given: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The collectives by operation and loops, those that move most first."""
    together: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for c in found:
        names = tuple(loop.name for loop in c.loops)
        row = together.setdefault(
            (c.op, names),
            {"op": c.op, "loops": list(names), "times": 0, "bytes": 0, "largest": 0, "elements": 0},
        )
        times = hlo.turns(c.loops, given)
        row["times"] += times
        row["bytes"] += times * c.bytes
        row["largest"] = max(row["largest"], c.bytes)
        row["elements"] = max(row["elements"], c.elements)
    return sorted(together.values(), key=lambda row: -row["bytes"])


def _collective_seconds(c: hlo.Collective, chip: Chip) -> float:
    """On a ring of its devices, at the speed of one axis of the torus."""
    if c.op.startswith("collective-"):
        return c.bytes / (chip.ici / 2)  # one way
    passes = 2 if c.op == "all-reduce" else 1
    return passes * c.bytes * (c.devices - 1) / c.devices / chip.ici


def _splash_flops(program: hlo.Program, computation: str, i: hlo.Instruction) -> int:
    """Operations of a splash attention kernel with a causal mask; of other kernels 0."""
    products = {"fwd": 2, "dq": 3, "dkv": 4}
    phase = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)
    if phase is None:
        return 0
    there = program.instructions(computation)
    shapes = [there[name].shape for name in i.operands]
    # The first array of floating point is the queries: [..., T, C].
    found = (re.match(r"(?:bf16|f32)\[([\d,]+)\]", shape) for shape in shapes)
    *rows, T, C = next([int(n) for n in match[1].split(",")] for match in found if match)
    return products[phase[1]] * 2 * math.prod(rows) * T * (T + 1) // 2 * C


def run(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> dict:
    """The plan that the command line asks for; raises as `plan`."""
    config = config_files.load(arguments.config, dict(overrides), data=False)
    return plan(config, arguments.topology, slices=arguments.slices, length=arguments.length)
