r"""A task for a small released model: generated word problems with two steps of arithmetic.

    Mia has 14 apples. Mia buys 5 more apples. Then Mia gives 6 apples to Tom. How many apples does
    Mia have now?

The concise solution, which the teacher sees, is one equation for each step:

    14 + 5 = 19. 19 - 6 = 13. The answer is \boxed{13}.

Demonstrations teach the format and two styles. After the student's prompt a response is verbose: it
often says what a step means, and checks it. After a prompt that shows the concise solution it is
concise, so the model keeps reading that context.

Prompts are rendered as `config.data` says, with the model's chat template. All data are a pure
function of (index, seed).
"""

from __future__ import annotations

import functools
import random

import grain
import numpy as np

from opsd_jax.data.arithmetic import Part
from opsd_jax.data.contexts import Context
from opsd_jax.data.options import DataOptions
from opsd_jax.data.task import Demonstration, Task, check_no_sources
from opsd_jax.data.text import Prompts, check_wording, make_tokenizer
from opsd_jax.problem import Problem
from opsd_jax.verify.maths import maths

NAMES = (
    "Mia", "Tom", "Anna", "Ben", "Sara", "Leo", "Emma", "Max", "Lily", "Sam", "Nora", "Jack",
    "Ella", "Paul", "Rosa", "Dan",
)  # fmt: skip
ITEMS = (
    "apples", "books", "coins", "stamps", "pencils", "marbles", "cookies", "shells", "cards",
    "flowers", "stickers", "eggs", "toys", "buttons", "balls", "candles",
)  # fmt: skip
PLUS, MINUS = "+", "-"
SIGNS = ((PLUS, PLUS), (PLUS, MINUS), (MINUS, PLUS), (MINUS, MINUS))
STARTS = 16  # numbers that a problem may begin with, from FIRST on
FIRST = {signs: 20 if signs == (MINUS, MINUS) else 10 for signs in SIGNS}  # the result is positive
CHANGES = 5  # numbers that are added or taken away: 2 to 6
SPACE = len(NAMES) * len(ITEMS) * len(SIGNS) * STARTS * CHANGES**2  # 409,600 problems
# Problems that are never trained on. The settings of configs/smollm2 were chosen on the first; an
# evaluation therefore begins with the last.
HELD_OUT = 4096

PRIVILEGED_FRACTION = 0.3  # demonstrations that are concise, after a prompt with the solution
# Range of the probability that an optional sentence is there. It differs between demonstrations.
# Where a style is certain, the reverse KL to a teacher with another style has almost no gradient.
VERBOSE, CONCISE = (0.5, 1.0), (0.0, 0.1)

UNLIMITED = 1 << 30  # tokens of a prompt

GAINS = ("buys {n} more {items}", "finds {n} {items}", "gets {n} {items} from {other}")
LOSSES = ("gives {n} {items} to {other}", "loses {n} {items}", "sells {n} {items}")


class Story:
    """One word problem.

    Attributes:
      question: the text of the question.
      steps: (number before, sign, number, number after) of each step.
    """

    def __init__(self, number: int):
        """Decodes a problem from its number, in [0, SPACE)."""
        choice = functools.partial(_digit, [number])
        name, items, signs = choice(NAMES), choice(ITEMS), choice(SIGNS)
        value = FIRST[signs] + choice(range(STARTS))
        # The wording is a pure function of the problem. It does not distinguish problems.
        rng = random.Random(number)
        other = rng.choice([x for x in NAMES if x != name])
        facts, self.steps = [f"{name} has {value} {items}."], []
        for i, sign in enumerate(signs):
            change = 2 + choice(range(CHANGES))
            event = rng.choice(GAINS if sign == PLUS else LOSSES)
            event = event.format(n=change, items=items, other=other)
            facts.append(f"Then {name} {event}." if i else f"{name} {event}.")
            after = value + change if sign == PLUS else value - change
            self.steps.append((value, sign, change, after))
            value = after
        self.question = f"{' '.join(facts)} How many {items} does {name} have now?"
        self.name, self.items, self.answer = name, items, str(value)


