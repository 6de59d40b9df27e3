"""The fused OPSD loss against the loss written plainly, in JAX and in PyTorch.

    python benchmarks/losses.py [--sizes 256x1024 ...] [--peers DIRECTORY]

Full-vocabulary reverse KL over 151,936 words with the gradients of the student's head and hidden
states, float32 on the CPU, some fifteen minutes on two cores. Fused and naive take turns in one
process for their time; each runs in one of its own for its peak memory. TRL and Liger, on torch,
are installed into a virtual environment in DIRECTORY, and compute the same loss of the same
numbers. Times are CPU-seconds of the process: on a shared machine they say more than the clock.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

V = 151_936
SIZES = [f"256x{n}" for n in (512, 1024, 2048, 4096, 8192)] + ["1024x512", "1024x1024"]
COMPILED = ["1024x4096", "1024x8192"]  # their memory alone: naive takes minutes a run
PEERS = ["torch==2.13.0", "trl==1.16.0", "liger-kernel==0.8.5"]


def weights(width: int, tokens: int):
    """Heads [D, V] and hidden states [1, N, D]; the teacher's are the student's, perturbed."""
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(scale, *shape, around=0.0):  # in place: the peak of memory is to be the loss's
        x = rng.standard_normal(shape, dtype=np.float32)
        x *= np.float32(scale)
        x += around
        return x

    head, hidden = normal(width**-0.5, width, V), normal(1, 1, tokens, width)
    teacher_head = normal(0.5 * width**-0.5, width, V, around=head)
    return head, hidden, teacher_head, normal(0.5, 1, tokens, width, around=hidden)


def programs(width: int, tokens: int):
    """`(head, hidden, teacher_head, teacher_hidden) -> (loss, gradients)`, compiled."""
    import jax
    import jax.numpy as jnp

    from opsd_jax import losses

    def unembed(head, hidden):
        return jnp.einsum("...d,dv->...v", hidden, head)

    def naive(head, hidden, teacher_head, teacher_hidden):
        log_s = jax.nn.log_softmax(unembed(head, hidden))
        log_t = jax.nn.log_softmax(unembed(teacher_head, teacher_hidden))
        return jnp.mean(jnp.sum(jnp.exp(log_s) * (log_s - log_t), axis=-1))

    def fused(head, hidden, teacher_head, teacher_hidden):
        one, none = jnp.ones(1, bool), jnp.zeros(1, bool)
        return losses.opsd(
            student=losses.Head(unembed, head, hidden),
            teacher=losses.Head(unembed, teacher_head, teacher_hidden),
            mask=jnp.ones(hidden.shape[:2], bool),
            groups=(one, none, none),
        ).mean

    heads = jax.ShapeDtypeStruct((width, V), jnp.float32)
    states = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    return {
        form.__name__: jax.jit(jax.value_and_grad(form, argnums=(0, 1)))
        .lower(heads, states, heads, states)
        .compile()
        for form in (naive, fused)
    }


def measure(form: str, width: int, tokens: int) -> dict:
    """In this process: CPU-seconds of the runs of each form, its loss and gradient norm."""
    import jax
    import numpy as np

    forms = programs(width, tokens)
    forms = {name: f for name, f in forms.items() if form in (name, "both")}
    arrays = list(weights(width, tokens))
    for i in range(len(arrays)):  # one at a time: no array is held twice
        arrays[i] = jax.block_until_ready(jax.device_put(arrays[i]))
    out: dict = {name: {"cpu_s": []} for name in forms}
    for _ in range(5 if tokens <= 1024 else 3):
        for name, run in forms.items():
            start = time.process_time()
            loss, gradients = jax.block_until_ready(run(*arrays))
            out[name]["cpu_s"].append(time.process_time() - start)
            rows = (row for g in gradients for row in np.asarray(g).reshape(-1, g.shape[-1]))
            square = sum(float(np.square(row, dtype=np.float64).sum()) for row in rows)
            out[name] |= {"loss": float(loss), "grad_norm": square**0.5}
            del gradients
    return out | {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def child(python: str, *arguments: str) -> dict:
    """The last line of another process, which is JSON."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [python, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers(directory: pathlib.Path, width: int, tokens: int) -> dict:
    """TRL's and Liger's losses in their own environment, made if it is not there."""
    import numpy as np

    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        # torch first and alone: what the others ask for would bring its CUDA packages.
        for packages in (PEERS[:1], PEERS):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.npz"
        names = ("head", "hidden", "teacher_head", "teacher_hidden")
        np.savez(file, **dict(zip(names, weights(width, tokens), strict=True)))
        script = str(pathlib.Path(__file__).with_name("losses_torch.py"))
        return {name: child(str(python), script, name, str(file)) for name in ("trl", "liger")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="width x tokens to time")
    parser.add_argument(
        "--peers", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "opsd-jax-peers")
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        form, width, tokens = arguments.measure
        print(json.dumps(measure(form, int(width), int(tokens))))
        return

    this = str(pathlib.Path(__file__).resolve())
    result: dict = {"time_ratios": {}}
    print(f"{'D x tokens':>12} {'temporaries, GiB':>18} {'CPU-s':>15} {'fused/naive':>12}")
    for size in arguments.sizes + COMPILED:
        width, tokens = map(int, size.split("x"))
        os.environ["JAX_PLATFORMS"] = "cpu"
        gib = {
            name: program.memory_analysis().temp_size_in_bytes / 2**30
            for name, program in programs(width, tokens).items()
        }
        if (width, tokens) == (256, 4096):
            result |= {f"temp_gib_{name}_4096": round(x, 4) for name, x in gib.items()}
        memory = f"{size:>12} {gib['fused']:8.3f} /{gib['naive']:8.3f}"
        if size not in arguments.sizes:
            print(memory, flush=True)
            continue
        both = child(sys.executable, this, "--measure", "both", str(width), str(tokens))
        seconds = {name: statistics.median(both[name]["cpu_s"]) for name in ("fused", "naive")}
        ratio = seconds["fused"] / seconds["naive"]
        result["time_ratios"][size] = round(ratio, 3)
        times = f"{seconds['fused']:6.1f} /{seconds['naive']:7.1f} {ratio:12.2f}"
        print(f"{memory} {times}", flush=True)
    result["time_ratio_fused_over_naive"] = statistics.median(result["time_ratios"].values())

    alone = {
        name: child(sys.executable, this, "--measure", name, "256", "1024")
        for name in ("fused", "naive")
    }
    for name, run in alone.items():
        result[f"peak_rss_gib_{name}"] = round(run["peak_rss_gib"], 2)
    figures = {name: run[name] | {"rss": run["peak_rss_gib"]} for name, run in alone.items()}
    for name, run in peers(arguments.peers, 256, 1024).items():
        figures[name] = run | {"rss": run["peak_rss_gib"]}
        fused = statistics.median(figures["fused"]["cpu_s"])
        ratio = fused / statistics.median(run["cpu_s"])
        result[f"time_ratio_fused_over_{name}"] = round(ratio, 3)
        result[f"peak_rss_gib_{name}"] = round(run["peak_rss_gib"], 2)
    print("\nat 256 x 1024, each in its own process:")
    for name, run in figures.items():
        print(
            f"{name:>8}: {statistics.median(run['cpu_s']):5.1f} CPU-s, peak {run['rss']:5.2f} GiB, "
            f"loss {run['loss']:.6f}, gradient norm {run['grad_norm']:.7f}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
