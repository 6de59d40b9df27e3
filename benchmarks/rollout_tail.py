"""Counts the decoding steps of the tail of rollouts, with and without speculation.

    python benchmarks/rollout_tail.py --workdir DIRECTORY

benchmarks/rollout.py runs this script. The model is the quickstart's after SFT, which the script
trains in DIRECTORY if it is not there: 1,300 steps, about two minutes on two free cores. Each of 8
calls of the engine samples 8 rollouts of each of 32 problems in 32 slots, at temperature 1, once
without speculation and once with 4 guesses per forward pass. The tail is what is left when 6 slots
are active and no rollout waits, because the engine then speculates. Up to there, both engines take
the same steps. The last line of the output is JSON:

    speculation_tail_step_ratio  steps of the tail without speculation over those with it
    speculation_step_ratio       the same of all steps
    speculation_tail_fraction    the tail's fraction of the steps without speculation
    speculation_ids_equal        whether both sampled the same tokens
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

from opsd_jax.config.run_options import parse_run
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.assembly import make_task
from opsd_jax.run.parameters import Parameters
from opsd_jax.training import checkpoint

GUESSES = 4
CALLS, PROBLEMS, GROUP, SLOTS = 8, 32, 8, 32


def parameters_of(directory: pathlib.Path) -> Parameters:
    """Returns the parameters of the quickstart, and trains its stage `sft` if it is not there."""
    if not checkpoint.has_params(directory / "sft" / "params"):
        command = [sys.executable, "-m", "opsd_jax", "train", "--config", "quickstart"]
        arguments = ["--workdir", str(directory), "--config.stages=('sft',)"]
        subprocess.run([*command, *arguments], check=True, stdout=sys.stderr)
    config = parse_run(workdir_lib.config_of(directory))
    return Parameters(config, directory, jax.devices()[:1])


def sampled(engine: Engine, params, prompts, call: int, sampling_params) -> tuple[dict, list]:
    """Runs one call of the engine.

    Returns:
      The tokens by (prompt, member), and (rollouts left, steps) for each batch of ended rollouts:
      the rollouts left before the steps.
    """
    ids = [range(i * GROUP, (i + 1) * GROUP) for i in range(len(prompts))]
    tokens, steps = {}, []
    for batch in engine(
        params, prompts, ids, key=jax.random.key(call), sampling_params=sampling_params
    ):
        steps.append((PROBLEMS * GROUP - len(tokens), batch.steps))
        tokens |= {(r.prompt, r.member): r.tokens.tolist() for r in batch.responses}
    return tokens, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parameters = parameters_of(parser.parse_args().workdir)
    options = parameters.config.sections["rlvr"]
    task = make_task(parameters.config)
    layout = parameters.form.rollouts.layout
    params = layout.convert(parameters.of("sft"))
    shape = EngineShape(SLOTS, SLOTS // 4, options.prompt_tokens, options.response_tokens)
    few = shape._replace(speculation=GUESSES).few
    engines = {
        guesses: Engine(
            parameters.model, layout.abstract, layout.mesh, shape._replace(speculation=guesses)
        )
        for guesses in (0, GUESSES)
    }
    sampling_params = sampling.params(parameters.model.vocab_size, stop=task.tokenizer.eos_ids)
    total, head, equal = dict.fromkeys(engines, 0), 0, True
    for call in range(CALLS):
        prompts = [task.prompt(task.heldout[call * PROBLEMS + i]) for i in range(PROBLEMS)]
        tokens = {}
        for guesses, engine in engines.items():
            tokens[guesses], steps = sampled(engine, params, prompts, call, sampling_params)
            total[guesses] += sum(n for _, n in steps)
            if guesses:
                head += sum(n for left, n in steps if left > few)
        equal = equal and tokens[0] == tokens[GUESSES]
    tail = {guesses: steps - head for guesses, steps in total.items()}
    lengths = [len(row) for row in tokens[0].values()]
    print(f"steps {total}, of the tail {tail}, mean length {np.mean(lengths):.1f}")
    result = {
        "speculation_tail_step_ratio": round(tail[0] / tail[GUESSES], 3),
        "speculation_step_ratio": round(total[0] / total[GUESSES], 3),
        "speculation_tail_fraction": round(tail[0] / total[0], 3),
        "speculation_ids_equal": equal,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
