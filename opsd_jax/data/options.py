"""The options in `config.data`: the sources of a run's problems, and the texts of its prompts.

docs/data.md explains the fields of a source, docs/prompts.md those of the prompts.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from opsd_jax.data.contexts import CONTEXTS
from opsd_jax.options import ConfigError, fail, option
from opsd_jax.storage.names import NAME, NAMES
from opsd_jax.verify.verifiers import VerifierOptions

SECTIONS = ("train", "heldout", "exclude")  # the fields of DataOptions that hold sources

CHAT_TEMPLATES = "'' for the tokenizer's own, 'none' for plain text, or an existing file"
MEMO_TEXT = "no placeholder except {answer} and {solution}"
REQUEST = "Please reason step by step, and put your final answer within \\boxed{}.\n"
_DAY = re.compile(r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """The column names of a source. A dotted name reads a nested value, such as "reward.answer"."""

    id: str = option("id", "Column with the id; rows without one use their row number.")
    question: str = option(
        "problem",
        "Column with the question.",
        expects="the name of a column",
        check=bool,
    )
    answer: str = option("answer", "Column with the answer; '' if the verifier needs none.")
    solution: str = option(
        "solution", "Column with a worked solution, which rows may lack; '' for none."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifficultyOptions:
    """Selects the rows of a source whose difficulty is in [low, high]."""

    column: str = option("", "Column with the difficulty, a number; '' keeps all rows.")
    low: float = option(-float("inf"), "Lowest difficulty that is kept.", finite=False)
    high: float = option(float("inf"), "Highest difficulty that is kept.", finite=False)

    def check(self, field: str) -> None:
        """Raises ConfigError if `low` is above `high`."""
        _check_range(self.low, self.high, field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRateOptions:
    """Selects the problems whose pass rate in earlier rollouts is in [low, high]."""

    path: str = option("", "JSON lines with the results of earlier rollouts; '' keeps all rows.")
    low: float = option(
        0.0, "Lowest fraction of correct rollouts that is kept.", at_least=0, at_most=1
    )
    high: float = option(
        1.0, "Highest fraction of correct rollouts that is kept.", at_least=0, at_most=1
    )

    def check(self, field: str) -> None:
        """Raises ConfigError if `low` is above `high`."""
        _check_range(self.low, self.high, field)


def _check_range(low: float, high: float, field: str) -> None:
    """Raises ConfigError if `low` is above `high`."""
    if low > high:
        fail(f"{field}.low", low, f"at most {high}, the value of config.{field}.high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The options of one source: a file or directory of problems, and how to read it."""

    path: str = option(
        "",
        "A .jsonl, .jsonl.gz, .json, .csv, .parquet or .arrow file, a directory of a dataset, or a "
        "name on the Hugging Face Hub, such as 'openai/gsm8k/main' (owner, name, directory).",
    )
    split: str = option("", "Split to read from a directory that has several.")
    columns: ColumnOptions = option(ColumnOptions(), "Names of the source's columns.")
    answer_after: str = option(
        "", "The answer is the text after the last occurrence of this in its column, e.g. '####'."
    )
    extra: tuple[str, ...] = option((), "Further columns, kept in Problem.extra for the verifier.")
    weight: float = option(
        1.0, "Training problems are drawn from sources in proportion to their weights.", above=0
    )
    verifier: VerifierOptions = option(VerifierOptions(), "How responses are verified.")
    difficulty: DifficultyOptions = option(DifficultyOptions(), "Keeps rows by difficulty.")
    pass_rates: PassRateOptions = option(PassRateOptions(), "Keeps rows by earlier pass rate.")
    bad_rows: str = option(
        "refuse",
        "'refuse' stops the run at rows that cannot be used; 'drop' leaves them out.",
        choices=("refuse", "drop"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoWording:
    """The user messages that ask the model for a memo on its response, one for each outcome.

    {answer} and {solution} are replaced by the problem's answer and solution.
    """

    correct: str = option(
        "That is right: the answer is {answer}. Write a short memo for solving problems like this "
        "one: the key insight, and the most direct way to the answer. Write the memo alone.",
        "Request for a memo on a correct response.",
        expects=MEMO_TEXT,
    )
    incorrect: str = option(
        "That is wrong: the answer is {answer}. Write a short memo for solving problems like this "
        "one: the key insight, where the attempt went wrong, and how one notices. Write the memo "
        "alone.",
        "Request for a memo on an incorrect response.",
        expects=MEMO_TEXT,
    )
    truncated: str = option(
        "You ran out of room; the answer is {answer}. Write a short memo for solving problems like "
        "this one: the key insight, and a more direct way to the answer. Write the memo alone.",
        "Request for a memo on a truncated response.",
        expects=MEMO_TEXT,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The sources of a run's problems, and the wording of its prompts."""

    train: Mapping[str, SourceOptions] = option({}, "Sources to train on, by name.")
    heldout: Mapping[str, SourceOptions] = option({}, "Sources to evaluate on, by name.")
    exclude: Mapping[str, SourceOptions] = option(
        {}, "Sources, by name, whose questions are removed from the training data."
    )
    heldout_problems: int = option(
        0,
        "Problems of `train` to hold out, the same ones in every run, if `heldout` is empty.",
        at_least=0,
    )
    tokenizer: str = option(
        "",
        "Directory or name on the Hugging Face Hub with a tokenizer.json, or a "
        "'package.module:function' that returns a tokenizer; '' is the model's directory.",
    )
    chat_template: str = option("", "Chat template.", expects=CHAT_TEMPLATES)
    thinking: str = option(
        "",
        "Value of the chat template's `enable_thinking`; '' leaves the template's default.",
        choices=("", "on", "off"),
    )
    system: str = option("", "System message of the chat; '' for none.")
    date: str = option(
        "",
        "Today's date for chat templates that ask for it, as 'YYYY-MM-DD'.",
        expects="a day such as '2026-01-31', or ''",
        check=lambda date: not date or bool(_DAY.fullmatch(date)),
    )
    template_options: Mapping[str, Any] = option({}, "Further variables of the chat template.")
    prompt: str = option(
        "{question}\n" + REQUEST,
        "The user's message to the student, with {question} filled in.",
        expects="a text that contains {question}",
    )
    teacher_prompt: str = option(
        "{question}\n\n{context}\n\n" + REQUEST,
        "The user's message to the teacher, with {question} and the worded {context} filled in.",
        expects="a text that contains {question} and {context}",
    )
    contexts: Mapping[str, str] = option(
        {name: kind.wording for name, kind in CONTEXTS.items() if kind.wording},
        "Wording of each kind of privileged context, with its text filled in for {context}.",
    )
    reminder: str = option(
        "\n\nWait, I recall this. {context}\n\n",
        "Text that repeats the worded {context} inside a response (opsd.reinject_every).",
        expects="a text that contains {context}",
    )
    memo: MemoWording = option(MemoWording(), "How the model is asked for a memo.")

    def check(self, field: str) -> None:
        """Raises ConfigError for an invalid or repeated source name, or a negligible weight."""
        names = Counter(name for section in SECTIONS for name in getattr(self, section))
        for section in SECTIONS:
            for name in getattr(self, section):
                place = f"config.{field}.{section}"
                if not NAME.fullmatch(name):
                    raise ConfigError(f"{place} has a source named {name!r}; expected {NAMES}.")
                if names[name] > 1:
                    raise ConfigError(
                        f"{place} has a source named {name!r}, which another section has as well; "
                        f"expected each name in only one of {', '.join(SECTIONS)}."
                    )
        total = sum(source.weight for source in self.train.values())
        for name, source in self.train.items():
            if source.weight < 1e-6 * total:
                fail(
                    f"{field}.train.{name}.weight",
                    source.weight,
                    f"at least a millionth of the sum of all weights ({total:g}), because a source "
                    "with a smaller weight would never be used",
                )

    def check_sources(self, field: str) -> None:
        """Raises ConfigError for a source without a path.

        `parse` does not call this: `opsd-jax plan` accepts a config whose sources have no path.
        """
        for section in SECTIONS:
            for name, source in getattr(self, section).items():
                if not source.path:
                    fail(f"{field}.{section}.{name}.path", source.path, "a file or directory")
