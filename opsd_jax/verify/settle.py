"""What of an answer can be settled without a parser: quickly, in the caller's process."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from opsd_jax.verify.extract import LONGEST
from opsd_jax.verify.normalise import UNITS, bare, normalise, plain_number, quantity
from opsd_jax.verify.verdict import MATCH, MISMATCH, NO_ANSWER, Verdict, verdict_on

_DOTS = re.compile(r"\\[a-z]?dots[a-z]?(?![a-zA-Z])|\.\.\.|…")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?= )|$)[.:]? ?(.*)")
_CLOCK = re.compile(r"0?([0-9]{1,2}):([0-9]{2})(?: ?([ap])\.?m\.?)?", re.IGNORECASE)
# Behind a plain number a lone letter is a unit; elsewhere it may be a variable.
_LONE_UNIT = re.compile(r"(.*[0-9}]) ?([mgsh])")
_BASED = re.compile(r"\(?([0-9][0-9a-fA-F]*)\)?(?:_\{?(?:base ?)?([0-9]+)\}?)?")
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_LIST = re.compile(r"[^()\[\]{}=<>]*,[^()\[\]{}=<>]*")


class Pair(NamedTuple):
    """What a worker is asked: are these two, normalised, equal?"""

    gold: str
    answer: str
    free: bool = False  # the answer is somewhere in a text


def settle(gold: str, answer: str) -> Verdict | Pair:
    """The verdict on an answer where it takes no parser, else the pair to be judged."""
    if len(answer) > LONGEST:
        return verdict_on(gold.strip() == answer.strip())
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return NO_ANSWER
    if bare(gold) == bare(answer):
        return MATCH
    if _DOTS.search(gold) or _DOTS.search(answer):
        return MISMATCH
    clock, time = _CLOCK.fullmatch(bare(gold)), _CLOCK.fullmatch(bare(answer))
    if clock and time:
        halves = {half.lower() for half in (clock[3], time[3]) if half}
        return verdict_on(clock.group(1, 2) == time.group(1, 2) and len(halves) < 2)
    (gold, unit), (answer, other) = quantity(gold), quantity(answer)
    if plain_number(gold) and (lone := _LONE_UNIT.fullmatch(answer)):
        answer, other = lone[1], other or f"{UNITS.get(lone[2], lone[2])}^1"
    if unit and other and unit != other:
        return MISMATCH
    asked, given = plain_number(gold), plain_number(answer)
    if asked and given:
        decimal = asked[1] or given[1]
        return verdict_on(asked[0] == given[0] or (decimal and close(asked[0], given[0])))
    words, spoken = bare(gold), bare(answer)
    chosen, choice = _CHOICE.fullmatch(words), _CHOICE.fullmatch(spoken)
    if chosen and choice:
        texts = {chosen[2], choice[2]} - {""}
        return verdict_on(chosen[1] == choice[1] and len(texts) < 2)
    if choice and choice[2]:  # "(C) 12" where 12 is asked for
        return settle(gold, choice[2])
    if chosen and chosen[2]:
        return settle(chosen[2], answer)
    based, base = _BASED.fullmatch(words), _BASED.fullmatch(spoken)
    if (based and based[2]) or (base and base[2]):
        both = [number and (number[1], number[2] or "10") for number in (based, base)]
        return verdict_on(both[0] == both[1])
    for this, that in ((gold, answer), (answer, gold)):  # a point is no list of values
        if _TUPLE.fullmatch(this) and _LIST.fullmatch(that):
            return MISMATCH
    return Pair(gold, answer)


def close(a: Any, b: Any) -> bool:
    """Equal as far as decimals tell: to half of the sixth place, and to a relative 1e-4."""
    difference = abs(a - b)
    return bool(difference * 2_000_000 <= 1 and difference * 10_000 <= max(abs(a), abs(b)))


def understood(text: str) -> bool:
    """Whether a normalised answer is of a kind that is compared here."""
    kinds = (_CHOICE, _CLOCK, _BASED)
    return plain_number(text) is not None or any(kind.fullmatch(bare(text)) for kind in kinds)
