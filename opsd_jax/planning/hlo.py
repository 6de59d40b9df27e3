"""Parses the HLO text of a compiled program into instructions and the loops around them.

XLA's own analyses count the body of a loop once. This module returns every instruction that a
program executes together with its loops, so that a caller can multiply by their trip counts.
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
# An array's dtype, dimensions and layout. The layout names the memory space unless it is HBM.
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\(")
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
RESHAPES = {"bitcast", "reshape"}  # operations that return their operand's bytes
# Operations that write into their first operand, and the index of the operand that they write.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
NAMELESS = "loop"  # name of a loop outside any `jax.named_scope`, such as one the compiler made
_WRAPPERS = {"jit", "jvp", "transpose", "vmap", "while", "body", "cond", "closed_call", "shard_map"}

# Trip counts that a program's text does not contain. The key of a loop is its path: the names of
# all loops around it, from the outermost to the loop itself.
TripCounts = Mapping[tuple[str, ...], int]


class Loop(NamedTuple):
    """The name and the trip count of a while loop in a compiled program.

    Attributes:
      name: the innermost `jax.named_scope` around the loop, or NAMELESS.
      trip_count: how often the body runs, or None if the program's text does not say.
    """

    name: str
    trip_count: int | None


def path_of(loops: tuple[Loop, ...]) -> tuple[str, ...]:
    """Returns the path of a nested loop: the loop names from the outermost to the innermost."""
    return tuple(loop.name for loop in loops)


def trip_count(loops: tuple[Loop, ...], given: TripCounts | None = None) -> int:
    """Returns how often the innermost body of nested loops runs: the product of the trip counts.

    Args:
      loops: nested loops, from the outermost to the innermost.
      given: trip counts of named loops whose count is not in the program's text. NAMELESS loops
        cannot be given; if their count is unknown it is taken as 1.

    Raises:
      KeyError: a named loop has no count in the text or in `given`.
    """
    total = 1
    for depth, loop in enumerate(loops, start=1):
        if loop.trip_count is not None:
            total *= loop.trip_count
        elif loop.name != NAMELESS:
            total *= (given or {})[path_of(loops[:depth])]
    return total


class Instruction(NamedTuple):
    """An HLO instruction, parsed from a line of a compiled program's text.

    Attributes:
      name: the name of its result.
      shape: the result's shape, as text.
      op: the operation, such as "fusion".
      operands: names of the instructions whose results it reads.
      called: names of the computations that it calls; for a loop, the body only.
      line: the whole text.
    """

    name: str
    shape: str
    op: str
    operands: list[str]
    called: list[str]
    line: str

    @property
    def is_root(self) -> bool:
        """Whether this instruction produces the result of its computation."""
        return self.line.startswith("ROOT")


class Program:
    """A compiled program, parsed from the HLO text that `compiled.as_text()` returns.

    Only one branch of each conditional is counted: the branch whose results take the most bytes,
    or the fewest if `lightest` is set.
    """

    def __init__(self, text: str, *, lightest: bool = False):
        """Splits the program's text into computations. Instructions are parsed on first use."""
        self._choose_branch = min if lightest else max
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
        """Returns the instructions of a computation in execution order, keyed by name.

        The computation "ENTRY" is the program itself.
        """
        if computation not in self._parsed:
            found = (_parse(line) for line in self._lines.get(computation, ()))
            self._parsed[computation] = {i.name: i for i in found if i is not None}
        return self._parsed[computation]

    def root(self, computation: str) -> Instruction:
        """Returns the root instruction of a computation, which produces its result."""
        return next(i for i in self.instructions(computation).values() if i.is_root)

    def executed(
        self, computation: str = "ENTRY", loops: tuple[Loop, ...] = ()
    ) -> Iterator[tuple[str, Instruction, tuple[Loop, ...]]]:
        """Yields `(computation, instruction, enclosing loops)` for each executed instruction.

        Instructions inside fusions are not included.
        """
        for i in self.instructions(computation).values():
            yield computation, i, loops
            if i.op == "while":
                yield from self.executed(i.called[0], (*loops, self._loop(i)))
            elif i.op == "call":
                yield from self.executed(i.called[0], loops)
            elif i.op == "conditional":
                result_bytes = lambda branch: sum(
                    size_of(x.shape) for _, x, _ in self.executed(branch)
                )
                yield from self.executed(self._choose_branch(i.called, key=result_bytes), loops)

    def dynamic_loops(self) -> set[tuple[str, ...]]:
        """Returns the paths of the named loops whose trip count is not in the program's text."""
        return {
            path_of(loops)
            for *_, loops in self.executed()
            if loops and loops[-1].trip_count is None and loops[-1].name != NAMELESS
        }

    def _loop(self, i: Instruction) -> Loop:
        """Returns the name and trip count of a while instruction."""
        scopes: list[str] = []
        if path := re.search(r'op_name="([^"]*)/while"', i.line):
            scopes = [w for w in re.findall(r"[A-Za-z_]\w*", path[1]) if w not in _WRAPPERS]
        name = scopes[-1] if len(scopes) > 1 else NAMELESS  # the first is the program's own name
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.line):
            return Loop(name, int(known[1]))
        condition = re.findall(r"condition=%([\w.\-]+)", i.line)[0]
        bound, counter = self._bound(condition)
        if bound is None:
            return Loop(name, None)
        # Where the compiler has unrolled the loop, the counter advances by more than one.
        body = self.instructions(i.called[0])
        root = next((x for x in body.values() if x.is_root), None)
        added = body.get(root.operands[counter]) if root is not None else None
        steps = [_constant(body.get(name)) for name in added.operands] if added else []
        return Loop(name, -(-bound // next((step for step in steps if step), 1)))

    def _bound(self, condition: str) -> tuple[int | None, int]:
        """Returns the upper bound of a loop's counter, and the counter's index in the loop state.

        The bound is None if it is not a constant.
        """
        instructions = self.instructions(condition)
        compared = next((x for x in instructions.values() if x.is_root), None)
        if compared is None or "direction=LT" not in compared.line:
            return None, 0
        counter = re.search(r"index=(\d+)", instructions[compared.operands[0]].line)
        bound = _constant(instructions.get(compared.operands[1]))
        return bound, int(counter[1]) if counter else 0

    def overlapped(self, i: Instruction) -> Instruction | None:
        """Returns the collective inside the fusion `i`, or None if `i` contains no collective.

        The compiler overlaps some collectives with computation: one fusion starts the collective,
        others continue it, and a last one completes it.
        """
        if i.op != "fusion":
            return None
        inner = self.instructions(i.called[0]).values()
        return next((x for x in inner if x.op in COLLECTIVES), None)


def _constant(i: Instruction | None) -> int | None:
    """Returns the value of an integer constant, or None for any other instruction."""
    value = re.search(r"constant\((\d+)\)", i.line) if i is not None else None
    return int(value[1]) if value else None


def _parse(line: str) -> Instruction | None:
    """Parses one line of a program. Returns None if the line is not an instruction."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    operands = re.findall(r"%([\w.\-]+)", line[match.end() :].split(")")[0])
    body = re.findall(r"body=%([\w.\-]+)", line)
    called = [n.strip(" %") for m in _CALLED.finditer(line) for n in m.group(1).split(",")]
    name, shape, op = match.groups()
    return Instruction(name, shape, op, operands, body or called, line)


def array_sizes(shape: str, *, hbm: bool = False) -> list[int]:
    """Returns the byte size of each array in a shape. If `hbm`, arrays outside HBM count as 0."""
    sizes = []
    for dtype, text, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        element_bytes = max(1, int(bits.group() if bits else 8) // 8)
        elements = math.prod(_dimensions(text))
        sizes.append(0 if hbm and "S(" in layout else elements * element_bytes)
    return sizes


def size_of(shape: str, *, hbm: bool = False) -> int:
    """Returns the total byte size of the arrays in a shape. If `hbm`, counts only arrays in HBM."""
    return sum(array_sizes(shape, hbm=hbm))


def dims(shape: str) -> list[list[int]]:
    """Returns the dimensions of each array in a shape."""
    return [_dimensions(sizes) for _, sizes, _ in _ARRAY.findall(shape)]


def _dimensions(text: str) -> list[int]:
    """Parses a list of dimensions from text such as "16,8"."""
    return [int(size) for size in text.split(",") if size]


def aliased_results(i: Instruction) -> dict[int, int]:
    """Returns {result index: operand index} for results of `i` that reuse an operand's memory."""
    aliasing = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.line)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", aliasing[1]) if aliasing else []
    return {int(result or 0): int(operand) for result, operand in pairs}
