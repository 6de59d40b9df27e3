"""Compiles a plan's programs, and reads their costs from the HLO of the compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from opsd_jax.parallel.chips import Chip
from opsd_jax.parallel.program import DECODE_STEPS, ProgramKey, ProgramKind
from opsd_jax.planning import costs, hlo, liveness
from opsd_jax.planning.chips import GIB, PlanError
from opsd_jax.planning.hlo import TripCounts
from opsd_jax.storage.executables import Executables

LISTED = 6  # number of a program's largest tensors in a plan
# Matmuls in each kernel of splash attention.
_SPLASH_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}

logger = logging.getLogger(__name__)


class CompiledProgram(NamedTuple):
    """The HLO text and the memory use of one program that a plan has compiled.

    Attributes:
      key: which program it is.
      name: its name in the plan: the phase and the key, as text.
      text: its instructions.
      seconds: compile time.
      arguments: bytes of arguments on one device, and of results that reuse no argument's memory.
      total: bytes of arguments and temporaries on one device, as the compiler assigns them.
      temp_size: XLA's `temp_size_in_bytes`, which counts some temporaries twice.
      refused: whether the compiler refused the program because `total` is too large.
    """

    key: ProgramKey
    name: str
    text: str
    seconds: float
    arguments: int
    total: int
    temp_size: int
    refused: bool = False


class Compiler:
    """Compiles programs, and stores each program's HLO text and memory use in `built`.

    With `saved`, it also writes the compiled programs there.

    Attributes:
      built: the programs in the order in which they were compiled.
      prefix: text before the key in the name of the next programs.
    """

    def __init__(self, saved: Executables | None = None):
        self._saved = saved
        self.built: list[CompiledProgram] = []
        self.prefix = ""

    def __call__(self, key: ProgramKey, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        """Compiles a program. Returns None if the program needs more memory than a device has.

        Raises:
          PlanError: the compiler fails for another reason.
        """
        name, began = f"{self.prefix}{key}", time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                raise PlanError(
                    f"{name} cannot be compiled: {str(error).splitlines()[0]}"
                ) from error
            self._keep(_refused_program(key, name, lowered, began, needed))
            return None
        memory: Any = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self._keep(
            CompiledProgram(
                key=key,
                name=name,
                text=compiled.as_text() or "",
                seconds=time.monotonic() - began,
                arguments=arguments - memory.alias_size_in_bytes,
                total=memory.peak_memory_in_bytes,
                temp_size=memory.temp_size_in_bytes,
            )
        )
        if self._saved:
            self._saved.save(key, lowered, compiled)
        return compiled

    def _keep(self, built: CompiledProgram) -> None:
        """Adds a program to `built` and logs its compile time."""
        self.built.append(built)
        logger.info("compiled %s: %.0f s", built.name, built.seconds)


def memory_needed(error: str) -> float | None:
    """Returns how many bytes a program needs, parsed from the compiler's out-of-memory error.

    Returns None if the error is not about memory.
    """
    size = r"([\d.]+)([MGT])"
    found = re.search(rf"memory required .*\({size}\) exceeds|Used {size} of \S+ hbm", error)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part)
    return float(number) * {"M": 2**20, "G": GIB, "T": 2**40}[unit]


def _refused_program(
    key: ProgramKey, name: str, lowered: jax.stages.Lowered, began: float, total: float
) -> CompiledProgram:
    """Returns a `CompiledProgram` for a program that needs more memory than the device has.

    The text is the compiler's last dump of the program; it is empty if there is no dump.
    """
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, str | bool] = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile(options)
        dumps = list(pathlib.Path(directory).glob("*after_optimizations.txt"))
        text = dumps[0].read_text() if dumps else ""
    arguments = _argument_bytes(text)
    temporaries = int(total) - arguments
    return CompiledProgram(
        key, name, text, seconds, arguments, int(total), temporaries, refused=True
    )


def _argument_bytes(text: str) -> int:
    """Returns the bytes of a program's arguments and of the results that have their own memory."""
    entry = hlo.Program(text).instructions("ENTRY").values()
    arguments = sum(hlo.size_of(i.shape) for i in entry if i.op == "parameter")
    results = [size for i in entry if i.is_root for size in hlo.array_sizes(i.shape)]
    # The header has input_output_alias={ {0}: (1, {}, may-alias), ... }, with {} for one result.
    header = text.partition("\n")[0]
    aliased = {int(at or 0) for at in re.findall(r"\{(\d*)\}: \(\d+, \{\}", header)}
    return arguments + sum(size for at, size in enumerate(results) if at not in aliased)


