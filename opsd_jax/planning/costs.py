"""Counts the matmuls, memory traffic and collectives of a compiled program."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from opsd_jax.planning.hlo import (
    COLLECTIVES,
    RESHAPES,
    UPDATES,
    Instruction,
    Loop,
    Program,
    aliased_results,
    array_sizes,
    dims,
    size_of,
)

_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})"
)
# Operations that move no data themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "partition-id",
    "conditional", "call",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}  # read a part of their first operand
_CALLS = {"fusion", "call", "async-start"}


class Access(NamedTuple):
    """The bytes that an instruction reads from and writes to memory when it executes once.

    Attributes:
      read: bytes read on one device.
      written: bytes written on one device.
      loops: the loops around the instruction, from the outermost to the innermost.
      line: the instruction's text.
    """

    read: int
    written: int
    loops: tuple[Loop, ...]
    line: str

    @property
    def bytes(self) -> int:
        """The total number of bytes read and written."""
        return self.read + self.written


class Collective(NamedTuple):
    """A collective operation in a compiled program, such as an all-gather, with its size.

    Attributes:
      op: the operation, such as "all-gather".
      elements: elements of the largest array among operands and results, on one device.
      bytes: bytes of all operands or of all results, whichever is larger.
      devices: number of devices in one of its groups.
      loops: the loops around the instruction, from the outermost to the innermost.
      line: the instruction's text.
    """

    op: str
    elements: int
    bytes: int
    devices: int
    loops: tuple[Loop, ...]
    line: str


class Matmul(NamedTuple):
    """An instruction that computes matmuls: a dot, a convolution, or a fusion that contains either.

    Attributes:
      flops: operations of one execution on one device; a multiply-add counts as two.
      loops: the loops around the instruction, from the outermost to the innermost.
      line: the instruction's text.
    """

    flops: int
    loops: tuple[Loop, ...]
    line: str


def collectives(program: Program) -> list[Collective]:
    """Returns the collectives that a program executes.

    A collective that the compiler spreads over several fusions is counted once, where it starts.
    """
    found = []
    for computation, i, loops in program.executed():
        if inner := program.overlapped(i):
            if "async_collective" in inner.line and not _starts_collective(program, i):
                continue
            computation, i = i.called[0], inner
        op = i.op.removesuffix("-start")
        if computation.startswith("all-reduce-scatter"):
            op = "reduce-scatter"  # on TPUs, a fusion of an all-reduce and slices of its result
        if op not in COLLECTIVES:
            continue
        instructions = program.instructions(computation)
        operands = [instructions[name].shape for name in i.operands]
        read = sum(map(size_of, operands))
        # The result of a "-start" instruction includes its operands.
        moved = max(read, size_of(i.shape) - read * i.op.endswith("-start"))
        elements = max(math.prod(d) for shape in (i.shape, *operands) for d in dims(shape))
        found.append(Collective(op, elements, moved, _group_size(i.line), loops, i.line))
    return found


def _starts_collective(program: Program, fusion: Instruction) -> bool:
    """Returns whether a fusion starts a collective that later fusions complete."""
    return "AsyncCollectiveStart" in program.root(fusion.called[0]).line


def _group_size(line: str) -> int:
    """Returns the number of devices in each group of a collective, given the instruction's text."""
    match = _GROUPS.search(line)
    if match is None:
        return 2  # a permutation has pairs instead of groups
    listed, iota, mesh, axes = match.groups()
    if listed is not None:
        return listed.count(",") + 1
    if iota is not None:
        return int(iota)
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes))


def matmuls(program: Program) -> list[Matmul]:
    """Returns the matmuls that a program executes, except matmuls inside custom calls."""

    @functools.cache
    def computation_flops(computation: str) -> int:
        instructions = program.instructions(computation).values()
        return sum(flops_of(computation, i) for i in instructions)

    def flops_of(computation: str, i: Instruction) -> int:
        if i.op in ("fusion", "async-start"):
            return computation_flops(i.called[0])
        instructions = program.instructions(computation)
        if i.op == "convolution":
            return _convolution_flops(i, *(dims(instructions[n].shape)[0] for n in i.operands))
        return _dot_flops(i, dims(instructions[i.operands[0]].shape)[0]) if i.op == "dot" else 0

    found = []
    for computation, i, loops in program.executed():
        if flops := flops_of(computation, i):
            found.append(Matmul(flops, loops, i.line))
    return found


def _dot_flops(i: Instruction, lhs: list[int]) -> int:
    """Returns the FLOPs of a dot instruction whose left operand has dimensions `lhs`."""
    contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)[0]
    terms = math.prod(lhs[int(d)] for d in contracted.split(",") if d)
    return 2 * terms * math.prod(dims(i.shape)[0])


