"""The files of an evaluation: one record per response, the settings, and the summary.

settings.json      everything that the responses depend on; a directory with other settings is
                   refused
responses.jsonl    one record per response; the records of a problem are appended together, when
                   its last response is verified
evaluation.json    the metrics and the settings; if this file exists, the evaluation is finished.
                   Its `sha256` has the digests of responses.jsonl and of its own values
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opsd_jax.data.options import DataOptions
from opsd_jax.data.task import Task
from opsd_jax.evaluation.options import EvaluationOptions
from opsd_jax.evaluation.statistics import Record, Records
from opsd_jax.options import ConfigError
from opsd_jax.problem import Problem
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.verify.verdict import Verdict
from opsd_jax.verify.verifiers import as_verifier

SETTINGS = "settings.json"
RESPONSES = "responses.jsonl"
SUMMARY = "evaluation.json"
DIGESTS = "sha256"

# `fingerprint` reads this many pieces of a file, each of this many bytes.
PIECES = 64
PIECE_BYTES = 4096

# The options of the evaluation and of the data that the responses depend on.
SAMPLING = ("samples", "temperature", "top_p", "top_k", "min_p", "response_tokens", "seed")
PROMPTING = ("prompt", "thinking", "system", "date")
# Settings that older evaluations did not record, with the values that they used.
UNRECORDED = {"min_p": 0.0}


def records(rollouts: Rollouts, task: Task, samples: int) -> list[Record]:
    """Returns one JSON-ready record per rollout, with the text that the verifier sees.

    Args:
      rollouts: verified rollouts; the `samples` rollouts of a problem are adjacent.
      task: the task that the problems belong to.
      samples: number of responses to each problem.
    """
    verdicts, outcomes, _ = rollouts.judged
    verifier = as_verifier(task.verify)

    def record(i: int, problem: Problem) -> Record:
        tokens = rollouts.responses[i].tolist()
        response = task.begun + task.tokenizer.decode(tokens)
        fields: Record = {
            "problem": problem.id,
            "source": problem.source,
            "sample": i % samples,
            "question": problem.question,
            "answer": problem.answer,
            "response": response,
            "tokens": tokens,
            "length": len(tokens),
            "correct": bool(outcomes.correct[i]),
            "truncated": bool(outcomes.truncated[i]),
            "verdict": verdicts[i].reason,
        }
        if verifier.extract is not None:
            try:
                fields["extracted"] = verifier.extract(problem, response)
            except Exception:  # a verifier that raises costs only this response its answer
                fields["extracted"] = None
        return fields

    return [record(i, problem) for i, problem in enumerate(rollouts.problems)]


def rollouts_of(problems: Sequence[Problem], responses: Records) -> Rollouts:
    """Rebuilds the rollouts of the given problems from their records.

    Args:
      problems: the problems; records of other problems are ignored.
      responses: records of an evaluation.

    Returns:
      The rollouts in the order of the records, without log-probabilities.
    """
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
    """Returns a digest that identifies the weights in a directory.

    It covers the names and sizes of all files and PIECES pieces of the content of each.
    """
    digest = hashlib.sha256()
    for path in sorted(_files(directory)):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.relative_to(directory)} {size}\n".encode())
            for i in range(PIECES):
                file.seek(size * i // PIECES)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def _files(directory: Path) -> Iterator[Path]:
    """Yields all files under a directory. Yields nothing if the directory does not exist."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def settings(
    model: str,
    weights: str,
    *,
    evaluation: EvaluationOptions,
    data: DataOptions,
    dtype: str,
    task: Task,
    problems: Sequence[Problem],
) -> dict[str, Any]:
    """Returns a JSON-ready dictionary of all settings that an evaluation's responses depend on.

    Args:
      model: name of the model, for the reader. `differences` ignores it.
      weights: the `fingerprint` of the model; "" if the directory of the evaluation belongs to one
        model only.
      evaluation: how the responses are sampled.
      data: how the prompts are made.
      dtype: dtype of the model's activations; "" if the model does not specify one.
      task: the task that makes the prompts.
      problems: the problems that are evaluated.
    """
    digest = hashlib.sha256()
    for problem in problems:
        asked = [problem.id, list(task.prompt(problem)), problem.answer]
        digest.update(json.dumps(asked).encode())
    return {
        "model": model,
        "weights": weights,
        "dtype": dtype,
        "problems": len(problems),
        **{name: getattr(evaluation, name) for name in SAMPLING},
        **{name: getattr(data, name) for name in PROMPTING},
        "prompts_digest": digest.hexdigest()[:16],
    }


