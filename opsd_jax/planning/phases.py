"""The phases of a planned run, with the memory, the time and the programs of each phase."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.evaluation import divergence
from opsd_jax.losses.fused import LOSS_CHUNKS, chunk_tokens
from opsd_jax.models.lora import Weights
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.chips import Chip
from opsd_jax.parallel.program import DECODE_STEPS, ProgramKey, ProgramKind, bucket_scope
from opsd_jax.planning import placeholders, workload
from opsd_jax.planning.chips import PlanError
from opsd_jax.planning.hlo import TripCounts
from opsd_jax.planning.keys import Part, PhaseKey, PhaseKind
from opsd_jax.planning.programs import (
    Compiler,
    ProgramCosts,
    check_loops_exist,
    matched_executions,
    program_costs,
)
from opsd_jax.rollout.engine import (
    ROLLOUTS_PER_INSERT,
    STEPS_PER_CHUNK,
    Engine,
    EngineShape,
    shape_for,
)
from opsd_jax.rollout.layout import Sampler
from opsd_jax.run import checks
from opsd_jax.run.parameters import Parameters
from opsd_jax.stages.algorithm import Algorithm, RowFields
from opsd_jax.stages.options import StageOptions
from opsd_jax.stages.packing import Packing
from opsd_jax.stages.parts import Sampling
from opsd_jax.stages.privileged import PrivilegedOptions, privileged_options
from opsd_jax.training import state as state_lib
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.stage import Batch
from opsd_jax.training.step import compile_train_step

# Problems of an evaluation whose size depends on the data: the size of MATH-500.
DEFAULT_PROBLEMS = 500

# The model, the sizes and whether sampling filters tokens.
EngineKey = tuple[Sampler, EngineShape, bool]


class Phase(NamedTuple):
    """A phase of a run, such as sampling or the train step. Memory and times are per device.

    Attributes:
      key: which phase it is.
      times: how often the run goes through it.
      parts: bytes of each part of its memory. Programs run one at a time, so the temporaries are
        the largest of any program.
      programs: names of the programs that it executes.
      seconds_at_best: seconds if compute, memory traffic and network overlap completely.
      seconds_in_turn: seconds if they follow one another.
      useful_tokens: fraction of the computed tokens that are not padding; None if not applicable.
      sampling: what it samples; None for a phase without sampling.
      row_fields: the fields that set the number of rows of a train step; None for other phases.
      cache_tokens: number of tokens in the cache, over all devices; 0 for a phase without sampling.
      slots_that_fit: for how many decoding slots the pages of the cache are enough; None for a
        cache without pages.
    """

    key: PhaseKey
    times: int
    parts: dict[Part, float]
    programs: list[str]
    seconds_at_best: float
    seconds_in_turn: float
    useful_tokens: float | None = None
    sampling: Sampling | None = None
    row_fields: RowFields | None = None
    cache_tokens: int = 0
    slots_that_fit: int | None = None

    @property
    def name(self) -> str:
        """The name that a plan prints for the phase."""
        return str(self.key)

    @property
    def total(self) -> float:
        """The total memory that the phase needs, in bytes."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the phase as the dictionary that `opsd-jax plan --json` prints."""
        optional = {
            "useful_tokens": self.useful_tokens,
            "slots_that_fit": self.slots_that_fit,
        }
        return {
            "name": self.name,
            "times": self.times,
            "parts": {part.value: size for part, size in self.parts.items()},
            "total": self.total,
            "programs": self.programs,
            "seconds_at_best": self.seconds_at_best,
            "seconds_in_turn": self.seconds_in_turn,
            **{name: value for name, value in optional.items() if value is not None},
        }


