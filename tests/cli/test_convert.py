"""`opsd-jax convert`, and runs that start from the weights of a directory."""

import json
import pathlib
import shutil

import hf_files
import jax
import numpy as np
import pytest
import tiny_config

from opsd_jax import config as config_lib
from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.models import safetensors
from opsd_jax.run import assembly
from opsd_jax.run.parameters import Parameters
from opsd_jax.training import checkpoint

CONFIG = """
from opsd_jax import config as config_lib
from opsd_jax.config import loading


def get_config():
    config = loading.read("quickstart")
    config.model = config_lib.pretrained(dtype="float32", scan_unroll=3)
    config.stages = ("sft",)
    return config
"""
TINY = {
    "sft.steps": "2",
    "sft.batch_size": "8",
    "sft.microbatch": "8",
    "sft.optimizer.warmup": "1",
    "sft.checkpoint_every": "1",
    "evaluation.problems": "8",
    "evaluation.samples": "1",
    "evaluation.slots": "8",
}


@pytest.fixture
def source(tmp_path):
    """The directory of a bfloat16 model with a vocabulary of 40 tokens and a tokenizer file."""
    config = hf_files.CONFIG | {"torch_dtype": "bfloat16"}
    tensors = hf_files.tensors_of(config, "bfloat16")
    tensors = {name: (value * 0.1).astype(value.dtype) for name, value in tensors.items()}
    directory = hf_files.write(tmp_path / "source", tensors, config)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def finished(config, tmp_path):
    """A work directory with the files of a finished first stage that `convert` reads."""
    workdir = tmp_path / "run"
    (workdir / "sft").mkdir(parents=True)
    (workdir / "config.json").write_text(loading.to_json(config))
    params = Parameters(parse_run(config), workdir).initial()
    checkpoint.save_params(workdir / "sft" / "params", jax.tree.map(lambda x: x + 1, params))
    return workdir


def convert(*arguments):
    return main.main(["convert", *map(str, arguments)])


def tensor(directory, name):
    stored = safetensors.tensors_of(directory)[name]
    return stored.read(0, int(np.prod(stored.shape))).reshape(stored.shape)


def test_the_last_finished_stage_is_written(finished, tmp_path, capsys):
    assert convert("--workdir", finished, "--out", tmp_path / "out") == 0
    assert f"model: {tmp_path / 'out'}" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["architectures"], written["torch_dtype"]) == (["Qwen3ForCausalLM"], "float32")
    np.testing.assert_array_equal(tensor(tmp_path / "out", "model.norm.weight"), np.full(16, 2.0))
    arguments = ("--stage", "untrained", "--dtype", "bfloat16")
    assert convert("--workdir", finished, *arguments, "--out", tmp_path / "untrained") == 0
    norm = tensor(tmp_path / "untrained", "model.norm.weight")
    assert (norm.dtype.name, norm[0]) == ("bfloat16", 1)


def test_a_run_of_a_pod_is_converted_on_one_device(finished, tmp_path):
    path = finished / "config.json"
    pod = {"mesh": [1, 16, 1], "decode_mesh": [8, 1, 2]}
    path.write_text(json.dumps(json.loads(path.read_text()) | pod))
    assert convert("--workdir", finished, "--out", tmp_path / "out") == 0
    np.testing.assert_array_equal(tensor(tmp_path / "out", "model.norm.weight"), np.full(16, 2.0))


