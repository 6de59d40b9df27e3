"""Compares the speed of SmolLM2-135M on a CPU with that of transformers and torch.

    python benchmarks/released.py MODEL [--repeats 3] [--only decode|step]

MODEL is the directory that launch/smollm2.py writes. Needs the extra `parity`.

decode: 32 responses of 128 tokens after prompts of 64 tokens, sampled at temperature 1 by the
rollout engine and by `generate` of transformers.

step: an SFT step (forward, backward and AdamW) on 16 rows of 256 tokens in microbatches of 4. The
last 193 tokens of a row are targets. In torch the model is that of transformers with sdpa
attention, the loss is `cross_entropy` on the logits of the targets, and AdamW is torch's.

Everything is float32, on all cores. torch stores all activations, and our step the outputs of the
matmuls (remat "products"). Both sides run in turns in one process. The figures are ratios of the
medians of wall-clock times. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import torch
import transformers
from rollout_ours import sampler
from rollout_torch import sample

from opsd_jax import config as config_lib
from opsd_jax.models import pretrained
from opsd_jax.policy import Model
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import EngineShape
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages import sft
from opsd_jax.stages.teacher import frozen
from opsd_jax.training.state import init_state
from opsd_jax.training.step import make_train_step

ROWS, PROMPT, NEW = 32, 64, 128  # decoding
BATCH, TOKENS, MICROBATCH = 16, 256, 4  # the train step
LEARNING_RATE = 1e-5
CHUNK = 1024  # tokens whose logits our loss computes at once

Run = Callable[[], object]


def token_ids(vocabulary: int, rows: int, tokens: int) -> np.ndarray:
    """Returns random token ids, int64 [rows, tokens]."""
    return np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))


def our_decoding(model: Model) -> Run:
    """Returns a function that samples the responses with the rollout engine."""
    engine, layout, params = sampler(model, EngineShape(ROWS, ROWS, PROMPT, NEW))
    decoded = layout.convert(params)
    return lambda: [
        *engine(
            decoded,
            token_ids(model.vocab_size, ROWS, PROMPT).tolist(),
            [[row] for row in range(ROWS)],
            key=jax.random.key(0),
            sampling_params=sampling.params(model.vocab_size, stop=()),
            budgets=[[NEW]] * ROWS,
        )
    ]


def their_decoding(model: transformers.PreTrainedModel) -> Run:
    """Returns a function that samples the responses with `generate`."""
    prompts = torch.from_numpy(token_ids(model.config.vocab_size, ROWS, PROMPT))
    model.generation_config.eos_token_id = None
    return lambda: sample(model, prompts, NEW)


def our_step(model: Model) -> Run:
    """Returns a function that makes one train step, and returns its loss."""
    rows = [
        {"student": row[:PROMPT], "response": row[PROMPT:]}
        for row in token_ids(model.vocab_size, BATCH, TOKENS + 1).tolist()
    ]
    batch = batch_lib.pack(
        rows, buckets=[{"student": TOKENS}], microbatch=MICROBATCH, capacity=BATCH, pad_id=0
    )
    optimizer = optax.adamw(LEARNING_RATE)
    loss = functools.partial(sft.loss_fn, model.policy, CHUNK)
    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    states = [init_state(jax.jit(model.init)(jax.random.key(0)), optimizer, frozen())]

    def run() -> float:
        state, metrics = step(states.pop(), batch)
        states.append(jax.block_until_ready(state))
        total, weight = metrics["loss"]
        return float(total / weight)

    return run


def their_step(model: transformers.PreTrainedModel) -> Run:
    """Returns a function that makes one train step, and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    ids = torch.from_numpy(token_ids(model.config.vocab_size, BATCH, TOKENS + 1))

    def run() -> float:
        total = 0.0
        for rows in ids.split(MICROBATCH):
            hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, PROMPT - 1 :])
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), rows[:, PROMPT:].flatten()
            )
            (loss * len(rows) / BATCH).backward()
            total += loss.item() * len(rows) / BATCH
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        return total

    return run


def in_turns(ours: Run, theirs: Run, repeats: int) -> tuple[list[float], list[float]]:
    """Runs both once to compile and warm up, then in turns. Returns the seconds of each run."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for run, times in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            if repeat:
                times.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Prints the times, and last a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("decode", "step"))
    arguments = parser.parse_args()
    ours = pretrained.from_config(config_lib.pretrained(arguments.model, remat="products"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    cases = {
        "decode": (our_decoding, their_decoding, ROWS * NEW, "decode_over_transformers"),
        "step": (our_step, their_step, BATCH * TOKENS, "train_step_over_torch"),
    }
    result: dict[str, object] = {"cores": os.cpu_count(), "repeats": arguments.repeats}
    for name, (make_ours, make_theirs, tokens, key) in cases.items():
        if arguments.only in (None, name):
            pair = in_turns(make_ours(ours), make_theirs(theirs), arguments.repeats)
            medians = [statistics.median(times) for times in pair]
            for side, times, median in zip(("ours", "theirs"), pair, medians, strict=True):
                print(
                    f"{name} {side:<8}{median:8.2f} s ({min(times):.2f} to {max(times):.2f})"
                    f"{tokens / median:8.0f} tokens/s"
                )
            result[key] = round(medians[1] / medians[0], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
