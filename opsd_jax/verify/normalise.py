"""Answers as text: one spelling for what is written alike, and the numbers that need no parser."""

from __future__ import annotations

import re
from fractions import Fraction

_DELIMITED = re.compile(r"(?:\$\$?(.*?)\$\$?|\\\[(.*)\\\]|\\\((.*)\\\))[.\s]*", re.DOTALL)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_NAMES = [
    "mm millimeter millimeters millimetres", "cm centimeter centimeters centimetres",
    "m meter meters metre metres", "km kilometer kilometers kilometres",
    "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
    "mg milligram milligrams", "g gram grams", "kg kilogram kilograms",
    "lb lbs pound pounds", "oz ounce ounces",
    "s sec second seconds", "min minute minutes", "h hr hour hours", "day days",
    "week weeks", "month months", "year years", "cent cents", "dollar dollars",
    "degree degrees", "unit units",
]  # fmt: skip
UNITS = {name: names.split()[0] for names in _NAMES for name in names.split()}
_UNIT = re.compile(
    r"(.*[^\\\s^_=,+*/-]) ?"
    r"(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox)\{([^{}]*)\}|"
    rf"(?<=[0-9}}])[ ]?({'|'.join(name for name in UNITS if len(name) > 1)})|"
    r"\^\{?\\circ\}?)"
    r"(?:\^\{?([23])\}?)?",
    re.DOTALL,
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*\{?([0-9]+)\}?")
_THOUSANDS = re.compile(r"([+-]?[0-9]{1,3})((?:(?:,|\{,\}| )[0-9]{3})+)(\.[0-9]+)?")
_NUMBER = re.compile(
    r"([+-]?)(?:([0-9]*\.[0-9]+|[0-9]+\.?)|(?:([0-9]+) )?([0-9]+)/0*([1-9][0-9]*))"
)

_ARGUMENT = r"\\[a-zA-Z]+|[0-9a-zA-Z]"

# In this order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\?\$", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle)(?![a-zA-Z])", ""),
        (r"(?<=[0-9])(?:,\\!|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ""),  # thousands
        (r"(?<!\\)\\[!,]|\\[hv]?phantom\s*(?:\{[^{}]*\}|[^\\{}])", ""),
        (r"(?<!\\)\\[;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s+\{", r"\\frac{"),
        (rf"\\frac\s*({_ARGUMENT})", r"\\frac{\1}"),
        (rf"(\\frac\{{[^{{}}]*\}})\s*({_ARGUMENT})", r"\1{\2}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|\\\{\s*\\\}|∅", r"\\emptyset"),
        (r"\\(?:le|leqslant)(?![a-zA-Z])|≤", r"\\leq"),
        (r"\\(?:ge|geqslant)(?![a-zA-Z])|≥", r"\\geq"),
        ("\N{MINUS SIGN}", "-"),
        (r"[,;\s]*(?:\\(?:text|mbox)\{[,\s]*(?:and|or)\s*\}|\b(?:and|or)\b)\s*|;", ","),
        (r"\\degree(?![a-zA-Z])", r"^\\circ"),
        (r"\\text\{\s*percent\s*\}|\bpercent(?:age)?\b", r"\\%"),
        (r"\s+", " "),
        # A space counts between words and between digits.
        (r" ?([^0-9a-zA-Z\\ ]) ?| (?=\\)", r"\1"),
        (r"^\\approx(?![a-zA-Z])|[.,\\ ]+$", ""),
    ]
]


def delimited(text: str) -> str | None:
    """What stands between the delimiters of a formula, if the text is one and no more."""
    formula = _DELIMITED.fullmatch(text)
    inside = formula and next(group for group in formula.groups() if group is not None)
    return None if not inside or "$" in inside else inside


def quantity(text: str) -> tuple[str, str | None]:
    r"""A normalised answer without the unit behind it, and which that is if it is one of UNITS.

    A unit stands in `\text{}` or the like, is a known word behind a digit, or the sign of degrees.
    """
    found = _UNIT.fullmatch(text)
    if not found:
        return text, None
    value, setting, word, power = found.groups()
    known = UNITS.get((setting or word or "degree").strip().lower())
    return value, known and f"{known}^{power or 1}"


def normalise(answer: str) -> str:
    """An answer without what only sets it. Equal texts are equal answers, and parse alike."""
    text = answer.strip()
    inside = delimited(text)
    text = _REPEATING.sub(_as_fraction, text if inside is None else inside)
    if "\\begin" not in text:  # there two backslashes end a row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if number := _THOUSANDS.fullmatch(text):
        text = number[1] + re.sub("[^0-9]", "", number[2]) + (number[3] or "")
    return text


def bare(text: str) -> str:
    r"""A normalised answer without `\text{}` and its kin around words."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip()


def _as_fraction(decimal: re.Match) -> str:
    whole, fixed, period = decimal.groups()
    before = int(f"0{whole}{fixed}")
    nines = 10 ** len(period) - 1
    return rf"\frac{{{before * nines + int(period)}}}{{{nines * 10 ** len(fixed)}}}"


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """The number that a normalised text spells out, with whether it is a decimal.

    None for all but integers, decimals, fractions of integers and mixed numbers.
    """
    text = re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", r" \1/\2", text).strip()
    number = _NUMBER.fullmatch(text.replace("- ", "-"))
    if not number:
        return None
    sign, decimal, whole, numerator, denominator = number.groups()
    if decimal:
        value = Fraction(decimal)
    else:
        value = Fraction(int(whole or 0)) + Fraction(int(numerator), int(denominator))
    return -value if sign == "-" else value, "." in (decimal or "")
