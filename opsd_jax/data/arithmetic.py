"""The built-in task: chains of arithmetic modulo 10, evaluated from left to right.

A problem has five operands and four operations. One in twenty operands is *misprinted*: the
question shows a digit that differs from the one used for the answer. A random generator seeded with
the problem decides which, so the student cannot know. The worked solution shows the true operands.
Two properties of real data follow. Some rollouts are incorrect however careful the student is (its
accuracy cannot exceed 82 %). The teacher knows more than the student can. Both together make
training on incorrect rollouts harmful.

This is a concise response, and below it one step of a verbose response:

    <think> B 5 + 8 3 C 3 * 8 4 D 4 * 4 6 E 6 - 0 6 </think> 6 <eos>
    ... C 3 * 8 4 wait C 3 * 8 4 ok D ...

Each step has the label of the next operand, the carried value, the operation, the operand and the
result. All data is a pure function of (index, seed).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence

import grain
import numpy as np

from opsd_jax.data.contexts import CONTEXTS, Context
from opsd_jax.data.options import DataOptions
from opsd_jax.data.task import Demonstration, Task, check_fits, check_no_sources
from opsd_jax.problem import Problem
from opsd_jax.verify.verdict import Verdict
from opsd_jax.verify.verifiers import at_once

MODULUS = 10
LABELS = "ABCDE"
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SPACE = MODULUS ** len(LABELS) * len(OPERATIONS) ** (len(LABELS) - 1)  # 8.1 million questions
HELD_OUT = 65_536  # questions that are never trained on

MISPRINT_RATE = 0.05  # fraction of operands
SLIP_VERBOSE, SLIP_CONCISE = 0.1, 0.03  # fraction of wrong results in demonstrations
PRIVILEGED_FRACTION = 0.3  # demonstrations that are concise, after a prompt with the solution
RESTATE_RATE = 0.3  # fraction of verbose demonstrations that begin with the question
SUMMARY_RATE = 0.2  # fraction of verbose demonstrations that end with the chain of results
# Range of the probability that a step is computed again.
RECHECK_VERBOSE, RECHECK_CONCISE = (0.2, 0.8), (0.0, 0.25)
MAX_RECHECKS = 2  # per step, once two results agree
MAX_RESPONSE = 88  # tokens

NOTE = (
    "The limits of this small task: the teacher is concise because the SFT data was concise for "
    "prompts with a solution, and one operand in twenty is misprinted by design, so that some "
    "rollouts are incorrect in a way that only the teacher can see. Every gate shortens the "
    "responses equally; the gate decides what happens to the accuracy. A prompt never reveals a "
    "misprint, so a student can reach at most about 82 %."
)


class WordTokenizer:
    """A tokenizer for texts whose tokens are separated by spaces.

    Attributes:
      vocab_size: number of tokens.
      pad_id: id of the padding token.
      eos_ids: the one id that ends a response.
    """

    def __init__(self, tokens: Sequence[str], pad: str, eos: str):
        """Creates a tokenizer from the text of each token.

        Args:
          tokens: text of each token; its index is its id.
          pad: text of the padding token.
          eos: text of the end-of-sequence token.
        """
        self._tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(tokens)}
        self.vocab_size = len(self._tokens)
        self.pad_id, self.eos_ids = self._ids[pad], (self._ids[eos],)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text. Raises ValueError for a token outside the vocabulary."""
        try:
            return [self._ids[token] for token in text.split()]
        except KeyError as error:
            raise ValueError(
                f"{text!r} contains {error}, which is not in the vocabulary; expected only "
                "tokens of the vocabulary, separated by spaces."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, including special tokens.

        Ids beyond the vocabulary, which a model with a larger one may sample, become "<unknown>".
        """
        known = len(self._tokens)
        return " ".join(self._tokens[i] if i < known else "<unknown>" for i in ids)


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
    """Decodes a question number into the operands and operations that the question shows."""
    operands, operations = [], []
    for _ in LABELS:
        number, digit = divmod(number, MODULUS)
        operands.append(digit)
    for _ in LABELS[1:]:
        number, i = divmod(number, len(OPERATIONS))
        operations.append(tuple(OPERATIONS)[i])
    return operands, operations


def _true_operands(number: int) -> list[int]:
    """Returns the operands that determine the answer. The question may show other values."""
    rng = random.Random(number)
    operands, _ = _parse(number)
    return [
        (digit + rng.randrange(1, MODULUS)) % MODULUS if rng.random() < MISPRINT_RATE else digit
        for digit in operands
    ]


def _results(operands: list[int], operations: list[str]) -> list[int]:
    """Returns the running result of the chain: the first operand, then the result of each step."""
    values = operands[:1]
    for operation, operand in zip(operations, operands[1:], strict=True):
        values.append(OPERATIONS[operation](values[-1], operand) % MODULUS)
    return values


def _question(number: int) -> str:
    """Returns the text of question `number`."""
    operands, operations = _parse(number)
    terms = [f"{LABELS[0]} {operands[0]}"]
    terms += [
        f"{label} {operation} {operand}"
        for label, operation, operand in zip(LABELS[1:], operations, operands[1:], strict=True)
    ]
    return " ".join(terms)


def problem(number: int) -> Problem:
    """Returns the `Problem` with a given number, which must be in [0, SPACE)."""
    number = int(number)
    operands, (_, operations) = _true_operands(number), _parse(number)
    values = _results(operands, operations)
    steps = [
        f"{label} {carried} {operation} {operand} {result}"
        for label, carried, operation, operand, result in zip(
            LABELS[1:], values, operations, operands[1:], values[1:], strict=False
        )
    ]
    answer = str(values[-1])
    return Problem(number, _question(number), " ".join([*steps, answer]), answer)


def prompt(problem: Problem) -> list[int]:
    """Returns the 16 token ids of the student's prompt for a problem."""
    return TOKENIZER.encode(f"<bos> {problem.question} ?")


def informed_prompt(problem: Problem, text: str) -> list[int]:
    """Returns the token ids of a prompt that shows the question and a privileged text.

    With the worked solution, the prompt has 39 tokens.
    """
    return TOKENIZER.encode(f"<bos> {problem.question} ? <ref> {text} </ref>")


def teacher_prompt(problem: Problem, context: Context, limit: int) -> tuple[list[int], bool]:
    """Returns the token ids of the teacher's prompt, and whether it was cut, which is always False.

    Raises:
      DataError: the prompt has more than `limit` tokens.
    """
    if not CONTEXTS[context.kind].wording:
        return prompt(problem), False
    ids = informed_prompt(problem, context.text)
    return check_fits(ids, limit, problem, "teacher_prompt_tokens"), False


def _think(
    rng: np.random.Generator, operands, operations, recheck_rate, slip_rate, reference=None
) -> list:
    """Generates the tokens of a demonstration: its reasoning steps, `</think>` and the answer.

    Args:
      rng: source of all random choices.
      operands: one per label.
      operations: one per step.
      recheck_rate: probability that a step is computed again.
      slip_rate: probability of a wrong result.
      reference: the carried values, if known; otherwise they are the results of the steps.
    """
    tokens: list = []
    carried = operands[0]
    results = []
    for i, (label, operation, operand) in enumerate(
        zip(LABELS[1:], operations, operands[1:], strict=True)
    ):
        right = OPERATIONS[operation](carried, operand) % MODULUS

        def compute(right=right):
            slip = rng.random() < slip_rate
            return (right + rng.integers(1, MODULUS)) % MODULUS if slip else right

        step = [label, carried, operation, operand]
        result = compute()
        tokens += [*step, result]
        rechecks, agree = 0, True
        while not agree or (rechecks < MAX_RECHECKS and rng.random() < recheck_rate):
            again = compute()
            agree, result = again == result, again
            tokens += [
                "wait" if rng.random() < 0.5 else "check",
                *step,
                result,
                "ok" if agree else "hmm",
            ]
            rechecks += 1
        results.append(result)
        carried = result if reference is None else reference[i + 1]
    if reference is None and rng.random() < SUMMARY_RATE:
        tokens += ["so", *results]
    return [*tokens, "</think>", carried]


def demonstrate(number: int, rng: np.random.Generator) -> Demonstration:
    """Returns a random SFT example for problem `number`: a prompt and a response.

    Most demonstrations reason verbosely from the printed question. PRIVILEGED_FRACTION of them are
    nearly concise. Their prompt shows the solution, from which they take the carried values and the
    answer. Both kinds have some wrong results.
    """
    number = int(number)
    operands, operations = _parse(number)
    privileged = rng.random() < PRIVILEGED_FRACTION
    while True:
        tokens: list = ["<think>"]
        if privileged:
            true = _true_operands(number)
            rate = rng.uniform(*RECHECK_CONCISE)
            tokens += _think(rng, true, operations, rate, SLIP_CONCISE, _results(true, operations))
        else:
            if rng.random() < RESTATE_RATE:
                tokens += ["problem", *_question(number).split()]
            rate = rng.uniform(*RECHECK_VERBOSE)
            tokens += _think(rng, operands, operations, rate, SLIP_VERBOSE)
        if len(tokens) < MAX_RESPONSE:
            break
    text = " ".join(map(str, [*tokens, "<eos>"]))
    asked = problem(number)
    ids = informed_prompt(asked, asked.solution) if privileged else prompt(asked)
    return Demonstration(ids, TOKENIZER.encode(text))


def verify(problem: Problem, response: str) -> Verdict:
    """Accepts a response if only the answer and EOS follow its last `</think>`."""
    _, found, answer = response.rpartition("</think>")
    if not found:
        return Verdict(False, "no answer")
    right = answer.split() == [problem.answer, "<eos>"]
    return Verdict(right, "match" if right else "mismatch")


def answer_in(problem: Problem, response: str) -> str | None:
    """Returns the answer that a response gives in a majority vote, or None if it gives none.

    The answer is the token between the last `</think>` and EOS. There must be exactly one.
    """
    _, found, answer = response.rpartition("</think>")
    tokens = answer.split()
    return tokens[0] if found and len(tokens) == 2 and tokens[1] == "<eos>" else None


class Part:
    """The positions [low, high) of a fixed permutation of the numbers of all problems.

    A slice of a shuffled grain dataset would change with the epoch, because grain shuffles each
    epoch again before it slices.
    """

    def __init__(self, low: int, high: int, space: int = SPACE):
        self._numbers = grain.MapDataset.range(space).shuffle(seed=1)
        self._low, self._high = low, high

    def __len__(self) -> int:
        return self._high - self._low

    def __getitem__(self, index: int) -> int:
        return self._numbers[self._low + index]


def task(options: DataOptions) -> Task:
    """Returns the built-in arithmetic task. It generates its problems and reads no files.

    Raises:
      ValueError: the config has sources, which this task does not read.
    """
    check_no_sources(options, "the arithmetic task reads no files")
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
