"""How the engines of benchmarks/rollout.py take turns: a line of JSON asks for one repetition.

Of the standard library alone, as each engine has an environment of its own.
"""

import functools
import json
import random
import sys
import time
from collections.abc import Callable

MODEL = {  # Qwen3's shape; the head is not tied
    "hidden": 256,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "mlp": 768,
    "rope_theta": 10_000,
}
ROWS = 32  # requests a static batch
PROMPT = 64  # tokens


def prompts(vocabulary: int, number: int) -> list[list[int]]:
    """Random ids, [number, PROMPT]."""
    rng = random.Random(0)
    return [rng.choices(range(vocabulary), k=PROMPT) for _ in range(number)]


def batches(vocabulary: int, lengths: list[int]) -> list[tuple[list[list[int]], int]]:
    """The requests as static batches in their order: the prompts of each, its longest length."""
    ids = prompts(vocabulary, len(lengths))
    starts = range(0, len(ids), ROWS)
    return [(ids[i : i + ROWS], max(lengths[i : i + ROWS])) for i in starts]


def serve(engine: Callable[..., Callable[[], list[int]]]) -> None:
    """Answers requests, each a line of stdin, with a line of stdout, until stdin ends.

    Args:
      engine: `(**request) -> run`, called at the first of equal requests; `run()` samples a
        response to each prompt and returns how many tokens each has, no fewer than asked for.
    """
    prepared = functools.cache(lambda line: engine(**json.loads(line)))
    for line in sys.stdin:
        run = prepared(line)
        start = time.process_time()
        tokens = run()
        answer = {"cpu_s": time.process_time() - start, "tokens": tokens}
        print(json.dumps(answer), flush=True)
