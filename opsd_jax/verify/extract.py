"""The answer in a response, by the data's convention. Linear in the text; no parser is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

LONGEST = 1000  # characters of an answer; of a longer one only that it is the same is looked at
LONGEST_TEXT = 5000  # characters at a response's end in which an answer is looked for

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$\\]+)")
# What may stand between two boxes that give one answer: `\boxed{1}$ and $\boxed{2}`.
_CONNECTIVE = re.compile(
    r"(?:[\s$,;&]|\\[,;:! ()\[\]]|\\q?quad\b|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)*"
)
_ANSWER_LINE = re.compile(
    r"\banswer(?:[ \t]+is)?\**[ \t]*:\**[ \t]*(?:the (?:final )?answer is[ \t:]*)?(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_HOPE = re.compile(r"\.?\s*I hope it is correct.*", re.IGNORECASE)
_HASHES_LINE = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")


def after_thinking(response: str) -> str | None:
    """What follows the last `</think>`; all of it where nobody thought aloud; None where the
    thinking has no end.
    """
    _, closed, rest = response.rpartition("</think>")
    if closed:
        return rest
    return None if "<think>" in rest else rest


def boxed(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{}` (or `\fbox`, or `\boxed 5`).

    Boxes with nothing but commas, "and" or "or" between them are one answer, their list: one cannot
    name several in a row and be right with the last.
    """
    first = min((i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0), default=None)
    if first is None:
        return None
    boxes: list[tuple[int, int, int]] = []  # begin, content's begin, its end
    opened: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(text, first):
        if token.group() == "}":
            box = opened.pop() if opened else None
            if box is not None:
                boxes.append((*box, token.start()))
        elif token.group() == "{":
            opened.append(None)
        elif token.group().endswith("{") and len(token.group()) > 2:
            opened.append((token.start(), token.end()))
    if not boxes:
        bare = _BARE_BOX.findall(text, first)
        return bare[-1] if bare else None
    boxes.sort()
    begin, start, end = boxes[-1]
    answers = {text[start:end].strip(): None}  # in order, the last first
    length = end - start
    for before, start, end in reversed(boxes[:-1]):
        if length > LONGEST or not _CONNECTIVE.fullmatch(text, end + 1, begin):
            break
        begin = before
        length += end - start
        answers.setdefault(text[start:end].strip())
    return ", ".join(reversed(answers))


def hashes(text: str) -> str | None:
    """What stands behind the last `####`, to the end of its line."""
    lines = _HASHES_LINE.findall(text)
    return lines[-1].strip() if lines else None


def answer_line(text: str) -> str | None:
    """What stands behind the last "Answer:", to the end of its line, without Markdown's stars."""
    lines = _ANSWER_LINE.findall(text)
    return _HOPE.sub("", lines[-1][:LONGEST]).strip().strip("*").strip() if lines else None


TEXT = "text"
CONVENTIONS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "####": hashes,
    "answer": answer_line,
    TEXT: lambda text: text[-LONGEST_TEXT:].strip(),  # somewhere: the verifier has to find it
}


def extract(response: str, conventions: Sequence[str] = ("boxed",)) -> str | None:
    """The answer in a response by the first of the conventions that finds one; None if none does.

    Args:
      response: its text; only what follows the last `</think>` is looked at.
      conventions: names in CONVENTIONS, tried in this order.

    Returns:
      The answer, which may be longer than LONGEST.
    """
    text = after_thinking(response)
    if text is None:
        return None
    found = (CONVENTIONS[name](text) for name in conventions)
    return next((answer for answer in found if answer), None)
