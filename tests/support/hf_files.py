"""Writes small Hugging Face directories for tests, independently of the code under test."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors_of(config: dict, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random tensors of a Qwen2 model, by name. Some float16 values are subnormal."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    Q, K = (config[f"num_{x}_heads"] * config["head_dim"] for x in ("attention", "key_value"))
    layer = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (Q, D),
        "self_attn.k_proj.weight": (K, D),
        "self_attn.v_proj.weight": (K, D),
        "self_attn.q_proj.bias": (Q,),
        "self_attn.k_proj.bias": (K,),
        "self_attn.v_proj.bias": (K,),
        "self_attn.o_proj.weight": (D, Q),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(seed)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    scale = 2.0**-12 if dtype == "float16" else 1.0
    return {
        name: (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(kind)
        for name, shape in shapes.items()
    }


def write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file."""
    header, end = {}, 0
    for name, value in tensors.items():
        offsets = [end, end := end + value.nbytes]
        code = CODES[value.dtype.name]
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(value.tobytes())


def write(directory: pathlib.Path, tensors: dict[str, np.ndarray], config: dict, files: int = 1):
    """Writes a directory with the tensors split over `files` files, and returns it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if files == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for number in range(files):
        part = f"model-{number + 1:05}-of-{files:05}.safetensors"
        write_file(directory / part, {name: tensors[name] for name in names[number::files]})
        weight_map |= dict.fromkeys(names[number::files], part)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
