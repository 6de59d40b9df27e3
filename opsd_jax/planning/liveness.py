"""Finds the arrays that are in memory when the memory use of a compiled program peaks.

The text of a scheduled program lists its instructions in execution order. An array is live from
the instruction that makes it to the last instruction that reads it. A value that is updated in
place, passed on in a tuple or carried by a loop is one array. An operand and a result that reuses
its memory are counted separately. For a train step, the peak equals XLA's own assignment except for
the padding of tiles, which a test checks. Unlike XLA's assignment, the arrays here have names.
"""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from opsd_jax.planning import hlo
from opsd_jax.planning.hlo import Instruction, Program


class Buffer(NamedTuple):
    """An array in memory: its size, its shape and the operation that made it.

    Attributes:
      bytes: its size on one device.
      shape: dtype and dimensions on one device, as text.
      made_by: the operation that makes it: its `op_name`, or else the instruction's name.
    """

    bytes: int
    shape: str
    made_by: str


# Operations whose results are their operands.
_ALIASES = {"tuple", "bitcast", "while", "opt-barrier", "add-dependency", "copy-done"}


def peak(program: Program, computation: str = "ENTRY") -> list[Buffer]:
    """Returns the temporaries that are in HBM when their total size peaks, largest first.

    The program's arguments and results are not included.
    """
    sequence = list(program.instructions(computation).values())
    lifetimes = _Lifetimes(program)
    inner: dict[int, list[Buffer]] = {}  # time -> peak of the computation that runs then
    for time, i in enumerate(sequence):
        lifetimes.add(i, time)
        if i.op in ("while", "call"):
            inner[time] = peak(program, i.called[0])
        elif i.op == "conditional":
            inner[time] = max((peak(program, c) for c in i.called), key=_total_bytes)
    for i in sequence:
        if i.is_root:
            lifetimes.exclude(i)  # its memory belongs to the caller

    begins: dict[int, set[int]] = collections.defaultdict(set)  # time -> buffers
    ends: dict[int, set[int]] = collections.defaultdict(set)
    for b, (first, last) in enumerate(zip(lifetimes.first, lifetimes.last, strict=True)):
        begins[first].add(b)
        ends[last].add(b)
    live: set[int] = set()
    most, found = -1, []
    for time in range(len(sequence)):
        live |= begins[time]
        here = [lifetimes.buffers[b] for b in live if lifetimes.buffers[b].bytes]
        here += inner.get(time, [])
        if (size := _total_bytes(here)) > most:
            most, found = size, here
        live -= ends[time]
    return sorted(found, reverse=True)


def _total_bytes(buffers: list[Buffer]) -> int:
    """Returns the total size of the buffers, in bytes."""
    return sum(buffer.bytes for buffer in buffers)


class _Lifetimes:
    """The buffers of a computation, with the times of each buffer's first and last use.

    A time is the index of an instruction in execution order.
    """

    def __init__(self, program: Program):
        self._program = program
        self._buffers_of: dict[str, list[int]] = {}  # instruction name -> its result's buffers
        self.buffers: list[Buffer] = []
        self.first: list[int] = []
        self.last: list[int] = []

    def add(self, i: Instruction, time: int) -> None:
        """Adds buffers for an instruction's result, and extends the lifetimes of its operands."""
        result = self._buffers_of[i.name] = self._result(i, time)
        if i.op not in ("get-tuple-element", "tuple", "bitcast"):  # these read nothing
            for name in i.operands:
                for b in self._buffers_of.get(name, []):
                    self.last[b] = time
        for b in result:
            self.last[b] = max(self.last[b], time)

    def exclude(self, i: Instruction) -> None:
        """Sets the size of an instruction's result to 0, so that the peak does not include it."""
        for b in self._buffers_of[i.name]:
            self.buffers[b] = self.buffers[b]._replace(bytes=0)

    def _new(self, size: int, i: Instruction, time: int, k: int = 0) -> int:
        """Adds a buffer for array `k` of an instruction's result. Returns the buffer's index."""
        name = re.search(r'op_name="([^"]*)"', i.line)
        shapes = re.findall(r"\w+\[[\d,]*\]", i.shape)
        made_by = name[1] if name else i.name
        self.buffers.append(Buffer(size, shapes[k] if shapes else "", made_by))
        self.first.append(time)
        self.last.append(time)
        return len(self.buffers) - 1

    def _result(self, i: Instruction, time: int) -> list[int]:
        """Returns the buffer index of each array in the result of `i`. Adds missing buffers."""
        sizes = hlo.array_sizes(i.shape, hbm=True)
        operands = [self._buffers_of.get(name, []) for name in i.operands]
        if i.op in ("parameter", "constant"):
            return [self._new(0, i, time, k) for k in range(len(sizes))]
        if i.op == "get-tuple-element":
            index = re.search(r"index=(\d+)", i.line)
            at = int(index[1]) if index else 0
            return operands[0][at : at + 1] if len(sizes) == 1 else operands[0]
        if i.op in _ALIASES:
            return [b for each in operands for b in each][: len(sizes) or None]
        if i.op.endswith("-done"):
            return operands[0][1:2] or operands[0]
        if i.op.endswith("-start") and i.op != "copy-start":
            new = [self._new(size, i, time, k + 1) for k, size in enumerate(sizes[1:])]
            return operands[0][:1] + new
        updated = _updated_operands(self._program, i)
        return [
            operands[updated[k]][0]
            if k in updated and operands[updated[k]]
            else self._new(size, i, time, k)
            for k, size in enumerate(sizes)
        ]


def _updated_operands(program: Program, i: Instruction) -> dict[int, int]:
    """Returns {result index: operand index} for results of `i` that update an operand in place."""
    if i.op in hlo.UPDATES:
        return {0: 0}
    if i.op != "fusion":
        return {}
    inner = program.instructions(i.called[0])
    root = program.root(i.called[0])
    found = hlo.aliased_results(i)
    for k, name in enumerate(root.operands if root.op == "tuple" else [root.name]):
        made = _unreshaped(inner, inner[name])
        if made.op in hlo.UPDATES:
            source = _unreshaped(inner, inner[made.operands[0]])
            if number := re.search(r" parameter\((\d+)\)", source.line):
                found[k] = int(number[1])
    return found


def _unreshaped(instructions: dict[str, Instruction], i: Instruction) -> Instruction:
    """Follows reshapes back from instruction `i` to the instruction that computed its value."""
    while i.op in hlo.RESHAPES:
        i = instructions[i.operands[0]]
    return i
