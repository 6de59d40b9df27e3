"""Compares the sampling speed of opsd_jax, Tunix and Hugging Face on one CPU core.

    python benchmarks/rollout.py [--engines ours tunix ...] [--configs A ...] [--peers DIRECTORY]
        [--quickstart DIRECTORY]

The speed is in tokens per CPU-second. The model has Qwen3's shape in float32 with random weights
(benchmarks/rollout_protocol.py). Prompts have 64 tokens, the temperature is 1, and no token is
excluded. The configurations are:

    A       32 responses of 256 tokens, vocabulary of 4,096
    B       32 responses of 32 tokens, vocabulary of 151,936
    spread  256 responses of exponentially distributed lengths (mean 64, at most 256), vocabulary of
            4,096; our engine has 32 slots, and the others run static batches of 32, each to its
            longest length. Only requested tokens count.
    tail    our engine's decoding steps with and without speculation on the quickstart's text
            (benchmarks/rollout_tail.py). It counts steps, so it depends on no clock. The run of the
            quickstart is trained in DIRECTORY if it is not there.

Our engine has two variants: `static` gets one batch of `spread` at a time, and `double` has a cache
for twice the tokens of A.

Each engine runs in its own process; Tunix and transformers have virtual environments in DIRECTORY.
All processes are pinned to one core and take turns, one repetition each. The first repetition
compiles and does not count. The last line of the output is JSON: the median of each rate, and the
median over the repetitions of each ratio.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

SPREAD = np.ceil(np.random.default_rng(0).exponential(64, 256)).clip(1, 256).astype(int).tolist()
CONFIGS = {
    "A": {"vocabulary": 4_096, "lengths": [256] * 32},
    "B": {"vocabulary": 151_936, "lengths": [32] * 32},
    "spread": {"vocabulary": 4_096, "lengths": SPREAD},
}
ENGINES = {  # name: (virtual environment, script)
    "ours": (None, "rollout_ours.py"),
    "tunix": ("tunix", "rollout_tunix.py"),
    "hugging_face": ("torch", "rollout_torch.py"),
}
TAIL = "tail"
VARIANTS = {  # of our engine: name: (configuration, further fields of the request)
    "static": ("spread", {"static": True}),
    "double": ("A", {"capacity": 2 * (64 + 256)}),
}
# Name: (configuration, engine, others). The ratio is the engine's rate over the fastest other's.
RATIOS = {
    "A_over_best_peer": ("A", "ours", ("tunix", "hugging_face")),
    "B_over_best_peer": ("B", "ours", ("tunix", "hugging_face")),
    "spread_over_static": ("spread", "ours", ("static",)),
    "spread_over_tunix": ("spread", "ours", ("tunix",)),
    "double_capacity_step_ratio": ("A", "ours", ("double",)),
}
PEERS = {
    "tunix": ["google-tunix==0.1.7"],
    # torch is installed first and alone; as a dependency of others it would bring CUDA packages.
    "torch": ["torch==2.13.0", "transformers==5.23.0"],
}


def environment(directory: pathlib.Path, name: str | None) -> str:
    """Returns the Python of a virtual environment, creating it if needed; None is this Python."""
    if name is None:
        return sys.executable
    python = directory / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory / name)], check=True)
        for package in PEERS[name]:
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return str(python)


class Child:
    """An engine in its own process. It answers one request at a time."""

    def __init__(self, python: str, script: str):
        self.process = subprocess.Popen(
            [python, str(pathlib.Path(__file__).with_name(script))],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tokens_per_cpu_s(self, request: dict) -> float:
        """Runs one repetition; returns the requested tokens per CPU-second of the process."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.process.args} exited with status {self.process.wait()}; "
                "see its output above."
            )
        answer = json.loads(line)
        for made, asked in zip(answer["tokens"], request["lengths"], strict=True):
            if made < asked:
                raise RuntimeError(
                    f"{self.process.args} sampled {made} tokens; expected at least {asked}."
                )
        return sum(request["lengths"]) / answer["cpu_s"]


def tail(workdir: pathlib.Path) -> dict:
    """Returns the JSON line of rollout_tail.py for a run of the quickstart in `workdir`."""
    script = pathlib.Path(__file__).with_name("rollout_tail.py")
    done = subprocess.run(
        [sys.executable, str(script), "--workdir", str(workdir)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *lines, last = done.stdout.splitlines()
    print(*lines, sep="\n", flush=True)
    return json.loads(last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    configs = [*CONFIGS, TAIL]
    parser.add_argument("--configs", nargs="*", default=configs, choices=configs)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--peers",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir(), "opsd-jax-rollout-peers"),
    )
    parser.add_argument(
        "--quickstart",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir(), "opsd-jax-rollout-quickstart"),
    )
    arguments = parser.parse_args()

    scripts = {name: ENGINES[name] for name in arguments.engines}
    pythons = {name: environment(arguments.peers, env) for name, (env, _) in scripts.items()}
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # inherited by the child processes
    children = {name: Child(pythons[name], script) for name, (_, script) in scripts.items()}

    result: dict = {}
    print(f"{'':>8} {'':>14} {'tokens/CPU-s':>14} {'lowest':>8} {'highest':>8}")
    for config in (name for name in arguments.configs if name in CONFIGS):
        requests = {name: (engine, CONFIGS[config]) for name, engine in children.items()}
        for variant, (base, more) in VARIANTS.items():
            if base == config and "ours" in children:
                requests[variant] = children["ours"], CONFIGS[config] | more
        runs: dict = {name: [] for name in requests}
        for _ in range(1 + arguments.repetitions):
            for name, (engine, request) in requests.items():
                runs[name].append(engine.tokens_per_cpu_s(request))
        runs = {name: run[1:] for name, run in runs.items()}
        for name, run in runs.items():
            rate = statistics.median(run)
            print(
                f"{config:>8} {name:>14} {rate:14.1f} {min(run):8.1f} {max(run):8.1f}", flush=True
            )
            result[f"{config}_tokens_per_cpu_s_{name}"] = round(rate, 1)
        for ratio, (base, ours, others) in RATIOS.items():
            if base == config and runs.keys() >= {ours, *others}:
                best = map(max, zip(*(runs[name] for name in others), strict=True))
                each = [run / other for run, other in zip(runs[ours], best, strict=True)]
                result[ratio] = round(statistics.median(each), 3)
    if TAIL in arguments.configs and "ours" in children:
        result |= tail(arguments.quickstart)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
