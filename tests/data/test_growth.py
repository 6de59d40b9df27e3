"""Functions of the main process that read text of models and datasets take linear time.

A worker process can be stopped, but nobody stops the main process. Each function reads 100,000
characters of each pattern within a second. tests/verify has the same test for the verifier.
"""

import json
import time

import pytest

from opsd_jax.data import sources, text
from opsd_jax.data.chat import Chat, ChatTemplate, cut_to_fit
from opsd_jax.data.duplicates import normalise, without_duplicates
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.evaluation import markers, markup, tables
from opsd_jax.problem import Problem
from opsd_jax.stages.privileged import reminder_places
from opsd_jax.storage import foreign

LENGTH, SECONDS = 100_000, 1.0
PATTERNS = [
    "a", " ", "\n", ". ", "$", "\\[", "{", "^ {", "1 ", "\\text{", "<think>", "a\u0316\u0301", " [",
    " ±", "wait ", "`|", "\x1b", "\ud800",
]  # fmt: skip

TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role + m.content | trim }}{{ m.content.split('</think>')[-1] }}"
    "{% endfor %}",
    {},
)
TOKENIZER = ByteTokenizer()
PLAIN = Chat(TOKENIZER, TEMPLATE)


def encodable(read):
    """Returns a reader that gets no half of a surrogate pair, which no dataset row may contain."""
    return lambda value: read(value.encode(errors="ignore").decode())


def problem(value):
    return Problem("a", value, value, value)


READERS = {
    "reminder_places of characters": lambda value: reminder_places(list(value), 10),
    "reminder_places of two tokens": lambda value: reminder_places([value, value], 1),
    "reminder_places in thinking": lambda value: reminder_places(["<think>", *value], 7),
    "normalise": normalise,
    "without_duplicates": encodable(
        lambda value: without_duplicates({"a": [problem(value)]}, {"b": [value]})
    ),
    "fill": lambda value: text.fill(value, question="q", context="c"),
    "render": lambda value: TEMPLATE.render([{"role": "user", "content": value}]),
    "prompt": encodable(PLAIN.prompt),
    "next_turn": encodable(PLAIN.next_turn),
    "cut_to_fit": encodable(lambda value: cut_to_fit(TOKENIZER.encode, value, 99)),
    "markers": markers.count,
    "highlight_markers": markup.highlight_markers,
    "small_uncertainty": markup.small_uncertainty,
    "shorten": markup.shorten,
    "markdown": markup.markdown,
    "table": lambda value: tables.Table(["a"], [[value]]).markdown(),
    "escape": foreign.escape,
    "message": foreign.message,
    "shown": foreign.shown,
    "parse_json": lambda value: foreign.parse_json(json.dumps({value: value})),
    "reach": lambda value: sources.reach({"a": value}, value),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_time_is_linear(name):
    read = READERS[name]
    for pattern in PATTERNS:
        value = f"x{(pattern * LENGTH)[:LENGTH]}\n y"
        began = time.process_time()
        read(value)
        assert time.process_time() - began < SECONDS, pattern
