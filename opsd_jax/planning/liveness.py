"""Which arrays of a compiled program are in memory at once, where that is most.

The text of a scheduled program lists instructions in the order in which they run. An array is there
from the instruction that makes it to the last that reads it; what is updated in place, handed on
in a tuple or carried by a loop is one array. A result that takes the place of an operand which dies
there counts beside it. The peak of a train step is that of XLA's own assignment but for the padding
of tiles (a test compares the two), and here it has names.
"""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from opsd_jax.planning import hlo
from opsd_jax.planning.hlo import Instruction, Program


class Buffer(NamedTuple):
    """An array of a program.

    Attributes:
      bytes: on a device.
      shape: dtype and sizes there.
      made_by: the operation that it comes from: its `op_name`, or what the compiler calls it.
    """

    bytes: int
    shape: str
    made_by: str


# Results that are their operands.
_ALIASES = {"tuple", "bitcast", "while", "opt-barrier", "add-dependency", "copy-done"}


def peak(program: Program, computation: str = "ENTRY") -> list[Buffer]:
    """The temporaries in HBM at the moment when they take most, the largest first: without the
    program's arguments and results.
    """
    sequence = list(program.instructions(computation).values())
    buffers: list[Buffer] = []
    made: list[int] = []
    last: list[int] = []
    values: dict[str, list[int]] = {}  # the buffers of each result, an array each
    inner: dict[int, list[Buffer]] = {}

    def new(size: int, i: Instruction, time: int, k: int = 0) -> int:
        name = re.search(r'op_name="([^"]*)"', i.line)
        shapes = re.findall(r"\w+\[[\d,]*\]", i.shape)
        buffers.append(Buffer(size, shapes[k] if shapes else "", name[1] if name else i.name))
        made.append(time)
        last.append(time)
        return len(buffers) - 1

    def result(i: Instruction, time: int) -> list[int]:
        sizes = hlo.array_sizes(i.shape, hbm=True)
        operands = [values.get(name, []) for name in i.operands]
        if i.op in ("parameter", "constant"):
            return [new(0, i, time, k) for k in range(len(sizes))]
        if i.op == "get-tuple-element":
            index = re.search(r"index=(\d+)", i.line)
            at = int(index[1]) if index else 0
            return operands[0][at : at + 1] if len(sizes) == 1 else operands[0]
        if i.op in _ALIASES:
            return [b for each in operands for b in each][: len(sizes) or None]
        if i.op.endswith("-done"):
            return operands[0][1:2] or operands[0]
        if i.op.endswith("-start") and i.op != "copy-start":
            return operands[0][:1] + [new(size, i, time, k + 1) for k, size in enumerate(sizes[1:])]
        there = _in_place(program, i)
        return [
            operands[there[k]][0] if k in there and operands[there[k]] else new(size, i, time, k)
            for k, size in enumerate(sizes)
        ]

    for time, i in enumerate(sequence):
        values[i.name] = result(i, time)
        if i.op not in ("get-tuple-element", "tuple", "bitcast"):  # which read nothing
            for name in i.operands:
                for b in values.get(name, []):
                    last[b] = time
        for b in values[i.name]:
            last[b] = max(last[b], time)
        if i.op in ("while", "call"):
            inner[time] = peak(program, i.called[0])
        elif i.op == "conditional":
            inner[time] = max((peak(program, c) for c in i.called), key=_total)

    for i in sequence:
        if i.is_root:  # lies where the caller wants it
            for b in values[i.name]:
                buffers[b] = buffers[b]._replace(bytes=0)
    begin: dict[int, set[int]] = collections.defaultdict(set)
    end: dict[int, set[int]] = collections.defaultdict(set)
    for b in range(len(buffers)):
        begin[made[b]].add(b)
        end[last[b]].add(b)
    live: set[int] = set()
    most, found = -1, []
    for time in range(len(sequence)):
        live |= begin[time]
        size = sum(buffers[b].bytes for b in live) + _total(inner.get(time, []))
        if size > most:
            most, found = size, [buffers[b] for b in live if buffers[b].bytes] + inner.get(time, [])
        live -= end[time]
    return sorted(found, reverse=True)


def _total(buffers: list[Buffer]) -> int:
    return sum(buffer.bytes for buffer in buffers)


def _in_place(program: Program, i: Instruction) -> dict[int, int]:
    """Which results of an instruction are one of its operands, updated: result -> operand."""
    if i.op in hlo.UPDATE:
        return {0: 0}
    if i.op != "fusion":
        return {}
    within = program.instructions(i.called[0])
    root = program.root(i.called[0])
    found = hlo.in_place(i)
    for k, name in enumerate(root.operands if root.op == "tuple" else [root.name]):
        made = within[name]
        while made.op in hlo.SAME:
            made = within[made.operands[0]]
        if made.op in hlo.UPDATE:
            source = within[made.operands[0]]
            while source.op in hlo.SAME:
                source = within[source.operands[0]]
            if number := re.search(r" parameter\((\d+)\)", source.line):
                found[k] = int(number[1])
    return found
