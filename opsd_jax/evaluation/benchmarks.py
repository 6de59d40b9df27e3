"""The known benchmarks, with their files on the Hugging Face Hub and the columns of each file."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from opsd_jax.data import files
from opsd_jax.data.options import ColumnOptions, SourceOptions
from opsd_jax.data.sources import reach
from opsd_jax.options import ConfigError
from opsd_jax.storage.names import NAME, NAMES
from opsd_jax.verify.verifiers import VerifierOptions


class Benchmark(NamedTuple):
    """A benchmark on the Hugging Face Hub: its dataset, its file and the file's columns.

    Attributes:
      repo: name of the dataset on the hub.
      file: the file of its test split.
      source: options that describe the columns of the file.
    """

    repo: str
    file: str
    source: SourceOptions = SourceOptions()


BENCHMARKS = {
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500",
        "test.jsonl",
        SourceOptions(columns=ColumnOptions(id="unique_id")),
    ),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet"),
    "aime25": Benchmark("math-ai/aime25", "test.jsonl"),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "main/test-00000-of-00001.parquet",
        SourceOptions(
            columns=ColumnOptions(question="question", solution="answer"), answer_after="####"
        ),
    ),
}

VERIFIER = VerifierOptions(answer=("boxed", "answer"))


def source(text: str) -> tuple[str, SourceOptions]:
    """Resolves a `--benchmark` argument to a benchmark's name and the options for reading it.

    Args:
      text: "NAME", one of BENCHMARKS, which is downloaded; or "NAME=PATH", a file or directory with
        the columns that the benchmark has on the hub, or with the default columns. "math-500" and
        "AIME_2024" name "math500" and "aime24".

    Returns:
      (name, options of the source).

    Raises:
      ConfigError: there is no such benchmark, or it cannot be downloaded.
      DataError: the file cannot be read.
    """
    name, _, path = text.partition("=")
    if not NAME.fullmatch(name):
        raise ConfigError(f"--benchmark {text} has the name {name!r}; expected {NAMES}.")
    plain = re.sub(r"[-_]|20(?=\d\d$)", "", name.lower())
    name = plain if plain in BENCHMARKS else name
    known = BENCHMARKS.get(name)
    if not path:
        if known is None:
            raise ConfigError(
                f"--benchmark {text}: unknown benchmark; expected NAME=PATH, or one of "
                f"{', '.join(BENCHMARKS)}."
            )
        path = _download(name, known)
    default = SourceOptions(path=path, verifier=VERIFIER)
    if known is None:
        on_hub = default
    else:
        on_hub = dataclasses.replace(known.source, path=path, verifier=VERIFIER)
    # A copy may have the default columns instead; the first row shows which.
    own = _required(on_hub.columns) - _required(default.columns)
    first = next(files.rows(path, "", f"data.heldout.{name}", own), None)
    values = (first and first.columns) or {}
    is_as_on_hub = all(reach(values, column) is not None for column in own)
    return name, on_hub if is_as_on_hub else default


def _required(columns: ColumnOptions) -> set[str]:
    """Returns the names of the columns that every row must have: id, question and answer."""
    return {columns.id, columns.question, columns.answer}


def _download(name: str, benchmark: Benchmark) -> str:
    """Returns the local path of a benchmark's file. Downloads the file if it is not cached."""
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(benchmark.repo, benchmark.file, repo_type="dataset")
    except Exception as error:  # from the network, the hub or the disk
        raise ConfigError(
            f"--benchmark {name}: {benchmark.file} of the dataset {benchmark.repo} cannot be "
            f"downloaded from the Hugging Face Hub ({type(error).__name__}: {error}). Connect to "
            f"the internet, or pass the path of a local copy: --benchmark {name}=PATH."
        ) from error