class Phases:
    """Compiles the programs of a run, and computes the memory and the time of each phase.

    Attributes:
      phases: the phases accounted for so far, in the order of the run.
      programs: the costs of the programs compiled so far.
      parameters: the run's model, meshes and abstract parameters.
    """

    def __init__(
        self,
        config: RunOptions,
        devices: list[jax.Device],
        compiler: Compiler,
        chip: Chip,
        length: float,
    ):
        """Builds the model and the meshes. Compiles nothing.

        Args:
          config: the config of the run.
          devices: the devices of the planned topology.
          compiler: compiles the programs; `aot.planning` has to be active with it.
          chip: the chip whose peak rates give the times.
          length: mean response length, as a fraction of the budget.

        Raises:
          ConfigError: the config does not fit the devices.
        """
        self.config, self.compiler, self.chip, self.length = config, compiler, chip, length
        self.parameters = Parameters(config, pathlib.Path(), devices)
        checks.check_devices(config, self.parameters.mesh, self.parameters.decode_mesh)
        sampler = self.parameters.form.rollouts
        checks.check_speculation(config, sampler.model)
        checks.check_pools(config, sampler.model.policy, self.parameters.decode_mesh)
        checks.check_positions(config, self.parameters.model.max_positions)
        self.model, self.mesh = self.parameters.model, self.parameters.mesh
        self.programs: list[ProgramCosts] = []
        self.reshards: dict[Sampler, list[ProgramCosts]] = {}
        self.engines: dict[EngineKey, tuple[Engine, list[ProgramCosts]]] = {}
        self.phases: list[Phase] = []

    def reshard(self, sampler: Sampler) -> list[ProgramCosts]:
        """Returns the program that converts parameters for sampling. Compiles it on first use.

        There is none if training and sampling use the same layout.
        """
        if sampler not in self.reshards:
            self.compiler.prefix = ""
            _ = sampler.layout  # compiles it
            self.reshards[sampler] = self.account({})
        return self.reshards[sampler]

    def smallest_weight(self) -> int:
        """Returns the number of elements in the smallest weight of one layer.

        Parameters with less than 0.1 % of all elements, such as norms and biases, do not count.
        """
        leaves = jax.tree.leaves(self.parameters.abstract)
        total = sum(leaf.size for leaf in leaves)
        weights = [leaf for leaf in leaves if leaf.size > total / 1000]
        return min(leaf.size // (leaf.shape[0] if leaf.ndim > 2 else 1) for leaf in weights)

    def account(self, trip_counts: TripCounts, **options: Any) -> list[ProgramCosts]:
        """Returns the costs of the programs compiled since the last call.

        Args:
          trip_counts: trip counts of the loops whose count is not in the programs.
          **options: keyword arguments of `program_costs`.

        Raises:
          PlanError: the loops in the programs differ from the loops in `trip_counts`.
        """
        new = [
            program_costs(built, self.chip, trip_counts, **options)
            for built in self.compiler.built[len(self.programs) :]
        ]
        check_loops_exist(new, trip_counts)
        self.programs += new
        return new

    def add_phase(
        self,
        key: PhaseKey,
        parts: Mapping[Part, float],
        executions: Sequence[tuple[float, ProgramCosts]],
        times: int,
        **attributes: Any,
    ) -> None:
        """Adds a phase to the run.

        Args:
          key: which phase it is.
          parts: bytes of each part of its memory, without temporaries.
          executions: the number of executions of each program, and its costs.
          times: how often the run goes through the phase.
          **attributes: further attributes of `Phase`.
        """
        temporaries = max(program.temporaries for _, program in executions)
        self.phases.append(
            Phase(
                key,
                times,
                {**parts, Part.TEMPORARIES: temporaries},
                [program.name for _, program in executions],
                sum(n * program.seconds_at_best for n, program in executions),
                sum(n * program.seconds_in_turn for n, program in executions),
                **attributes,
            )
        )

    def engine(
        self, sampler: Sampler, shape: EngineShape, filters_tokens: bool, reads: float
    ) -> tuple[Engine, list[ProgramCosts]]:
        """Returns an engine and the costs of its programs. Compiles the programs on first use.

        Args:
          sampler: the model.
          shape: the engine's sizes.
          filters_tokens: whether sampling filters tokens by top-k, top-p or min-p.
          reads: cached tokens that a decoding step reads, if it reads only the filled part.
        """
        if (sampler, shape, filters_tokens) not in self.engines:
            self.reshard(sampler)
            layout = sampler.layout
            engine = Engine(sampler.model, layout.abstract, layout.mesh, shape)
            programs = self.account(
                {(DECODE_STEPS,): STEPS_PER_CHUNK},
                kernel_bytes=self.kernel_bytes(engine, reads),
                lightest=not filters_tokens,
            )
            self.engines[sampler, shape, filters_tokens] = engine, programs
        return self.engines[sampler, shape, filters_tokens]

    def kernel_bytes(self, engine: Engine, reads: float) -> float:
        """Returns how many bytes per device the attention kernels read for `reads` cached tokens.

        Returns 0 for a dense cache, because the costs of a program already include its reads.
        """
        token_bytes = engine.cache_bytes / engine.cache_tokens
        return reads * token_bytes if self.model.ragged else 0.0

    def add_sampling(
        self,
        key: PhaseKey,
        resident: Mapping[Part, float],
        sampling: Sampling,
        sampler: Sampler,
        *,
        times: int,
        filters_tokens: bool = False,
    ) -> None:
        """Adds a phase that samples rollouts.

        Args:
          key: which phase it is.
          resident: bytes of the arrays that stay in memory while the engine samples.
          sampling: the sizes of the engine, and the number and lengths of the responses.
          sampler: the model.
          times: how often the run goes through the phase.
          filters_tokens: whether sampling filters tokens by top-k, top-p or min-p.
        """
        self.compiler.prefix = f"{key}: "
        shards = mesh_lib.row_shards(self.parameters.decode_mesh)
        shape = sampling.engine(functools.partial(shape_for, shards=shards))
        responses = self._response_lengths(sampling.samples, sampling.response_tokens)
        steps = workload.decode_steps(responses, shape.slots)
        if sampling.carries_over:  # no slot is idle
            steps = math.ceil(responses.sum() / shape.slots)
        prompts = sampling.prompt_tokens - (1 - self.length) * sampling.response_in_prompt
        reads = workload.cache_tokens_read(prompts, responses) / steps
        engine, programs = self.engine(sampler, shape, filters_tokens, reads)
        kernel_bytes = self.kernel_bytes(engine, reads)
        executions = _engine_executions(
            engine,
            prefills=-(-sampling.samples // (sampling.group_size * shape.prompts)),
            samples=sampling.samples,
            steps=steps,
            continues_at=prompts + responses.mean() / 2 if sampling.carries_over else 0,
        )
        self.add_phase(
            key,
            {
                **resident,
                Part.SAMPLING_WEIGHTS: sampler.layout.moved_bytes,
                Part.CACHE: engine.cache_bytes,
                Part.PROMPT_CACHE: engine.prefill_cache_bytes,
            },
            matched_executions(
                [program.with_kernel_bytes(kernel_bytes, self.chip) for program in programs],
                executions,
            ),
            times,
            sampling=sampling,
            cache_tokens=engine.cache_tokens,
            slots_that_fit=workload.slots_that_fit(
                engine.pool_sizes, prompts, responses, sampling.group_size
            ),
        )

    def _add_samplings(
        self,
        stage: str,
        samplings: Sequence[Sampling],
        resident: Mapping[Part, float],
        times: int,
        kind: PhaseKind = PhaseKind.SAMPLING,
    ) -> None:
        """Adds one phase for each `Sampling` of a stage.

        A sampling that continues the one before it samples only for the responses that filled their
        budget. The plan assumes that at least one did.

        Args:
          stage: the name of the stage.
          samplings: the samplings of the stage, in order.
          resident: bytes of the arrays that stay in memory while the engines sample.
          times: how often the run goes through the phases.
          kind: what the run does in the phases.
        """
        self._check_fields(stage, [s.slots_field for s in samplings])
        self._check_fields(stage, [s.response_tokens_field for s in samplings])
        filled = 0  # responses of the sampling before that fill their budget
        for sampling in samplings:
            if sampling.continues:
                sampling = sampling._replace(samples=max(1, filled))
            key = PhaseKey(stage, kind, sampling.name)
            self.add_sampling(
                key, resident, sampling, self.parameters.form_in(stage).rollouts, times=times
            )
            lengths = self._response_lengths(sampling.samples, sampling.response_tokens)
            filled = int((lengths == sampling.response_tokens).sum())

    def _check_fields(self, stage: str, fields: Sequence[str]) -> None:
        """Raises PlanError if one of `fields` is missing from the config section of the stage."""
        there = [name for name in loading.flatten(self.config) if name.startswith(f"{stage}.")]
        for field in fields:
            if f"{stage}.{field}" not in there:
                raise PlanError(
                    f"config.{stage}.{field}: there is no such field, but the stage's algorithm "
                    f"names it in a Sampling or RowFields; expected one of {', '.join(there)}."
                )

    def _response_lengths(self, count: int, budget: int) -> np.ndarray:
        """Returns the lengths assumed for `count` responses of at most `budget` tokens each."""
        return workload.response_lengths(count, budget, self.length)

    def add_stage(self, name: str) -> None:
        """Adds the phases of the stage whose config section is `name`."""
        options = self.config.sections[name]
        algorithm = self.config.algorithm(name)
        rows = algorithm.row_fields
        self._check_fields(name, [*rows.factors, *[rows.divisor] * bool(rows.divisor)])
        parameters = self.parameters
        stage = algorithm.make(
            options, placeholders.parts(parameters.trained(name), mesh_lib.row_shards(self.mesh))
        )
        stage = parameters.adapt(stage, name)
        optimizer = make_optimizer(options.optimizer, stage.steps * stage.updates)
        abstract = state_lib.abstract_state(
            parameters.trained_form(name), optimizer, stage.teacher, self.mesh
        )
        form = parameters.form_in(name)
        resident: dict[Part, float] = {
            Part.PARAMETERS: mesh_lib.shard_bytes(form.abstract),
            Part.OPTIMIZER: mesh_lib.shard_bytes(abstract["opt_state"]),
            Part.TEACHER: mesh_lib.shard_bytes(abstract["teacher"]),
        }
        samplings = algorithm.sampling(options)
        if samplings and (programs := self.reshard(form.rollouts)):
            moved = {Part.SAMPLING_WEIGHTS: form.rollouts.layout.moved_bytes}
            reshard = matched_executions(programs, {ProgramKey(ProgramKind.RESHARD): 1})
            key = PhaseKey(name, PhaseKind.RESHARD)
            self.add_phase(key, resident | moved, reshard, stage.steps)
        self._add_samplings(name, samplings, resident, stage.steps)
        self.compiler.prefix = f"{name}: "
        base = form.abstract.base if isinstance(form.abstract, Weights) else None
        compile_train_step(stage, optimizer, abstract, self.mesh, base)
        trip_counts, useful = self._trip_counts(algorithm, options, stage.empty_batch)
        (step,) = self.account(trip_counts)
        self.add_phase(
            PhaseKey(name, PhaseKind.STEP),
            {**resident, Part.BATCH: step.arguments - sum(resident.values())},
            matched_executions([step], {ProgramKey(ProgramKind.TRAIN_STEP): stage.updates}),
            stage.steps,
            useful_tokens=useful if samplings else None,
            row_fields=rows,
        )
        if algorithm.privileged is not None and self.config.evaluation.divergence_responses:
            self._add_probe(name, algorithm, privileged_options(options))

    def _add_probe(self, name: str, algorithm: Algorithm, options: PrivilegedOptions) -> None:
        """Adds the phases that measure the student's divergence from a stage's teacher.

        A run goes through them before and after the stage `name`.
        """
        evaluation = self.config.evaluation
        count = divergence.probed(evaluation, self._evaluated()) * evaluation.samples
        weights = self.parameters.form_in(name).abstract
        trained = self.parameters.trained_form(name)
        resident: dict[Part, float] = {
            Part.PARAMETERS: mesh_lib.shard_bytes(weights),
            Part.PROBE_TEACHER: mesh_lib.shard_bytes(trained),
        }
        samplings = algorithm.privileged_sampling(options, evaluation, count)
        self._add_samplings(name, samplings, resident, 2, PhaseKind.PROBE_SAMPLING)
        self.compiler.prefix = f"{name}: "
        policy = self.parameters.policy(name)
        divergence.DivergenceProbe(
            options, evaluation, placeholders.TASK, policy, self.mesh, weights
        )
        tokens = self.length * evaluation.response_tokens * options.microbatch
        (probe,) = self.account({(LOSS_CHUNKS,): self._chunks(options, tokens)})
        # Student and teacher with an adapter are two arguments with the same base model.
        models = 2 * mesh_lib.shard_bytes(weights)
        batch: dict[Part, float] = {Part.BATCH: probe.arguments - models}
        microbatches = -(-count // options.microbatch)
        self.add_phase(
            PhaseKey(name, PhaseKind.PROBE),
            resident | batch,
            matched_executions([probe], {ProgramKey(ProgramKind.PROBE): microbatches}),
            2,
        )

    def _trip_counts(
        self, algorithm: Algorithm, options: StageOptions, batch: Batch
    ) -> tuple[TripCounts, float]:
        """Returns the loop trip counts of a train step, and the fraction of non-padding tokens.

        All rows are assumed to be active, and responses to have the assumed lengths.
        """
        targets, rows = algorithm.step_rows(options, self._response_lengths)
        shares = any("starts" in bucket["rows"] for bucket in batch)
        packing = Packing(mesh_lib.row_shards(self.mesh)) if shares else None
        packed = workload.packed(
            rows, targets, algorithm.buckets(options), options.microbatch, packing
        )
        trip_counts: dict[tuple[str, ...], int] = {}
        for b, (count, tokens) in enumerate(zip(packed.counts, packed.targets, strict=True)):
            trip_counts[bucket_scope(b),] = count
            trip_counts[bucket_scope(b), LOSS_CHUNKS] = self._chunks(options, tokens)
        return trip_counts, packed.useful

    def _chunks(self, options: StageOptions, tokens: float) -> int:
        """Returns the number of loss chunks in a microbatch with `tokens` response tokens."""
        chunk = chunk_tokens(options.loss_chunk, self._width, self.model.vocab_size)
        return math.ceil(tokens / mesh_lib.row_shards(self.mesh) / chunk)

    @functools.cached_property
    def _width(self) -> int:
        """The size of the model's hidden states."""
        tokens_1xT = positions_1xT = jnp.zeros((1, 128), jnp.int32)
        hidden_1xTxD = jax.eval_shape(
            lambda params: self.model.policy.forward(params, tokens_1xT, positions_1xT)[0],
            self.parameters.abstract,
        )
        return hidden_1xTxD.shape[-1]

    def _evaluated(self) -> int:
        """Returns the number of problems in each evaluation of the run."""
        data = self.config.data
        held_out = DEFAULT_PROBLEMS if data.heldout else data.heldout_problems
        return self.config.evaluation.problems or held_out or DEFAULT_PROBLEMS

    def add_evaluation(self) -> None:
        """Adds one phase for the evaluations before the first stage and after each stage."""
        options, form = self.config.evaluation, self.parameters.form
        # A run with an adapter also evaluates all parameters, before its first stage.
        forms = form, self.parameters.whole
        weights = max(mesh_lib.shard_bytes(each.abstract) for each in forms)
        responses = self._evaluated() * options.samples
        self.add_sampling(
            PhaseKey("evaluation", PhaseKind.EVALUATION),
            {Part.PARAMETERS: weights},
            Sampling(
                name="evaluation",
                slots_field="slots",
                response_tokens_field="response_tokens",
                slots=options.slots,
                group_size=options.samples,
                rollouts=responses,
                prompt_tokens=options.prompt_tokens,
                response_tokens=options.response_tokens,
                samples=responses,
            ),
            form.evaluated,
            times=1 + len(self.config.stages),
            filters_tokens=options.top_k > 0 or options.top_p < 1 or options.min_p > 0,
        )


def _engine_executions(
    engine: Engine, *, prefills: int, samples: int, steps: int, continues_at: float
) -> dict[ProgramKey, float]:
    """Returns how often a sampling phase executes each program of its engine.

    The plan assumes that the cache always has its largest length and is never resized, that no step
    is saved by speculation, and that no rollout loses its pages. With `continues_at`, every slot
    begins with a rollout of the step before that has this many tokens.
    """
    executions: dict[ProgramKey, float] = {ProgramKey(ProgramKind.RESIZE): 0}
    for length in engine.cache_lengths:
        executions[ProgramKey(ProgramKind.INSERT, length)] = 0
        executions[ProgramKey(ProgramKind.DECODE, length)] = 0
        if engine.shape.speculation:
            executions[ProgramKey(ProgramKind.SPECULATE, length)] = 0
    longest = engine.cache_lengths[-1]
    for length in engine.continue_lengths:
        executions[ProgramKey(ProgramKind.CONTINUE, length)] = 0
    if continues_at:
        length = next(n for n in engine.continue_lengths if n >= continues_at)
        count = -(-engine.shape.slots // engine.continued)
        executions[ProgramKey(ProgramKind.CONTINUE, length)] = count
    return executions | {
        ProgramKey(ProgramKind.START): 1,
        ProgramKey(ProgramKind.PREFILL): prefills,
        ProgramKey(ProgramKind.INSERT, longest): -(-samples // ROLLOUTS_PER_INSERT),
        ProgramKey(ProgramKind.DECODE, longest): steps / STEPS_PER_CHUNK,
    }
