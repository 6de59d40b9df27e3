"""A Jinja sandbox that also bounds the time and the memory of a template.

Jinja's own sandbox keeps a template away from Python's internals, but `{{ "a" * 10**10 }}` or a few
nested loops would stop the process. Here loop iterations, calls, filters and operators take steps,
in proportion to their time, and no value grows beyond LONGEST characters.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

STEPS = 500_000  # steps of one rendering, each of about a microsecond
LONGEST = 10_000_000  # characters of a value or of the rendered text
LARGEST = 100_000  # integer argument of a function, such as a width
BITS = 4096  # of an integer

# Functions and operators whose result can be as large as the product of two arguments.
_MULTIPLY = frozenset(
    {"*", "%", "expandtabs", "format", "format_map", "indent", "join", "replace", "tojson",
     "translate"}
)  # fmt: skip
# Filters that take about a microsecond for each character.
_SLOW = frozenset(
    {"groupby", "indent", "list", "pprint", "sort", "striptags", "title", "tojson", "unique",
     "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"}
)  # fmt: skip
CALL = 10  # steps of a call, beside those for its arguments
CHARACTERS = 100  # characters of a value that count as a step
_WIDE = re.compile(r"[%{][^%{]*(?:\d{6}|\*)")  # a format such as %1000000s or {:1000000}


class Exhausted(jinja2.TemplateError):
    """Raised if a template takes too many steps, or makes a value that is too large."""


def _filter(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    """Returns an expression that applies a filter to `node`."""
    return nodes.Filter(node, name, [*arguments], [], None, None, lineno=node.lineno)


def _steps(node: nodes.Node) -> nodes.Const:
    """Returns the number of steps that a body takes, beside those of its calls and loops."""
    return nodes.Const(1 + sum(1 for _ in node.find_all(nodes.Node)) // 10)


class _Limiter(NodeTransformer):
    """Adds filters to a template that count the steps of its loops, macros and operators `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Counts the steps of all iterations of a loop."""
        steps = _steps(node)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_loop", steps)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        """Counts the steps of each call of a macro."""
        steps = _steps(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(steps, "_pay"), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """Limits a concatenation."""
        return _filter(self.generic_visit(node), "string")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A Jinja environment whose templates have a limited number of steps, and limited values."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any):
        """Creates the environment.

        Args:
          filters: name -> filter, in addition to those of Jinja or in their place.
          options: further arguments of `jinja2.Environment`.
        """
        super().__init__(**options, finalize=self._checked)
        self._taken = threading.local()
        filters = {**self.filters, **filters}
        self.filters = {name: self._limited(name, use) for name, use in filters.items()}
        # A filter that takes the context is never applied while the template is compiled.
        self.filters["_pay"] = jinja2.pass_context(lambda context, steps: self._step(steps))
        self.filters["_loop"] = self._loop

    def restart(self) -> None:
        """Allows the next rendering in this thread STEPS steps."""
        self._taken.steps = 0

    def concat(self, parts: Iterable[str]) -> str:
        """Joins the parts of a rendered text, after a check of their size."""
        return "".join(self._checked(list(parts)))

    def call(self, context: Any, obj: Any, *arguments: Any, **named: Any) -> Any:
        """Calls an object on behalf of a template, if the sandbox's limits allow it."""
        # The string of a method such as `replace`. Jinja wraps the method `format`.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        self._step(CALL)
        # In a loop or block, Jinja passes its variables along.
        own = [named[key] for key in named if key not in ("_loop_vars", "_block_vars")]
        self._check(getattr(obj, "__name__", ""), [owner, *arguments, *own])
        return self._checked(super().call(context, obj, *arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator on behalf of a template, if the sandbox's limits allow it."""
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            self._check(operator, [left, right])
        elif operator == "**" and isinstance(left, int) and left.bit_length() * abs(right) > BITS:
            raise Exhausted(f"it computes an integer of over {BITS} bits")
        return self._checked(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parses a template, and inserts filters that limit its loops and its operator `~`."""
        tree = _Limiter().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def _limited(self, name: str, use: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a filter within the limits."""

        @functools.wraps(use)  # copies the mark of a filter that takes the environment
        def filtered(*arguments: Any, **named: Any) -> Any:
            self._check(name, [*arguments, *named.values()])
            return self._checked(use(*arguments, **named))

        return filtered

    def _loop(self, items: Any, steps: int) -> Any:
        """Counts the steps of a loop over `items`, and returns the items."""
        items = items if hasattr(items, "__len__") else list(items)
        self._step(steps * (1 + len(items)))
        return items

    def _step(self, count: int) -> None:
        """Counts steps. Raises Exhausted if there are too many."""
        self._taken.steps = getattr(self._taken, "steps", 0) + count
        if self._taken.steps > STEPS:
            raise Exhausted(f"it takes over {STEPS:,} steps")

    def _size(self, value: Any) -> int:
        """Returns the size of a value in characters and items, and counts the steps to read it."""
        size, queue = 0, [value]
        while queue:
            item = queue.pop()
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, dict | list | tuple | set):
                size += len(item)
                self._step(len(item))
                queue += [*item, *item.values()] if isinstance(item, dict) else item
            elif isinstance(item, int) and item.bit_length() > BITS:
                raise Exhausted(f"it computes an integer of over {BITS} bits")
            if size > LONGEST:
                raise Exhausted(f"it produces a value of more than {LONGEST:,} characters")
        self._step(size // CHARACTERS)
        return size

    def _checked(self, value: Any) -> Any:
        """Returns a value if it is not too large."""
        self._size(value)
        return value

    def _check(self, name: str, arguments: list[Any]) -> None:
        """Counts a step, and checks that the result of a function or operator cannot be too large.

        Args:
          name: the name of the function, or the operator.
          arguments: its arguments.
        """
        self._step(1)
        widths = [abs(value) for value in arguments if isinstance(value, int)]
        sizes = [*map(self._size, arguments)]
        if name in _SLOW:
            self._step(sum(sizes))
        *_, second, first = sorted([1, 1, *widths, *sizes])
        if name in _MULTIPLY and first * second > 10 * LONGEST:
            raise Exhausted(f"{name} produces a value of more than {LONGEST:,} characters")
        if name in ("%", "format", "format_map") and any(
            isinstance(value, str) and _WIDE.search(value) for value in arguments
        ):
            raise Exhausted(f"{name} produces a value of more than {LARGEST:,} characters")
        if name not in _MULTIPLY and max(widths, default=0) > LARGEST:
            raise Exhausted(f"it passes {max(widths)} to {name}")
