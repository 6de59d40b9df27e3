"""What a compiled program moves, between devices and to and from memory, read off its text."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|\w+_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_COLLECTIVE = re.compile(
    r" = (.*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-[a-z]+)"
    r"(?:-start)?\("
)
# An array's dtype, sizes and layout, which names its memory space if that is not HBM.
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\(")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "partition-id",
}  # fmt: skip
_SAME = {"bitcast", "reshape"}
_PIECE = {"slice", "dynamic-slice", "gather"}  # of their first operand
_UPDATE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first
_CALLS = {"fusion", "call", "async-start"}


class Collective(NamedTuple):
    """A collective operation of a program.

    Attributes:
      op: such as "all-gather".
      elements: of the largest array among its results, on a device.
      in_loop: whether a while loop runs it.
      line: the instruction.
    """

    op: str
    elements: int
    in_loop: bool
    line: str


class Access(NamedTuple):
    """What an instruction moves to and from HBM.

    Attributes:
      read, written: bytes on a device.
      line: the instruction.
    """

    read: int
    written: int
    line: str

    @property
    def bytes(self) -> int:
        return self.read + self.written


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    called: list[str]  # of a loop, its body first
    trips: int
    line: str


def _parsed(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    operands = re.findall(r"%([\w.\-]+)", line[match.end() :].split(")")[0])
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    body = re.findall(r"body=%([\w.\-]+)", line)
    called = body or _called(line)
    name, shape, op = match.groups()
    return _Instruction(name, shape, op, operands, called, int(trips[1]) if trips else 1, line)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name; that of the program itself is "ENTRY"."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = "ENTRY" if line.startswith("ENTRY") else start.group(1)
            computations[name] = []
        elif name:
            computations[name].append(line.strip())
    return computations


def _called(line: str) -> list[str]:
    return [name.strip(" %") for m in _CALLED.finditer(line) for name in m.group(1).split(",")]


def _elements(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)


def _bytes(shape: str, *, hbm: bool = False) -> int:
    """Of the arrays in a shape; with `hbm`, of those that lie there."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if not (hbm and "S(" in layout):
            bits = re.search(r"\d+", dtype)
            total += _elements(sizes) * max(1, int(bits.group() if bits else 8) // 8)
    return total


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, those of called computations included."""
    computations = _computations(text)
    looped: set[str] = set()
    everything = [line for lines in computations.values() for line in lines]
    todo = {name for line in everything if " while(" in line for name in _called(line)}
    while todo:
        looped |= todo
        todo = {n for body in todo for x in computations.get(body, []) for n in _called(x)} - looped
    found = []
    for name, lines in computations.items():
        for line in lines:
            if match := _COLLECTIVE.search(line):
                elements = max((_elements(a[1]) for a in _ARRAY.findall(match.group(1))), default=0)
                found.append(Collective(match["op"], elements, name in looped, line))
    return found


def accesses(text: str, *, in_loop: bool, vmem: bool = False) -> list[Access]:
    """What the instructions of a compiled TPU program read from HBM and write there.

    An instruction reads its operands and writes its result, where their layouts place these in HBM.
    Of what is sliced or gathered, inside of a fusion too, it reads the piece; an update in place
    (of a slice, or a scatter) reads and writes the size of the update. A custom call, such as a
    Pallas kernel, reads its operands but for the largest: how much of that is for the caller to
    add. Of a conditional's branches the one counts that moves most, an inner loop as often as the
    compiler knows it to run, or once. Padding to tiles is left out.

    Args:
      text: `compiled.as_text()`.
      in_loop: of the bodies of the program's loops, one turn of each; else of all but its loops.
      vmem: count what lies in VMEM, too, and asynchronous copies at both ends, as XLA's
        `cost_analysis` does: to compare with it.
    """
    computations = _computations(text)
    in_memory = functools.partial(_bytes, hbm=not vmem)

    @functools.cache
    def instructions(computation: str) -> dict[str, _Instruction]:
        found = (_parsed(line) for line in computations[computation])
        return {i.name: i for i in found if i is not None}

    def read(computation: str, i: _Instruction, number: int) -> int:
        """Bytes that an instruction reads of one of its operands."""
        if i.op in _PIECE and number == 0:
            return _bytes(i.shape)
        if i.op in _UPDATE and number == 0:
            return _bytes(instructions(computation)[i.operands[_UPDATE[i.op]]].shape)
        if i.op in _CALLS:
            within = instructions(i.called[0]).values()
            name = next(p.name for p in within if f" parameter({number})" in p.line)
            return read_within(i.called[0], name)
        return _bytes(instructions(computation)[i.operands[number]].shape)

    @functools.cache
    def read_within(computation: str, name: str) -> int:
        """Bytes of a value that the instructions which use it read of it."""
        value = instructions(computation)[name]
        total = _bytes(value.shape) if value.line.startswith("ROOT") else 0
        for user in instructions(computation).values():
            for number, operand in enumerate(user.operands):
                if operand == name and user.op in _SAME:
                    total += read_within(computation, user.name)
                elif operand == name:
                    total += read(computation, user, number)
        return min(total, _bytes(value.shape))

    def written(computation: str, i: _Instruction) -> int:
        """Bytes of a result, or of the update if it is one in place."""
        there = instructions(computation)
        if i.op in _UPDATE:
            return _bytes(there[i.operands[_UPDATE[i.op]]].shape)
        if i.op in _SAME:
            return written(computation, there[i.operands[0]])
        if i.op in _CALLS:
            within = instructions(i.called[0]).values()
            return written(i.called[0], next(x for x in within if x.line.startswith("ROOT")))
        return _bytes(i.shape)

    def of(computation: str) -> list[Access]:
        found: list[Access] = []
        there = instructions(computation)
        for i in there.values():
            if i.op == "while" and computation != "ENTRY":
                found += of(i.called[0]) * i.trips
            elif i.op == "conditional":
                found += max(map(of, i.called), key=lambda branch: sum(a.bytes for a in branch))
            elif i.op.endswith("-done"):
                found += [Access(_bytes(i.shape), _bytes(i.shape), i.line)] * vmem
            elif i.op not in _FREE:
                sizes = [in_memory(there[name].shape) for name in i.operands]
                reads = [
                    min(size, read(computation, i, n)) if size else 0
                    for n, size in enumerate(sizes)
                ]
                if i.op == "custom-call":
                    reads.append(-max(reads, default=0))
                result = in_memory(i.shape)
                if i.op.endswith("-start") and i.shape.startswith("("):
                    result -= sum(sizes)  # it names its operands besides
                elif result:
                    result = min(result, written(computation, i))
                found.append(Access(sum(reads), result, i.line))
        return found

    if not in_loop:
        return of("ENTRY")
    loops = [i for i in instructions("ENTRY").values() if i.op == "while"]
    return [access for loop in loops for access in of(loop.called[0])]