def _convolution_flops(i: Instruction, lhs: list[int], rhs: list[int]) -> int:
    """Returns the FLOPs of a convolution whose operands have dimensions `lhs` and `rhs`.

    XLA:TPU turns every matmul into a convolution and can make batch and contracted dimensions
    spatial. Positions that fall on padding or between dilated elements cost no operation.
    """
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", i.line)[0]
    of_lhs, of_rhs, of_out = (
        dict(zip(label, sizes, strict=True))
        for label, sizes in zip(labels, (lhs, rhs, dims(i.shape)[0]), strict=True)
    )
    fields = re.findall(r"window=\{([^}]*)\}", i.line) or [""]
    window = {name: by_dim.split("x") for name, by_dim in re.findall(r"(\w+)=(\S+)", fields[0])}
    flops = 2 * of_out["b"] * of_out["f"] * of_rhs["i"]
    for d in range(len(of_out) - 2):
        default = ["1"] * (d + 1)
        stride, rhs_dilation, lhs_dilation = (
            int(window.get(field, default)[d]) for field in ("stride", "rhs_dilate", "lhs_dilate")
        )
        low = int(window["pad"][d].split("_")[0]) if "pad" in window else 0
        at = np.arange(of_out[str(d)])[:, None] * stride - low
        at = at + np.arange(of_rhs[str(d)])[None] * rhs_dilation
        last = (of_lhs[str(d)] - 1) * lhs_dilation
        flops *= int(((at >= 0) & (at <= last) & (at % lhs_dilation == 0)).sum())
    return flops


def accesses(program: Program, *, vmem: bool = False) -> list[Access]:
    """Returns the HBM traffic of each instruction that a compiled TPU program executes.

    An instruction reads its operands and writes its result if their layouts place them in HBM. A
    slice or gather, also inside a fusion, reads only the part that it returns. An update in place
    (of a slice, or a scatter) reads and writes only the size of the update. A custom call, such as
    a Pallas kernel, reads all its operands except the largest; the caller adds the bytes read from
    the largest. The padding of arrays to tiles is not counted.

    Args:
      program: the compiled program.
      vmem: whether to count arrays in VMEM too, and both ends of asynchronous copies. XLA's
        `cost_analysis` counts this way.
    """
    in_memory = functools.partial(size_of, hbm=not vmem)
    traffic = _Traffic(program)
    found: list[Access] = []
    for computation, i, loops in program.executed():
        if i.op in _FREE:
            continue
        if i.op.endswith("-done"):
            size = size_of(i.shape)
            found += [Access(size, size, loops, i.line)] * vmem
            continue
        instructions = program.instructions(computation)
        sizes = [in_memory(instructions[name].shape) for name in i.operands]
        if program.overlapped(i):
            read, written = _overlapped_bytes(program, i, sizes, hbm=not vmem)
            found.append(Access(read, written, loops, i.line))
            continue
        reads = [
            min(size, traffic.read(computation, i, n)) if size else 0
            for n, size in enumerate(sizes)
        ]
        if i.op == "custom-call":
            reads.append(-max(reads, default=0))
        written = in_memory(i.shape)
        if i.op.endswith("-start") and i.shape.startswith("("):
            written -= sum(sizes)  # the result includes the operands
        elif written:
            written = min(written, traffic.written(computation, i))
        found.append(Access(sum(reads), written, loops, i.line))
    return found


def _overlapped_bytes(
    program: Program, fusion: Instruction, sizes: list[int], *, hbm: bool
) -> tuple[int, int]:
    """Returns (bytes read, bytes written) for a fusion that contains part of a collective.

    Args:
      program: the compiled program.
      fusion: the fusion.
      sizes: bytes of each operand.
      hbm: whether to count only results in HBM.
    """
    aliased = aliased_results(fusion)
    results = enumerate(array_sizes(fusion.shape, hbm=hbm))
    written = sum(size for k, size in results if k not in aliased)
    if _starts_collective(program, fusion):
        return sum(sizes), written
    return sum(size for n, size in enumerate(sizes) if n not in aliased.values()), written


class _Traffic:
    """Computes how many bytes an instruction reads from each operand and writes to its result."""

    def __init__(self, program: Program):
        self._program = program
        self._read_of_value: dict[tuple[str, str], int] = {}

    def read(self, computation: str, i: Instruction, number: int) -> int:
        """Returns how many bytes an instruction reads from the operand at index `number`."""
        instructions = self._program.instructions(computation)
        if i.op in _SLICES and number == 0:
            return size_of(i.shape)
        if i.op in UPDATES and number == 0:
            return size_of(instructions[i.operands[UPDATES[i.op]]].shape)
        if i.op in _CALLS:
            inner = self._program.instructions(i.called[0]).values()
            name = next(p.name for p in inner if f" parameter({number})" in p.line)
            return self._read_by_users(i.called[0], name)
        return size_of(instructions[i.operands[number]].shape)

    def _read_by_users(self, computation: str, name: str) -> int:
        """Returns how many bytes the instructions of `computation` read from the value `name`."""
        if (computation, name) not in self._read_of_value:
            instructions = self._program.instructions(computation)
            value = instructions[name]
            total = size_of(value.shape) if value.is_root else 0
            for user in instructions.values():
                for number, operand in enumerate(user.operands):
                    if operand == name and user.op in RESHAPES:
                        total += self._read_by_users(computation, user.name)
                    elif operand == name:
                        total += self.read(computation, user, number)
            self._read_of_value[computation, name] = min(total, size_of(value.shape))
        return self._read_of_value[computation, name]

    def written(self, computation: str, i: Instruction) -> int:
        """Returns the number of bytes written: the size of the result, or of an in-place update."""
        instructions = self._program.instructions(computation)
        if i.op in UPDATES:
            return size_of(instructions[i.operands[UPDATES[i.op]]].shape)
        if i.op in RESHAPES:
            return self.written(computation, instructions[i.operands[0]])
        if i.op in _CALLS:
            return self.written(i.called[0], self._program.root(i.called[0]))
        return size_of(i.shape)
