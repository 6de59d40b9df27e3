"""The text of a compiled program: its instructions, and the loops that they stand in.

XLA's own analyses count the body of a loop once. Here every instruction that a program runs comes
with the loops around it, so that a caller can multiply by the turns of each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|\w+_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
# An array's dtype, sizes and layout, which names its memory space if that is not HBM.
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\(")
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
SAME = {"bitcast", "reshape"}
UPDATE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first
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
        return next((x for x in within if x.op in COLLECTIVES), None)


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


def array_sizes(shape: str, *, hbm: bool = False) -> list[int]:
    """Bytes of each array in a shape; with `hbm`, 0 for those that do not lie there."""
    sizes = []
    for dtype, text, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        each = max(1, int(bits.group() if bits else 8) // 8)
        sizes.append(0 if hbm and "S(" in layout else math.prod(_sizes(text)) * each)
    return sizes


def size_of(shape: str, *, hbm: bool = False) -> int:
    """Bytes of the arrays in a shape; with `hbm`, of those that lie there."""
    return sum(array_sizes(shape, hbm=hbm))


def dims(shape: str) -> list[list[int]]:
    """The dimensions of each array in a shape."""
    return [_sizes(sizes) for _, sizes, _ in _ARRAY.findall(shape)]


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def in_place(i: Instruction) -> dict[int, int]:
    """Which results of a fusion are one of its operands, as it says: result -> operand."""
    said = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.line)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", said[1]) if said else []
    return {int(result or 0): int(operand) for result, operand in pairs}
