"""Text that somebody else wrote: JSON within limits, and messages without control characters.

Model directories and datasets come from anywhere. A damaged or hostile file has to end in an error
that names it, and nothing in it may act on a terminal or imitate a line of a log.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from opsd_jax.options import ConfigError

DOCUMENT_BYTES = 32 * 2**20  # largest JSON file; parsed, it takes up to 25 times as much memory
LISTED = 30  # items that a message lists
LISTED_CHARACTERS = 1000  # longest of these items
DEPTH = 100  # deepest nesting of a JSON value; other code can use recursion on it

# Control characters, line and paragraph separators, characters that change the direction of text,
# and halves of surrogate pairs, which no encoding can write.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str, keep: str = "") -> str:
    r"""Replaces control characters in a text with escape sequences such as `\x1b` and `\n`.

    Args:
      text: the text.
      keep: control characters that stay.
    """
    return _CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def message(text: str) -> str:
    """Returns a message as a terminal or a log should show it.

    Control characters are escaped. Lines after the first are indented, so no text that a message
    quotes can begin a line.
    """
    return re.sub(r"\n(?!  )", "\n  ", escape(text.rstrip("\n"), keep="\n"))


def shown(value: Any, limit: int = 60) -> str:
    """Returns the repr of a value, shortened to `limit` characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(items: Sequence[str], separator: str = ", ", count: int = LISTED) -> str:
    """Returns the first `count` items as one text, and the number of the other items.

    Control characters are escaped, and the end of a long item is left out.
    """
    first = [escape(item[:LISTED_CHARACTERS]) for item in items[:count]]
    more = [f"and {len(items) - count} more"] if len(items) > count else []
    return separator.join([*first, *more])


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: the text; bytes may be in UTF-8, UTF-16 or UTF-32.
      unique_keys: whether an object that has the same key twice is an error. If not, the last value
        counts.

    Raises:
      ValueError: the text is not JSON, or it is nested more than DEPTH levels deep. The message is
        one line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError(f"nested over {DEPTH} levels deep") from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > DEPTH:  # type: ignore[arg-type]
        level = [value]
        for _ in range(DEPTH + 1):
            level = [
                item
                for outer in level
                if isinstance(outer, dict | list)
                for item in (outer.values() if isinstance(outer, dict) else outer)
            ]
        if level:
            raise ValueError(f"nested over {DEPTH} levels deep")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the key-value pairs of a JSON object as a dict. Raises ValueError for repeated keys.

    A repeated key would make its value ambiguous.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {shown(repeated)} occurs twice; expected it once")
    return found


def check_file_name(name: Any) -> str:
    """Returns a name that a file lists, if it is the name of another file in the same directory.

    Raises:
      ValueError: it is not such a name. A path could lead anywhere.
    """
    good = isinstance(name, str) and name.isprintable() and len(name.encode()) <= 255
    if not good or not name or pathlib.Path(name).name != name:
        raise ValueError(f"{shown(name)} is not the name of a file in the directory")
    return name


def read_document(path: pathlib.Path) -> bytes:
    """Returns the content of a regular file of at most DOCUMENT_BYTES bytes.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a regular file, or it is too large.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        text = file.read(DOCUMENT_BYTES + 1)
    if len(text) > DOCUMENT_BYTES:
        raise ValueError(f"over {DOCUMENT_BYTES:,} bytes")
    return text


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file of at most DOCUMENT_BYTES bytes whose top-level value must be an object.

    Raises:
      ConfigError: the file cannot be read or does not hold an object. The message names the file.
    """
    try:
        value = parse_json(read_document(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}; expected a JSON object.") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} contains a JSON value of type {type(value).__name__}; expected an object."
        )
    return value
