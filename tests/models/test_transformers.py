"""Parity with Hugging Face transformers: its directories load here, and ours load there."""

import copy
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from conftest import random_tokens

from opsd_jax import config as config_lib
from opsd_jax import policy
from opsd_jax.cli import main
from opsd_jax.config.run_options import parse_run
from opsd_jax.models import decoder, pretrained, safetensors
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.run import pipeline
from opsd_jax.run.parameters import Parameters

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs the extra `parity`")

pytestmark = pytest.mark.slow

SIZES = dict(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=16_384,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
GEMMA = {"sliding_window": 11, "sliding_window_pattern": 3, "tie_word_embeddings": True}
CASES = {  # name -> (class prefix, rotary embedding, other changes)
    "qwen3": ("Qwen3", {"rope_theta": 5e5}, {}),
    "qwen3-tied": ("Qwen3", {"rope_theta": 1e6}, {"tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", {"rope_theta": 1e6, **YARN}, {}),
    "qwen2": ("Qwen2", {"rope_theta": 3e4}, {"num_key_value_heads": 1}),
    "qwen2-tied": ("Qwen2", {"rope_theta": 1e6}, {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen2-yarn": ("Qwen2", {"rope_theta": 1e6, **YARN, "attention_factor": 1.5}, {}),
    "llama": ("Llama", {"rope_theta": 5e5, **LLAMA3}, {"rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {"rope_theta": 2e4}, {"tie_word_embeddings": True}),
    "llama-linear": (
        "Llama",
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        {"head_dim": 64},
    ),
    # Rows of 40 tokens are longer than two windows.
    "qwen2-window": (
        "Qwen2",
        {"rope_theta": 1e6},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "mistral-window": ("Mistral", {"rope_theta": 1e4}, {"sliding_window": 13}),
    "mistral": ("Mistral", {"rope_theta": 1e4}, {"sliding_window": None, "head_dim": 8}),
    "gemma3": ("Gemma3", {}, {"query_pre_attn_scalar": 10, **GEMMA}),
    "gemma3-linear": (
        "Gemma3",
        {"rope_type": "linear", "factor": 8.0},
        {"num_hidden_layers": 7, "num_key_value_heads": 1, "head_dim": 24, **GEMMA},
    ),
}


class Pair(NamedTuple):
    """A transformers model, and the same model loaded from its directory."""

    directory: pathlib.Path
    hf: "transformers.PreTrainedModel"
    model: policy.Model
    params: policy.Params


def random_hf(case: str) -> "transformers.PreTrainedModel":
    """Returns a model with random norms, biases and weights, of standard deviation 0.2."""
    family, rope, changes = CASES[case]
    rope = {"rope_type": "default", **rope}
    if family == "Gemma3":
        rope = {
            "full_attention": {"rope_theta": 1e6, **rope},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    text = "Text" if family == "Gemma3" else ""
    make = getattr(transformers, f"{family}{text}Config")
    config = make(**SIZES | changes, rope_parameters=rope)
    torch.manual_seed(0)
    hf = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return hf


def abstract(model: policy.Model, mesh=None) -> policy.Params:
    mesh = mesh or mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / request.param
    hf = random_hf(request.param)
    hf.save_pretrained(directory)
    model = decoder_from(directory)
    return Pair(directory, hf, model, model.load(abstract(model)))


def decoder_from(directory):
    section = config_lib.pretrained(directory, dtype="float32", remat="none")
    return pretrained.from_config(section)


def logits_of(model, params, tokens, positions):
    @jax.jit
    def logits(params, tokens, positions):
        return model.policy.unembed(params, model.policy.forward(params, tokens, positions)[0])

    return np.asarray(logits(params, jnp.asarray(tokens), jnp.asarray(positions, jnp.int32)))


def hf_logits(hf, tokens, positions):
    with torch.no_grad():
        return hf(
            torch.tensor(np.asarray(tokens)),
            attention_mask=torch.tensor(positions >= 0).long(),
            position_ids=torch.tensor(positions).clamp(min=0),
        ).logits.numpy()


def padded_positions(kind, windows=False):
    """Returns positions [2, 40], with -1 for padding.

    With `windows`, far positions have no gaps, because transformers counts tokens in a window.
    """
    counted = np.broadcast_to(np.arange(40), (2, 40)).copy()
    if kind == "left":
        counted -= np.array([[5], [11]])
        return np.maximum(counted, -1)
    if kind == "right":
        return np.where(counted < np.array([[33], [27]]), counted, -1)
    if kind == "far" and windows:
        return counted + 8152
    if kind == "far":  # random positions below 8,192
        chosen = np.random.default_rng(0).permuted(np.tile(np.arange(8191), (2, 1)), axis=1)
        return np.concatenate([np.sort(chosen[:, :39]), [[8191], [8191]]], axis=1)
    return counted


@pytest.mark.parametrize("kind", ["whole", "left", "right", "far"])
def test_logits_equal_those_of_transformers(pair, kind):
    windows = bool(getattr(pair.hf.config, "sliding_window", None))
    tokens, positions = np.array(random_tokens(3, (2, 40))), padded_positions(kind, windows)
    expected = hf_logits(pair.hf, tokens, positions)
    logits = logits_of(pair.model, pair.params, tokens, positions)
    real = positions >= 0
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=1e-4)


def test_greedy_decoding_equals_that_of_transformers(pair):
    prompt = np.array(random_tokens(4, (1, 7)))
    with torch.no_grad():
        expected = pair.hf.generate(
            torch.tensor(prompt), max_new_tokens=200, do_sample=False, eos_token_id=None
        )[0, 7:].numpy()
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    params = jax.device_put(pair.params, mesh_lib.replicated(mesh))
    shardings = jax.tree.map(lambda x: x.sharding, params)
    engine = Engine(pair.model, abstract_of(params, shardings), mesh, EngineShape(2, 1, 8, 200))
    assert len(engine.cache_lengths) == 2  # the cache grows during decoding
    sampling_params = sampling.params(pair.model.vocab_size, stop=(), temperature=0.0)
    (ended,) = engine(
        params, prompt.tolist(), [[0]], key=jax.random.key(0), sampling_params=sampling_params
    )
    np.testing.assert_array_equal(ended.responses[0].tokens, expected)


def test_cached_decoding_equals_the_full_forward(pair):
    tokens = jnp.array(random_tokens(5, (2, 24)))
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    forward = jax.jit(pair.model.policy.forward)
    full, _ = forward(pair.params, tokens, positions)
    cache = pair.model.policy.init_cache(2, 32)
    for part in (slice(0, 9), *(slice(t, t + 1) for t in range(9, 24))):
        hidden, cache = forward(pair.params, tokens[:, part], positions[:, part], cache)
        np.testing.assert_allclose(hidden, full[:, part], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_and_saving_preserve_every_byte(pair, dtype, tmp_path):
    source = tmp_path / "source"
    hf = copy.deepcopy(pair.hf).to(getattr(torch, dtype))
    hf.save_pretrained(source, max_shard_size="20KB")
    model = decoder_from(source)
    params = model.load(abstract(model, mesh_lib.make_mesh((2, 4, 1))))
    model.save(params, tmp_path / "out")
    there, here = safetensors.tensors_of(source), safetensors.tensors_of(tmp_path / "out")
    assert there.keys() == here.keys()
    assert len({t.file for t in there.values()}) > 1
    for name, stored in there.items():
        assert (stored.code, stored.shape) == (here[name].code, here[name].shape)
        count = int(np.prod(stored.shape))
        assert stored.read(0, count).tobytes() == here[name].read(0, count).tobytes()


def test_an_export_loads_in_transformers(pair, tmp_path):
    pair.model.save(pair.params, tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert hf.dtype == torch.float32
    tokens, positions = np.array(random_tokens(6, (2, 40))), padded_positions("left")
    real = positions >= 0
    expected = hf_logits(pair.hf, tokens, positions)
    np.testing.assert_array_equal(hf_logits(hf, tokens, positions)[real], expected[real])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"qk_norm": False, "attention_bias": True},
        {"qk_norm": False, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"qk_norm": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=["qwen3", "qwen3-yarn", "qwen2", "llama3", "linear"],
)
def test_a_decoder_with_random_weights_loads_in_transformers(changes, tmp_path):
    model = decoder.from_config(tiny_config.decoder(**changes))
    params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape),
        jax.jit(model.init)(jax.random.key(0)),
    )
    model.save(params, tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens, positions = np.array(random_tokens(7, (2, 40))), padded_positions("far")
    logits = logits_of(model, params, tokens, positions)
    np.testing.assert_allclose(logits, hf_logits(hf, tokens, positions), atol=1e-4, rtol=1e-4)


def test_the_result_of_a_run_loads_in_transformers(config, tmp_path):
    run = config.copy_and_resolve_references()
    run.stages = ("sft",)
    pipeline.run(parse_run(run), tmp_path / "run")
    out = tmp_path / "out"
    assert main.main(["convert", "--workdir", str(tmp_path / "run"), "--out", str(out)]) == 0
    hf = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    this = Parameters(parse_run(run), tmp_path / "run")
    tokens, positions = np.array(random_tokens(8, (2, 40))), padded_positions("whole")
    logits = logits_of(this.model, this.of("sft"), tokens, positions)
    np.testing.assert_allclose(logits, hf_logits(hf, tokens, positions), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_model_of_images_is_read(tmp_path, prefix):
    """Released Gemma 3 models of 4B and more have their text model beside a vision tower."""
    text = random_hf("gemma3").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    hf = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.normal_(0.0, 0.2)
    hf.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors_torch.load_file(file)
    found = next(
        p
        for p in ("language_model.model.", "model.language_model.")
        if any(name.startswith(p) for name in tensors)
    )
    named = {name.replace(found, prefix): tensor for name, tensor in tensors.items()}
    safetensors_torch.save_file(named, file, metadata={"format": "pt"})

    model = decoder_from(tmp_path / "hf")
    params = model.load(abstract(model))
    tokens, positions = np.array(random_tokens(3, (2, 40))), padded_positions("left")
    with torch.no_grad():
        expected = hf(
            torch.tensor(tokens),
            attention_mask=torch.tensor(positions >= 0).long(),
            position_ids=torch.tensor(positions).clamp(min=0),
        ).logits.numpy()
    logits = logits_of(model, params, tokens, positions)
    real = positions >= 0
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=1e-4)

    model.save(params, tmp_path / "text")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").float().eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    np.testing.assert_allclose(
        hf_logits(again, tokens, positions)[real], expected[real], atol=1e-4, rtol=1e-4
    )
