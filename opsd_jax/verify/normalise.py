"""Normalises answers as text, splits off units, and reads plain numbers without a parser."""

from __future__ import annotations

import re
from fractions import Fraction

_DELIMITED = re.compile(r"(?:\$\$?(.*?)\$\$?|\\\[(.*)\\\]|\\\((.*)\\\))[.\s]*", re.DOTALL)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}"
)
_NAMES = [
    "mm millimeter millimeters millimetres", "cm centimeter centimeters centimetres",
    "m meter meters metre metres", "km kilometer kilometers kilometres",
    "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
    "mg milligram milligrams", "g gram grams", "kg kilogram kilograms",
    "lb lbs pound pounds", "oz ounce ounces", "l liter liters litre litres",
    "ml milliliter milliliters millilitres", "gal gallon gallons",
    "s sec second seconds", "min mins minute minutes", "h hr hrs hour hours", "day days",
    "week weeks", "month months", "year years", "cent cents", "dollar dollars",
    "degree degrees", "rad radian radians", "celsius", "fahrenheit", "unit units",
]  # fmt: skip
UNITS = {name: names.split()[0] for names in _NAMES for name in names.split()}
_SPEEDS = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
_UNIT = re.compile(
    r"(.*[^\\\s^_=,+*/-]) ?"
    r"(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox)\{([a-zA-Z ./]*)\}|"
    rf"(?<=[0-9}}])[ ]?({'|'.join(name for name in UNITS if len(name) > 1)})|"
    r"\^\{?\\circ\}?)"
    r"(?:\^\{?([23])\}?)?",
    re.DOTALL,
)
# Words after a number that are not a unit but change its value.
FACTORS = re.compile(
    r"\b(?:and|or|not|no|if|pi|million|billion|trillion|thousand|hundred|dozen|half|base|mod)\b",
    re.IGNORECASE,
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*\{?([0-9]+)\}?")
_THOUSANDS = re.compile(
    r"((?:\\?\$)?[+-]?[1-9][0-9]{0,2})((?:(?:,|\{,\}|,?\\[!,]| )[0-9]{3})+)(\.[0-9]+)?"
)
_NUMBER = re.compile(
    r"([+-]?)(?:([0-9]*\.[0-9]+|[0-9]+\.?)|(?:([0-9]+) )?([0-9]+)/0*([1-9][0-9]*))"
)

_ARGUMENT = r"\\[a-zA-Z]+|[0-9a-zA-Z]"

# (pattern, replacement), applied in this order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\?\$", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle)(?![a-zA-Z])", ""),
        (r"(?<=[0-9])(?:,\\!|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ""),  # thousands
        (r"(?<=[0-9])\\,(?=[0-9])", " "),
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
        (r"\\(?:text|mathrm|operatorname)\{\s*([eid])\s*\}", r"\1"),  # upright constants
        (r"\\(?:text|mathrm)\{\s*pi\s*\}|π", r"\\pi "),
        (r"\\(?:large|Large|bf|it|rm|textstyle)(?![a-zA-Z])|\*\*", ""),
        (r"\\underline\{([^{}]*)\}", r"\1"),
        (r"√\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^?(?:\\degree(?![a-zA-Z])|°)", r"^\\circ"),
        (r"\^\{?\\circ\}?\s*\\(?:text|mathrm)\{\s*C\s*\}", r"\\text{celsius}"),
        (r"\^\{?\\circ\}?\s*\\(?:text|mathrm)\{\s*F\s*\}", r"\\text{fahrenheit}"),
        ("²", "^2"),
        ("³", "^3"),
        (r"\\colon(?![a-zA-Z])|\{:\}", ":"),
        (r"\\text\{\s*percent\s*\}|\bpercent(?:age)?\b", r"\\%"),
        (r"\s+", " "),
        # A space is significant only between words and between digits.
        (r" ?([^0-9a-zA-Z\\ ]) ?| (?=\\)", r"\1"),
        (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ", "),  # else math-verify reads one number
        (r"^\\approx(?![a-zA-Z])|(?:(?<!\.)\.|[,\\ ])+$", ""),
    ]
]


def delimited(text: str) -> str | None:
    """Returns the formula inside delimiters such as `$...$`. Returns None for any other text."""
    formula = _DELIMITED.fullmatch(text)
    inside = formula and next(group for group in formula.groups() if group is not None)
    return None if not inside or "$" in inside else inside


def quantity(text: str) -> tuple[str, str | None]:
    r"""Splits a normalised answer into its value and its unit.

    A unit is the content of `\text{}` or a similar command, a known word after a digit, or the
    degree sign.

    Returns:
      `(value, unit)`. The unit is None if there is none, or if it is not made of UNITS.
    """
    found = _UNIT.fullmatch(text)
    if not found:
        return text, None
    value, setting, word, power = found.groups()
    words = (word or ("degree" if setting is None else setting)).lower()
    return (text, None) if FACTORS.search(words) else (value, _unit(words, power or "1"))


def _unit(words: str, power: str) -> str | None:
    """Returns the canonical name of a unit, such as "ft^2", or None if the unit is unknown."""
    if squared := re.match(r"\s*(?:(square|sq)|cubic|cu)[. ]\s*", words):
        words, power = words[squared.end() :], "2" if squared[1] else "3"
    name = re.sub(r"[ .]", "", words.replace(" per ", "/"))
    parts = _SPEEDS.get(name, name).split("/")
    if not all(part in UNITS for part in parts):
        return None
    first, *others = (UNITS[part] for part in parts)
    return "/".join([f"{first}^{power}", *others])


def normalise(answer: str) -> str:
    """Removes typesetting from an answer, so that answers can be compared as texts."""
    text = answer.strip()
    inside = delimited(text)
    text = _REPEATING.sub(_as_fraction, text if inside is None else inside)
    if number := _THOUSANDS.fullmatch(text.strip(" .$")):
        text = number[1] + re.sub("[^0-9]", "", number[2]) + (number[3] or "")
    if "\\begin" not in text:  # in an environment, two backslashes end a row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def bare(text: str) -> str:
    r"""Returns a normalised answer without `\text{}` and similar commands around words."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip().removesuffix(".")


def _as_fraction(decimal: re.Match) -> str:
    """Returns a repeating decimal as a LaTeX fraction."""
    whole, fixed, period = decimal.groups()
    before = int(f"0{whole}{fixed}")
    nines = 10 ** len(period) - 1
    return rf"\frac{{{before * nines + int(period)}}}{{{nines * 10 ** len(fixed)}}}"


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """Parses a normalised text as a number. Returns its value, and whether it has a decimal point.

    Returns None for everything except integers, decimals, fractions of integers and mixed numbers.
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
