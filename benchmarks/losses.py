"""Compares the fused OPSD loss with a naive JAX loss and with the losses of TRL and Liger.

    python benchmarks/losses.py [--sizes 256x1024 ...] [--peers DIRECTORY]

The loss is the reverse KL over a vocabulary of 151,936, with the gradients of the student's head
and hidden states, in float32 on the CPU. The benchmark takes about fifteen minutes on two cores.

For times, the fused and the naive loss run alternately in one process. For peak memory, each runs
in a process of its own. TRL and Liger are installed with PyTorch into a virtual environment in
DIRECTORY, and compute the same loss of the same arrays. Times are CPU-seconds of the process,
because wall-clock times vary on a shared machine.
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
COMPILED = ["1024x4096", "1024x8192"]  # memory only: the naive loss takes minutes per run
PEERS = ["torch==2.13.0", "trl==1.16.0", "liger-kernel==0.8.5"]


def weights(width: int, tokens: int):
    """Returns heads [D, V] and hidden states [1, N, D] of the student and of the teacher.

    The teacher's arrays are the student's with noise.
    """
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(scale, *shape, around=0.0):
        # In place, so that the loss and not this function sets the peak memory.
        x = rng.standard_normal(shape, dtype=np.float32)
        x *= np.float32(scale)
        x += around
        return x

    head, hidden = normal(width**-0.5, width, V), normal(1, 1, tokens, width)
    teacher_head = normal(0.5 * width**-0.5, width, V, around=head)
    return head, hidden, teacher_head, normal(0.5, 1, tokens, width, around=hidden)


def programs(width: int, tokens: int):
    """Compiles the naive and the fused loss with their gradients.

    Returns:
      "naive" and "fused" -> a compiled function
      `(head, hidden, teacher_head, teacher_hidden) -> (loss, gradients)`.
    """
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
            outcomes=(one, none, none),
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
    """Measures one form of the loss, or both alternately, in this process.

    Args:
      form: "naive", "fused" or "both".
      width: width of the hidden states.
      tokens: number of tokens.

    Returns:
      Form -> CPU-seconds of each run, the loss and the norm of its gradients; and the peak memory
      of the process in GiB.
    """
    import jax
    import numpy as np

    forms = programs(width, tokens)
    forms = {name: f for name, f in forms.items() if form in (name, "both")}
    arrays = list(weights(width, tokens))
    for i in range(len(arrays)):  # one at a time, so that only one array exists twice
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
    """Runs a Python script in another process and returns the JSON object on its last line."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [python, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers(directory: pathlib.Path, width: int, tokens: int) -> dict:
    """Measures the losses of TRL and Liger in their virtual environment, creating it if needed."""
    import numpy as np

    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        # torch is installed first and alone. The other packages would install its CUDA packages.
        for packages in (PEERS[:1], PEERS):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.npz"
        names = ("head", "hidden", "teacher_head", "teacher_hidden")
        np.savez(file, **dict(zip(names, weights(width, tokens), strict=True)))
        script = str(pathlib.Path(__file__).with_name("losses_torch.py"))
        return {name: child(str(python), script, name, str(file)) for name in ("trl", "liger")}


def compare_sizes(sizes: list[str]) -> dict:
    """Prints the memory and the times of the fused and the naive loss, one line for each size.

    Args:
      sizes: "width x tokens" of the sizes to time, such as "256x1024".

    Returns:
      The numbers for the benchmark's JSON.
    """
    this_script = str(pathlib.Path(__file__).resolve())
    result: dict = {"time_ratios": {}}
    print(f"{'D x tokens':>12} {'temporaries, GiB':>18} {'CPU-s':>15} {'fused/naive':>12}")
    for size in sizes + COMPILED:
        width, tokens = map(int, size.split("x"))
        os.environ["JAX_PLATFORMS"] = "cpu"
        gib = {
            name: program.memory_analysis().temp_size_in_bytes / 2**30
            for name, program in programs(width, tokens).items()
        }
        if (width, tokens) == (256, 4096):
            result |= {f"temp_gib_{name}_4096": round(x, 4) for name, x in gib.items()}
        memory = f"{size:>12} {gib['fused']:8.3f} /{gib['naive']:8.3f}"
        if size not in sizes:
            print(memory, flush=True)
            continue
        both = child(sys.executable, this_script, "--measure", "both", str(width), str(tokens))
        seconds = {name: statistics.median(both[name]["cpu_s"]) for name in ("fused", "naive")}
        ratio = seconds["fused"] / seconds["naive"]
        result["time_ratios"][size] = round(ratio, 3)
        times = f"{seconds['fused']:6.1f} /{seconds['naive']:7.1f} {ratio:12.2f}"
        print(f"{memory} {times}", flush=True)
    result["time_ratio_fused_over_naive"] = statistics.median(result["time_ratios"].values())
    return result


def compare_peers(directory: pathlib.Path) -> dict:
    """Prints time, peak memory and values of all four losses at 256 x 1024, one process each.

    Args:
      directory: the virtual environment of TRL and Liger.

    Returns:
      The numbers for the benchmark's JSON.
    """
    this_script = str(pathlib.Path(__file__).resolve())
    result: dict = {}
    alone = {
        name: child(sys.executable, this_script, "--measure", name, "256", "1024")
        for name in ("fused", "naive")
    }
    for name, run in alone.items():
        result[f"peak_rss_gib_{name}"] = round(run["peak_rss_gib"], 2)
    measured = {name: run[name] | {"rss": run["peak_rss_gib"]} for name, run in alone.items()}
    for name, run in peers(directory, 256, 1024).items():
        measured[name] = run | {"rss": run["peak_rss_gib"]}
        fused = statistics.median(measured["fused"]["cpu_s"])
        ratio = fused / statistics.median(run["cpu_s"])
        result[f"time_ratio_fused_over_{name}"] = round(ratio, 3)
        result[f"peak_rss_gib_{name}"] = round(run["peak_rss_gib"], 2)
    print("\nat 256 x 1024, each in its own process:")
    for name, run in measured.items():
        print(
            f"{name:>8}: {statistics.median(run['cpu_s']):5.1f} CPU-s, peak {run['rss']:5.2f} GiB, "
            f"loss {run['loss']:.6f}, gradient norm {run['grad_norm']:.7f}"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="widths x tokens to time")
    parser.add_argument(
        "--peers",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir(), "opsd-jax-peers"),
        help="directory of the virtual environment of TRL and Liger",
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        form, width, tokens = arguments.measure
        print(json.dumps(measure(form, int(width), int(tokens))))
        return
    result = compare_sizes(arguments.sizes)
    print(json.dumps(result | compare_peers(arguments.peers)))


if __name__ == "__main__":
    main()
