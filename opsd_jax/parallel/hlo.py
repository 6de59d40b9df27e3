"""What a compiled program does, read off its text: products, memory traffic, collectives.

XLA's own analyses count the body of a loop once. Here every instruction that a program runs comes
with the loops around it, so that a caller can multiply by the turns of each.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|\w+_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
# An array's dtype, sizes and layout, which names its memory space if that is not HBM.
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\(")
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})"
)
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "partition-id",
}  # fmt: skip
SAME = {"bitcast", "reshape"}
_PIECE = {"slice", "dynamic-slice", "gather"}  # of their first operand
UPDATE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first
_CALLS = {"fusion", "call", "async-start"}
NAMELESS = "loop"  # one without a scope, such as the compiler makes
_WRAPPERS = {"jit", "jvp", "transpose", "vmap", "while", "body", "cond", "closed_call", "shard_map"}


class Loop(NamedTuple):
    """A while loop.

    Attributes:
      name: the innermost `jax.named_scope` around it; NAMELESS where there is none.
      turns: how many; None if that is not in the program.
    """

    name: str
    turns: int | None


def turns(loops: tuple[Loop, ...], given: Mapping[str, int] | None = None) -> int:
    """How often the body of the innermost of nested loops runs.

    Args:
      loops: from the outermost on.
      given: the turns of loops that the program does not say, by name, or by the names of all up to
        it, "outer/inner"; 1 for others.
    """
    total, path, known = 1, "", given or {}
    for loop in loops:
        path = f"{path}/{loop.name}".removeprefix("/")
        unknown = known.get(path, known.get(loop.name, 1))
        total *= unknown if loop.turns is None else loop.turns
    return total


class Instruction(NamedTuple):
    """An instruction: its result's name and shape, its operation, and what it reads and calls."""

    name: str
    shape: str
    op: str
    operands: list[str]
    called: list[str]  # of a loop, its body first
    line: str

    @property
    def is_root(self) -> bool:
        return self.line.startswith("ROOT")


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


