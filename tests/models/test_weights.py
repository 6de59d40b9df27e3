"""Loading, checking and saving the weights of Hugging Face directories."""

import json
import os
import shutil
import subprocess
import sys

import hf_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import processes
import pytest

from opsd_jax import config as config_lib
from opsd_jax.models import pretrained, safetensors, weights
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of


def opened(directory, **changes):
    return pretrained.from_config(config_lib.pretrained(directory, **changes))


def load(model, shape=(1, 1, 1)):
    mesh = mesh_lib.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model.load(abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes)))


@pytest.fixture
def tensors():
    return hf_files.tensors_of(hf_files.CONFIG)


@pytest.fixture
def directory(tmp_path, tensors):
    return hf_files.write(tmp_path / "source", tensors, hf_files.CONFIG, files=3)


def test_every_parameter_holds_the_tensor_of_its_name(directory, tensors):
    params = load(opened(directory))
    for i in range(3):
        stored = lambda name, i=i: tensors[f"model.layers.{i}.{name}"]
        layer = {name: value[i] for name, value in params["layers"].items()}
        x = np.arange(16.0, dtype=np.float32)
        q = stored("self_attn.q_proj.weight") @ x + stored("self_attn.q_proj.bias")
        ours = np.einsum("d,dhc->hc", x, layer["q"]) + layer["q_bias"]
        np.testing.assert_allclose(ours, q.reshape(4, 8), rtol=1e-4, atol=1e-4)
        out = np.random.default_rng(0).standard_normal((4, 8), np.float32)
        theirs = stored("self_attn.o_proj.weight") @ out.reshape(-1)
        ours = np.einsum("hc,hcd->d", out, layer["o"])
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(layer["down"], stored("mlp.down_proj.weight").T)
        np.testing.assert_array_equal(layer["v_bias"].ravel(), stored("self_attn.v_proj.bias"))
        np.testing.assert_array_equal(layer["mlp_norm"], stored("post_attention_layernorm.weight"))
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("piece", [weights.PIECE, 100], ids=["whole", "pieces"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_parameters_are_equal_on_every_mesh(directory, shape, piece, monkeypatch, tmp_path):
    expected = load(opened(directory))
    monkeypatch.setattr(weights, "PIECE", piece)
    model = opened(directory)
    params = load(model, shape)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert params["layers"]["gate"].sharding.spec == jax.P(None, "fsdp", "tensor")
    model.save(params, tmp_path / "out")
    assert_same_tensors(directory, tmp_path / "out")


def assert_same_tensors(a, b):
    a, b = safetensors.tensors_of(a), safetensors.tensors_of(b)
    assert a.keys() == b.keys()
    for name, stored in a.items():
        assert (stored.code, stored.shape) == (b[name].code, b[name].shape)
        n = int(np.prod(stored.shape))
        assert stored.read(0, n).tobytes() == b[name].read(0, n).tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_saved_after_loading_are_equal_to_the_byte(dtype, tmp_path, monkeypatch):
    tensors = hf_files.tensors_of(hf_files.CONFIG, dtype)
    source = hf_files.write(tmp_path / "source", tensors, hf_files.CONFIG)
    model = opened(source)
    params = load(model, (2, 2, 1))
    assert params["norm"].dtype == jnp.float32
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 4000)
    model.save(params, tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")
    pretrained.rewrite(source, tmp_path / "again")
    assert_same_tensors(source, tmp_path / "again")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


def test_parameters_can_be_bfloat16(directory, tensors):
    norm = load(opened(directory, param_dtype="bfloat16"))["norm"]
    np.testing.assert_array_equal(norm, tensors["model.norm.weight"].astype(ml_dtypes.bfloat16))


def test_an_export_has_the_requested_dtype_and_the_companion_files(directory, tmp_path):
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("x")
    (directory / "README.md").write_text("not part of the model")
    model = opened(directory)
    for out in (tmp_path / "saved", tmp_path / "written"):
        if out.name == "saved":
            model.save(load(model), out, "bfloat16")
        else:
            pretrained.rewrite(directory, out, "bfloat16")
        assert json.loads((out / "config.json").read_text()) == hf_files.CONFIG | {
            "torch_dtype": "bfloat16"
        }
        assert {t.code for t in safetensors.tensors_of(out).values()} == {"BF16"}
        assert {path.name for path in out.iterdir()} == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "additional_chat_templates",
            "SHA256SUMS",
        }
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_damaged_export_is_named(tmp_path, tensors):
    source = hf_files.write(tmp_path / "source", tensors, hf_files.CONFIG)
    pretrained.rewrite(source, tmp_path / "out")
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "out", capture_output=True).returncode == 0
    weights.check_sums(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    model = opened(tmp_path / "out")
    for use in (lambda: load(model), lambda: pretrained.rewrite(path.parent, tmp_path / "again")):
        with pytest.raises(WeightsError, match=r"model.safetensors is damaged: it differs from"):
            use()
    (tmp_path / "out" / "SHA256SUMS").unlink()
    load(model)


def test_all_wrong_tensors_are_listed_in_one_error(tmp_path, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.norm.weight"] = np.ones(15, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.ones(16, np.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    source = hf_files.write(tmp_path / "source", tensors, hf_files.CONFIG)
    with pytest.raises(WeightsError) as error:
        opened(source)
    assert str(error.value).split("\n  ")[1:] == [
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight has shape [15]; expected [16]",
        "model.layers.0.input_layernorm.weight is stored as I8; expected one of "
        "['F32', 'BF16', 'F16']",
        "model.layers.2.self_attn.q_norm.weight of shape [8] is unexpected",
    ]


def test_a_stored_head_must_equal_a_tied_embedding(tmp_path):
    config = hf_files.CONFIG | {"tie_word_embeddings": True}
    tensors = hf_files.tensors_of(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    model = opened(hf_files.write(tmp_path / "equal", tensors, config))
    params = load(model)
    assert "head" not in params
    model.save(params, tmp_path / "out")  # transformers restores the tie
    assert "lm_head.weight" not in safetensors.tensors_of(tmp_path / "out")
    tensors["lm_head.weight"][39, 15] += 1
    other = hf_files.write(tmp_path / "other", tensors, config)
    for use in (lambda: load(opened(other)), lambda: pretrained.rewrite(other, tmp_path / "no")):
        with pytest.raises(
            WeightsError,
            match=r"the tensor lm_head\.weight in .* differs from model\.embed_tokens\.weight",
        ):
            use()


def cut_off(directory):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_header(directory):
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"version https://git-lfs")


def empty(directory):
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"")


def wrong_offsets(directory):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"data_offsets": [0, ', b'"data_offsets": [1, ', 1))


def absent(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def damaged_index(directory):
    (directory / "model.safetensors.index.json").write_text('{"weight_map"')


def nothing(directory):
    for path in directory.glob("model*"):
        path.unlink()


def twice(directory):
    (directory / "model.safetensors.index.json").unlink()
    content = (directory / "model-00002-of-00003.safetensors").read_bytes()
    (directory / "model-00004-of-00003.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_off, r"model-00002-of-00003\.safetensors has \d+ bytes, but its header describes \d+"),
        (no_header, r"model-00002-of-00003\.safetensors is damaged or is not a safetensors file"),
        (empty, r"model-00002-of-00003\.safetensors is damaged or is not a safetensors file"),
        (wrong_offsets, r"model-00002-of-00003\.safetensors is damaged .* data_offsets 1 and"),
        (
            absent,
            r"index\.json lists files that are missing from .*: model-00002-of-00003\.safetensors",
        ),
        (damaged_index, r"index\.json cannot be used \(JSONDecodeError"),
        (nothing, r"contains no weights; expected model\.safetensors, model\.safetensors\.index"),
        (twice, r"00002-of-00003\.safetensors and .*00004-of-00003\.safetensors both contain"),
    ],
)
def test_a_damaged_directory_is_an_error(directory, harm, message):
    harm(directory)
    with pytest.raises(WeightsError, match=message):
        opened(directory)


def test_a_file_that_is_cut_off_after_the_check_is_an_error(directory):
    model = opened(directory)
    for path in directory.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(WeightsError, match="file is truncated"):
        load(model)


def test_files_are_found_without_an_index(directory):
    (directory / "model.safetensors.index.json").unlink()
    assert load(opened(directory))["norm"].shape == (16,)


def test_a_failed_export_leaves_nothing_behind(directory, tmp_path, monkeypatch):
    model = opened(directory)
    params = load(model)
    with pytest.raises(WeightsError, match="is not empty; expected a new or an empty directory"):
        model.save(params, directory)
    (tmp_path / "empty").mkdir()
    model.save(params, tmp_path / "empty")
    assert_same_tensors(directory, tmp_path / "empty")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "add_files", fail)
    with pytest.raises(WeightsError, match="out cannot be written: No space left on device"):
        model.save(params, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]


MEASURE = """
import os, pathlib, sys
import jax
from opsd_jax import config as config_lib
from opsd_jax.models import pretrained, weights
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

weights.PIECE = 4 * 2**20
model = pretrained.from_config(config_lib.pretrained(sys.argv[1], param_dtype="bfloat16"))
shapes = jax.eval_shape(model.init, jax.random.key(0))
mesh = mesh_lib.make_mesh((1, 4, 2))
abstract = abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
before = peak()
params = model.load(abstract)
held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print((peak() - before - held) >> 20)
before = peak()
model.save(params, pathlib.Path(sys.argv[1]) / "out")
print((peak() - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_and_saving_do_not_hold_the_model_in_host_memory(tmp_path):
    """With 256 MiB of weights, the memory besides the arrays stays below a third of that."""
    config = hf_files.CONFIG | {
        "vocab_size": 65_536,
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    tensors = hf_files.tensors_of(config, "bfloat16")
    size = sum(value.nbytes for value in tensors.values()) >> 20
    assert 220 < size < 300
    hf_files.write(tmp_path / "source", tensors, config)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "source")],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    reading, writing = map(int, done.stdout.split())
    assert reading < size // 3, done.stdout
    assert writing < size // 3, done.stdout


PROCESS = """
import pathlib
from opsd_jax import config as config_lib
from opsd_jax.models import pretrained, weights
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of

weights.PIECE = 300
source = pathlib.Path(sys.argv[4])
model = pretrained.from_config(config_lib.pretrained(source))
shapes = jax.eval_shape(model.init, jax.random.key(0))
for number, shape in enumerate([(1, 4, 1), (1, 2, 2), (2, 2, 1)]):
    mesh = mesh_lib.make_mesh(shape)
    shardings = mesh_lib.tree_shardings(mesh, model.rules, shapes)
    params = model.load(abstract_of(shapes, shardings))
    model.save(params, source.parent / f"out{number}")
"""


@pytest.mark.slow
def test_two_processes_load_and_save_one_model(directory, tmp_path):
    processes.run(PROCESS, str(directory), processes=2, devices=2)
    for number in range(3):
        assert_same_tensors(directory, tmp_path / f"out{number}")


def test_an_export_copies_only_files_of_the_model(directory, tmp_path):
    """A link could name any file of the machine, such as a private key."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "a.jinja").write_text("secret")
    link, out = directory / "tokenizer_secret.json", tmp_path / "out"
    for target in (secret, tmp_path / "keys", "/dev/zero", "../secret", "absent", link):
        link.symlink_to(target)
        with pytest.raises(WeightsError, match=r"tokenizer_secret\.json (is a symb|cannot be exp)"):
            pretrained.rewrite(directory, out)
        link.unlink()
    templates = directory / "additional_chat_templates"
    templates.mkdir(exist_ok=True)
    (templates / "tool.jinja").symlink_to(secret)
    with pytest.raises(WeightsError, match=r"tool\.jinja is a symbolic link to .*secret, outside"):
        pretrained.rewrite(directory, out)
    assert not out.exists()
    (templates / "tool.jinja").unlink()
    (directory / "tokenizer.json").write_text("{}")
    link.symlink_to("tokenizer.json")  # a link inside the directory
    pretrained.rewrite(directory, out)
    assert (out / "tokenizer_secret.json").read_text() == "{}"
    assert not (out / "tokenizer_secret.json").is_symlink()


def test_a_snapshot_in_the_hugging_face_cache_is_exported(directory, tmp_path):
    """Its files are links to `blobs`, next to `snapshots`."""
    snapshot, blobs = (
        tmp_path / "models--a" / "snapshots" / "1234",
        tmp_path / "models--a" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    for i, path in enumerate(sorted(path for path in directory.iterdir() if path.is_file())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    pretrained.rewrite(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert_same_tensors(directory, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry | {"shape": ["a", 10**9]}, "expected integers of at least 0"),
        (lambda entry: entry | {"shape": [-1, -16]}, "expected integers of at least 0"),
        (lambda entry: entry | {"shape": [10**300]}, "expected integers of at least 0"),
        (lambda entry: entry | {"shape": [1] * 99}, "has 99 dimensions"),
        (lambda entry: entry | {"dtype": ["F32"]}, "expected integers of at least 0"),
        (lambda entry: entry | {"data_offsets": [4, 68]}, "the tensor before it ends at 0"),
        (lambda entry: [entry], "is damaged or is not a safetensors file"),
    ],
)
def test_a_header_is_checked_by_field(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    text = json.dumps({"a": change(entry)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(WeightsError, match=message):
        safetensors.tensors_of(tmp_path)


def test_a_header_with_a_hostile_or_repeated_name_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = '{"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}'
    for names, message in (
        ([r"a\nb"], r"'a\\nb' is not the name of a tensor"),
        (["a", "a"], "the key 'a' occurs twice"),
    ):
        text = ("{" + ", ".join(f'"{name}": {entry}' for name in names) + "}").encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        with pytest.raises(WeightsError, match=message):
            safetensors.tensors_of(tmp_path)