def _digit(rest: list[int], choices):
    """Returns the choice that the last digit of a number names, and removes that digit."""
    rest[0], digit = divmod(rest[0], len(choices))
    return choices[digit]


def _equation(step) -> str:
    before, sign, change, after = step
    return f"{before} {sign} {change} = {after}."


def _conclusion(story: Story) -> str:
    return rf"The answer is \boxed{{{story.answer}}}."


def _check(step, rng: np.random.Generator) -> str:
    """Returns a sentence that checks a step by the inverse operation."""
    before, sign, change, after = step
    inverse = f"{after} {MINUS if sign == PLUS else PLUS} {change} = {before}."
    begin = ("Wait, let me check.", "Hmm, let me check that.", "Let me make sure.")
    return f"{rng.choice(begin)} {inverse} Yes, that is right."


def _solution(story: Story) -> str:
    """Returns the concise solution."""
    return " ".join([*map(_equation, story.steps), _conclusion(story)])


def _response(story: Story, verbosity: tuple[float, float], rng: np.random.Generator) -> str:
    """Returns the solution with some of its optional sentences.

    Args:
      story: the problem.
      verbosity: range of the probability that an optional sentence is there.
      rng: draws this probability, and the sentences.
    """
    rate = rng.uniform(*verbosity)
    chosen = lambda *sentences: [text for text in sentences if rng.random() < rate]
    sentences = chosen("Let me think step by step.")
    for step in story.steps:
        meaning = f"So now {story.name} has {step[3]} {story.items}."
        sentences += [_equation(step), *chosen(_check(step, rng), meaning)]
    return " ".join([*sentences, _conclusion(story)])


def problem(number: int) -> Problem:
    """Returns the problem with a number in [0, SPACE)."""
    story = Story(int(number))
    return Problem(int(number), story.question, _solution(story), story.answer)


def demonstrate(prompts: Prompts, number: int, rng: np.random.Generator) -> Demonstration:
    """Returns a random SFT example for problem `number`: a prompt and a response.

    Args:
      prompts: renders the prompts.
      number: the number of the problem.
      rng: decides on the style.
    """
    asked, story = problem(number), Story(int(number))
    if rng.random() < PRIVILEGED_FRACTION:
        prompt, _ = prompts.teacher(asked, Context("solution", asked.solution), UNLIMITED)
        text = _response(story, CONCISE, rng)
    else:
        prompt, text = prompts.student(asked), _response(story, VERBOSE, rng)
    tokenizer = prompts.tokenizer
    return Demonstration(prompt, [*tokenizer.encode(text), tokenizer.eos_ids[0]])


def task(options: DataOptions) -> Task:
    """Returns the word problems, with prompts as `config.data` describes them.

    Raises:
      ConfigError: a wording, the tokenizer or the chat template cannot be used. Names the field.
      ValueError: the config has sources, which this task does not read.
    """
    check_no_sources(options, "the word problems are generated")
    check_wording(options)
    prompts = Prompts(options, make_tokenizer(options.tokenizer))
    heldout, train = Part(0, HELD_OUT, SPACE), Part(HELD_OUT, SPACE, SPACE)
    numbers = grain.MapDataset.source(train)
    return Task(
        tokenizer=prompts.tokenizer,
        train=numbers.map(problem),
        heldout=grain.MapDataset.source(heldout)[::-1].map(problem),
        demonstrations=lambda seed: (
            numbers.seed(seed).shuffle().random_map(functools.partial(demonstrate, prompts))
        ),
        prompt=prompts.student,
        teacher_prompt=prompts.teacher,
        verify=maths(),
        begun=prompts.begun,
        memo_request=prompts.memo_request,
        reminder=prompts.reminder,
    )
