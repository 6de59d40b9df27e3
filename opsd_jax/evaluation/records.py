"""The records of an evaluation in its directory: every response, judged, and their figures.

settings.json      what the figures depend on; other settings are refused
responses.jsonl    a record a response, those of a problem when the last of them is judged
evaluation.json    the figures and the settings; once it is there the evaluation is done
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from opsd_jax.config import ConfigError
from opsd_jax.data.task import Task
from opsd_jax.problem import Problem
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.verify.verdict import Verdict
from opsd_jax.verify.verifiers import as_verifier

SETTINGS = "settings.json"
RESPONSES = "responses.jsonl"
SUMMARY = "evaluation.json"

SAMPLED = 64  # places of a file that its fingerprint looks at

# What of `config.evaluation` and of `config.data` the responses depend on.
SAMPLING = ("samples", "temperature", "top_p", "top_k", "min_p", "response_tokens", "seed")
LATER = {"min_p": 0.0}  # settings that older evaluations lack, as they had them
PROMPTING = ("prompt", "thinking", "system", "date")


def records(rollouts: Rollouts, task: Task, samples: int) -> list[dict[str, Any]]:
    """One JSON-ready record a response. Its text is what the verifier sees."""
    verdicts, outcomes, _ = rollouts.judged
    extract = as_verifier(task.verify).extract

    def extracted(problem: Problem, response: str) -> dict[str, str | None]:
        if extract is None:
            return {}
        try:
            return {"extracted": extract(problem, response)}
        except Exception:  # as where a verifier raises: the response loses by it, nothing else
            return {"extracted": None}

    def record(i: int, problem: Problem) -> dict[str, Any]:
        response = task.begun + task.tokenizer.decode(rollouts.responses[i].tolist())
        return {
            "problem": problem.id,
            "source": problem.source,
            "sample": i % samples,
            "question": problem.question,
            "answer": problem.answer,
            "response": response,
            "tokens": rollouts.responses[i].tolist(),
            "length": len(rollouts.responses[i]),
            "correct": bool(outcomes.correct[i]),
            "truncated": bool(outcomes.truncated[i]),
            "verdict": verdicts[i].reason,
            **extracted(problem, response),
        }

    return [record(i, problem) for i, problem in enumerate(rollouts.problems)]


def rollouts_of(problems: Sequence[Problem], responses: Sequence[dict[str, Any]]) -> Rollouts:
    """The rollouts that `records` recorded, of the first problems; without log-probabilities."""
    by_id = {problem.id: problem for problem in problems}
    kept = [record for record in responses if record["problem"] in by_id]
    return Rollouts(
        problems=[by_id[record["problem"]] for record in kept],
        responses=[np.array(record["tokens"], np.int32) for record in kept],
        sampling_logprobs=[],
        model_logprobs=[],
        truncated=np.array([record["truncated"] for record in kept], bool),
        replies=[Verdict(record["correct"], record["verdict"]) for record in kept],
    )


def fingerprint(directory: Path) -> str:
    """A digest of the weights in a directory: of names, sizes and samples of the files' bytes."""
    digest = hashlib.sha256()
    for path in sorted(_files(directory)):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.relative_to(directory)} {size}\n".encode())
            for i in range(SAMPLED):
                file.seek(size * i // SAMPLED)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _files(directory: Path) -> Iterator[Path]:
    """The files in a directory, if it is one, and in those under it."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def settings(
    model: str, weights: str, config: ConfigDict, task: Task, problems: Sequence[Problem]
) -> dict[str, Any]:
    """What the figures of an evaluation depend on, JSON-ready.

    Args:
      model: which one, for the reader.
      weights: the `fingerprint` of it, or what else tells it from others.
      config: of the run; `config.evaluation` says how it is sampled.
      task: makes the prompts.
      problems: the evaluated ones.

    Returns:
      `model` and `weights`, the settings of the sampling, the number of problems, what the prompts
      are made with, and a digest of prompts and answers.
    """
    digest = hashlib.sha256()
    for problem in problems:
        asked = [problem.id, list(task.prompt(problem)), problem.answer]
        digest.update(json.dumps(asked).encode())
    section = config.evaluation
    return {
        "model": model,
        "weights": weights,
        "dtype": config.model.get("dtype", ""),
        "problems": len(problems),
        **{name: section[name] for name in SAMPLING},
        **{name: config.data[name] for name in PROMPTING},
        "prompts_digest": digest.hexdigest()[:16],
    }


def check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Writes down the settings of an evaluation; a later call compares.

    Raises:
      ConfigError: the directory holds an evaluation with other settings, which it lists, or with
        unknown ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    if not path.exists():
        if (directory / SUMMARY).exists():
            raise ConfigError(
                f"{directory} holds an evaluation without its {SETTINGS}; expected another "
                "directory."
            )
        (directory / RESPONSES).unlink(missing_ok=True)
        files.write_atomically(path, files.to_json(settings, indent=2) + "\n")
    there = files.read_json(path)
    if different := differences(there, settings):
        raise ConfigError(
            f"{directory} holds an evaluation with other settings:\n"
            + "\n".join(f"  {name}: {a!r} there, {b!r} now" for name, a, b in different)
            + "\nGive the same settings to go on with it, delete it, or choose another directory."
        )


def resume(directory: Path, samples: int) -> list[dict[str, Any]]:
    """The records that an evaluation has already. Only problems with all of their samples count: a
    kill may cut off what follows.

    Raises:
      RecordError: they cannot be read; names the file.
    """
    path = directory / RESPONSES
    if not path.exists():
        return []
    done = files.read_json_lines(path, "Delete it to sample them again.")
    return done[: len(done) // samples * samples]


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that differ, as (name, there, now), None where one is absent; the name of the
    model is none of them: a directory may have been moved.
    """
    names = [name for name in {**there, **now} if name != "model"]
    both = [(n, there.get(n, LATER.get(n)), now.get(n, LATER.get(n))) for n in names]
    return [(name, a, b) for name, a, b in both if a != b]


def recorder(directory: Path, responses: list[dict[str, Any]]) -> files.Lines:
    """The file of the records, of which there are these."""
    return files.Lines(directory / RESPONSES, _lines(responses))


def append(file: files.Lines, made: list[dict[str, Any]]) -> None:
    """Writes down the records of a problem."""
    file.write(_lines(made))


def rewrite(file: files.Lines, responses: list[dict[str, Any]]) -> None:
    """Writes down all records, in this order."""
    file.rewrite(_lines(responses))


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(files.to_json(record) + "\n" for record in records)


def finish(directory: Path, summary: dict[str, Any]) -> None:
    """Writes the summary, whose presence says that the records are all there."""
    files.write_atomically(directory / SUMMARY, files.to_json(summary, indent=2) + "\n")


def read(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of a finished evaluation: `(responses, summary)`.

    Raises:
      RecordError: it cannot be read any more; names the file.
    """
    mend = f"Delete {directory / SUMMARY} and {directory / RESPONSES} to evaluate again."
    responses = files.read_json_lines(directory / RESPONSES, mend)
    return responses, files.read_json(directory / SUMMARY)