@dataclasses.dataclass(frozen=True)
class ProgramCosts:
    """The memory, operations and time of one execution of a program, per device.

    Attributes:
      key: which program it is.
      name: its name in the plan.
      compile_seconds: compile time.
      arguments: bytes of arguments, and of results that reuse no argument's memory.
      temporaries: bytes of temporaries, as the compiler assigns them.
      temp_size_in_bytes: XLA's own number for temporaries, which counts some of them twice.
      refused: whether the compiler refused the program because of its memory.
      live_bytes: bytes of the temporaries that are live at the peak, without the padding of tiles.
      largest: the largest of these temporaries, as rows for JSON.
      flops: floating-point operations.
      hbm_bytes: bytes read from HBM and written to it.
      decode_steps: trip count of the loop over decoding steps; 0 for other programs.
      kernel_bytes: bytes that the paged attention kernels read in one decoding step.
      seconds: time for "compute", "memory" and "network" at the chip's peak rates.
      collectives: the collectives by operation and loops, as rows for JSON.
      loops: names of all loops.
      dynamic_loops: paths of the named loops whose trip count is not in the program's text.
    """

    key: ProgramKey
    name: str
    compile_seconds: float
    arguments: int
    temporaries: int
    temp_size_in_bytes: int
    refused: bool
    live_bytes: int
    largest: list[dict[str, Any]]
    flops: int
    hbm_bytes: float
    decode_steps: int
    kernel_bytes: float
    seconds: dict[str, float]
    collectives: list[dict[str, Any]]
    loops: list[str]
    dynamic_loops: frozenset[tuple[str, ...]]

    @property
    def seconds_at_best(self) -> float:
        """Seconds that one execution takes if compute, memory and network overlap completely."""
        return max(self.seconds.values())

    @property
    def seconds_in_turn(self) -> float:
        """Seconds that one execution takes if compute, memory and network do not overlap."""
        return sum(self.seconds.values())

    def with_kernel_bytes(self, kernel_bytes: float, chip: Chip) -> ProgramCosts:
        """Returns a copy of the costs in which attention reads `kernel_bytes` per decoding step.

        Programs that do not decode are returned unchanged.
        """
        if not self.decode_steps:
            return self
        more = (kernel_bytes - self.kernel_bytes) * self.decode_steps
        return dataclasses.replace(
            self,
            kernel_bytes=kernel_bytes,
            hbm_bytes=self.hbm_bytes + more,
            seconds=self.seconds | {"memory": self.seconds["memory"] + more / chip.hbm},
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the costs as the dictionary that `opsd-jax plan --json` prints."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["key"], fields["dynamic_loops"]
        bounds = {
            "seconds_at_best": self.seconds_at_best,
            "seconds_in_turn": self.seconds_in_turn,
        }
        return fields | bounds


def program_costs(
    built: CompiledProgram,
    chip: Chip,
    trip_counts: TripCounts,
    *,
    kernel_bytes: float = 0.0,
    lightest: bool = False,
) -> ProgramCosts:
    """Returns the costs of a compiled program, read from its HLO text.

    Args:
      built: the program.
      chip: the chip whose peak rates give the times.
      trip_counts: trip counts of the loops whose count is not in the text.
      kernel_bytes: bytes that the paged attention kernels read in a decoding step, on average.
      lightest: count the lightest branch of each conditional instead of the heaviest.

    Raises:
      PlanError: a named loop's trip count is neither in the text nor in `trip_counts`.
    """
    program = hlo.Program(built.text, lightest=lightest)
    dynamic_loops = program.dynamic_loops()
    if unknown := dynamic_loops - trip_counts.keys():
        raise PlanError(
            f"{built.name} has named loops with unknown trip counts: {_listed(unknown)}; "
            f"expected them in `trip_counts`, which has the loops {_listed(trip_counts)}."
        )
    times = lambda loops: hlo.trip_count(loops, trip_counts)
    live = liveness.peak(program)
    flops = _flops(program, trip_counts)
    moved = float(sum(a.bytes * times(a.loops) for a in costs.accesses(program)))
    found = costs.collectives(program)
    network = sum(_collective_seconds(c, chip) * times(c.loops) for c in found)
    decodes = built.key.kind is ProgramKind.DECODE
    return ProgramCosts(
        key=built.key,
        name=built.name,
        compile_seconds=built.seconds,
        arguments=built.arguments,
        temporaries=built.total - built.arguments,
        temp_size_in_bytes=built.temp_size,
        refused=built.refused,
        live_bytes=sum(buffer.bytes for buffer in live),
        largest=_largest_tensors(live),
        flops=flops,
        hbm_bytes=moved,
        decode_steps=trip_counts[DECODE_STEPS,] if decodes else 0,
        kernel_bytes=0.0,
        seconds={"compute": flops / chip.flops, "memory": moved / chip.hbm, "network": network},
        collectives=_collective_table(found, trip_counts),
        loops=sorted({loop.name for *_, loops in program.executed() for loop in loops}),
        dynamic_loops=frozenset(dynamic_loops),
    ).with_kernel_bytes(kernel_bytes, chip)


def check_loops_exist(programs: Sequence[ProgramCosts], trip_counts: TripCounts) -> None:
    """Raises PlanError if `trip_counts` has a loop that none of the programs contains."""
    if any(program.refused for program in programs):
        return  # the text of a refused program may be missing
    found = frozenset[tuple[str, ...]]().union(*(program.dynamic_loops for program in programs))
    if unmatched := trip_counts.keys() - found:
        names = ", ".join(program.name for program in programs)
        raise PlanError(
            f"`trip_counts` has loops that do not exist in {names}: {_listed(unmatched)}; expected "
            f"only these loops: {_listed(found)}."
        )


def matched_executions(
    programs: Sequence[ProgramCosts], executions: Mapping[ProgramKey, float]
) -> list[tuple[float, ProgramCosts]]:
    """Returns each program, paired with the number of times that a phase executes it.

    Args:
      programs: the programs that a phase compiled.
      executions: how often the phase executes the program of each key.

    Raises:
      PlanError: a program has no number of executions, or an executed program does not exist.
    """
    compiled = {program.key for program in programs}
    executed = {key for key, count in executions.items() if count}
    if compiled - executions.keys() or executed - compiled:
        raise PlanError(
            f"The phase compiled the programs {', '.join(sorted(map(str, compiled)))}; expected "
            f"the programs that it executes: {', '.join(sorted(map(str, executions)))}."
        )
    return [(executions[program.key], program) for program in programs]


def _listed(paths: Iterable[tuple[str, ...]]) -> str:
    """Formats the paths of loops as text. Returns "none" if there are no paths."""
    return ", ".join(sorted(" > ".join(path) for path in paths)) or "none"


def _largest_tensors(live: list[liveness.Buffer]) -> list[dict[str, Any]]:
    """Groups tensors by shape and origin, and returns the largest groups as JSON-ready rows."""
    together: dict[tuple[str, str], list[int]] = {}
    for buffer in live:
        together.setdefault((buffer.shape, buffer.made_by), []).append(buffer.bytes)
    largest = sorted(together.items(), key=lambda item: -sum(item[1]))[:LISTED]
    return [
        {"shape": shape, "made_by": made_by, "count": len(sizes), "bytes": sum(sizes)}
        for (shape, made_by), sizes in largest
    ]


def _flops(program: hlo.Program, trip_counts: TripCounts) -> int:
    """Returns the FLOPs of all matmuls in a program, including splash attention kernels."""
    matmuls = sum(m.flops * hlo.trip_count(m.loops, trip_counts) for m in costs.matmuls(program))
    return matmuls + sum(
        _splash_flops(program, computation, i) * hlo.trip_count(loops, trip_counts)
        for computation, i, loops in program.executed()
        if i.op == "custom-call"
    )


def _collective_table(
    found: list[costs.Collective], trip_counts: TripCounts
) -> list[dict[str, Any]]:
    """Groups collectives by operation and loops, and returns JSON-ready rows, largest first.

    If the compiler split a collective into a loop of its own, `elements` counts all its trips.
    """
    together: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for c in found:
        path = hlo.path_of(c.loops)
        row = together.setdefault(
            (c.op, path),
            {"op": c.op, "loops": list(path), "times": 0, "bytes": 0, "largest": 0, "elements": 0},
        )
        times = hlo.trip_count(c.loops, trip_counts)
        row["times"] += times
        row["bytes"] += times * c.bytes
        row["largest"] = max(row["largest"], c.bytes)
        own = itertools.takewhile(lambda loop: loop.name == hlo.NAMELESS, reversed(c.loops))
        row["elements"] = max(row["elements"], c.elements * hlo.trip_count(tuple(own)))
    return sorted(together.values(), key=lambda row: -row["bytes"])


def _collective_seconds(c: costs.Collective, chip: Chip) -> float:
    """Estimates the time, in seconds, of a collective on a ring along one axis of the torus."""
    if c.op.startswith("collective-"):
        return c.bytes / (chip.ici / 2)  # in one direction
    passes = 2 if c.op == "all-reduce" else 1
    return passes * c.bytes * (c.devices - 1) / c.devices / chip.ici


def _splash_flops(program: hlo.Program, computation: str, i: hlo.Instruction) -> int:
    """Returns the FLOPs of a causal splash attention kernel, or 0 for any other instruction."""
    kernel = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)
    if kernel is None:
        return 0
    instructions = program.instructions(computation)
    shapes = [instructions[name].shape for name in i.operands]
    # The first floating-point operands are the queries [..., T, C] and the keys [..., S, C]. T is
    # less than S if devices split a row's queries, which then have (S + 1) / 2 keys on average.
    found = (re.match(r"(?:bf16|f32)\[([\d,]+)\]", shape) for shape in shapes)
    (*rows, T, C), (*_, S, _) = [[int(n) for n in match[1].split(",")] for match in found if match][
        :2
    ]
    return _SPLASH_MATMULS[kernel[1]] * 2 * math.prod(rows) * T * (S + 1) // 2 * C
