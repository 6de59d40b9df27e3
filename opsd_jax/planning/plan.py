"""A run compiled for TPUs that are not there: whether it fits, what it moves, how long it takes.

Every program of a config's run is compiled by XLA:TPU for a topology, and its text is read: memory
by part and by phase, operations and traffic with loops counted, the collectives and the loops that
they stand in. Times are a roofline: what the chips could do at best, and with nothing overlapped.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opsd_jax import config_files, sizes
from opsd_jax.data.task import Task
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.evaluation import divergence
from opsd_jax.losses.fused import chunk_tokens
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parameters import Parameters
from opsd_jax.planning.chips import CHIPS, Chip, PlanError, hbm_bytes, topology_devices
from opsd_jax.planning.programs import Compiler, figures
from opsd_jax.rollout.engine import STEPS, Engine, EngineShape, shape_for
from opsd_jax.stages import memos, opsd, rlvr, sft
from opsd_jax.stages.batch import Lengths, first_that_holds
from opsd_jax.stages.privileged import Privileged, inserted_tokens
from opsd_jax.stages.stage import Stage
from opsd_jax.training import state as state_lib
from opsd_jax.training.step import compile_train_step

PROBLEMS = 500  # evaluated, where the config leaves it to the data: MATH500's
BOUNDS = "seconds_at_best", "seconds_in_turn"

# A run without data: the shapes of its programs depend on none, but for the tokens that close a
# memo's thinking.
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
    return {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "chip": device.device_kind,
        "hbm": hbm,
        "mesh": dict(run.parameters.mesh.shape),
        "decode_mesh": dict(run.parameters.decode_mesh.shape),
        "response_length": length,
        "config": config_files.flatten(config),
        "phases": run.phases,
        "programs": run.programs,
        "largest_collective": {
            loop: max((c["elements"] for c in found if loop in c["loops"]), default=0)
            for loop in ("decode_steps", "loss_chunks")
            if any(loop in program["loops"] for program in run.programs)
        },
        "smallest_weight": run.smallest_weight(),
        "fits": max(phase["total"] for phase in run.phases) <= hbm
        and not any(program["refused"] for program in run.programs),
    }


Program = dict[str, Any]  # `figures` of one


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
        """Raises ConfigError as `plan`."""
        self.config, self.compiler, self.chip, self.length = config, compiler, chip, length
        self.parameters = Parameters(config, pathlib.Path(), devices)
        sizes.check_devices(config, self.parameters.mesh, self.parameters.decode_mesh)
        self.model, self.mesh = self.parameters.model, self.parameters.mesh
        self.layout = self.parameters.decoding
        self.weights = mesh_lib.shard_bytes(self.parameters.abstract)
        self.programs: list[Program] = []
        self.phases: list[dict[str, Any]] = []
        # The way to the layout for sampling, if there is one.
        self.reshard = self.account({})

    def smallest_weight(self) -> int:
        """The elements of the smallest weight, of stacked ones a layer's. What holds less than a
        thousandth of the parameters, as norms and biases do, is none.
        """
        leaves = jax.tree.leaves(self.parameters.abstract)
        total = sum(leaf.size for leaf in leaves)
        weights = [leaf for leaf in leaves if leaf.size > total / 1000]
        return min(leaf.size // (leaf.shape[0] if leaf.ndim > 2 else 1) for leaf in weights)

    def account(self, given: Mapping[str, int], **options: Any) -> list[Program]:
        """Accounts for what was compiled since the last time, with the turns of loops given, and
        other arguments of `figures`.
        """
        new = [
            figures(built, self.chip, given, **options)
            for built in self.compiler.built[len(self.programs) :]
        ]
        self.programs += new
        return new

    def phase(
        self, name: str, parts: Mapping[str, float], executions: Sequence[tuple[float, Program]]
    ) -> None:
        """A phase of the run: what lies on a device beside the temporaries of one program at a
        time, and how often it executes each.
        """
        parts = {**parts, "temporaries": max(p["temporaries"] for _, p in executions)}
        times = {b: sum(n * p[b] for n, p in executions) for b in BOUNDS}
        names = [p["name"] for _, p in executions]
        whole = sum(parts.values())
        self.phases.append(
            {"name": name, "parts": parts, "total": whole, "programs": names, **times}
        )

    @functools.cache  # noqa: B019 - one a plan
    def engine(self, shape: EngineShape, cuts: bool) -> tuple[Engine, list[Program]]:
        """The engine of a shape and its programs, compiled at the first request.

        Args:
          shape: of the engine.
          cuts: whether the sampling rule looks for the likeliest words.
        """
        engine = Engine(self.model, self.layout.abstract, self.layout.mesh, shape)
        filled = shape.prompt_tokens + self.length * shape.response_tokens / 2  # on average
        live = engine.cache_bytes * filled / engine.lengths[-1] if self.model.ragged else 0.0
        given = {"decode_steps": STEPS}
        return engine, self.account(given, kernel_bytes=live, lightest=not cuts)

    def sampling(
        self,
        name: str,
        resident: Mapping[str, float],
        *,
        slots: int,
        group_size: int,
        rollouts: int,
        prompt_tokens: int,
        response_tokens: int,
        cuts: bool = False,
        samples: int | None = None,
    ) -> None:
        """The phase in which rollouts are sampled, beside what is resident.

        Args:
          name, resident: of the phase.
          slots, group_size, rollouts, prompt_tokens, response_tokens: as `shape_for`.
          cuts: as `engine`.
          samples: how many are sampled; by default `rollouts`.
        """
        self.compiler.prefix = f"{name}: "
        shape = shape_for(
            slots=slots,
            group_size=group_size,
            rollouts=rollouts,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            shards=mesh_lib.row_shards(self.layout.mesh),
        )
        engine, programs = self.engine(shape, cuts)
        samples = rollouts if samples is None else samples
        prefills = -(-samples // (group_size * shape.prompts))
        chunks = max(1.0, samples / shape.slots) * self.length * response_tokens / STEPS
        times = {"prefill": prefills, f"decode in {engine.lengths[-1]}": chunks}
        self.phase(
            name,
            {
                **resident,
                "weights for sampling": self.layout.moved,
                "cache": engine.cache_bytes,
                "prompts' cache": engine.prompts_bytes,
            },
            [(times.get(p["name"].split(": ")[-1], 0), p) for p in programs],
        )

    def memos(
        self,
        name: str,
        resident: Mapping[str, float],
        section: ConfigDict,
        sampled: ConfigDict,
        count: int,
    ) -> None:
        """The phases in which `count` memos of an OPSD stage are written, on rollouts of the
        lengths that are `sampled`.
        """
        longest = memos.sizes(section.memo, NO_DATA, sampled.prompt_tokens, sampled.response_tokens)
        for which, (prompt, response) in zip((name, f"{name}, closed"), longest, strict=True):
            self.sampling(
                which,
                resident,
                slots=section.memo.slots,
                group_size=1,
                rollouts=section.memo.slots,
                prompt_tokens=prompt,
                response_tokens=response,
                samples=count,
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
        has_memos = section.algorithm == "opsd" and "memo" in section.contexts
        if section.algorithm != "sft":
            moved = {"weights for sampling": self.layout.moved}
            if self.reshard:
                self.phase(f"{name} reshard", resident | moved, [(1, p) for p in self.reshard])
            self.sampling(
                f"{name} rollouts",
                resident,
                slots=section.slots,
                group_size=section.group_size,
                rollouts=section.prompts * section.group_size,
                prompt_tokens=section.prompt_tokens,
                response_tokens=section.response_tokens,
            )
        if has_memos:
            self.memos(f"{name} memos", resident, section, section, opsd.capacity(section))
        self.compiler.prefix = f"{name}: "
        compile_train_step(stage, optimizer, abstract, self.mesh)
        (step,) = self.account(self._turns(section, stage))
        batch = {"batch": step["arguments"] - sum(resident.values())}
        self.phase(f"{name} step", resident | batch, [(stage.updates, step)])
        if section.algorithm == "opsd":
            self._probe(f"{name} probe", section, has_memos)

    def _probe(self, name: str, section: ConfigDict, has_memos: bool) -> None:
        """The measurement of the divergence from a stage's teacher, before and after the stage."""
        evaluation = self.config.evaluation
        count = 2 * min(self._evaluated() * evaluation.samples, divergence.PROBED)
        resident = {"parameters": self.weights, "the teacher's": self.weights}
        if has_memos:
            self.memos(f"{name} memos", resident, section, evaluation, count)
        self.compiler.prefix = f"{name.split()[0]}: "
        weights = self.parameters.abstract
        divergence.DivergenceProbe(
            section, evaluation, NO_DATA, self.model.policy, self.mesh, weights
        )
        chunks = self._chunks(section, self._mean(evaluation))
        (probe,) = self.account({"loss_chunks": chunks})
        self.phase(name, resident, [(-(-count // section.microbatch), probe)])

    def _turns(self, section: ConfigDict, stage: Stage) -> dict[str, int]:
        """The turns of a train step's loops when all rows are active, and as long as assumed."""
        microbatches = len(stage.empty_batch[0]["rows"]["mask"])
        shapes: list[Lengths] = [{"student": n} for n in section.buckets]
        if section.algorithm == "sft":
            live, needed = section.buckets[-1], {"student": section.buckets[-1]}
        else:
            live = self._mean(section)
            needed = {"student": section.prompt_tokens + live - 1}
        if section.algorithm == "opsd":
            shapes = opsd.buckets(section)
            teacher = section.teacher_prompt_tokens + inserted_tokens(section, live)
            needed["teacher"] = teacher + live - 1
        chosen = first_that_holds(shapes, needed)
        chunks = self._chunks(section, live)
        given = {}
        for b in range(len(shapes)):
            given[f"bucket_{b}"] = microbatches * (b == chosen)
            given[f"bucket_{b}/loss_chunks"] = chunks
        return given

    def _mean(self, sampled: ConfigDict) -> int:
        """The tokens of a response, as long as assumed."""
        return max(1, int(self.length * sampled.response_tokens))

    def _chunks(self, section: ConfigDict, tokens: int) -> int:
        """The chunks of the loss of a microbatch whose rows have so many tokens that count."""
        hidden = jax.eval_shape(
            lambda p: self.model.policy.forward(p, *(jnp.zeros((1, 128), jnp.int32),) * 2)[0],
            self.parameters.abstract,
        )
        chunk = chunk_tokens(section.loss_chunk, hidden.shape[-1], self.model.vocab_size)
        return -(-section.microbatch * tokens // mesh_lib.row_shards(self.mesh) // chunk)

    def _evaluated(self) -> int:
        """The problems that are evaluated."""
        data = self.config.data
        held_out = PROBLEMS if data.get("heldout") else data.get("heldout_problems")
        return self.config.evaluation.problems or held_out or PROBLEMS

    def evaluation(self) -> None:
        """The evaluation of a stage's result."""
        section = self.config.evaluation
        self.sampling(
            "evaluation",
            {"parameters": self.weights},
            slots=section.slots,
            group_size=section.samples,
            rollouts=self._evaluated() * section.samples,
            prompt_tokens=section.prompt_tokens,
            response_tokens=section.response_tokens,
            cuts=section.top_k > 0 or section.top_p < 1 or section.min_p > 0,
        )


def run(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> dict:
    """The plan that the command line asks for; raises as `plan`."""
    config = config_files.load(arguments.config, dict(overrides), data=False)
    return plan(config, arguments.topology, slices=arguments.slices, length=arguments.length)
