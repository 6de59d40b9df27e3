"""Replaces Unicode characters by the ASCII and TeX spelling of the same text."""

from __future__ import annotations

import re
import unicodedata

MARKS = 30  # combining marks on one letter; no script has as many (Unicode annex 15, section 13)

# Characters with several spellings: full-width ASCII, quotes, dashes, and signs with a TeX command.
_TABLE = (
    {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
    | str.maketrans("\u2018\u2019\u201c\u201d\u2212\u2010\u2011\u2013\u2014", "''\"\"-----")
    | str.maketrans(
        "\u3002\uff61\u3001\uff64\u3010\u3011\u2044\u2215\u2236\uffe0\uffe1\uffe5", "..,,[]//:¢£¥"
    )
    | str.maketrans(
        {
            "\u2026": "...",
            "\u00d7": r"\times ",
            "\u00f7": r"\div ",
            "\u00b7": r"\cdot ",
            "\u22c5": r"\cdot ",
            "\u00b1": r"\pm ",
            "\u00b0": r"^\circ ",
            "\u2103": r"^\circ C",
            "\u2109": r"^\circ F",
            "\u03c0": r"\pi ",
            "\u221e": r"\infty ",
            "\u2205": r"\emptyset ",
            "\u2208": r"\in ",
            "\u222a": r"\cup ",
            "\u2229": r"\cap ",
            "\u2227": r"\land ",
            "\u2228": r"\lor ",
            "\u2248": r"\approx ",
            "\u2264": r"\le ",
            "\u2265": r"\ge ",
            "\u2260": r"\ne ",
            "\u2a7d": r"\le ",
            "\u2a7e": r"\ge ",
            "\u27e8": r"\langle ",
            "\u27e9": r"\rangle ",
            "\u2211": r"\sum ",
            "\u211d": r"\mathbb{R}",
            "\u2124": r"\mathbb{Z}",
        }
    )
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTIONS = re.compile("(?<![⁰¹²³⁴-⁹])[⁰¹²³⁴-⁹]+\u2044[₀-₉]+|[¼-¾⅐-⅞↉]")
_SCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+|[₀-₉]+")


def plain_characters(text: str) -> str:
    r"""Returns a text in NFC, in which Unicode signs have their ASCII or TeX spelling.

    For example, full-width digits become digits, `x¹⁰` becomes `x^{10}`, and `½` becomes
    `\frac{1}{2}`. Invisible characters, such as soft hyphens, are removed.
    """
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", _without_long_marks(text))
    text = _SCRIPTS.sub(_script, _FRACTIONS.sub(_fraction, text)).translate(_TABLE)
    return "".join(char for char in text if unicodedata.category(char) != "Cf")


def _without_long_marks(text: str) -> str:
    """Removes combining marks after the first MARKS in a row, which `normalize` sorts slowly."""
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= MARKS:
            kept.append(char)
    return "".join(kept)


def _fraction(match: re.Match) -> str:
    """Returns a Unicode fraction as a LaTeX fraction."""
    # NFKC writes each of them as digits on both sides of U+2044.
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _script(match: re.Match) -> str:
    """Returns superscript or subscript characters as a TeX script."""
    sign, table = ("_", _SUBSCRIPTS) if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else ("^", _SUPERSCRIPTS)
    digits = match[0].translate(table)
    return sign + (digits if len(digits) == 1 else f"{{{digits}}}")
