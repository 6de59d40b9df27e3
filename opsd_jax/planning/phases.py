"""The phases of a planned run: which programs execute in each, how often, and what lies beside."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opsd_jax.data.task import Task
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.evaluation import divergence
from opsd_jax.losses.fused import chunk_tokens
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.planning import workload
from opsd_jax.planning.chips import Chip
from opsd_jax.planning.programs import Compiler, figures, with_kernel_bytes
from opsd_jax.rollout.engine import (
    ROLLOUTS_PER_INSERT,
    STEPS_PER_CHUNK,
    Engine,
    EngineShape,
    shape_for,
)
from opsd_jax.run import checks as sizes
from opsd_jax.run.parameters import Parameters
from opsd_jax.stages import memos, opsd, rlvr, sft
from opsd_jax.stages.batch import Lengths
from opsd_jax.stages.privileged import Privileged, inserted_tokens
from opsd_jax.training import state as state_lib
from opsd_jax.training.optimizer import make_optimizer
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
    memo_request=lambda problem, outcome: [],
    reminder=lambda context, limit: ([], False),
)

Program = dict[str, Any]  # `figures` of one


class Phases:
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
        self.engines: dict[tuple[EngineShape, bool], tuple[Engine, list[Program]]] = {}
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
        self,
        name: str,
        parts: Mapping[str, float],
        executions: Sequence[tuple[float, Program]],
        times: int,
        **more: float,
    ) -> None:
        """A phase of the run, which has it so many times: what lies on a device beside the
        temporaries of one program at a time, how often it executes each, and more to tell.
        """
        parts = {**parts, "temporaries": max(p["temporaries"] for _, p in executions)}
        self.phases.append(
            {
                "name": name,
                "times": times,
                "parts": parts,
                "total": sum(parts.values()),
                "programs": [p["name"] for _, p in executions],
                **{bound: sum(n * p[bound] for n, p in executions) for bound in BOUNDS},
                **more,
            }
        )

    def engine(self, shape: EngineShape, cuts: bool, reads: float) -> tuple[Engine, list[Program]]:
        """The engine of a shape and its programs, compiled and accounted for at the first request.

        Args:
          shape: of the engine.
          cuts: whether the sampling rule looks for the likeliest words.
          reads: tokens of the cache that a step reads, where it reads what is filled alone.
        """
        if (shape, cuts) not in self.engines:
            engine = Engine(self.model, self.layout.abstract, self.layout.mesh, shape)
            given, read = {"decode_steps": STEPS_PER_CHUNK}, self.kernel_bytes(engine, reads)
            programs = self.account(given, kernel_bytes=read, lightest=not cuts)
            self.engines[shape, cuts] = engine, programs
        return self.engines[shape, cuts]

    def kernel_bytes(self, engine: Engine, reads: float) -> float:
        """Bytes of so many tokens of the cache on a device; 0 where all of it is read anyway."""
        each = engine.cache_bytes / engine.shape.slots / engine.cache_lengths[-1]
        return reads * each if self.model.ragged else 0.0

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
        times: int,
        cuts: bool = False,
        samples: int | None = None,
        unused: float = 0,
    ) -> None:
        """The phase in which rollouts are sampled, beside what is resident.

        Args:
          name, resident, times: of the phase.
          slots, group_size, rollouts, prompt_tokens, response_tokens: as `shape_for`.
          cuts: as `engine`.
          samples: how many are sampled; by default `rollouts`.
          unused: tokens by which prompts are shorter than `prompt_tokens`, on average.
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
        samples = rollouts if samples is None else samples
        responses = workload.lengths(samples, response_tokens, self.length)
        steps = workload.decode_steps(responses, shape.slots)
        reads = workload.reads(prompt_tokens - unused, responses) / steps
        engine, programs = self.engine(shape, cuts, reads)
        longest = engine.cache_lengths[-1]
        executed = {
            "start": 1,
            "prefill": -(-samples // (group_size * shape.prompts)),
            f"admit to {longest}": -(-samples // ROLLOUTS_PER_INSERT),
            f"decode in {longest}": steps / STEPS_PER_CHUNK,
        }
        kernel_bytes = self.kernel_bytes(engine, reads)
        here = [with_kernel_bytes(p, self.chip, kernel_bytes) for p in programs]
        self.phase(
            name,
            {
                **resident,
                "weights for sampling": self.layout.moved_bytes,
                "cache": engine.cache_bytes,
                "prompts' cache": engine.prefill_cache_bytes,
            },
            [(executed.get(p["name"].split(": ")[-1], 0), p) for p in here],
            times,
        )

    def memos(
        self,
        name: str,
        resident: Mapping[str, float],
        section: ConfigDict,
        sampled: ConfigDict,
        count: int,
        times: int,
    ) -> None:
        """The phases in which `count` memos of an OPSD stage are written, on rollouts of the
        lengths that are `sampled`; the run has them so many times. Those that fill their budget are
        taken for thinking that has to be closed.
        """
        longest = memos.sizes(section.memo, NO_DATA, sampled.prompt_tokens, sampled.response_tokens)
        written = workload.lengths(count, section.memo.tokens, self.length)
        closed = max(1, int((written == section.memo.tokens).sum()))
        of_each = (name, count), (f"{name}, closed", closed)
        for (which, samples), (prompt, response) in zip(of_each, longest, strict=True):
            self.sampling(
                which,
                resident,
                slots=section.memo.slots,
                group_size=1,
                rollouts=section.memo.slots,
                prompt_tokens=prompt,
                response_tokens=response,
                times=times,
                samples=samples,
                unused=(1 - self.length) * sampled.response_tokens,
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
        optimizer = make_optimizer(section.optimizer, stage.steps * stage.updates)
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
            moved = {"weights for sampling": self.layout.moved_bytes}
            if self.reshard:
                reshard = [(1, p) for p in self.reshard]
                self.phase(f"{name} reshard", resident | moved, reshard, stage.steps)
            self.sampling(
                f"{name} rollouts",
                resident,
                slots=section.slots,
                group_size=section.group_size,
                rollouts=section.prompts * section.group_size,
                prompt_tokens=section.prompt_tokens,
                response_tokens=section.response_tokens,
                times=stage.steps,
            )
        if has_memos:
            count = opsd.capacity(section)
            self.memos(f"{name} memos", resident, section, section, count, stage.steps)
        self.compiler.prefix = f"{name}: "
        compile_train_step(stage, optimizer, abstract, self.mesh)
        given, useful = self._turns(section)
        (step,) = self.account(given)
        self.phase(
            f"{name} step",
            {**resident, "batch": step["arguments"] - sum(resident.values())},
            [(stage.updates, step)],
            stage.steps,
            **useful,
        )
        if section.algorithm == "opsd":
            self._probe(f"{name} probe", section, has_memos)

    def _probe(self, name: str, section: ConfigDict, has_memos: bool) -> None:
        """The measurement of the divergence from a stage's teacher, before and after the stage."""
        evaluation = self.config.evaluation
        problems = max(1, divergence.PROBED // evaluation.samples)
        count = min(self._evaluated(), problems) * evaluation.samples
        resident = {"parameters": self.weights, "the teacher's": self.weights}
        if has_memos:
            self.memos(f"{name} memos", resident, section, evaluation, count, 2)
        self.compiler.prefix = f"{name.split()[0]}: "
        weights = self.parameters.abstract
        divergence.DivergenceProbe(
            section, evaluation, NO_DATA, self.model.policy, self.mesh, weights
        )
        tokens = self.length * evaluation.response_tokens * section.microbatch
        (probe,) = self.account({"loss_chunks": self._chunks(section, tokens)})
        batch = {"batch": probe["arguments"] - sum(resident.values())}
        self.phase(name, resident | batch, [(-(-count // section.microbatch), probe)], 2)

    def _turns(self, section: ConfigDict) -> tuple[dict[str, int], dict[str, float]]:
        """The turns of a train step's loops when all rows are active, and as long as assumed, those
        of SFT as long as they can be; and the useful ones of the tokens that it computes, as a part
        of them, where an assumption says so.
        """
        shapes: list[Lengths] = [{"student": n} for n in section.buckets]
        if section.algorithm == "sft":
            targets = [section.buckets[-1]] * section.batch_size
            rows = [{"student": tokens} for tokens in targets]
        else:
            module = {"rlvr": rlvr, "opsd": opsd}[section.algorithm]
            count = module.capacity(section) // section.get("updates", 1)
            targets = workload.lengths(count, section.response_tokens, self.length).tolist()
            rows = [{"student": section.prompt_tokens + n - 1} for n in targets]
        if section.algorithm == "opsd":
            shapes = opsd.buckets(section)
            for row, n in zip(rows, targets, strict=True):
                row["teacher"] = section.teacher_prompt_tokens + inserted_tokens(section, n) + n - 1
        packed = workload.packed(rows, targets, shapes, section.microbatch)
        given = {}
        for b, (count, tokens) in enumerate(zip(packed.counts, packed.targets, strict=True)):
            given[f"bucket_{b}"] = count
            given[f"bucket_{b}/loss_chunks"] = self._chunks(section, tokens)
        return given, {} if section.algorithm == "sft" else {"useful_tokens": packed.useful}

    def _chunks(self, section: ConfigDict, tokens: float) -> int:
        """The chunks of the loss of a microbatch with so many tokens that count."""
        chunk = chunk_tokens(section.loss_chunk, self._width, self.model.vocab_size)
        return math.ceil(tokens / mesh_lib.row_shards(self.mesh) / chunk)

    @functools.cached_property
    def _width(self) -> int:
        """Of the hidden states."""
        hidden = jax.eval_shape(
            lambda p: self.model.policy.forward(p, *(jnp.zeros((1, 128), jnp.int32),) * 2)[0],
            self.parameters.abstract,
        )
        return hidden.shape[-1]

    def _evaluated(self) -> int:
        """The problems that are evaluated."""
        data = self.config.data
        held_out = PROBLEMS if data.get("heldout") else data.get("heldout_problems")
        return self.config.evaluation.problems or held_out or PROBLEMS

    def evaluation(self) -> None:
        """The evaluation of the parameters at the beginning, and of each stage's result."""
        section = self.config.evaluation
        self.sampling(
            "evaluation",
            {"parameters": self.weights},
            slots=section.slots,
            group_size=section.samples,
            rollouts=self._evaluated() * section.samples,
            prompt_tokens=section.prompt_tokens,
            response_tokens=section.response_tokens,
            times=1 + len(self.config.stages),
            cuts=section.top_k > 0 or section.top_p < 1 or section.min_p > 0,
        )