class Program:
    """The text of a compiled program, `compiled.as_text()`, in parts.

    Of a conditional's branches the one counts whose results are largest, or with `lightest` the one
    whose are smallest.
    """

    def __init__(self, text: str, *, lightest: bool = False):
        self._branch = min if lightest else max
        self._lines: dict[str, list[str]] = {}
        name = ""
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                name = "ENTRY" if line.startswith("ENTRY") else start.group(1)
                self._lines[name] = []
            elif name:
                self._lines[name].append(line.strip())
        self._parsed: dict[str, dict[str, Instruction]] = {}

    def instructions(self, computation: str) -> dict[str, Instruction]:
        """Those of a computation by the name of their result, in the order in which they run; that
        of the program itself is "ENTRY".
        """
        if computation not in self._parsed:
            found = (_parsed(line) for line in self._lines.get(computation, ()))
            self._parsed[computation] = {i.name: i for i in found if i is not None}
        return self._parsed[computation]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions(computation).values() if i.is_root)

    def executed(
        self, computation: str = "ENTRY", loops: tuple[Loop, ...] = ()
    ) -> Iterator[tuple[str, Instruction, tuple[Loop, ...]]]:
        """`(computation, instruction, loops around it)` of all that the program runs, but for what
        is inside of fusions.
        """
        for i in self.instructions(computation).values():
            yield computation, i, loops
            if i.op == "while":
                yield from self.executed(i.called[0], (*loops, self._loop(i)))
            elif i.op == "call":
                yield from self.executed(i.called[0], loops)
            elif i.op == "conditional":
                moved = lambda branch: sum(size_of(x.shape) for _, x, _ in self.executed(branch))
                yield from self.executed(self._branch(i.called, key=moved), loops)

    def _loop(self, i: Instruction) -> Loop:
        words: list[str] = []
        if path := re.search(r'op_name="([^"]*)/while"', i.line):
            words = [w for w in re.findall(r"[A-Za-z_]\w*", path[1]) if w not in _WRAPPERS]
        name = words[-1] if len(words) > 1 else NAMELESS  # the first is the program's own
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.line):
            return Loop(name, int(known[1]))
        condition = re.findall(r"condition=%([\w.\-]+)", i.line)[0]
        bound, counter = self._bound(condition)
        if bound is None:
            return Loop(name, None)
        # The compiler unrolls some: the counter takes steps of two then.
        body = self.instructions(i.called[0])
        root = next((x for x in body.values() if x.is_root), None)
        added = body.get(root.operands[counter]) if root is not None else None
        steps = [_constant(body.get(name)) for name in added.operands] if added else []
        return Loop(name, -(-bound // next((step for step in steps if step), 1)))

    def _bound(self, condition: str) -> tuple[int | None, int]:
        """What a loop's counter is compared with, if it is constant, and its place in the state."""
        there = self.instructions(condition)
        compared = next((x for x in there.values() if x.is_root), None)
        if compared is None or "direction=LT" not in compared.line:
            return None, 0
        counter = re.search(r"index=(\d+)", there[compared.operands[0]].line)
        bound = _constant(there.get(compared.operands[1]))
        return bound, int(counter[1]) if counter else 0

    def overlapped(self, i: Instruction) -> Instruction | None:
        """The collective that goes on inside of a fusion, beside what it computes, if one does: the
        compiler starts some in one fusion, moves them on in others, and ends them in a last one.
        """
        if i.op != "fusion":
            return None
        within = self.instructions(i.called[0]).values()
        return next((x for x in within if x.op in _COLLECTIVES), None)


def _constant(i: Instruction | None) -> int | None:
    """The value of a whole number in the program."""
    value = re.search(r"constant\((\d+)\)", i.line) if i is not None else None
    return int(value[1]) if value else None


def _parsed(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    operands = re.findall(r"%([\w.\-]+)", line[match.end() :].split(")")[0])
    body = re.findall(r"body=%([\w.\-]+)", line)
    called = [n.strip(" %") for m in _CALLED.finditer(line) for n in m.group(1).split(",")]
    name, shape, op = match.groups()
    return Instruction(name, shape, op, operands, body or called, line)


def _elements(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)


def array_sizes(shape: str, *, hbm: bool = False) -> list[int]:
    """Bytes of each array in a shape; with `hbm`, 0 for those that do not lie there."""
    sizes = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        each = max(1, int(bits.group() if bits else 8) // 8)
        sizes.append(0 if hbm and "S(" in layout else _elements(dims) * each)
    return sizes


def size_of(shape: str, *, hbm: bool = False) -> int:
    """Bytes of the arrays in a shape; with `hbm`, of those that lie there."""
    return sum(array_sizes(shape, hbm=hbm))


def _dims(shape: str) -> list[int]:
    """Of the first array in a shape."""
    return [int(size) for size in _ARRAY.findall(shape)[0][1].split(",") if size]


def collectives(program: Program) -> list[Collective]:
    """The collectives that a program runs."""
    found = []
    for computation, i, loops in program.executed():
        if within := program.overlapped(i):
            if "AsyncCollectiveStart" not in program.root(i.called[0]).line:
                continue  # one that has started goes on
            computation, i = i.called[0], within
        op = i.op.removesuffix("-start")
        if op not in _COLLECTIVES:
            continue
        there = program.instructions(computation)
        given = [there[name].shape for name in i.operands]
        read = sum(map(size_of, given))
        # What starts an operation results in its operands too, and in marks of a few bytes.
        moved = max(read, size_of(i.shape) - read * i.op.endswith("-start"))
        arrays = [array for shape in (i.shape, *given) for array in _ARRAY.finditer(shape)]
        elements = max(_elements(array[2]) for array in arrays)
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
            return _convolution(i, *(_dims(there[name].shape) for name in i.operands))
        if i.op == "dot":
            dims = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)[0]
            lhs = _dims(there[i.operands[0]].shape)
            summed = math.prod(lhs[int(d)] for d in dims.split(",") if d)
            return 2 * summed * _elements(_ARRAY.findall(i.shape)[0][1])
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
        for label, sizes in zip(labels, (lhs, rhs, _dims(i.shape)), strict=True)
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


def in_place(i: Instruction) -> dict[int, int]:
    """Which results of a fusion are one of its operands, as it says: result -> operand."""
    said = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.line)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", said[1]) if said else []
    return {int(result or 0): int(operand) for result, operand in pairs}


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
