"""The records of an evaluation: every response, judged, and their figures."""

from __future__ import annotations

import pathlib
from typing import Any

from opsd_jax.data.task import Task
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.training import files

RESPONSES = "responses.jsonl"
SUMMARY = "evaluation.json"


def records(rollouts: Rollouts, task: Task, samples: int) -> list[dict[str, Any]]:
    """One JSON-ready record a response."""
    verdicts, groups, _ = rollouts.judged
    return [
        {
            "problem": problem.id,
            "sample": i % samples,
            "question": problem.question,
            "answer": problem.answer,
            "response": task.tokenizer.decode(rollouts.responses[i].tolist()),
            "tokens": rollouts.responses[i].tolist(),
            "length": len(rollouts.responses[i]),
            "correct": bool(groups.correct[i]),
            "truncated": bool(groups.truncated[i]),
            "verdict": verdicts[i].reason,
        }
        for i, problem in enumerate(rollouts.problems)
    ]


def write(
    directory: pathlib.Path, responses: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Writes all responses, then the summary, whose presence says that both are whole."""
    directory.mkdir(parents=True, exist_ok=True)
    files.write_atomically(
        directory / RESPONSES, "".join(files.to_json(r) + "\n" for r in responses)
    )
    files.write_atomically(directory / SUMMARY, files.to_json(summary, indent=2) + "\n")


def read(directory: pathlib.Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `write` wrote: `(responses, summary)`.

    Raises:
      RecordError: it cannot be read any more; names the file.
    """
    mend = f"Delete {directory / SUMMARY} to evaluate again."
    responses = files.read_json_lines(directory / RESPONSES, mend)
    return responses, files.read_json(directory / SUMMARY)
