"""Compares answers without a parser, fast enough to run outside the worker processes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from opsd_jax.verify.extract import LONGEST
from opsd_jax.verify.lists import CONNECTIVE, listing
from opsd_jax.verify.normalise import bare, normalise, plain_number
from opsd_jax.verify.units import quantity
from opsd_jax.verify.verdict import MATCH, MISMATCH, NO_ANSWER, Verdict, verdict_on

_DOTS = re.compile(r"\\[a-z]?dots[a-z]?(?![a-zA-Z])|\.\.\.|…")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?= )|$)[.:]? ?(.*)")
_CLOCK = re.compile(r"0?([0-9]{1,2}):([0-9]{2})(?: ?([ap])\.?m\.?)?", re.IGNORECASE)
_BASED = re.compile(
    r"(?:[a-z]=)?\(?(-?[0-9][0-9a-fA-F]*)\)?(?:(?:_\{?\(?(?:base ?)?| ?base ?)([0-9]+)\)?\}?)?"
)
_RATIO = re.compile(r"[0-9]+(?:\.[0-9]+)?(?::[0-9]+(?:\.[0-9]+)?)+")
_CAPITALS = re.compile(r"[A-Z]{3,}")  # a triangle or an order of letters, not a product
# After the letter of a choice: another choice, or words that take it back.
_HEDGE = re.compile(
    r"\)?[-+*/^=,?]|(?!\)?[.:]? ?(?i:both|all|none|neither|only)\b)"
    r".*(?:\([A-J]\)|(?<![a-zA-Z])(?i:or|maybe|possibly|perhaps|probably|either)(?![a-zA-Z]))"
)


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
    if max(len(gold), len(answer)) > LONGEST:
        return verdict_on(gold.strip() == answer.strip())
    gold, answer = _normalise_both(gold, answer)
    if not answer:
        return NO_ANSWER
    settled = _compare_notation(gold, answer, choice_removed=choice_removed)
    return _compare_quantities(gold, answer) if settled is None else settled


def _normalise_both(gold: str, answer: str) -> tuple[str, str]:
    """Normalises two answers. If one is a list, `60,120` in the other is read as a list too."""
    normal = [normalise(text) for text in (gold, answer)]
    lists = [len(listing(text).parts) > 1 for text in normal]
    if lists[0] != lists[1]:
        normal[lists[0]] = normalise((gold, answer)[lists[0]].replace(",", ", "))
    return normal[0], normal[1]


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
    gold, gold_units = without_units(gold, gold=True)
    numbers = all(plain_number(part) for part in listing(gold).parts)
    answer, answer_units = without_units(answer, lone=numbers)
    if gold_units and answer_units and gold_units != answer_units:
        return MISMATCH
    right = compare_numbers(gold, answer)
    return Pair(gold, answer) if right is None else verdict_on(right)


def without_units(text: str, *, gold: bool = False, lone: bool = False) -> tuple[str, set[str]]:
    """Removes the units from a normalised answer and from its parts, if it is a list.

    Args:
      text: a normalised answer.
      gold, lone: see `units.quantity`.

    Returns:
      The answer without units, and the names of the units.
    """
    text, unit = quantity(text, gold=gold, lone=lone)
    units = {unit} if unit else set()
    brackets, parts, names = listing(text)
    split = [quantity(part, gold=gold, lone=lone) for part in parts]
    values = [
        f"{name}={value}" if name else value for name, (value, _) in zip(names, split, strict=True)
    ]
    if [value for value, _ in split] == list(parts) or len(parts) == 1 or CONNECTIVE.search(text):
        return text, units
    units |= {unit for _, unit in split if unit}
    escape = "\\" if brackets == "{}" else ""
    before, after = (escape + bracket for bracket in brackets) if brackets else ("", "")
    return f"{before}{', '.join(values)}{after}", units


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
        hedged = not gold_choice[2] and _HEDGE.match(answer_words, answer_choice.end(1))
        same = gold_choice[1] == answer_choice[1] and len(texts) < 2
        return verdict_on(same and single and not hedged)
    if answer_choice and answer_choice[2]:  # "(C) 12" where the gold is 12
        return settle(gold, answer_choice[2], choice_removed=True)
    if gold_choice and gold_choice[2]:
        return settle(gold_choice[2], answer_words, choice_removed=True)
    return None


def compare_numbers(gold: str, answer: str) -> bool | None:
    """Returns whether two plain numbers or percentages are equal. Returns None for other answers.

    50 % equals both 50 and 0.5.
    """
    percent = [text.endswith("%") for text in (gold, answer)]
    gold_number, answer_number = (plain_number(text.rstrip("%\\ ")) for text in (gold, answer))
    if not gold_number or not answer_number:
        return None
    (gold_value, gold_is_decimal), (value, is_decimal) = gold_number, answer_number
    rounded = gold_is_decimal or is_decimal
    hundredths = Fraction(100) ** (percent[0] - percent[1])  # 100, 1 or 1/100
    return any(
        gold_value == value * scale or (rounded and close(gold_value, value * scale))
        for scale in {Fraction(1), hundredths}
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