def check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Writes the settings to a new evaluation directory, or compares them with the recorded ones.

    Args:
      directory: the directory of the evaluation. It is created if it does not exist.
      settings: the settings of this evaluation.

    Raises:
      ConfigError: the directory holds an evaluation with different or unknown settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    if not path.exists():
        if (directory / SUMMARY).exists():
            raise ConfigError(
                f"{directory} holds an evaluation without its {SETTINGS}, so it cannot be resumed. "
                "Choose another directory, or delete this one."
            )
        (directory / RESPONSES).unlink(missing_ok=True)
        files.write_atomically(path, files.to_json(settings, indent=2) + "\n")
    recorded = files.read_json(path)
    if different := differences(recorded, settings):
        raise ConfigError(
            f"{directory} holds an evaluation with different settings:\n"
            + "\n".join(f"  {name}: {a!r} in the directory, {b!r} now" for name, a, b in different)
            + "\nTo resume it, use the same settings. Otherwise delete the directory or choose "
            "another one."
        )


def resume(directory: Path, samples: int) -> list[Record]:
    """Reads the records that an interrupted evaluation has written.

    Args:
      directory: the directory of the evaluation.
      samples: number of responses to each problem.

    Returns:
      The records of the problems that are complete. The last problem may lack records, or its last
      line may be cut off, if the process was killed while it wrote them.

    Raises:
      RecordError: a complete line of the file is not JSON.
    """
    path = directory / RESPONSES
    if not path.exists():
        return []
    done = files.read_json_lines(path, "Delete the file to sample all responses again.")
    return done[: len(done) // samples * samples]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the settings that differ between two evaluations, as (name, before, after).

    The value of a setting that is absent is None. The name of the model is ignored, because a
    directory may have been moved.
    """
    names = [name for name in {**before, **after} if name != "model"]
    value = lambda side, name: side.get(name, UNRECORDED.get(name))
    values = [(name, value(before, name), value(after, name)) for name in names]
    return [(name, a, b) for name, a, b in values if a != b]


def recorder(directory: Path, responses: Records) -> files.Lines:
    """Writes the given records to `responses.jsonl`, and opens the file for appending.

    Args:
      directory: the directory of the evaluation.
      responses: the records to keep, which replace the content of the file.
    """
    return files.Lines(directory / RESPONSES, to_lines(responses))


def append(file: files.Lines, made: Records) -> None:
    """Appends the records of one problem to the open records file."""
    file.write(to_lines(made))


def rewrite(file: files.Lines, responses: Records) -> None:
    """Replaces the content of the open records file with `responses`, in the given order."""
    file.rewrite(to_lines(responses))


def to_lines(responses: Records) -> str:
    """Converts records to JSON Lines text, one line per record."""
    return "".join(files.to_json(record) + "\n" for record in responses)


def finish(directory: Path, summary: dict[str, Any]) -> None:
    """Writes the summary file of an evaluation, which marks the evaluation as finished."""
    whole = {**summary, DIGESTS: _digests(directory, summary)}
    files.write_atomically(directory / SUMMARY, files.to_json(whole, indent=2) + "\n")


def _digests(directory: Path, summary: dict[str, Any]) -> dict[str, str]:
    """Returns the SHA-256 digests of the two files of a finished evaluation, by file name."""
    values = json.loads(files.to_json(summary))  # as they are read: every key is a string
    contents = {
        RESPONSES: (directory / RESPONSES).read_bytes(),
        SUMMARY: files.to_json(values, sort_keys=True).encode(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def read(directory: Path) -> tuple[list[Record], dict[str, Any]]:
    """Reads the records and the summary of a finished evaluation.

    Returns:
      (records, summary): the contents of `responses.jsonl` and of `evaluation.json`.

    Raises:
      RecordError: a file is missing, damaged or changed.
    """
    fix = f"Delete {directory / SUMMARY} and {directory / RESPONSES} to evaluate again."
    responses = files.read_json_lines(directory / RESPONSES, fix)
    summary = files.read_json(directory / SUMMARY)
    saved = summary.pop(DIGESTS, {})  # absent in an evaluation of version 0.1.0
    for name, digest in _digests(directory, summary).items() if saved else ():
        if saved.get(name) != digest:
            raise files.RecordError(
                f"{directory / name} is damaged: its content is not what the evaluation wrote. "
                f"{fix}"
            )
    return responses, summary
