"""What a compiled program moves between devices, read off its text."""

from __future__ import annotations

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
_ARRAY = re.compile(r"\b[a-z]+[0-9]*[a-z0-9]*\[([0-9,]*)\]")


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


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, those of called computations included."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start.group(1)
            computations[name] = []
        elif name:
            computations[name].append(line.strip())

    def called(lines: list[str], within: str = "") -> set[str]:
        lists = (m.group(1) for line in lines if within in line for m in _CALLED.finditer(line))
        return {name.strip(" %") for names in lists for name in names.split(",")}

    looped: set[str] = set()
    todo = {name for lines in computations.values() for name in called(lines, " while(")}
    while todo:
        looped |= todo
        todo = {name for body in todo for name in called(computations.get(body, []))} - looped

    found = []
    for name, lines in computations.items():
        for line in lines:
            if match := _COLLECTIVE.search(line):
                elements = 0
                for dimensions in _ARRAY.findall(match.group(1)):
                    size = 1
                    for dimension in filter(None, dimensions.split(",")):
                        size *= int(dimension)
                    elements = max(elements, size)
                found.append(Collective(match["op"], elements, name in looped, line))
    return found
