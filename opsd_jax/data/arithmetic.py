"""The embedded task: left-to-right chains of arithmetic modulo 10, with verbose reasoning.

A problem has five operands and four operations. One in twenty operands is *misprinted*: the
question shows another digit than the one that the answer is computed from. A hash of the problem
decides which, so a student cannot tell; the worked solution shows the true operands. Thus there are
wrong rollouts that no amount of care avoids (82 % is the ceiling of accuracy) and a teacher that
knows better than the student could: what makes training on incorrect rollouts harmful.

A response, here concise, and one line of it verbose:

    <think> B 5 + 8 3 C 3 * 8 4 D 4 * 4 6 E 6 - 0 6 </think> 6 <eos>
    ... C 3 * 8 4 wait C 3 * 8 4 ok D ...

Each line names the next operand and gives carried value, operation, operand, result. Everything is
a pure function of (index, seed).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence

import grain
import numpy as np

from opsd_jax.data.contexts import Context
from opsd_jax.data.options import DataOptions
from opsd_jax.data.task import Demonstration, Task, check_fits
from opsd_jax.problem import Problem
from opsd_jax.verify.verdict import Verdict
from opsd_jax.verify.verifiers import at_once

MODULUS = 10
LABELS = "ABCDE"
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SPACE = MODULUS ** len(LABELS) * len(OPERATIONS) ** (len(LABELS) - 1)  # all questions: 8.1 million
HELD_OUT = 65_536  # of them, never trained on

MISPRINT_RATE = 0.05  # of operands
SLIP_VERBOSE, SLIP_CONCISE = 0.1, 0.03  # share of wrong results in demonstrations
PRIVILEGED_SHARE = 0.3  # of demonstrations: concise, to a prompt that shows the solution
RESTATE_RATE = 0.3  # of verbose demonstrations begin with the question
SUMMARY_RATE = 0.2  # of verbose demonstrations end with the chain of results
RECHECK_VERBOSE, RECHECK_CONCISE = (0.2, 0.8), (0.0, 0.25)  # range of a line's chance of it
MAX_RECHECKS = 2  # of a line whose results agree
MAX_RESPONSE = 88  # tokens

NOTE = (
    "What this miniature is not: the teacher is concise because its kind of example was concise "
    "in the SFT mix, and one operand in twenty is misprinted by design, so that some rollouts are "
    "wrong in a way that only the teacher can see. Every gate shortens alike; the gate decides "
    "what becomes of accuracy. A prompt never reveals a misprint, so about 82 % is the most that a "
    "student can reach."
)


class WordTokenizer:
    """One token a word; words are separated by spaces."""

    def __init__(self, words: Sequence[str], pad: str, eos: str):
        self._words = tuple(words)
        self._ids = {word: i for i, word in enumerate(words)}
        self.vocab_size = len(self._words)
        self.pad_id, self.eos_ids = self._ids[pad], (self._ids[eos],)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises ValueError that names a word outside the vocabulary."""
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as error:
            raise ValueError(f"no token for the word {error} of {text!r}.") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The words of token ids, special ones included; an id beyond them, which a model with a
        larger vocabulary may sample, reads <unknown>.
        """
        known = len(self._words)
        return " ".join(self._words[i] if i < known else "<unknown>" for i in ids)


TOKENIZER = WordTokenizer(
    [
        *("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<ref>", "</ref>", "?"),
        *map(str, range(MODULUS)),
        *LABELS,
        *OPERATIONS,
        *("problem", "so", "wait", "check", "ok", "hmm"),
    ],
    pad="<pad>",
    eos="<eos>",
)


def _parse(number: int) -> tuple[list[int], list[str]]:
    """The printed operands and the operations of question `number` of the space."""
    operands, operations = [], []
    for _ in LABELS:
        number, digit = divmod(number, MODULUS)
        operands.append(digit)
    for _ in LABELS[1:]:
        number, i = divmod(number, len(OPERATIONS))
        operations.append(tuple(OPERATIONS)[i])
    return operands, operations


def _true_operands(number: int) -> list[int]:
    """The operands that the answer is computed from: some differ from the printed ones."""
    rng = random.Random(number)
    operands, _ = _parse(number)
    return [
        (digit + rng.randrange(1, MODULUS)) % MODULUS if rng.random() < MISPRINT_RATE else digit
        for digit in operands
    ]


def _results(operands: list[int], operations: list[str]) -> list[int]:
    """The carried value at each operand: the first operand, then the result of each line."""
    values = operands[:1]
    for operation, operand in zip(operations, operands[1:], strict=True):
        values.append(OPERATIONS[operation](values[-1], operand) % MODULUS)
    return values


def _question(number: int) -> str:
    operands, operations = _parse(number)
    terms = [f"{LABELS[0]} {operands[0]}"]
    terms += [
        f"{label} {operation} {operand}"
        for label, operation, operand in zip(LABELS[1:], operations, operands[1:], strict=True)
    ]
    return " ".join(terms)


def problem(number: int) -> Problem:
    """Problem `number` in [0, SPACE)."""
    number = int(number)
    operands, (_, operations) = _true_operands(number), _parse(number)
    values = _results(operands, operations)
    lines = [
        f"{label} {carried} {operation} {operand} {result}"
        for label, carried, operation, operand, result in zip(
            LABELS[1:], values, operations, operands[1:], values[1:], strict=False
        )
    ]
    answer = str(values[-1])
    return Problem(number, _question(number), " ".join([*lines, answer]), answer)


def prompt(problem: Problem) -> list[int]:
    """Token ids of the student's prompt (16)."""
    return TOKENIZER.encode(f"<bos> {problem.question} ?")


