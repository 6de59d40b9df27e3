"""Loads the results of a run's stages in transformers, and compares what it generates with ours.

    python benchmarks/exported.py --workdir runs/smollm2 [--stages sft rlvr opsd]

Each stage is converted to a directory that transformers loads. Its greedy responses to 32 held-out
problems must have the same tokens as ours. Its samples for the problems of the run's evaluation
are judged by the run's verifier; their accuracy must be within two standard errors of the run's.
Otherwise the exit code is 1. Both sides are float32 on the CPU. Needs the extra `parity`. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
import transformers

from opsd_jax.config.run_options import parse_run
from opsd_jax.evaluation import records
from opsd_jax.problem import Problem
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.assembly import make_task

GREEDY, BATCH = 32, 64  # problems
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def run(*arguments: object) -> None:
    """Runs a command of opsd-jax."""
    command = [sys.executable, "-m", "opsd_jax", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def generate(
    model: transformers.PreTrainedModel, prompts: Sequence[list[int]], eos: Sequence[int], **options
) -> list[list[int]]:
    """Returns the response of transformers to each prompt, with the token that ends it."""
    made = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        longest = max(map(len, part))
        padding = [longest - len(ids) for ids in part]
        ids = torch.tensor([[eos[0]] * n + row for n, row in zip(padding, part, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        found = model.generate(ids, attention_mask=mask, eos_token_id=list(eos), **options)
        for response in found[:, longest:].tolist():
            end = next((i + 1 for i, token in enumerate(response) if token in eos), None)
            made.append(response[:end])
    return made


def main() -> int:
    """Prints a line for each stage, and last a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--stages", nargs="+")
    given = parser.parse_args()
    config = parse_run(workdir_lib.config_of(given.workdir))
    task, evaluation = make_task(config), config.evaluation
    eos, limit = task.tokenizer.eos_ids, evaluation.response_tokens
    number = evaluation.problems or len(task.heldout)
    problems: list[Problem] = [task.heldout[i] for i in range(number)]
    first = min(GREEDY, number)
    prompts = [task.prompt(problem) for problem in problems]
    torch.manual_seed(0)
    result: dict[str, object] = {}
    passed = True
    for stage in given.stages or config.stages:
        of_stage = ("--workdir", given.workdir, "--stage", stage)
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            run("convert", *of_stage, "--out", directory / "model")
            greedy = ("--temperature", 0, "--samples", 1, "--problems", first, "--slots", first)
            run("evaluate", *of_stage, *greedy, "--out", directory / "greedy")
            ours, _ = records.read(directory / "greedy")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory / "model", dtype=torch.float32
            )
        options = {"max_new_tokens": limit, "pad_token_id": eos[0]}
        theirs = generate(model, prompts[:first], eos, do_sample=False, **options)
        equal = sum(a["tokens"] == b for a, b in zip(ours, theirs, strict=True))
        options |= {name: getattr(evaluation, name) for name in SAMPLING}
        sampled = generate(model, prompts, eos, do_sample=True, **options)
        texts = [task.begun + task.tokenizer.decode(ids) for ids in sampled]
        right = [
            ids[-1] in eos and task.verify(problem, text).correct
            for ids, problem, text in zip(sampled, problems, texts, strict=True)
        ]
        accuracy = sum(right) / len(right)
        _, summary = records.read(given.workdir / stage)
        error = math.hypot(
            summary["accuracy_se"], math.sqrt(accuracy * (1 - accuracy) / len(right))
        )
        difference = abs(accuracy - summary["accuracy"])
        apart = difference / error if difference else 0.0
        passed = passed and equal == first and apart <= 2
        result[stage] = {
            "greedy_equal": equal,
            "accuracy": round(summary["accuracy"], 4),
            "accuracy_transformers": round(accuracy, 4),
            "standard_errors_apart": round(apart, 2),
            "mean_length": round(summary["mean_length"], 1),
            "mean_length_transformers": round(sum(map(len, sampled)) / len(sampled), 1),
        }
        print(stage, result[stage], flush=True)
    print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
