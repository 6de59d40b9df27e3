"""A task with a few tokens, as a user might write it. A model learns it in seconds.

A question is two digits, and the answer is their sum modulo 5. Demonstrations are long, and three
of ten are wrong. Demonstrations whose prompt shows the solution are short and right. There are only
25 different questions, so the held-out questions are also trained on: this task only shows that a
model learns.
"""

import grain

from opsd_jax.data.arithmetic import WordTokenizer
from opsd_jax.data.task import Demonstration, Task, check_fits
from opsd_jax.problem import Problem
from opsd_jax.verify.verdict import Verdict
from opsd_jax.verify.verifiers import at_once

TOKENIZER = WordTokenizer(
    ["<pad>", "<bos>", "<eos>", "hm", "so", "ref", *map(str, range(10))], pad="<pad>", eos="<eos>"
)


def problem(number):
    a, b = divmod(int(number) % 25, 5)
    answer = str((a + b) % 5)
    return Problem(int(number), f"{a} {b}", answer, answer)


def prompt(problem):
    return TOKENIZER.encode(f"<bos> {problem.question}")


def informed_prompt(problem, text):
    return TOKENIZER.encode(f"<bos> {problem.question} ref {text}")


def teacher_prompt(problem, context, limit):
    return check_fits(informed_prompt(problem, context.text), limit, problem, "limit"), False


def demonstrate(problem, rng):
    if rng.random() < 0.4:
        response = f"so {problem.answer} <eos>"
        return Demonstration(informed_prompt(problem, problem.solution), TOKENIZER.encode(response))
    answer = problem.answer if rng.random() < 0.7 else rng.integers(5)
    response = "hm " * int(rng.integers(2, 7)) + f"so {answer} <eos>"
    return Demonstration(prompt(problem), TOKENIZER.encode(response))


def verify(problem, response):
    right = response.split()[-3:] == ["so", problem.answer, "<eos>"]
    return Verdict(right, "match" if right else "mismatch")


def task(config):
    del config  # the task reads no files
    train = grain.MapDataset.range(750).map(problem)
    return Task(
        tokenizer=TOKENIZER,
        train=train,
        heldout=grain.MapDataset.range(750, 1000).map(problem),
        demonstrations=lambda seed: train.seed(seed).shuffle().repeat().random_map(demonstrate),
        prompt=prompt,
        teacher_prompt=teacher_prompt,
        verify=at_once(verify),
    )
