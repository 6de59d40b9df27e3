"""Normalises answers as text, and reads plain numbers without a parser."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from opsd_jax.verify.characters import plain_characters

LONGEST_NUMBER = 1000  # characters
_DELIMITED = re.compile(r"(?:\$\$?(.*?)\$\$?|\\\[(.*)\\\]|\\\((.*)\\\))[.\s]*", re.DOTALL)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}"
)
# A decimal whose last digits recur: 0.1\overline{6}, 0.1\dot{6}, 0.1(6) or 0.1666...
_DOT = r"\\dot\s*\{?([0-9])\}?"
_DOTS = r"(?:\.\.\.|\\[lc]?dots(?![a-z]))"
_RECURRING = re.compile(
    r"(?<![0-9.])([0-9]{0,30})\.([0-9]{0,30}?)(?:"
    r"\\(?:overline|bar)\s*(?:\{([0-9]{1,30})\}|([0-9]))|\(([0-9]{1,30})\)|"
    rf"{_DOT}(?:([0-9]{{0,30}}){_DOT})?|"
    rf"(?:(?P<one>[0-9])(?P=one)(?P=one)|(?P<more>[0-9]{{2,12}})(?P=more)){_DOTS}"
    r")(?![0-9])"
)
_OVERLINED = re.compile("(?:[0-9]\u0305)+")  # with combining characters
_DOTTED = re.compile("([0-9])\u0307")
# The opening bracket of an argument, or any other bracket.
_ARGUMENT_OR_CLOSE = re.compile(
    r"(?:(\\sqrt(?: ?\[[0-9a-z]\])?|\^) ?|((?<![a-zA-Z\\])[aA]bs))?\(|\)"
)
# Names of functions that need no brackets, and what has to follow their names.
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|ln|log"
_OPERAND = r"(?= ?(?:[(_^]|[0-9]|\\|[a-zA-Z](?![a-zA-Z])))"
_THOUSANDS = re.compile(
    r"((?:\\?\$|[€£¥₹]|\\text\{(?:[^{}0-9]*\})?|[A-Za-z]{2,3}\.? ?)?[+-]?[1-9][0-9]{0,2})"
    r"((?:(?:,|\{,\}|,?\\[!,]| )[0-9]{3})+)(\.[0-9]+)?((?![0-9])(?:[^0-9,;=]|\^\{?-?[0-9])*)",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"([+-]?)(?:([0-9]*\.[0-9]+|[0-9]+\.?)|(?:([0-9]+) )?([0-9]+)/0*([1-9][0-9]*))"
)
_SCIENTIFIC = re.compile(
    r"(?:(.*[0-9.]) ?(?:\\times|\\cdot|\*) ?|([+-]?))10\^\{?([-+]?[0-9]{1,3})\}?", re.DOTALL
)
_ARGUMENT = r"\\[a-zA-Z]+|[0-9a-zA-Z]"

# (pattern, replacement), applied in this order.
_RULES: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\?\$", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle)(?![a-zA-Z])", ""),
        (r"(?<=[0-9])(?:,\\!|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ""),  # thousands
        (r"(?<=[0-9])\\,(?=[0-9])|(?<=[0-9a-zA-Z])\\,(?=[a-zA-Z])", " "),
        (r"(?<!\\)\\[!,]|\\[hv]?phantom\s*(?:\{[^{}]*\}|[^\\{}])", ""),
        (r"(?<!\\)\\[;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
        # Signs and commands with several spellings.
        # A choice: "B. 12", and "(B) -1", which is no difference.
        (r"^([A-J])[.:] +", r"(\1) "),
        (
            r"^(?:\\(?:text|math)\w*\{(\([A-J]\))(?: +\} *|\} +)|(\([A-J]\)) +)(?=-)",
            r"\1\2:",
        ),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:le|leqslant|leqq)(?![a-zA-Z])|<=", r"\\leq"),
        (r"\\(?:ge|geqslant|geqq)(?![a-zA-Z])|>=", r"\\geq"),
        (r"\\(?:ne|not ?=)(?![a-zA-Z])|!=", r"\\neq"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(begin|end)\{(?:small|[bB])matrix\}", r"\\\1{pmatrix}"),
        (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\(?:pounds|textsterling)(?![a-zA-Z])", "£"),
        (r"\\(?:euro|texteuro|EUR)(?![a-zA-Z])", "€"),
        (r"\\(?:yen|textyen)(?![a-zA-Z])", "¥"),
        (r"\\(?:cent|textcent)(?![a-zA-Z])", "¢"),
        (r"\\text\{\s*([€£¥₹¢])\s*\}", r"\1"),
        (
            r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|pmb)\s*(?:\{([^{}]*)\}|([0-9a-zA-Z]))",
            r"\1\2",
        ),
        (r"\\(?:mathrm|text(?:bf|it|rm)?|rm)\s*([0-9])", r"\1"),
        (r"\\(?:large|Large|bf|it|rm|textstyle)(?![a-zA-Z])", ""),
        (r"\\underline\{([^{}]*)\}", r"\1"),
        # The notation of programs: x**2, sin(x), exp(2), pi/2, sqrt(2), 1.5e3.
        (r"(?<=[0-9a-zA-Z)}])(?:\*\*| \*\* )(?=[-0-9a-zA-Z({\\])", "^"),
        (r"\*\*", ""),
        (rf"(?<![a-zA-Z\\])({_FUNCTIONS}){_OPERAND}", r"\\\1 "),
        (r"(?<![a-zA-Z\\])a(sin|cos|tan)(?=\()", r"\\arc\1"),
        (r"(?<![a-zA-Z\\])(exp|sec|csc)(?=\()", r"\\\1"),
        (rf"\\(?:operatorname|mathrm|text)\{{({_FUNCTIONS}|exp|sec|csc)\}}", r"\\\1 "),
        (
            r"(?<![a-zA-Z\\{])(alpha|beta|gamma|delta|theta|lambda|sigma|phi|omega|pi)(?![a-zA-Z])",
            r"\\\1 ",
        ),
        (r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![a-zA-Z\\])sqrt(?![a-zA-Z])", r"\\sqrt"),
        (
            r"(?<![0-9a-zA-Z.\\_])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]{1,3})"
            r"(?![0-9a-zA-Z._])",
            r"\1\\times10^{\2}",
        ),
        # Roots, fractions and powers have their arguments in braces.
        (r"√\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"([∛∜])\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z])", r"\1{\2}"),
        ("√", r"\\sqrt"),
        ("∛", r"\\sqrt[3]"),
        ("∜", r"\\sqrt[4]"),
        (r"\\frac\s+\{", r"\\frac{"),
        (rf"\\frac\s*({_ARGUMENT})", r"\\frac{\1}"),
        (rf"(\\frac\{{[^{{}}]*\}})\s*({_ARGUMENT})", r"\1{\2}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\\frac\{[^{}]*\}\{[^{}]*\})", r"\\sqrt{\1}"),
        (r"\^\s*([-+][0-9]+)", r"^{\1}"),
        (r"\\lor(?![a-zA-Z])", r"\\vee"),
        (r"\\land(?![a-zA-Z])", r"\\wedge"),
        (
            r"(?:(?<![,;\s])[,;\s]*)?(?:\\(?:text(?:rm|bf|it)?|mathrm|mbox)\{[,\s]*(?:and|or)\s*\}|"
            r"\b(?:and|or)\b)\s*",
            lambda words: r"\lor " if "or" in words[0] else r"\land ",
        ),
        (";", ","),
        (r"\\(?:text|mathrm|operatorname)\{\s*([eid])\s*\}", r"\1"),  # upright constants
        (r"\\(?:text|mathrm)\{\s*\\?pi\s*\}", r"\\pi "),
        (r"\^?\\degree(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])", r"^\\circ"),
        (r"\^\\circ\s*(?:\\(?:text|mathrm)\{\s*C\s*\}|C(?![a-zA-Z]))", r"\\text{celsius}"),
        (r"\^\\circ\s*(?:\\(?:text|mathrm)\{\s*F\s*\}|F(?![a-zA-Z]))", r"\\text{fahrenheit}"),
        (r"\\colon(?![a-zA-Z])|\{:\}", ":"),
        (r"\\text\{\s*percent\s*\}|\bpercent(?:age)?\b", r"\\%"),
        (r"\s+", " "),
        # A space is significant only between words and between digits.
        (r" ?([^0-9a-zA-Z\\ ]) ?| (?=\\)", r"\1"),
        (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ", "),  # else math-verify reads one number
        (r"^\\approx(?![a-zA-Z])|(?:(?<!\.)\.|[,\\ ])+$", ""),
    ]
]

# "and" and "or" separate the values of a list. Between inequalities and sets they differ.
_REGION = re.compile(r"[<>]|\\(?:leq|geq|neq|in|infty)(?![a-zA-Z])")
_IN_LISTS = [
    (re.compile(r"\\(?:lor|land)(?![a-zA-Z]) ?(?=[0-9]{3}(?![0-9]))"), ", "),
    (re.compile(r"\\(?:lor|land)(?![a-zA-Z]) ?"), ","),
]
_IN_REGIONS = [
    (re.compile(r"\\vee(?![a-zA-Z])"), r"\\lor"),
    (re.compile(r"\\wedge(?![a-zA-Z])"), r"\\land"),
]


def delimited(text: str) -> str | None:
    """Returns the formula inside delimiters such as `$...$`. Returns None for any other text."""
    formula = _DELIMITED.fullmatch(text)
    inside = formula and next(group for group in formula.groups() if group is not None)
    return None if not inside or "$" in inside else inside


def normalise(answer: str) -> str:
    """Removes typesetting from an answer, so that answers can be compared as strings."""
    text = plain_characters(answer.strip())
    inside = delimited(text)
    text = text if inside is None else inside
    text = _OVERLINED.sub(lambda run: rf"\overline{{{run[0][::2]}}}", text)
    text = _RECURRING.sub(_as_fraction, _DOTTED.sub(r"\\dot{\1}", text))
    if number := _THOUSANDS.fullmatch(text.strip(" .$")):
        text = number[1] + re.sub("[^0-9]", "", number[2]) + (number[3] or "") + number[4]
    if "\\begin" not in text:  # in an environment, two backslashes end a row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    for joined, separator in _IN_REGIONS if _REGION.search(text) else _IN_LISTS:
        text = joined.sub(separator, text)
    return _braced_arguments(text).strip()


def _braced_arguments(text: str) -> str:
    r"""Replaces the parentheses of arguments: `\sqrt(2)` by `\sqrt{2}`, and `abs(x)` by `|x|`."""
    closings: list[str] = []

    def replaced(token: re.Match) -> str:
        if token[0] == ")":
            return closings.pop() if closings else ")"
        closings.append("}" if token[1] else "|" if token[2] else ")")
        return f"{token[1]}{{" if token[1] else "|" if token[2] else "("

    return _ARGUMENT_OR_CLOSE.sub(replaced, text)


def bare(text: str) -> str:
    r"""Returns a normalised answer without `\text{}` and similar commands around words."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip().removesuffix(".")


def _as_fraction(decimal: re.Match) -> str:
    """Returns a recurring decimal as a LaTeX fraction."""
    whole, fixed, *spellings = decimal.groups(default="")
    period = "".join(spellings)
    before = int(f"0{whole}{fixed}")
    nines = 10 ** len(period) - 1
    return rf"\frac{{{before * nines + int(period)}}}{{{nines * 10 ** len(fixed)}}}"


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """Parses a normalised text as a number. Returns its value, and whether it has a decimal point.

    Returns None for everything except integers, decimals, fractions of integers, mixed numbers, and
    these times a power of ten.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    text = re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", r" \1/\2", text).strip()
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific:
        text = scientific[1] or f"{scientific[2]}1"
    number = _NUMBER.fullmatch(text.replace("- ", "-"))
    if not number:
        return None
    sign, decimal, whole, numerator, denominator = number.groups()
    if decimal:
        value = Fraction(decimal)
    else:
        value = Fraction(int(whole or 0)) + Fraction(int(numerator), int(denominator))
    if scientific:
        value *= Fraction(10) ** int(scientific[3])
    return -value if sign == "-" else value, "." in (decimal or "")
