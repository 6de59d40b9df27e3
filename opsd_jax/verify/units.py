r"""Splits answers into a value and a unit, and decides which words after a number are units.

Units, currencies and names of counted things are removed. Other words are not, because they may
change the value ("12 squared", "4 tenths", "5 million") or take it back ("3 or maybe 4").
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

LONGEST_UNIT = 80  # characters

# Spellings of each unit. The first is its name.
_SPELLINGS = [
    "mm millimeter millimeters millimetre millimetres 毫米",
    "cm centimeter centimeters centimetre centimetres 厘米",
    "m meter meters metre metres 米", "km kilometer kilometers kilometre kilometres 千米 公里",
    "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "acre acres",
    "mg milligram milligrams 毫克", "g gram grams gm gms 克", "kg kilogram kilograms kgs 千克 公斤",
    "tonne tonnes ton tons 吨", "lb lbs pound pounds", "oz ounce ounces",
    "l liter liters litre litres 升", "ml milliliter milliliters millilitre millilitres 毫升",
    "gal gallon gallons", "ha hectare hectares 公顷",
    "s sec secs second seconds 秒", "min mins minute minutes 分钟", "h hr hrs hour hours 小时",
    "day days 天", "week weeks", "month months", "year years yr yrs 年",
    "ms millisecond milliseconds",
    "N newton newtons", "J joule joules", "W watt watts", "Pa pascal pascals", "Hz hertz",
    "V volt volts", "A amp amps ampere amperes", "K kelvin kelvins", "C coulomb coulombs",
    "F farad farads", "T tesla teslas", "Wb weber webers", "H henry henries", "Ω ohm ohms",
    "mol mole moles", "eV", "cal calorie calories", "kcal", "atm", "bar", "rad radian radians",
    "rpm", "mpg",
    "degree degrees deg 度", "celsius", "fahrenheit", "B byte bytes", "bit bits",
    "dB decibel decibels",
    "cent cents ¢", "dollar dollars usd us 美元", "euro euros eur €", "gbp £",
    "jpy yen", "cny yuan rmb 元", "¥", "rupee rupees inr rs ₹", "won krw ₩",
    "ruble rubles rub ₽", "chf", "aud", "cad", "unit units",
]  # fmt: skip
UNITS = {name: names.split()[0] for names in reversed(_SPELLINGS) for name in names.split()}
# Units that are products of others.
_DERIVED = {
    "N": "kg m s^-2", "J": "kg m^2 s^-2", "W": "kg m^2 s^-3", "Pa": "kg m^-1 s^-2", "Hz": "s^-1",
    "mph": "mi h^-1", "kmh": "km h^-1", "kph": "km h^-1", "kmph": "km h^-1",
}  # fmt: skip
_PREFIXED = re.compile(
    r"[kMGTmcdnpμ](?:m|g|s|N|J|W|Pa|Hz|V|A|K|C|F|T|mol|eV|Wh|L|l|B|Ω|cal|bar)|Wh"
)
_CURRENCY = re.compile(
    r"([-+]?)(?:(?:\\(?:text|mathrm|mbox)\{ ?)?([A-Za-z]{2,3})\.? ?\}? ?|"
    r"([€£¥₹₩₽¢]))(?=[0-9.])(.*)",
    re.DOTALL,
)
_CURRENCIES = "usd us eur gbp jpy cny rmb inr rs krw rub chf aud cad"

_NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand lakh lac crore million billion trillion quadrillion dozen gross myriad "
    "half third quarter fifth eighth ninth twelfth nth twentieth thirtieth fortieth fiftieth "
    "sixtieth seventieth eightieth ninetieth"
)
_OTHER_FACTORS = (
    "halves sixes twenties k mn bn pi base mod modulo plus minus over divided multiplied raised "
    "squared cubed factorial power powers log ln sin cos tan inverse reciprocal "
    "negative positive doubled tripled quadrupled halved double triple percent percents permille "
    "and or not no non if but maybe perhaps possibly probably likely either neither wrong "
    "incorrect false unless except else otherwise instead versus vs is was equals less greater "
    "least most about approximately roughly almost nearly above below under than to by recurring "
    "repeating"
)
# Words that change the value of a number, or that take it back. They are never part of a unit.
FACTORS = {word + end for word in _NUMERALS.split() for end in ("", "s", "th", "ths")}
FACTORS |= set(_OTHER_FACTORS.split())
# Things that are counted in the singular, and words that may follow what is counted.
_COUNTED_WORDS = (
    "people person man men woman women child children fish sheep deer mice geese feet teeth dice "
    "die cattle fruit money water total altogether each apiece old more fewer left remaining long "
    "tall wide high deep away apart faster slower older younger extra way apple book car student "
    "number integer solution digit point time piece page ticket game ball box boxes egg cookie "
    "cake tree dog cat bird cow horse coin card letter word pair set row column side edge vertex "
    "vertices face path outcome team player group class room trip step turn st nd rd th "
    "个 人 岁 种 本 次 只 件 条 张 辆"
)
_COUNTED = set(_COUNTED_WORDS.split())
_PLURAL = re.compile(r"[a-z]{2,}(?<![sui])s")
_SETTING = r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)"
_SET = re.compile(rf"{_SETTING} ?\{{([^{{}}]*)\}}")
_SET_UNIT = re.compile(
    rf"(?:\\frac\{{ ?)?(?:\\(?:mu|Omega) ?)?{_SETTING}|\^\\circ|\\(?:mu|Omega)(?![a-zA-Z])"
)
_BARE_UNIT = re.compile(r" ?[a-zA-Zμµ€£¥₹₩₽¢\u4e00-\u9fff]")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_VALUE_END = re.compile(r".*(?:[0-9)}]|\\pi ?)", re.DOTALL)
_OPERATOR_END = re.compile(r".*(?:[\\\s^_=,+*/({\[<>-]|\\(?:cdot|times|div|pm|in) ?)", re.DOTALL)
_SIMPLER = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\^\{ ?([-+]?[0-9]) ?\}", r"^\1"),
        (rf"{_SETTING} ?\{{([^{{}}]*)\}}", r" \1 "),
        (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/(\2)"),
        (r"\\mu(?![a-zA-Z]) ?|µ", "μ"),
        (r"\\Omega(?![a-zA-Z]) ?", "Ω"),
        (r"\\(?:cdot|times)(?![a-zA-Z])|\\[,;:! ]|[*~]", " "),
        (r"μ +", "μ"),
    ]
]
_TOKEN = re.compile(
    r" *(?:(/|per\b|an?\b)|([()])|(squared?|sq|cubic|cubed|cu)\b\.?|(平方|立方)|"
    r"([^\W\d_]+|\^\\circ|[€£¥₹₩₽¢])\.?(?:(?: *\^)?([-+]?[0-9])(?![0-9])| +(squared|cubed)\b)?) *"
)


def quantity(text: str, *, gold: bool = False, lone: bool = False) -> tuple[str, str | None]:
    r"""Splits a normalised answer into its value and its unit.

    Args:
      text: a normalised answer.
      gold: whether it is a right answer. Then any words in `\text{}` after the value are a unit,
        except FACTORS.
      lone: whether single letters that are not in `\text{}` are units. They may also be variables.

    Returns:
      `(value, unit)`. The unit is None if there is none, or if it is not made of UNITS.
    """
    if (whole := _SET.fullmatch(text)) and re.match("[-+]?[0-9]", whole[1]):
        text = whole[1]
    if (currency := _CURRENCY.fullmatch(text)) and (name := _currency(currency)):
        return currency[1] + quantity(currency[4], gold=gold)[0], name
    for start in range(max(1, len(text) - LONGEST_UNIT), len(text)):
        value, suffix = text[:start], text[start:]
        if suffix[0] == "^" and TRIGONOMETRY.search(value):
            continue  # the degrees of an angle
        if _SET_UNIT.match(suffix) and not _OPERATOR_END.fullmatch(value[-8:]):
            name = unit_name(suffix)
            if name or is_counted(suffix, gold=gold):
                return value, name
        elif _BARE_UNIT.match(suffix) and _VALUE_END.fullmatch(value[-8:]):
            letters = any(len(word) == 1 for word in re.findall("[a-zA-Z]+", suffix))
            compound = gold and suffix[0] == " " and re.search("[/^]", suffix)
            spaced = not "!" < suffix[0] < "~" or suffix in ("m", "g", "s", "h") or "/" in suffix
            if letters and not compound and not (lone and spaced):
                continue
            name = unit_name(suffix)
            if name or is_counted(suffix):
                return value, name
    return text, None


def _currency(match: re.Match) -> str | None:
    """Returns the name of the currency before a number, or None if the words are no currency."""
    word = (match[2] or match[3]).lower()
    if match[2] and word not in _CURRENCIES.split():
        return None
    return f"{UNITS[word]}^1"


def unit_name(text: str) -> str | None:
    r"""Returns the canonical name of a unit, such as "m^1 s^-2" for `\text{m/s}^2`.

    Returns None if the text is not a product or quotient of UNITS.
    """
    for pattern, new in _SIMPLER:
        text = pattern.sub(new, text)
    powers: Counter[str] = Counter()
    position, sign, group, power, depth = 0, 1, 1, 1, 0
    expected = True  # a factor has to follow
    while position < len(text):
        token = _TOKEN.match(text, position)
        if not token:
            return None
        position = token.end()
        divide, bracket, latin, chinese, name, exponent, word = token.groups()
        if divide:
            if expected and powers:
                return None
            sign, expected = -1, True
        elif bracket:
            group, sign, depth = (sign, 1, depth + 1) if bracket == "(" else (1, 1, depth - 1)
            if depth not in (0, 1):
                return None
        elif latin or chinese:
            power = 2 if (latin or chinese) in ("square", "squared", "sq", "平方") else 3
            expected = True
        else:
            factors = _factors(name)
            if factors is None:
                return None
            power *= int(exponent or {"squared": 2, "cubed": 3}.get(word, 1))
            for factor, own in factors:
                powers[factor] += own * power * sign * group
            sign, power, expected = 1, 1, False
    if expected or depth:
        return None
    return " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power)


def _factors(name: str) -> list[tuple[str, int]] | None:
    """Returns the (unit, exponent) pairs that a unit's name stands for; None if it is unknown."""
    known = UNITS.get(name) or UNITS.get(name.lower())
    if name == "^\\circ":
        known = "degree"
    if derived := _DERIVED.get(known or name) or _DERIVED.get(name.lower()):
        pairs = (factor.partition("^") for factor in derived.split())
        return [(unit, int(exponent or 1)) for unit, _, exponent in pairs]
    if known or _PREFIXED.fullmatch(name):
        return [(known or name, 1)]
    return None


def is_counted(text: str, *, gold: bool = False) -> bool:
    """Returns whether words after a number only say what is counted, as in "42 red apples".

    Args:
      text: the words.
      gold: whether they are part of a right answer, which may count anything.
    """
    text = _SET.sub(r" \1 ", text)
    if not re.fullmatch(r"[^\W\d_ ./]+(?:[ ./]+[^\W\d_ ./]+)*[ .]*", text.strip()):
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not FACTORS.isdisjoint(words):
        return False
    pairs = itertools.pairwise(words)
    counted = next((before for before, word in pairs if word == "of"), words[-1])
    return gold or counted in _COUNTED or counted in UNITS or bool(_PLURAL.fullmatch(counted))
