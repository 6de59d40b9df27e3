"""Sizes of decoders: the presets, and reading and writing config.json."""

import json
import math

import jax
import pytest
import tiny_config

from opsd_jax import config as config_lib
from opsd_jax.models import architecture, decoder, presets

# Millions of parameters as published: model cards, or the counts in safetensors files.
MILLIONS = {
    "qwen3-0.6b": 596.05,
    "qwen3-1.7b": 1720.57,
    "qwen3-4b": 4022.47,
    "qwen3-8b": 8190.74,
    "qwen3-14b": 14768.31,
    "qwen3-32b": 32762.12,
    "qwen2.5-0.5b": 494.03,
    "qwen2.5-1.5b": 1543.71,
    "qwen2.5-3b": 3085.94,
    "qwen2.5-7b": 7615.62,
    "qwen2.5-14b": 14770.03,
    "qwen2.5-32b": 32763.88,
    "qwen2.5-math-1.5b": 1543.71,
    "qwen2.5-math-7b": 7615.62,
    "r1-distill-qwen-1.5b": 1777.09,
    "r1-distill-qwen-7b": 7615.62,
    "r1-distill-qwen-14b": 14770.03,
    "acereason-nemotron-7b": 7615.62,
    "acereason-nemotron-14b": 14770.03,
    # Text models; the larger ones are released with a vision tower.
    "gemma-3-270m": 268.10,
    "gemma-3-1b": 999.89,
    "gemma-3-4b": 3880.26,
    "gemma-3-12b": 11766.03,
    "gemma-3-27b": 27009.35,
    "llama-3.1-8b": 8030.26,
    "llama-3.2-1b": 1235.81,
    "llama-3.2-3b": 3212.75,
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
}


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_has_the_published_size(name):
    model = decoder.from_config(config_lib.preset(name, param_dtype="bfloat16"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert total / 1e6 == pytest.approx(MILLIONS[name], abs=0.01)


def test_an_unknown_preset_is_an_error():
    with pytest.raises(config_lib.ConfigError, match="no preset 'qwen3-9b'; expected one of qwen3"):
        config_lib.preset("qwen3-9b")


@pytest.fixture
def written(tmp_path):
    """A function that writes a config.json and returns its path. None removes a field."""

    def write(**changes):
        path = tmp_path / "config.json"
        fields = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        path.write_text(json.dumps(fields))
        return path

    return write


def test_older_and_newer_files_give_the_same_sizes(written):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    newer = written(rope_parameters={**scaling, "rope_theta": 123.0})
    expected = architecture.from_json(newer)
    assert (expected.rope_theta, expected.rope_scaling.factor) == (123.0, 4.0)
    assert (expected.head_dim, expected.attention_bias, expected.qk_norm) == (4, True, False)
    older = written(rope_theta=123, rope_scaling={"type": "yarn", **scaling})
    assert architecture.from_json(older) == expected
    assert architecture.from_json(written()).rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"max_position_embeddings": None}, 0),
        ({"max_position_embeddings": 8192}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 20_480),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            32_768,
        ),
        (
            {
                "max_position_embeddings": 40_960,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32_768,
                },
            },
            131_072,
        ),
        (
            {
                "max_position_embeddings": 131_072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131_072,
        ),
    ],
)
def test_the_longest_sequence_of_a_config_json(written, changes, positions):
    path = written(**{"max_position_embeddings": 8192, **changes})
    assert architecture.max_positions(path) == positions


@pytest.mark.parametrize("value", [0, -1, "8192", 1e400, True])
def test_an_impossible_longest_sequence_is_refused(written, value):
    with pytest.raises(
        config_lib.ConfigError, match=r"config\.json: max_position_embeddings is .*; expected"
    ):
        architecture.max_positions(written(max_position_embeddings=value))


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-7b", "llama-3.2-1b"])
def test_a_config_json_that_we_write_reads_back(name, tmp_path):
    section = config_lib.preset(name)
    sizes = decoder.config_of(section)
    (tmp_path / "config.json").write_text(json.dumps(architecture.to_json(sizes, "float32")))
    options = {"dtype": "bfloat16", "remat": "full"}
    assert architecture.from_json(tmp_path / "config.json", **options) == sizes


