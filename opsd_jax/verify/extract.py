r"""Extracts the answer that a response marks, for example with `\boxed{}` or "Answer:".

The time is linear in the length of the response. No parser runs here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

LONGEST = 1000  # characters; a longer answer is only compared as text
LONGEST_EMPTY = 50  # characters of a box that has no content except spaces and empty boxes
LONGEST_TEXT = 5000  # characters at the end of a response that convention "text" reads

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$\\]+)")
# Text between two boxes that together give one answer: `\boxed{1}$ and $\boxed{2}`.
_EMPTY = re.compile(r"(?:\\(?:boxed|fbox|text|quad)\b|\\[,;:! ]|[\s{}$.~])*")
_CONNECTIVE = re.compile(
    r"(?:[\s$,;&]|\\[,;:! ()\[\]]|\\q?quad\b|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)*"
)
_ANSWER_LINE = re.compile(
    r"\banswer(?:[ \t]+is)?\**[ \t]*[:\uff1a]\**[ \t]*(?:the (?:final )?answer is[ \t:]*)?(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_HOPE = re.compile(r"\.?\s*I hope it is correct.*", re.IGNORECASE)
_HASHES_LINE = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")


def after_thinking(response: str) -> str | None:
    """Returns the part of a response that follows its thinking.

    Returns:
      The text after the last `</think>`. The whole response if it has no thinking tags. None if its
      thinking does not end.
    """
    _, closed, rest = response.rpartition("</think>")
    if closed:
        return rest
    return None if "<think>" in rest else rest


def boxed(text: str) -> str | None:
    r"""Returns the content of the last box: `\boxed{}`, `\fbox{}` or, without braces, `\boxed 5`.

    Empty boxes are ignored. Consecutive boxes with only commas, "and" or "or" between them count as
    one answer, a list. Otherwise a response could name several answers in a row and be correct with
    the last.
    """
    first = min((i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0), default=None)
    if first is None:
        return None
    boxes: list[tuple[int, int, int]] = []  # start of the box, start and end of its content
    opened: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(text, first):
        if token.group() == "}":
            box = opened.pop() if opened else None
            if box is not None and not _empty(text, box[1], token.start()):
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
    answers = {text[start:end].strip(): None}  # a dict as an ordered set, the last box first
    length = end - start
    for before, start, end in reversed(boxes[:-1]):
        if length > LONGEST or not _CONNECTIVE.fullmatch(text, end + 1, begin):
            break
        begin = before
        length += end - start
        answers.setdefault(text[start:end].strip())
    return ", ".join(reversed(answers))


def _empty(text: str, start: int, end: int) -> bool:
    """Returns whether a box has no content except spaces and empty boxes."""
    return end - start <= LONGEST_EMPTY and _EMPTY.fullmatch(text, start, end) is not None


def hashes(text: str) -> str | None:
    """Returns the rest of the line after the last `####` in a text."""
    lines = _HASHES_LINE.findall(text)
    return lines[-1].strip() if lines else None


def answer_line(text: str) -> str | None:
    """Returns the rest of the line after the last "Answer:", without Markdown around it."""
    lines = _ANSWER_LINE.findall(text)
    return _HOPE.sub("", lines[-1][:LONGEST]).strip(" \t*`") if lines else None


TEXT = "text"
CONVENTIONS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "####": hashes,
    "answer": answer_line,
    TEXT: lambda text: text[-LONGEST_TEXT:].strip(),  # the verifier finds the answer in it
}


def extract(response: str, conventions: Sequence[str] = ("boxed",)) -> str | None:
    """Extracts the answer from a response with the first of `conventions` that finds an answer.

    Args:
      response: text of the response. Only the text after its thinking is read.
      conventions: keys of CONVENTIONS, tried in this order.

    Returns:
      The answer, which may be longer than LONGEST; None if no convention finds one.
    """
    text = after_thinking(response)
    if text is None:
        return None
    found = (CONVENTIONS[name](text) for name in conventions)
    return next((answer for answer in found if answer), None)
