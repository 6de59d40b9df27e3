"""Benchmarks by name: where they are, and which of their columns are what."""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.data import files
from opsd_jax.data.sources import reach


class Benchmark(NamedTuple):
    """A data set on the Hugging Face hub.

    Attributes:
      repo: its name there.
      file: the evaluated part of it.
      source: what `opsd_jax.config.source` has to know of its columns.
    """

    repo: str
    file: str
    source: dict[str, Any]


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test.jsonl", {"columns": {"id": "unique_id"}}),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", {}),
    "aime25": Benchmark("math-ai/aime25", "test.jsonl", {}),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "main/test-00000-of-00001.parquet",
        {"columns": {"question": "question", "solution": "answer"}, "answer_after": "####"},
    ),
}


def source(text: str) -> tuple[str, ConfigDict]:
    """A benchmark's name and its `config.data` source.

    Args:
      text: "NAME", one of BENCHMARKS, which is downloaded; or "NAME=PATH", a file or folder with
        the columns that the benchmark has on the hub, or those of `opsd_jax.config.source`.

    Raises:
      ConfigError: there is no such benchmark, or it cannot be downloaded.
      DataError: the file cannot be read.
    """
    name, _, path = text.partition("=")
    known = BENCHMARKS.get(name)
    if not path:
        if known is None:
            raise config_lib.ConfigError(
                f"--benchmark {text}: expected NAME=PATH, or one of {', '.join(BENCHMARKS)}."
            )
        path = _download(name, known)
    verifier = config_lib.verifier(answer=("boxed", "answer"))
    as_on_the_hub = config_lib.source(path, verifier=verifier, **(known.source if known else {}))
    columns = set(as_on_the_hub.columns.values()) - {as_on_the_hub.columns.solution}
    wanted = columns - set(config_lib.source().columns.values())
    rows = files.rows(path, "", f"data.heldout.{name}", columns)
    first = next(rows, None)
    there = (first and first.columns) or {}
    if all(reach(there, column) is not None for column in wanted):
        return name, as_on_the_hub
    return name, config_lib.source(path, verifier=verifier)


def _download(name: str, benchmark: Benchmark) -> str:
    """The path of a benchmark's file on this machine."""
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(benchmark.repo, benchmark.file, repo_type="dataset")
    except Exception as error:  # of the network, of the hub, of the disk
        raise config_lib.ConfigError(
            f"--benchmark {name}: {benchmark.file} of the data set {benchmark.repo} cannot be "
            f"downloaded from the Hugging Face hub ({type(error).__name__}: {error}); expected a "
            f"connection, or a path of a copy: --benchmark {name}=PATH."
        ) from error
