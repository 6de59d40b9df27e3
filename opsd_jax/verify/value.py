r"""Evaluates an answer such as `1.2 \times 10^{3}`, `\frac{\pi}{2}` or `5!` as a number.

It runs outside the worker processes, so the length, the depth of brackets and the values are
limited. All of the text has to be understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from opsd_jax.verify.normalise import plain_number

_DEEPEST = 30  # brackets inside brackets
_TOKEN = re.compile(r" *([0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[a-zA-Z]+|[-+*/^(){}\[\]!|e]) *")
_CONSTANTS = {"e": math.e, "\\pi": math.pi}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "\\sin": math.sin, "\\cos": math.cos, "\\tan": math.tan, "\\arcsin": math.asin,
    "\\arccos": math.acos, "\\arctan": math.atan, "\\sinh": math.sinh, "\\cosh": math.cosh,
    "\\tanh": math.tanh, "\\ln": math.log, "\\log": math.log10, "\\exp": math.exp,
}  # fmt: skip
_CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}


def evaluate(text: str) -> float | None:
    """Returns the value of a normalised text; None if it is not a real number below 1e300."""
    if number := plain_number(text):
        return float(number[0]) if abs(number[0]) < 1e300 else None
    tokens, position = [], 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if not token:
            return None
        tokens.append(token[1])
        position = token.end()
    reader = _Reader(tokens)
    try:
        value = reader.sum()
    except (ValueError, ArithmeticError):  # not an expression, or its value is too large
        return None
    return value if not reader.tokens and abs(value) < 1e300 else None


class _Reader:
    """Evaluates tokens by recursive descent. Raises ValueError for what is not an expression."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]  # the next token is the last
        self.depth = 0

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *expected: str) -> str:
        """Removes and returns the next token; "" if it is not one of those expected."""
        return self.tokens.pop() if self.next() in expected else ""

    def sum(self) -> float:
        value = self.product()
        while sign := self.take("+", "-"):
            value += self.product() if sign == "+" else -self.product()
        return value

    def product(self) -> float:
        value = self.signed()
        while True:
            if self.take("*", "\\cdot", "\\times"):
                value *= self.signed()
            elif self.take("/", "\\div"):
                value /= self.signed()
            elif self.begins_factor():
                value *= self.power()
            else:
                return value

    def begins_factor(self) -> bool:
        """Whether a factor without a sign for multiplication follows, as in `2\\pi`."""
        token = self.next()
        return token in ("(", "{") or (token in _CONSTANTS or token[:1] == "\\")

    def signed(self) -> float:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        return -self.power() if negative else self.power()

    def power(self) -> float:
        base = self.atom()
        while self.take("!"):
            if base != int(base) or not 0 <= base <= 170:
                raise ValueError
            base = float(math.factorial(int(base)))
        if self.take("^"):
            exponent = self.signed() if self.next() not in _CLOSING else self.group()
            value = base**exponent
            if isinstance(value, complex):
                raise ValueError
            return value
        return base

    def group(self) -> float:
        """Evaluates an expression in brackets."""
        closing = _CLOSING.get(self.take(*_CLOSING))
        self.depth += 1
        if closing is None or self.depth > _DEEPEST:
            raise ValueError
        value = self.sum()
        if not self.take(closing):
            raise ValueError
        self.depth -= 1
        return abs(value) if closing == "|" else value

    def atom(self) -> float:
        token = self.next()
        if token in _CLOSING:
            return self.group()
        if not token:
            raise ValueError
        self.tokens.pop()
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token == "\\frac":
            return self.group() / self.group()
        if token == "\\sqrt":
            root = self.group() if self.next() == "[" else 2.0
            value = self.group()
            return math.sqrt(value) if root == 2 else math.copysign(abs(value) ** (1 / root), value)
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self.power())
        return float(token)
