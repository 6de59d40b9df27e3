"""What a compiled program does: matrix products, memory traffic, collectives."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from opsd_jax.planning.hlo import (
    COLLECTIVES,
    SAME,
    UPDATE,
    Instruction,
    Loop,
    Program,
    array_sizes,
    dims,
    in_place,
    size_of,
)

_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})"
)
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "partition-id",
}  # fmt: skip
_PIECE = {"slice", "dynamic-slice", "gather"}  # of their first operand
_CALLS = {"fusion", "call", "async-start"}


class Access(NamedTuple):
    """What an instruction moves to and from HBM, each time that it runs.

    Attributes:
      read, written: bytes on a device.
      loops: around it, from the outermost on.
      line: the instruction.
    """

    read: int
    written: int
    loops: tuple[Loop, ...]
    line: str

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Collective(NamedTuple):
    """A collective operation of a program.

    Attributes:
      op: such as "all-gather".
      elements: of the largest array among its operands and results, on a device.
      bytes: of all its operands or all its results, whichever are more: some move several arrays.
      devices: that take part in one of its groups.
      loops: around it, from the outermost on.
      line: the instruction.
    """

    op: str
    elements: int
    bytes: int
    devices: int
    loops: tuple[Loop, ...]
    line: str


class Product(NamedTuple):
    """A matrix product, as the compiler has it: a convolution or a dot, or a kernel's.

    Attributes:
      flops: floating-point operations on a device, each time; a multiplication and an addition are
        two.
      loops: around it, from the outermost on.
      line: the instruction.
    """

    flops: int
    loops: tuple[Loop, ...]
    line: str


def collectives(program: Program) -> list[Collective]:
    """The collectives that a program runs."""
    found = []
    for computation, i, loops in program.executed():
        if within := program.overlapped(i):
            starts = "AsyncCollectiveStart" in program.root(i.called[0]).line
            if "async_collective" in within.line and not starts:
                continue  # one that has started goes on
            computation, i = i.called[0], within
        op = i.op.removesuffix("-start")
        if computation.startswith("all-reduce-scatter"):
            op = "reduce-scatter"  # which TPUs have as a fusion of sums and their slices
        if op not in COLLECTIVES:
            continue
        there = program.instructions(computation)
        given = [there[name].shape for name in i.operands]
        read = sum(map(size_of, given))
        # What starts an operation results in its operands too, and in marks of a few bytes.
        moved = max(read, size_of(i.shape) - read * i.op.endswith("-start"))
        elements = max(math.prod(d) for shape in (i.shape, *given) for d in dims(shape))
        found.append(Collective(op, elements, moved, _group(i.line), loops, i.line))
    return found


def _group(line: str) -> int:
    """The devices of a collective's groups."""
    match = _GROUPS.search(line)
    if match is None:
        return 2  # a permutation's pairs
    listed, iota, mesh, axes = match.groups()
    if listed is not None:
        return listed.count(",") + 1
    if iota is not None:
        return int(iota)
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes))


def products(program: Program) -> list[Product]:
    """The matrix products that a program runs, but for those of kernels (custom calls)."""
    found = []

    @functools.cache
    def within(computation: str) -> int:
        return sum(of(computation, i) for i in program.instructions(computation).values())

    def of(computation: str, i: Instruction) -> int:
        there = program.instructions(computation)
        if i.op == "convolution":
            return _convolution(i, *(dims(there[name].shape)[0] for name in i.operands))
        if i.op == "dot":
            over = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)[0]
            lhs = dims(there[i.operands[0]].shape)[0]
            summed = math.prod(lhs[int(d)] for d in over.split(",") if d)
            return 2 * summed * math.prod(dims(i.shape)[0])
        return within(i.called[0]) if i.op in ("fusion", "async-start") else 0

    for computation, i, loops in program.executed():
        if flops := of(computation, i):
            found.append(Product(flops, loops, i.line))
    return found