def test_a_model_directory_is_rewritten_in_another_dtype(source, tmp_path):
    assert convert("--model", source, "--out", tmp_path / "out", "--dtype", "float32") == 0
    norm = tensor(tmp_path / "out", "model.norm.weight")
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, tensor(source, "model.norm.weight").astype(np.float32))
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workdir", "RUN", "--stage", "rlvr"), "the stage 'rlvr' has not finished"),
        (("--workdir", "RUN", "--stage", "rl"), "--stage is 'rl'; expected one of untrained, sft"),
        (("--workdir", "EMPTY"), "holds no run"),
        (("--model", "EMPTY"), r"config.json cannot be read: No such file"),
        (
            ("--model", "EMPTY", "--stage", "sft"),
            "--stage applies to a run; expected",
        ),
    ],
)
def test_a_model_that_cannot_be_converted_is_an_error(
    finished, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty").mkdir()
    places = {"RUN": finished, "EMPTY": tmp_path / "empty"}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert convert(*arguments, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(finished, source, capsys):
    for what in (("--workdir", finished), ("--model", source)):
        assert convert(*what, "--out", finished) == 2
        assert "is not empty; expected a new or an empty directory" in capsys.readouterr().err


def test_a_run_without_a_finished_stage_has_nothing_to_convert(finished, tmp_path, capsys):
    shutil.rmtree(finished / "sft")
    assert convert("--workdir", finished, "--out", tmp_path / "out") == 2
    assert "no stage of the run has finished" in capsys.readouterr().err


def test_a_model_without_save_cannot_be_converted(finished, tmp_path, capsys):
    path = finished / "config.json"
    changes = {"model.make": "tiny_model:make"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    trusted = ("--trust", "tiny_model")
    assert convert("--workdir", finished, *trusted, "--out", tmp_path / "out") == 2
    assert "'tiny_model:make', which returns a Model without `save`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_a_directory(source, config_file, tmp_path):
    """The run also evaluates, resumes and converts like a run with random initial weights."""
    fields = TINY | {"model.path": str(source)}
    arguments = [f"--config.{field}={value}" for field, value in fields.items()]
    workdir = tmp_path / "run"
    train = ["train", "--config", str(config_file), "--workdir", str(workdir), *arguments]
    assert main.main(train) == 0
    assert convert("--workdir", workdir, "--stage", "untrained", "--out", tmp_path / "same") == 0
    for name in safetensors.tensors_of(source):
        np.testing.assert_array_equal(tensor(tmp_path / "same", name), tensor(source, name))
    assert convert("--workdir", workdir, "--out", tmp_path / "trained") == 0
    assert (tmp_path / "trained" / "tokenizer.json").exists()
    trained = tensor(tmp_path / "trained", "model.embed_tokens.weight")
    assert trained.dtype.name == "bfloat16"
    assert not np.array_equal(trained, tensor(source, "model.embed_tokens.weight"))
    shutil.rmtree(workdir / "sft" / "params")
    (workdir / "sft" / "evaluation.json").unlink()
    assert main.main(train) == 0
    assert convert("--workdir", workdir, "--out", tmp_path / "again") == 0
    np.testing.assert_array_equal(tensor(tmp_path / "again", "model.embed_tokens.weight"), trained)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "model.path is ''; expected a directory with a Hugging Face config.json"),
        ("/nowhere", "model.path is '/nowhere'; expected a directory on this machine"),
    ],
)
def test_a_path_without_a_model_is_a_config_error(config_file, tmp_path, capsys, path, message):
    arguments = ["--config", str(config_file), "--workdir", str(tmp_path / "run")]
    assert main.main(["train", *arguments, f"--config.model.path={path}"]) == 2
    assert f"config.{message}" in capsys.readouterr().err


def test_weights_that_disappear_before_they_are_read_are_a_config_error(source, config, tmp_path):
    config.unlock()
    config.model = config_lib.pretrained(source)
    this = assembly.assemble(parse_run(config), tmp_path)
    (source / "model.safetensors").unlink()
    with pytest.raises(config_lib.ConfigError, match=r"config\.model: .*model\.safetensors cannot"):
        this.parameters.initial()


def test_a_pretrained_model_has_typed_fields(config_file):
    changes = {"model.path": "/m", "model.param_dtype": "bfloat16", "model.remat": "none"}
    config = loading.load(config_file, changes)
    assert (config.model.path, config.model.remat) == ("/m", "none")
    assert parse_run(loading.from_flat(loading.flatten(config))) == config
    with pytest.raises(config_lib.ConfigError, match=r"no such field"):
        loading.load(config_file, {"model.hidden_size": "64"})


def test_a_preset_is_a_section_like_any_other():
    config = tiny_config.quickstart()
    config.model = config_lib.preset("llama-3.2-1b", num_layers=2)
    loading.override(config, "model.rope_scaling.factor", "16.0")
    scaling = config.model.rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("llama3", 16.0)
    assert (config.model.num_layers, config.model.rope_theta) == (2, 5e5)
    assert pathlib.Path(config_lib.pretrained(pathlib.Path("/m")).path) == pathlib.Path("/m")
