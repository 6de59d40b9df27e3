"""Models and datasets of the Hugging Face Hub, by name.

A model is named "OWNER/NAME" or "OWNER/NAME@REVISION", a dataset also "OWNER/NAME/DIRECTORY" or
"OWNER/NAME/DIRECTORY@REVISION". A directory of the same name on this machine takes precedence. The
files are downloaded into the cache of huggingface_hub, whose settings apply (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT). Only data are downloaded, and nothing of them is imported.

`pinned` replaces the revision with its commit, so that a run reads the same files when it resumes.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

from opsd_jax.options import ConfigError

MODEL, SIZES, TOKENIZER, DATASET = "model", "model's config.json", "tokenizer", "dataset"
_TOKENIZER_FILES = (
    "config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
# Patterns of the files to download.
FILES = {
    MODEL: (
        *_TOKENIZER_FILES, "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    ),
    SIZES: ("config.json",),
    TOKENIZER: _TOKENIZER_FILES,
    DATASET: ("*.jsonl", "*.jsonl.gz", "*.json", "*.csv", "*.parquet", "*.arrow"),
}  # fmt: skip
# In a model's repository: the weights in the layout of another library.
OTHERS = {MODEL: ("original/*", "consolidated*"), SIZES: (), TOKENIZER: (), DATASET: ()}
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"({_PART}/{_PART})((?:/{_PART})*)(?:@([A-Za-z0-9._/-]+))?")


class _Repository(NamedTuple):
    """A part of a repository on the hub.

    Attributes:
      name: "OWNER/NAME".
      directory: a directory of the repository, such as "/main"; "" for all of it.
      revision: a branch, tag or commit; None for the default branch.
    """

    name: str
    directory: str
    revision: str | None


def _parse(path: str, kind: str) -> _Repository | None:
    """Parses a name on the hub. Returns None for any other path.

    A path that exists here, or whose first directory exists here, is not a name.
    """
    found = _NAME.fullmatch(path)
    if found is None or (kind != DATASET and found[2]):
        return None
    if pathlib.Path(path).exists() or pathlib.Path(path.partition("/")[0]).exists():
        return None  # a mistake in "models/qwen" is not the name of a repository
    if path.endswith(tuple(pattern[1:] for pattern in FILES[DATASET])):
        return None  # a data file that does not exist
    return _Repository(*found.groups())


def is_name(path: str, kind: str) -> bool:
    """Returns whether a path is a name on the hub, and not a path that exists here."""
    return _parse(path, kind) is not None


def local(path: str, kind: str, field: str) -> pathlib.Path:
    """Returns the directory on this machine that a path or a name on the hub stands for.

    Args:
      path: a path, which is returned as it is, or a name, whose files are downloaded unless they
        are in the cache.
      kind: MODEL, SIZES, TOKENIZER or DATASET.
      field: the config field or argument with the path, for errors.

    Raises:
      ConfigError: the files cannot be downloaded.
    """
    repository = _parse(path, kind)
    if repository is None:
        return pathlib.Path(path)
    return _snapshot(repository, path, kind, field) / repository.directory.removeprefix("/")


def pinned(path: str, kind: str, field: str) -> str:
    """Returns a path, or a name on the hub with the commit of its revision, "NAME@COMMIT".

    Downloads the files. See `local` for the arguments and errors.
    """
    repository = _parse(path, kind)
    if repository is None:
        return path
    commit = _snapshot(repository, path, kind, field).name
    return f"{repository.name}{repository.directory}@{commit}"


def _snapshot(repository: _Repository, path: str, kind: str, field: str) -> pathlib.Path:
    """Downloads a repository's files, and returns their directory, which the commit names."""
    # Imported here, because the command line parses names without JAX.
    import huggingface_hub

    from opsd_jax.storage import files

    within = repository.directory.removeprefix("/")
    patterns = [f"{within}/{pattern}" if within else pattern for pattern in FILES[kind]]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository.name,
                repo_type=DATASET if kind == DATASET else MODEL,
                revision=repository.revision,
                allow_patterns=patterns,
                ignore_patterns=[*OTHERS[kind]],
            )
        )
    except Exception as error:  # from the network, the hub or the disk
        raise ConfigError(
            f"{field} is {path!r}; expected a path on this machine, or the name of a {kind} on the "
            f"Hugging Face Hub, but it cannot be downloaded ({files.reason(error)}). Without a "
            "network, pass the path of a local copy."
        ) from error
