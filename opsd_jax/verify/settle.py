"""Compares answers without a parser, fast enough to run outside the worker processes."""

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
# After a plain number, a single letter is a unit; elsewhere it may be a variable.
_LONE_UNIT = re.compile(r"(.*[0-9}]) ?([mgsh])")
_BASED = re.compile(
    r"(?:[a-z]=)?\(?([0-9][0-9a-fA-F]*)\)?(?:(?:_\{?\(?(?:base ?)?| ?base ?)([0-9]+)\)?\}?)?"
)
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_LIST = re.compile(r"[^()\[\]{}=<>]*,[^()\[\]{}=<>]*|\\\{[^()\[\]{}]*,[^()\[\]{}]*\\\}")
_RATIO = re.compile(r"[0-9]+(?:\.[0-9]+)?(?::[0-9]+(?:\.[0-9]+)?)+")
_CAPITALS = re.compile(r"[A-Z]{3,}")  # a triangle or an order of letters, not a product
_COUNTED = re.compile(r"(.*[0-9}])((?: [a-zA-Z]{2,}\.?)+)")


class Pair(NamedTuple):
    """A verification job of the maths verifier: are these two answers equal?

    Attributes:
      gold: the normalised right answer.
      answer: the normalised answer of the response, or a text that contains it.
      free: whether `answer` is such a text.
    """

    gold: str
    answer: str
    free: bool = False


def settle(gold: str, answer: str, *, choice_removed: bool = False) -> Verdict | Pair:
    """Returns the verdict on an answer if no parser is needed, otherwise a `Pair` for a worker.

    Args:
      gold: the right answer.
      answer: the answer of the response.
      choice_removed: whether the letter of a choice was already removed from one of them.
    """
    if len(answer) > LONGEST:
        return verdict_on(gold.strip() == answer.strip())
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return NO_ANSWER
    settled = _compare_notation(gold, answer, choice_removed=choice_removed)
    return _compare_quantities(gold, answer) if settled is None else settled


def _compare_notation(gold: str, answer: str, *, choice_removed: bool) -> Verdict | Pair | None:
    """Compares two answers as text, and as values in notation such as clock times and ratios.

    Returns:
      The verdict, or the job for a worker. None if the texts differ and use no such notation.
    """
    gold_words, answer_words = bare(gold), bare(answer)
    if gold_words == answer_words:
        return MATCH
    if _DOTS.search(gold) or _DOTS.search(answer):
        return MISMATCH
    if _CAPITALS.fullmatch(gold_words) and _CAPITALS.fullmatch(answer_words):
        return MISMATCH
    gold_time, answer_time = _CLOCK.fullmatch(gold_words), _CLOCK.fullmatch(answer_words)
    if gold_time and answer_time:
        halves = {half.lower() for half in (gold_time[3], answer_time[3]) if half}
        return verdict_on(gold_time.group(1, 2) == answer_time.group(1, 2) and len(halves) < 2)
    gold_ratio, answer_ratio = _ratio(gold_words), _ratio(answer_words)
    if gold_ratio and answer_ratio:
        return verdict_on(gold_ratio == answer_ratio)
    if len(gold_ratio) > 2 or len(answer_ratio) > 2:
        return MISMATCH
    if not choice_removed and (settled := _compare_choices(gold, gold_words, answer_words)):
        return settled
    gold_based, answer_based = _BASED.fullmatch(gold_words), _BASED.fullmatch(answer_words)
    if (gold_based and gold_based[2]) or (answer_based and answer_based[2]):
        # The question may fix the base, so a gold without one accepts an answer with one.
        return verdict_on(
            gold_based is not None
            and answer_based is not None
            and gold_based[1] == answer_based[1]
            and gold_based[2] in (None, answer_based[2] or "10")
        )
    return None


def _compare_quantities(gold: str, answer: str) -> Verdict | Pair:
    """Compares units and values of normalised answers. Returns a `Pair` if a parser is needed."""
    (gold, gold_unit), (answer, answer_unit) = quantity(gold), quantity(answer)
    gold_number = plain_number(gold)
    if gold_number and (lone := _LONE_UNIT.fullmatch(answer)):
        answer, answer_unit = lone[1], answer_unit or f"{UNITS[lone[2]]}^1"
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return MISMATCH
    counted = _COUNTED.fullmatch(bare(answer))
    if gold_number and counted and not FACTORS.search(counted[2]):
        answer = counted[1]
    verdict = _compare_numbers(gold, answer)
    if verdict is not None:
        return verdict
    for this, that in ((gold, answer), (answer, gold)):  # a point is not a list of values
        if _TUPLE.fullmatch(this) and _LIST.fullmatch(that):
            return MISMATCH
    return Pair(gold, answer)


def _ratio(text: str) -> list[Fraction]:
    """Divides the terms of a ratio such as 2:4:6 by the first term. Returns [] for other texts."""
    if not _RATIO.fullmatch(text):
        return []
    first, *others = (Fraction(number) for number in text.split(":"))
    return [Fraction(1), *(other / first for other in others)] if first else []


def _compare_choices(gold: str, gold_words: str, answer_words: str) -> Verdict | Pair | None:
    """Compares two answers if at least one begins with a choice letter, as "(C) 12" does.

    Args:
      gold: the normalised right answer.
      gold_words, answer_words: the right answer and the other one, as `bare` returns them.

    Returns:
      The verdict, or the job for a worker. None if neither answer begins with such a letter.
    """
    gold_choice, answer_choice = _CHOICE.fullmatch(gold_words), _CHOICE.fullmatch(answer_words)
    if gold_choice and answer_choice:
        texts = {gold_choice[2], answer_choice[2]} - {""}
        single = not any(_CHOICE.match(text.strip(" ,")) for text in texts)
        return verdict_on(gold_choice[1] == answer_choice[1] and len(texts) < 2 and single)
    if answer_choice and answer_choice[2]:  # "(C) 12" where the gold is 12
        return settle(gold, answer_choice[2], choice_removed=True)
    if gold_choice and gold_choice[2]:
        return settle(gold_choice[2], answer_words, choice_removed=True)
    return None


def _compare_numbers(gold: str, answer: str) -> Verdict | None:
    """Compares two plain numbers or percentages. Returns None for other answers.

    50 % equals both 50 and 0.5.
    """
    percent = [text.endswith("%") for text in (gold, answer)]
    gold_number, answer_number = (plain_number(text.rstrip("%\\ ")) for text in (gold, answer))
    if not gold_number or not answer_number:
        return None
    (gold_value, gold_is_decimal), (value, is_decimal) = gold_number, answer_number
    rounded = gold_is_decimal or is_decimal
    hundredths = Fraction(100) ** (percent[0] - percent[1])  # 100, 1 or 1/100
    return verdict_on(
        any(
            gold_value == value * scale or (rounded and close(gold_value, value * scale))
            for scale in {Fraction(1), hundredths}
        )
    )


def close(a: Any, b: Any) -> bool:
    """Returns whether two numbers differ by at most 5e-7 and by at most 1e-4 of the larger one."""
    difference = abs(a - b)
    return bool(difference * 2_000_000 <= 1 and difference * 10_000 <= max(abs(a), abs(b)))


def understood(text: str) -> bool:
    """Returns whether `settle` can compare this kind of normalised answer without a worker."""
    kinds = (_CHOICE, _CLOCK, _BASED, _RATIO, _CAPITALS)
    return (
        plain_number(text) is not None
        or _DOTS.search(text) is not None
        or any(kind.fullmatch(bare(text)) for kind in kinds)
    )
