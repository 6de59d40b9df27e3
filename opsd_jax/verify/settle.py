"""What of an answer can be settled without a parser: quickly, in the caller's process."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from opsd_jax.verify.extract import LONGEST
from opsd_jax.verify.normalise import FACTORS, UNITS, bare, normalise, plain_number, quantity
from opsd_jax.verify.verdict import MATCH, MISMATCH, NO_ANSWER, Verdict, verdict_on

_DOTS = re.compile(r"\\[a-z]?dots[a-z]?(?![a-zA-Z])|\.\.\.|…")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?= )|$)[.:]? ?(.*)")
_CLOCK = re.compile(r"0?([0-9]{1,2}):([0-9]{2})(?: ?([ap])\.?m\.?)?", re.IGNORECASE)
# Behind a plain number a lone letter is a unit; elsewhere it may be a variable.
_LONE_UNIT = re.compile(r"(.*[0-9}]) ?([mgsh])")
_BASED = re.compile(
    r"(?:[a-z]=)?\(?([0-9][0-9a-fA-F]*)\)?(?:(?:_\{?\(?(?:base ?)?| ?base ?)([0-9]+)\)?\}?)?"
)
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_LIST = re.compile(r"[^()\[\]{}=<>]*,[^()\[\]{}=<>]*|\\\{[^()\[\]{}]*,[^()\[\]{}]*\\\}")
_RATIO = re.compile(r"[0-9]+(?:\.[0-9]+)?(?::[0-9]+(?:\.[0-9]+)?)+")
_CAPITALS = re.compile(r"[A-Z]{3,}")  # a triangle, an order: no product
_COUNTED = re.compile(r"(.*[0-9}])((?: [a-zA-Z]{2,}\.?)+)")


class Pair(NamedTuple):
    """What a worker is asked: are these two, normalised, equal?"""

    gold: str
    answer: str
    free: bool = False  # the answer is somewhere in a text


def settle(gold: str, answer: str, *, chosen: bool = False) -> Verdict | Pair:
    """The verdict on an answer where it takes no parser, else the pair to be judged.

    Args:
      gold: the right answer.
      answer: another.
      chosen: the letter of a choice has been taken off.
    """
    if len(answer) > LONGEST:
        return verdict_on(gold.strip() == answer.strip())
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return NO_ANSWER
    words, spoken = bare(gold), bare(answer)
    if words == spoken:
        return MATCH
    if _DOTS.search(gold) or _DOTS.search(answer):
        return MISMATCH
    if _CAPITALS.fullmatch(words) and _CAPITALS.fullmatch(spoken):
        return MISMATCH
    clock, time = _CLOCK.fullmatch(words), _CLOCK.fullmatch(spoken)
    if clock and time:
        halves = {half.lower() for half in (clock[3], time[3]) if half}
        return verdict_on(clock.group(1, 2) == time.group(1, 2) and len(halves) < 2)
    ratio, other_ratio = _ratio(words), _ratio(spoken)
    if ratio and other_ratio:
        return verdict_on(ratio == other_ratio)
    if len(ratio) > 2 or len(other_ratio) > 2:
        return MISMATCH
    if not chosen and (verdict := _choices(words, spoken, gold)):
        return verdict
    based, base = _BASED.fullmatch(words), _BASED.fullmatch(spoken)
    if (based and based[2]) or (base and base[2]):
        # The base that a question asks for stands in an answer more often than in a gold.
        return verdict_on(
            based is not None
            and base is not None
            and based[1] == base[1]
            and based[2] in (None, base[2] or "10")
        )
    (gold, unit), (answer, other) = quantity(gold), quantity(answer)
    asked = plain_number(gold)
    if asked and (lone := _LONE_UNIT.fullmatch(answer)):
        answer, other = lone[1], other or f"{UNITS[lone[2]]}^1"
    if unit and other and unit != other:
        return MISMATCH
    counted = _COUNTED.fullmatch(bare(answer))
    if asked and counted and not FACTORS.search(counted[2]):
        answer = counted[1]
    verdict = _compare(gold, answer)
    if verdict is not None:
        return verdict
    for this, that in ((gold, answer), (answer, gold)):  # a point is no list of values
        if _TUPLE.fullmatch(this) and _LIST.fullmatch(that):
            return MISMATCH
    return Pair(gold, answer)


def _ratio(text: str) -> list[Fraction]:
    """A ratio such as 2:4:6, as multiples of its first number; [] for anything else."""
    if not _RATIO.fullmatch(text):
        return []
    first, *others = (Fraction(number) for number in text.split(":"))
    return [Fraction(1), *(other / first for other in others)] if first else []


def _choices(words: str, spoken: str, gold: str) -> Verdict | Pair | None:
    """What becomes of answers that begin with the letter of a choice; None if none does."""
    right, choice = _CHOICE.fullmatch(words), _CHOICE.fullmatch(spoken)
    if right and choice:
        texts = {right[2], choice[2]} - {""}
        one = not any(_CHOICE.match(text.strip(" ,")) for text in texts)
        return verdict_on(right[1] == choice[1] and len(texts) < 2 and one)
    if choice and choice[2]:  # "(C) 12" where 12 is asked for
        return settle(gold, choice[2], chosen=True)
    if right and right[2]:
        return settle(right[2], spoken, chosen=True)
    return None


def _compare(gold: str, answer: str) -> Verdict | None:
    """The verdict on plain numbers and percentages; 50 % may be given as 50 and as 0.5."""
    percent = [text.endswith("%") for text in (gold, answer)]
    asked, given = (plain_number(text.rstrip("%\\ ")) for text in (gold, answer))
    if not asked or not given:
        return None
    decimal = asked[1] or given[1]
    hundredths = Fraction(100) ** (percent[0] - percent[1])  # 100, 1 or 1/100
    return verdict_on(
        any(
            asked[0] == given[0] * scale or (decimal and close(asked[0], given[0] * scale))
            for scale in {Fraction(1), hundredths}
        )
    )


def close(a: Any, b: Any) -> bool:
    """Equal as far as decimals tell: to half of the sixth place, and to a relative 1e-4."""
    difference = abs(a - b)
    return bool(difference * 2_000_000 <= 1 and difference * 10_000 <= max(abs(a), abs(b)))


def understood(text: str) -> bool:
    """Whether a normalised answer is of a kind that is compared here."""
    kinds = (_CHOICE, _CLOCK, _BASED, _RATIO, _CAPITALS)
    return (
        plain_number(text) is not None
        or _DOTS.search(text) is not None
        or any(kind.fullmatch(bare(text)) for kind in kinds)
    )
