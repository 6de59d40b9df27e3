"""Measures the time and the host memory to load and save a Hugging Face directory.

    python benchmarks/weights.py [--layers 8] [--directory DIRECTORY]

The script writes random bfloat16 weights to a temporary directory: Qwen3-1.7B with fewer layers and
with an output head, 2 GiB in several files. Each case then runs in a separate process, on one or on
eight CPU devices. On the CPU the parameters themselves are in host memory. The script therefore
reports the peak memory of the process, including the interpreter and JAX, minus the bytes of its
arrays. During loading it takes this after each parameter, and reports the maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

CASES = [  # devices, mesh, param_dtype
    (1, (1, 1, 1), "bfloat16"),
    (1, (1, 1, 1), "float32"),
    (8, (1, 8, 1), "bfloat16"),
    (8, (1, 4, 2), "float32"),
]


def make(directory: pathlib.Path, layers: int) -> None:
    """Writes `config.json` and random weights for a model of `layers` layers."""
    import jax
    import numpy as np

    from opsd_jax import config as config_lib
    from opsd_jax.models import architecture, decoder, safetensors, weights

    section = config_lib.preset("qwen3-1.7b", num_layers=layers, tie_word_embeddings=False)
    decoder_config = decoder.config_of(section)
    config = architecture.to_json(decoder_config, "bfloat16")
    (directory / "config.json").write_text(json.dumps(config))
    shapes = jax.eval_shape(decoder.model(decoder_config).init, jax.random.key(0))
    tensors = weights.all_layouts(shapes)
    safetensors.SHARD_BYTES = 2**29
    rng = np.random.default_rng(0)
    with safetensors.writer(directory, {k: ("BF16", t.shape) for k, t in tensors.items()}) as put:
        for name, tensor in tensors.items():
            total, step = int(np.prod(tensor.shape)), 2**22
            for start in range(0, total, step):
                values = rng.standard_normal(min(step, total - start), np.float32)
                put(name, start, values.astype(safetensors.DTYPES["BF16"]))


def peak() -> int:
    """Returns the peak memory of this process, in bytes."""
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> None:
    """Resets the recorded peak memory of this process to its current memory."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure(directory: pathlib.Path, mesh: tuple[int, ...], param_dtype: str) -> dict:
    """Loads and saves the weights in this process, and returns the measurements."""
    import jax

    from opsd_jax import config as config_lib
    from opsd_jax.models import pretrained, safetensors, weights
    from opsd_jax.parallel import mesh as mesh_lib
    from opsd_jax.parallel.mesh import abstract_of

    model = pretrained.from_config(config_lib.pretrained(directory, param_dtype=param_dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = mesh_lib.tree_shardings(mesh_lib.make_mesh(mesh), model.rules, shapes)
    abstract = abstract_of(shapes, shardings)
    stored = safetensors.tensors_of(directory)
    result = {"mesh": mesh, "param_dtype": param_dtype, "before_mib": peak() >> 20}
    began, held, beside, loaded = time.monotonic(), 0, 0, []
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    for path, leaf in leaves:  # one by one, so that the peak belongs to one parameter
        reset_peak()
        for key in reversed(path):
            leaf = {key.key: leaf}
        (array,) = jax.block_until_ready(jax.tree.leaves(weights.load(stored, leaf)))
        held += sum(shard.data.nbytes for shard in array.addressable_shards)
        beside = max(beside, peak() - held)
        loaded.append(array)
    params = jax.tree.unflatten(tree, loaded)
    result["load_s"] = round(time.monotonic() - began, 1)
    result["arrays_mib"] = held >> 20
    result["load_beside_arrays_mib"] = beside >> 20
    reset_peak()
    began = time.monotonic()
    model.save(params, directory / "out")
    result["save_s"] = round(time.monotonic() - began, 1)
    result["save_beside_arrays_mib"] = (peak() - held) >> 20
    return result


def same(directory: pathlib.Path) -> bool:
    """Returns whether the saved tensors have the same bytes as the loaded tensors."""
    import numpy as np

    from opsd_jax.models import safetensors

    def equal(a, b):
        total, step = int(np.prod(a.shape)), 2**24
        return all(
            np.array_equal(
                a.read(i, min(step, total - i)).view(np.uint16),
                b.read(i, min(step, total - i)).view(np.uint16),
            )
            for i in range(0, total, step)
        )

    loaded, saved = safetensors.tensors_of(directory), safetensors.tensors_of(directory / "out")
    return loaded.keys() == saved.keys() and all(equal(loaded[k], saved[k]) for k in loaded)


def main() -> None:
    """Runs all cases and prints one line of JSON for each, and one with the totals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--directory", help="where to create the temporary directory (default: the system's)"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)  # runs one measurement in this process
    arguments = parser.parse_args()
    if arguments.case:
        directory, mesh, dtype = json.loads(arguments.case)
        print(json.dumps(measure(pathlib.Path(directory), tuple(mesh), dtype)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = pathlib.Path(name)
        make(directory, arguments.layers)
        files = list(directory.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        results = []
        for devices, mesh, dtype in CASES:
            flags = f"--xla_force_host_platform_device_count={devices}"
            case = ["--case", json.dumps([name, mesh, dtype])]
            done = subprocess.run(
                [sys.executable, __file__, *case],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results.append(json.loads(done.stdout) | {"same_bytes": same(directory)})
            print(json.dumps(results[-1]), flush=True)
            subprocess.run(["rm", "-r", str(directory / "out")], check=True)
    largest = 151_936 * 2048 * 2
    print(
        json.dumps(
            {
                "files": len(files),
                "weights_mib": size >> 20,
                "largest_tensor_mib": largest >> 20,
                "bound_mib": int(1.3 * largest + 10**9) >> 20,
                "load_beside_arrays_mib": max(r["load_beside_arrays_mib"] for r in results),
                "save_beside_arrays_mib": max(r["save_beside_arrays_mib"] for r in results),
                "load_s": [r["load_s"] for r in results],
                "save_s": [r["save_s"] for r in results],
                "same_bytes": all(r["same_bytes"] for r in results),
            }
        )
    )


if __name__ == "__main__":
    main()
