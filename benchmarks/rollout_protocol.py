"""Protocol for the engines of benchmarks/rollout.py: a JSON line requests one repetition.

It uses only the standard library, because each engine has its own virtual environment.
"""

import functools
import json
import random
import sys
import time
from collections.abc import Callable

MODEL = {  # Qwen3's shape with an untied head
    "hidden": 256,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "mlp": 768,
    "rope_theta": 10_000,
}
ROWS = 32  # requests per static batch
PROMPT = 64  # tokens per prompt


def prompts(vocabulary: int, number: int) -> list[list[int]]:
    """Returns random token ids, [number, PROMPT]."""
    rng = random.Random(0)
    return [rng.choices(range(vocabulary), k=PROMPT) for _ in range(number)]


def batches(vocabulary: int, lengths: list[int]) -> list[tuple[list[list[int]], int]]:
    """Returns the static batches in order: (prompts, longest response length) for each."""
    ids = prompts(vocabulary, len(lengths))
    starts = range(0, len(ids), ROWS)
    return [(ids[i : i + ROWS], max(lengths[i : i + ROWS])) for i in starts]


def serve(engine: Callable[..., Callable[[], dict]]) -> None:
    """Answers each request, a line of stdin, with a line of stdout, until stdin ends.

    Args:
      engine: `(**request) -> run`, called once for equal requests. `run()` samples a response to
        each prompt and returns `{"tokens": ...}`, the number of tokens in each, at least the
        requested number, and may add "sampled" and "steps": the number of tokens in all, and of
        decoding steps.
    """
    prepared = functools.cache(lambda line: engine(**json.loads(line)))
    for line in sys.stdin:
        run = prepared(line)
        start = time.process_time()
        made = run()
        answer = {"cpu_s": time.process_time() - start} | made
        print(json.dumps(answer), flush=True)
