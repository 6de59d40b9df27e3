"""Programs compiled for a plan, and what is read of them."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from opsd_jax.planning import costs, hlo, liveness
from opsd_jax.planning.chips import GIB, Chip, PlanError

LISTED = 6  # of a program's largest tensors


class Built(NamedTuple):
    """A program that was compiled.

    Attributes:
      name: what it is called.
      text: its instructions.
      seconds: that the compiler took.
      arguments: bytes on a device, with results that are none of them.
      total: bytes on a device with the temporaries, as the compiler assigns them.
      temp_size: XLA's `temp_size_in_bytes`, which counts some of these twice.
      refused: whether that is more than the compiler admits.
    """

    name: str
    text: str
    seconds: float
    arguments: int
    total: int
    temp_size: int
    refused: bool = False


class Compiler:
    """Compiles what it is given, under a name, and keeps what a plan reads of it."""

    def __init__(self, report: Callable[[str, float], None] = lambda name, seconds: None):
        """`report` is told the name of each program, and the seconds that the compiler took."""
        self.built: list[Built] = []
        self.prefix = ""
        self._report = report

    def __call__(self, name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        name, began = self.prefix + name, time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                raise PlanError(
                    f"{name} cannot be compiled: {str(error).splitlines()[0]}"
                ) from error
            self._keep(_too_large(name, lowered, began, needed))
            return None
        memory: Any = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self._keep(
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

    def _keep(self, built: Built) -> None:
        self.built.append(built)
        self._report(built.name, built.seconds)


def memory_needed(error: str) -> float | None:
    """The bytes that a program needed, of the error that refused it for them; None of others."""
    size = r"([\d.]+)([MGT])"
    found = re.search(rf"memory required .*\({size}\) exceeds|Used {size} of \S+ hbm", error)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part)
    return float(number) * {"M": 2**20, "G": GIB, "T": 2**40}[unit]


def _too_large(name: str, lowered: jax.stages.Lowered, began: float, total: float) -> Built:
    """What is known of a program that the compiler refused for its memory: what it left of it."""
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, str | bool] = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile(options)
        left = list(pathlib.Path(directory).glob("*after_optimizations.txt"))
        text = left[0].read_text() if left else ""
    arguments = _arguments(text)
    temporaries = int(total) - arguments
    return Built(name, text, seconds, arguments, int(total), temporaries, refused=True)


def _arguments(text: str) -> int:
    """Bytes of a program's arguments, and of those results that do not take the place of one."""
    entry = hlo.Program(text).instructions("ENTRY").values()
    given = sum(hlo.size_of(i.shape) for i in entry if i.op == "parameter")
    results = [size for i in entry if i.is_root for size in hlo.array_sizes(i.shape)]
    # The header: input_output_alias={ {0}: (1, {}, may-alias), ... }; of a single result {}.
    header = text.partition("\n")[0]
    replaced = {int(at or 0) for at in re.findall(r"\{(\d*)\}: \(\d+, \{\}", header)}
    return given + sum(size for at, size in enumerate(results) if at not in replaced)


def figures(
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
      kernel_bytes: that the paged attention kernels of a turn of "decode_steps" read, on average.
      lightest: which branches of conditionals are taken (`hlo.Program`).
    """
    program = hlo.Program(built.text, lightest=lightest)
    live = liveness.peak(program)
    flops = sum(p.flops * hlo.turns(p.loops, given) for p in costs.products(program)) + sum(
        _splash_flops(program, computation, i) * hlo.turns(loops, given)
        for computation, i, loops in program.executed()
        if i.op == "custom-call"
    )
    moved = float(sum(a.bytes * hlo.turns(a.loops, given) for a in costs.accesses(program)))
    decodes = "/decode_steps/while" in built.text
    found = costs.collectives(program)
    network = sum(_collective_seconds(c, chip) * hlo.turns(c.loops, given) for c in found)
    seconds = {"compute": flops / chip.flops, "memory": moved / chip.hbm, "network": network}
    program_figures = {
        "name": built.name,
        "compile_seconds": built.seconds,
        "arguments": built.arguments,
        "temporaries": built.total - built.arguments,
        "temp_size_in_bytes": built.temp_size,
        "refused": built.refused,
        "live_bytes": sum(buffer.bytes for buffer in live),
        "largest": _largest_tensors(live),
        "flops": flops,
        "hbm_bytes": moved,
        "decode_steps": given["decode_steps"] if decodes else 0,
        "kernel_bytes": 0.0,
        **_roofline(seconds),
        "collectives": _collective_table(found, given),
        "loops": sorted({loop.name for *_, loops in program.executed() for loop in loops}),
    }
    return with_kernel_bytes(program_figures, chip, kernel_bytes)


def with_kernel_bytes(
    program: Mapping[str, Any], chip: Chip, kernel_bytes: float
) -> dict[str, Any]:
    """The figures of a program whose paged attention kernels read so much at each step of decoding;
    those of others as they are.
    """
    more = (kernel_bytes - program["kernel_bytes"]) * program["decode_steps"]
    seconds = program["seconds"]
    return {
        **program,
        "kernel_bytes": kernel_bytes if program["decode_steps"] else 0.0,
        "hbm_bytes": program["hbm_bytes"] + more,
        **_roofline(seconds | {"memory": seconds["memory"] + more / chip.hbm}),
    }


def _roofline(seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "seconds_at_best": max(seconds.values()),
        "seconds_in_turn": sum(seconds.values()),
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
    found: list[costs.Collective], given: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The collectives by operation and loops, those that move most first.

    Of one that a loop of the compiler's own has in pieces, `elements` are those of all its turns.
    """
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
        own = itertools.takewhile(lambda loop: loop.name == hlo.NAMELESS, reversed(c.loops))
        row["elements"] = max(row["elements"], c.elements * hlo.turns(tuple(own)))
    return sorted(together.values(), key=lambda row: -row["bytes"])


def _collective_seconds(c: costs.Collective, chip: Chip) -> float:
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