def informed_prompt(problem: Problem, text: str) -> list[int]:
    """Token ids of the prompt that shows a text, such as the worked solution (39)."""
    return TOKENIZER.encode(f"<bos> {problem.question} ? <ref> {text} </ref>")


def teacher_prompt(problem: Problem, context: Context, limit: int) -> tuple[list[int], bool]:
    """The teacher's prompt, of a context in this task's words; it is never cut."""
    if context.kind == "none":
        return prompt(problem), False
    ids = informed_prompt(problem, context.text)
    return check_fits(ids, limit, problem, "teacher_prompt_tokens"), False


def _think(
    rng: np.random.Generator, operands, operations, recheck_rate, slip_rate, reference=None
) -> list:
    """The lines of a demonstration; a reference, if given, supplies each line's carried value."""
    words: list = []
    carried = operands[0]
    results = []
    for i, (label, operation, operand) in enumerate(
        zip(LABELS[1:], operations, operands[1:], strict=True)
    ):
        right = OPERATIONS[operation](carried, operand) % MODULUS

        def compute(right=right):
            slip = rng.random() < slip_rate
            return (right + rng.integers(1, MODULUS)) % MODULUS if slip else right

        line = [label, carried, operation, operand]
        result = compute()
        words += [*line, result]
        rechecks, agree = 0, True
        while not agree or (rechecks < MAX_RECHECKS and rng.random() < recheck_rate):
            again = compute()
            agree, result = again == result, again
            words += [
                "wait" if rng.random() < 0.5 else "check",
                *line,
                result,
                "ok" if agree else "hmm",
            ]
            rechecks += 1
        results.append(result)
        carried = result if reference is None else reference[i + 1]
    if reference is None and rng.random() < SUMMARY_RATE:
        words += ["so", *results]
    return [*words, "</think>", carried]


def demonstrate(number: int, rng: np.random.Generator) -> Demonstration:
    """A demonstration for SFT: mostly verbose reasoning from the question as printed; in
    PRIVILEGED_SHARE of cases a nearly concise one in answer to the prompt with the solution, which
    takes carried values and answer from it. In both some results are wrong.
    """
    number = int(number)
    operands, operations = _parse(number)
    privileged = rng.random() < PRIVILEGED_SHARE
    while True:
        words: list = ["<think>"]
        if privileged:
            true = _true_operands(number)
            rate = rng.uniform(*RECHECK_CONCISE)
            words += _think(rng, true, operations, rate, SLIP_CONCISE, _results(true, operations))
        else:
            if rng.random() < RESTATE_RATE:
                words += ["problem", *_question(number).split()]
            rate = rng.uniform(*RECHECK_VERBOSE)
            words += _think(rng, operands, operations, rate, SLIP_VERBOSE)
        if len(words) < MAX_RESPONSE:
            break
    text = " ".join(map(str, [*words, "<eos>"]))
    asked = problem(number)
    ids = informed_prompt(asked, asked.solution) if privileged else prompt(asked)
    return Demonstration(ids, TOKENIZER.encode(text))


def verify(problem: Problem, response: str) -> Verdict:
    """Exact: correct if the answer and EOS, and nothing else, follow the last `</think>`."""
    _, found, answer = response.rpartition("</think>")
    if not found:
        return Verdict(False, "no answer")
    right = answer.split() == [problem.answer, "<eos>"]
    return Verdict(right, "match" if right else "mismatch")


def answer_in(problem: Problem, response: str) -> str | None:
    """The one word after the last `</think>`, if EOS follows; for majority votes."""
    _, found, answer = response.rpartition("</think>")
    words = answer.split()
    return words[0] if found and len(words) == 2 and words[1] == "<eos>" else None


class Part:
    """Questions [low, high) of one fixed permutation of them all, which no seed or epoch changes.

    A slice of a shuffled grain data set would not do: grain shuffles each epoch anew, then cuts.
    """

    def __init__(self, low: int, high: int):
        self._numbers = grain.MapDataset.range(SPACE).shuffle(seed=1)
        self._low, self._high = low, high

    def __len__(self) -> int:
        return self._high - self._low

    def __getitem__(self, index: int) -> int:
        return self._numbers[self._low + index]


def task(config: DataOptions) -> Task:
    """The embedded task. Of its section `config.data` it uses nothing.

    Raises:
      ValueError: the config names files, which this task does not read.
    """
    if config.train or config.heldout or config.exclude:
        raise ValueError(
            "it reads no files, and config.data names some; expected "
            "config.task = 'opsd_jax.data.text:task', or none there."
        )
    heldout = grain.MapDataset.source(Part(0, HELD_OUT))
    train = grain.MapDataset.source(Part(HELD_OUT, SPACE))
    return Task(
        tokenizer=TOKENIZER,
        train=train.map(problem),
        heldout=heldout.map(problem),
        demonstrations=lambda seed: train.seed(seed).shuffle().random_map(demonstrate),
        prompt=prompt,
        teacher_prompt=teacher_prompt,
        verify=at_once(verify, answer_in),
        note=NOTE,
    )
