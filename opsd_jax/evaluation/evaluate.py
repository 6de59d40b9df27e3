"""The records of an evaluation: every response, judged, and their figures."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from opsd_jax.data.task import Task
from opsd_jax.rollout.collect import Rollouts

RESPONSES = "responses.jsonl"
SUMMARY = "evaluation.json"


def records(rollouts: Rollouts, task: Task, samples: int) -> list[dict[str, Any]]:
    """One JSON-ready record a response."""
    return [
        {
            "problem": problem.id,
            "sample": i % samples,
            "question": problem.question,
            "answer": problem.answer,
            "response": task.tokenizer.decode(rollouts.responses[i].tolist()),
            "tokens": rollouts.responses[i].tolist(),
            "length": len(rollouts.responses[i]),
            "correct": bool(rollouts.groups.correct[i]),
            "truncated": bool(rollouts.groups.truncated[i]),
            "verdict": rollouts.verdicts[i].reason,
        }
        for i, problem in enumerate(rollouts.problems)
    ]


def write(
    directory: pathlib.Path, responses: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Writes all responses, then the summary, whose presence says that both are whole."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / RESPONSES, "".join(json.dumps(r) + "\n" for r in responses))
    finite = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in summary.items()}
    write_atomically(directory / SUMMARY, json.dumps(finite, indent=2) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the run dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def read(directory: pathlib.Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `write` wrote: `(responses, summary)`."""
    lines = (directory / RESPONSES).read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((directory / SUMMARY).read_text())
