"""Adapters in the format of PEFT: what it saves loads here, and what we save loads there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from conftest import random_tokens

from opsd_jax import config as config_lib
from opsd_jax.models import decoder, peft, pretrained
from opsd_jax.models.lora import LoRA, LoRAOptions, Weights
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.parallel import mesh as mesh_lib

ABOUT = peft.About(
    4,
    6.0,
    ("layers/down", "layers/o", "layers/q"),
    "models/tiny",
    {"embedding": "float32:0123abcd"},
    "bfloat16",
    "int8",
)


def bound(model, mesh=None, **options):
    """Returns the adapter of a model, and its shapes with shardings."""
    mesh = mesh or mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    abstract = mesh_lib.abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
    adapter = LoRA(LoRAOptions(kind="lora", rank=4, alpha=6.0, **options), model, shapes)
    return adapter, adapter.abstract(abstract)


def random_values(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding), abstract
    )


@pytest.fixture(scope="module")
def small():
    return decoder.from_config(tiny_config.decoder(num_layers=2, scan_unroll=1))


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """An adapter of some of the matrices, and the directory where it was saved from 8 devices."""
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    mesh = mesh_lib.make_mesh((2, 2, 2))
    _, abstract = bound(small, mesh, targets=(r"layers/(q|o|down)",))
    adapter = random_values(abstract)
    small.adapter_files.save(adapter, directory, ABOUT, dropout=0.1)
    return adapter, directory


def test_a_saved_adapter_is_read_again(small, saved):
    adapter, directory = saved
    about = peft.about(directory)
    assert about == ABOUT
    _, abstract = bound(small, targets=about.paths)
    loaded = small.adapter_files.load(abstract, directory)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(x, y)
    config = json.loads((directory / peft.CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    assert config["lora_dropout"] == 0.1
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "SHA256SUMS",
    }


CHANGES = {
    "peft_type": ("IA3", "peft_type is 'IA3'; expected 'LORA'"),
    "use_dora": (True, "use_dora is True; expected None"),
    "modules_to_save": (["lm_head"], r"modules_to_save is \['lm_head'\]; expected None"),
    "rank_pattern": ({"q_proj": 8}, "rank_pattern is {'q_proj': 8}"),
    "bias": ("all", "bias is 'all'; expected 'none'"),
    "alora_invocation_tokens": ([1, 2], r"alora_invocation_tokens is \[1, 2\]; expected None"),
    "some_future_variant": ({"a": 1}, "some_future_variant is {'a': 1}; expected None"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa', which changes the base model"),
    "base_model_name_or_path": (3, "base_model_name_or_path is 3; expected text"),
    "r": (0, r"r is 0 and lora_alpha 6\.0; expected numbers above 0"),
    "lora_alpha": (True, "lora_alpha True"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_other_kinds_of_adapters_are_refused(saved, tmp_path, field):
    value, message = CHANGES[field]
    directory = changed(saved, tmp_path, lambda config: config | {field: value})
    with pytest.raises(WeightsError, match=message):
        peft.about(directory)


def changed(saved, directory, change):
    """Returns a copy of the saved adapter whose config has been changed."""
    for path in saved[1].iterdir():
        content = path.read_bytes()
        if path.name == peft.CONFIG:
            content = json.dumps(change(json.loads(content))).encode()
        (directory / path.name).write_bytes(content)
    return directory


def test_rslora_divides_by_the_square_root_of_the_rank(saved, tmp_path):
    directory = changed(saved, tmp_path, lambda config: config | {"use_rslora": True})
    assert peft.about(directory).alpha == 12  # 12 / 4 = 6 / sqrt(4)


def test_a_model_of_the_hub_keeps_its_revision(small, saved, tmp_path):
    """PEFT has the revision in a field of its own."""
    adapter, _ = saved
    peft.save(adapter, tmp_path / "hub", ABOUT._replace(base="Owner/Name@0123abcd"))
    config = json.loads((tmp_path / "hub" / peft.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Owner/Name", "0123abcd")
    assert peft.about(tmp_path / "hub").base == "Owner/Name@0123abcd"
    (tmp_path / "hub" / "base.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"base\.json is damaged; expected checksums"):
        peft.about(tmp_path / "hub")


def test_an_adapter_that_does_not_fit_is_refused(small, saved, tmp_path):
    _, abstract = bound(small, targets=(r"layers/(q|o|up)",))
    message = r"(?s)does not fit the model.*down_proj.*is unexpected.*up_proj.*is missing"
    with pytest.raises(WeightsError, match=message):
        peft.load(abstract, saved[1])
    narrow = decoder.from_config(tiny_config.decoder(num_layers=2, scan_unroll=1, hidden_size=32))
    _, abstract = bound(narrow, targets=(r"layers/(q|o|down)",))
    with pytest.raises(WeightsError, match=r"q_proj\.lora_A\.weight has shape \[4, 64\]"):
        peft.load(abstract, saved[1])
    with pytest.raises(WeightsError, match=r"has no adapter_config\.json; expected an adapter"):
        peft.about(tmp_path)


def torch_pair(directory, **options):
    """Returns a PEFT model on torch with random adapters, and the same model here."""
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    hf_peft = pytest.importorskip("peft", reason="needs the extra `parity`")
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    hf = transformers.Qwen3ForCausalLM(config).float().eval()
    hf.save_pretrained(directory / "base")
    wrapped = hf_peft.get_peft_model(
        hf,
        hf_peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options
        ),
    ).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.2)
    section = config_lib.pretrained(directory / "base", dtype="float32", remat="none")
    model = pretrained.from_config(section)
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    base = model.load(
        mesh_lib.abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
    )
    return torch, wrapped, model, base


def losses_and_gradients(torch, wrapped, model, base, adapter, factors, tokens):
    """Returns logits and gradients of the cross-entropy of the next token, of torch and here."""
    ids = torch.tensor(np.asarray(tokens)).long()
    logits = wrapped(ids).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 32), ids[:, 1:].reshape(-1)
    ).backward()
    theirs = {
        name.replace(".default", ""): weight.grad.numpy()
        for name, weight in wrapped.named_parameters()
        if weight.grad is not None
    }
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(factors):
        params = adapter.applied(base, factors)
        found = model.policy.unembed(params, model.policy.forward(params, tokens, positions)[0])
        logprobs = jax.nn.log_softmax(found[:, :-1])
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1).mean(), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(factors)
    return (logits.detach().numpy(), theirs), (found, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_logits_gradients_and_merged_weights_equal_those_of_peft(tmp_path, options):
    torch, wrapped, model, base = torch_pair(tmp_path, **options)
    wrapped.save_pretrained(tmp_path / "theirs")
    about = peft.about(tmp_path / "theirs")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    chosen = LoRAOptions(kind="lora", rank=about.rank, alpha=about.alpha, targets=about.paths)
    adapter = LoRA(chosen, model, shapes)
    assert len(about.paths) == 7
    factors = peft.load(adapter.abstract(base), tmp_path / "theirs")
    tokens = random_tokens(3, (2, 24))
    theirs, ours = losses_and_gradients(torch, wrapped, model, base, adapter, factors, tokens)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    peft.save(ours[1], tmp_path / "gradients", about)
    stored = peft.safetensors.tensors_in(tmp_path / "gradients" / peft.FILE)
    assert stored.keys() == theirs[1].keys()
    for name, tensor in stored.items():
        expected = theirs[1][name]
        got = tensor.read(0, expected.size).reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    merged = adapter.merged(Weights(base, factors))
    model.save(merged, tmp_path / "merged", "float32")
    expected = {k: v.numpy() for k, v in wrapped.merge_and_unload().state_dict().items()}
    for name, tensor in peft.safetensors.tensors_of(tmp_path / "merged").items():
        got = tensor.read(0, expected[name].size).reshape(expected[name].shape)
        np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_peft_loads_what_is_saved_here(tmp_path):
    torch, wrapped, model, base = torch_pair(tmp_path)
    hf_peft = pytest.importorskip("peft")
    adapter, abstract = bound(model, targets=(r"layers/(q|v|down)",))
    factors = random_values(abstract)
    factors = jax.tree.map(lambda x: 0.1 * x, factors)
    peft.save(factors, tmp_path / "ours", ABOUT._replace(base=str(tmp_path / "base")))
    again = hf_peft.PeftModel.from_pretrained(wrapped.unload(), tmp_path / "ours").eval()
    tokens = random_tokens(4, (2, 24))
    with torch.no_grad():
        expected = again(torch.tensor(np.asarray(tokens)).long()).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    params = adapter.applied(base, factors)
    hidden, _ = model.policy.forward(params, tokens, positions)
    np.testing.assert_allclose(model.policy.unembed(params, hidden), expected, rtol=1e-5, atol=1e-5)