def test_normalised_queries_with_biases_cannot_be_exported():
    sizes = decoder.config_of(tiny_config.decoder(attention_bias=True))
    with pytest.raises(ValueError, match=r"qk_norm is True and model\.attention_bias is True"):
        architecture.to_json(sizes, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, r"architectures is \[\"PhiForCausalLM\"\]"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "rope_scaling is .*; expected a single object that applies to all layers",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; expected 1.0",
        ),
        ({"architectures": None}, "architectures is null; expected one of Qwen3ForCausalLM"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; expected "silu"'),
        ({"hidden_size": None}, "hidden_size is null; expected an integer above 0"),
        ({"num_hidden_layers": "2"}, 'num_hidden_layers is "2"; expected an integer'),
        (
            {"num_key_value_heads": 3},
            "num_heads is 4; expected a multiple of model.num_kv_heads = 3",
        ),
        ({"attention_bias": False}, "attention_bias is false; expected true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*bits"),
        (
            {"architectures": ["LlamaForCausalLM"], "attention_bias": False, **SLIDING},
            "layer_types is .*; expected a list with only",
        ),
        (SLIDING | {"sliding_window": 0}, "sliding_window is 0; expected an integer above 0"),
        ({"layer_types": ["full_attention"] * 3, "sliding_window": 8}, "layer_types is .*; expec"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type is "dynamic"; expected'),
        ({"rope_scaling": {"type": "linear"}}, "factor is null; expected a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; expected at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_emb.* is null"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is false"),
        ({"rope_theta": "1e6"}, 'rope_theta is "1e6"; expected a number'),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; .* at most 1,000"),
        ({"vocab_size": 10**400}, r"vocab_size is 1000\d+\.\.\.; expected an integer above 0"),
        ({"rope_theta": 10**400}, r"rope_theta is 1000\d+\.\.\.; expected a number above 0"),
        ({"rope_theta": 1}, "rope_theta is 1.0; expected a number above 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; expected a number"),
        ({"layer_types": [["full_attention"]]}, "layer_types is .*; expected a list with 2"),
        ({"layer_types": 3}, "layer_types is 3; expected a list"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures is .*; expected one of"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"; expected true or'),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "1"}, "max_window"),
    ],
)
def test_an_unsupported_config_json_is_an_error(written, changes, message):
    path = written(**changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        architecture.from_json(path)


def test_null_counts_as_absent(tmp_path):
    """Older Llama files contain null. num_key_value_heads defaults to num_attention_heads."""
    path = tmp_path / "config.json"
    fields = CONFIG | {"attention_bias": None, "rope_scaling": None, "rope_theta": None}
    path.write_text(json.dumps(fields | {"num_key_value_heads": None}))
    sizes = architecture.from_json(path)
    assert sizes.num_kv_heads == sizes.num_heads == CONFIG["num_attention_heads"]
    assert sizes.rope_theta == 10_000.0


@pytest.mark.parametrize("text", ["{", "[1]", None, '{"a":' * 10**5, "1" * 5000])
def test_an_unreadable_config_json_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(
        ValueError, match=r"config\.json (cannot be read|contains a JSON value of type list)"
    ):
        architecture.from_json(path)


FULL, SLIDES = "full_attention", "sliding_attention"
GEMMA = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "num_hidden_layers": 7}


@pytest.mark.parametrize(
    ("changes", "types"),
    [
        (GEMMA, (SLIDES,) * 5 + (FULL, SLIDES)),
        ({**GEMMA, "sliding_window_pattern": 2}, (SLIDES, FULL) * 3 + (SLIDES,)),
        ({**SLIDING}, (FULL, SLIDES)),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            (FULL, SLIDES),
        ),
        (
            {"architectures": ["MistralForCausalLM"], "attention_bias": False, "sliding_window": 8},
            (SLIDES, SLIDES),
        ),
    ],
)
def test_the_layers_with_a_sliding_window_are_read(written, changes, types):
    config = architecture.from_json(written(**changes))
    assert config.layer_types == types
    assert config.slides == tuple(kind == SLIDES for kind in types)
    assert config.sliding_window == changes.get("sliding_window", 4096)


def test_the_rotary_embeddings_of_gemma_are_read_from_old_and_new_files(written):
    """Older files have two bases, and newer ones an object for each kind of layers."""
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = written(**GEMMA, rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=scaling)
    expected = architecture.from_json(old)
    assert (expected.rope_theta, expected.rope_local_theta) == (5e5, 2e4)
    assert expected.rope_scaling.factor == 8
    kinds = {FULL: {"rope_theta": 5e5, **scaling}, SLIDES: {"rope_theta": 2e4}}
    assert architecture.from_json(written(**GEMMA, rope_parameters=kinds)) == expected
    assert architecture.to_json(expected, "float32")["rope_local_base_freq"] == 2e4
    other = {FULL: {}, SLIDES: scaling}
    with pytest.raises(ValueError, match=r"sliding_attention is .*; expected the rope_type"):
        architecture.from_json(written(**GEMMA, rope_parameters=other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": (FULL,)}, r"layer_types has 1 entries; expected one for each of .* = 3"),
        ({"layer_types": ("local",) * 3}, r"layer_types is .*; expected \(\) or, for each layer"),
        ({"sliding_window": 8}, r"sliding_window is 8, but model\.layer_types has no 'sliding"),
        ({"layer_types": (SLIDES,) * 3}, r"sliding_window is 0, but model\.layer_types has 'slid"),
        (
            {
                "layer_types": (SLIDES,) * 3,
                "sliding_window": 8,
                "context_parallel": True,
                "remat": "full",
            },
            r"context_parallel is True with model\.sliding_window = 8; expected False",
        ),
    ],
)
def test_windows_that_do_not_fit_the_layers_are_refused(changes, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        decoder.config_of(tiny_config.decoder(**changes))


def test_a_sliding_window_that_no_layer_uses_is_allowed(written):
    """Released models have the fields of a window that is not in use."""
    changes = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}
    assert architecture.from_json(written(**changes)).num_layers == 2
