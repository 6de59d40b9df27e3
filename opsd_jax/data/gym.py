"""Problems of reasoning-gym (arXiv 2505.24760): writes them to a file, and verifies responses.

    pip install 'opsd-jax[gym]'
    python -m opsd_jax.data.gym leg_counting legs.jsonl --problems 2000 --options max_animals=3

    config.data.train.legs = config_lib.source(
        "legs.jsonl", verifier=config_lib.verifier("opsd_jax.data.gym:verifier"), extra=("gym",)
    )

Each row says how its problem is made, so the verifier makes it again and calls the dataset's own
scorer on the answer in the response's last \\boxed{}. The scores of reasoning-gym are partial: an
answer that contains the right one gets some of it. Only a full score is correct.

Problem i of a dataset has the random seed SEED + i, so files with seeds 0 and 1 share all problems
but one. Take held-out problems from the same file, with `config.data.heldout_problems`, or from
later problems of the dataset, with `--first`.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from opsd_jax.problem import Problem
from opsd_jax.storage.files import to_json, write_atomically
from opsd_jax.verify import extract
from opsd_jax.verify.verdict import MATCH, MISMATCH, NO_ANSWER, Verdict, Verifier, verdict_on

try:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
except ImportError as error:
    raise ImportError("reasoning-gym is missing; run pip install 'opsd-jax[gym]'") from error


class Job(NamedTuple):
    """A verification job.

    Attributes:
      question: the question of the problem.
      spec: how its dataset is made, as JSON: the column "gym" of its row without the index.
      number: number of the problem in the dataset.
      answer: the answer to score; "" only checks that the problem is the one in the file.
    """

    question: str
    spec: str
    number: int
    answer: str


def rows(
    name: str, *, first: int, problems: int, seed: int, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file of problems.

    Args:
      name: the dataset of reasoning-gym.
      first: number of the first problem.
      problems: how many.
      seed: seed of the dataset.
      options: further options of the dataset.
    """
    size = first + problems
    spec = {"dataset": name, "options": options, "seed": seed, "size": size}
    dataset = _dataset(to_json(spec))
    for index in range(first, size):
        entry = dataset[index]
        # Some datasets whose problems have many right answers give none.
        answer = {"answer": entry["answer"]} if isinstance(entry["answer"], str) else {}
        row = {"id": f"{name}/{seed}/{index}", "problem": entry["question"], **answer}
        yield {**row, "gym": {**spec, "index": index}}


@functools.lru_cache(16)
def _dataset(spec: str) -> Any:
    """Returns the dataset that the `spec` of a job describes."""
    values = json.loads(spec)
    return reasoning_gym.create_dataset(
        values["dataset"], size=values["size"], seed=values["seed"], **values["options"]
    )


def judge(job: Job) -> Verdict:
    """Scores an answer.

    Raises:
      ValueError: the installed version makes another problem than the file has.
    """
    dataset = _dataset(job.spec)
    entry = dataset[job.number]
    if entry["question"] != job.question:
        name = json.loads(job.spec)["dataset"]
        raise ValueError(
            f"problem {job.number} of {name} is not the one in the file; expected the version "
            "of reasoning-gym that wrote the file. Write the file again."
        )
    if not job.answer:
        return MATCH
    try:
        return verdict_on(dataset.score_answer(job.answer, entry) == 1.0)
    except (ImportError, MemoryError):
        raise
    except Exception:  # some scorers raise one for an answer of another form
        return MISMATCH


def _job(problem: Problem, answer: str) -> Job:
    if "gym" not in problem.extra:
        raise ValueError("a problem has no column 'gym'; expected extra=('gym',) in its source")
    spec = dict(problem.extra["gym"])
    number = spec.pop("index")
    return Job(problem.question, to_json(spec), number, answer)


def _prepare(problem: Problem, response: str) -> Verdict | Job:
    answer = extract.extract(response)
    return NO_ANSWER if answer is None else _job(problem, answer)


verifier = Verifier(
    prepare=_prepare,
    judge=judge,
    prepare_gold=lambda problem: _job(problem, problem.answer),
    extract=lambda problem, response: extract.extract(response),
)


def _option(text: str) -> tuple[str, Any]:
    """Parses `NAME=VALUE`. The value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE, such as max_animals=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    """Writes a file of problems."""
    parser = argparse.ArgumentParser(prog="python -m opsd_jax.data.gym", description=main.__doc__)
    parser.add_argument("dataset", help="name of a dataset of reasoning-gym")
    parser.add_argument("file", type=pathlib.Path, help="JSON Lines file to write")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--options", nargs="*", type=_option, default=[], metavar="NAME=VALUE",
        help="options of the dataset",
    )  # fmt: skip
    given = parser.parse_args()
    if given.problems < 1 or given.first < 0:
        parser.error("expected --problems of at least 1, and --first of at least 0")
    if given.dataset not in DATASETS:
        near = difflib.get_close_matches(given.dataset, DATASETS)
        parser.error(f"there is no dataset {given.dataset!r}; the nearest: {', '.join(near)}")
    if not given.file.parent.is_dir():
        parser.error(f"{given.file}: there is no directory {given.file.parent}")
    made = rows(
        given.dataset,
        first=given.first,
        problems=given.problems,
        seed=given.seed,
        options=dict(given.options),
    )
    try:
        text = "".join(to_json(row) + "\n" for row in made)
    except Exception as error:  # the datasets check their options in many ways, often with `assert`
        reason = str(error) or type(error).__name__
        parser.error(f"reasoning-gym cannot make {given.dataset} with these options: {reason}")
    write_atomically(given.file, text)


if __name__ == "__main__":
    main()