def _convolution(i: Instruction, lhs: list[int], rhs: list[int]) -> int:
    """Operations of a convolution: XLA:TPU makes one of every product, with dimensions of its batch
    and of its sum as spatial ones. What falls on padding or between is no operation.
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
        one = ["1"] * (d + 1)
        stride, dilate, base = (
            int(window.get(field, one)[d]) for field in ("stride", "rhs_dilate", "lhs_dilate")
        )
        low = int(window["pad"][d].split("_")[0]) if "pad" in window else 0
        at = np.arange(of_out[str(d)])[:, None] * stride - low
        at = at + np.arange(of_rhs[str(d)])[None] * dilate
        inside = (at >= 0) & (at <= (of_lhs[str(d)] - 1) * base) & (at % base == 0)
        flops *= int(inside.sum())
    return flops


def accesses(program: Program, *, vmem: bool = False) -> list[Access]:
    """What the instructions of a compiled TPU program read from HBM and write there.

    An instruction reads its operands and writes its result, where their layouts place these in HBM.
    Of what is sliced or gathered, inside of a fusion too, it reads the piece; an update in place
    (of a slice, or a scatter) reads and writes the size of the update. A custom call, such as a
    Pallas kernel, reads its operands but for the largest: how much of that is for the caller to
    add. Padding to tiles is left out.

    Args:
      program: to account for.
      vmem: count what lies in VMEM, too, and asynchronous copies at both ends, as XLA's
        `cost_analysis` does: to compare with it.
    """
    in_memory = functools.partial(size_of, hbm=not vmem)
    instructions = program.instructions

    def read(computation: str, i: Instruction, number: int) -> int:
        """Bytes that an instruction reads of one of its operands."""
        if i.op in _PIECE and number == 0:
            return size_of(i.shape)
        if i.op in UPDATE and number == 0:
            return size_of(instructions(computation)[i.operands[UPDATE[i.op]]].shape)
        if i.op in _CALLS:
            within = instructions(i.called[0]).values()
            name = next(p.name for p in within if f" parameter({number})" in p.line)
            return read_within(i.called[0], name)
        return size_of(instructions(computation)[i.operands[number]].shape)

    @functools.cache
    def read_within(computation: str, name: str) -> int:
        """Bytes of a value that the instructions which use it read of it."""
        value = instructions(computation)[name]
        total = size_of(value.shape) if value.is_root else 0
        for user in instructions(computation).values():
            for number, operand in enumerate(user.operands):
                if operand == name and user.op in SAME:
                    total += read_within(computation, user.name)
                elif operand == name:
                    total += read(computation, user, number)
        return min(total, size_of(value.shape))

    def written(computation: str, i: Instruction) -> int:
        """Bytes of a result, or of the update if it is one in place."""
        there = instructions(computation)
        if i.op in UPDATE:
            return size_of(there[i.operands[UPDATE[i.op]]].shape)
        if i.op in SAME:
            return written(computation, there[i.operands[0]])
        if i.op in _CALLS:
            return written(i.called[0], program.root(i.called[0]))
        return size_of(i.shape)

    found: list[Access] = []
    for computation, i, loops in program.executed():
        there = instructions(computation)
        if i.op.endswith("-done"):
            size = size_of(i.shape)
            found += [Access(size, size, loops, i.line)] * vmem
        elif i.op not in _FREE | {"conditional", "call"}:
            sizes = [in_memory(there[name].shape) for name in i.operands]
            if program.overlapped(i):
                aliased = in_place(i)
                kept = [0 if n in aliased.values() else size for n, size in enumerate(sizes)]
                new = [
                    size
                    for k, size in enumerate(array_sizes(i.shape, hbm=not vmem))
                    if k not in aliased
                ]
                starts = "AsyncCollectiveStart" in program.root(i.called[0]).line
                found.append(Access(sum(sizes if starts else kept), sum(new), loops, i.line))
                continue
            reads = [
                min(size, read(computation, i, n)) if size else 0 for n, size in enumerate(sizes)
            ]
            if i.op == "custom-call":
                reads.append(-max(reads, default=0))
            result = in_memory(i.shape)
            if i.op.endswith("-start") and i.shape.startswith("("):
                result -= sum(sizes)  # it names its operands besides
            elif result:
                result = min(result, written(computation, i))
            found.append(Access(sum(reads), result, loops, i.line))
    return found
