"""Runs whose stages train a low-rank adapter: what they save, resume and refuse."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from paths import SUPPORT

from opsd_jax import config as config_lib
from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.models import peft, safetensors
from opsd_jax.options import ConfigError
from opsd_jax.planning import placeholders
from opsd_jax.run import pipeline
from opsd_jax.run.parameters import Parameters
from opsd_jax.stages import opsd
from opsd_jax.storage.files import RecordError
from opsd_jax.training import checkpoint
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.signals import Interrupted
from opsd_jax.training.speed import without_times
from opsd_jax.training.state import abstract_state
from opsd_jax.training.step import compile_train_step

STAGES = ("sft", "rlvr", "opsd")


def adapted(config, **changes):
    """Returns a config that trains all parameters in SFT, and then an adapter."""
    config.adapter = config_lib.lora(
        **{"rank": 4, "alpha": 8.0, "stages": ("rlvr", "opsd"), **changes}
    )
    for name in ("rlvr", "opsd"):
        config[name].optimizer.learning_rate = 1e-2
    return config


def run(config, workdir):
    pipeline.run(parse_run(config), workdir)


def restored(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())


def outcome(workdir, stages=STAGES):
    """Returns parameters, metrics without times, responses and divergence curves of a run."""
    params = {s: restored(workdir / s / "params") for s in stages}
    metrics = {s: [without_times(row) for row in metrics_lib.read(workdir / s)] for s in stages}
    names = [f"{s}/responses.jsonl" for s in stages] + ["opsd/divergence.json"]
    return params, metrics, [(workdir / name).read_text() for name in names]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert a[1:] == b[1:]


@pytest.fixture(scope="module")
def whole(shared_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    run(adapted(shared_config.copy_and_resolve_references()), workdir)
    return workdir


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of the run as it was after the last step of OPSD."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("params", "params.checksums.json", "params.base.json"):
        path = tmp_path / "run" / "opsd" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "run" / "opsd" / "evaluation.json").unlink()
    return tmp_path / "run"


def state_of(workdir, stage):
    with ocp.CheckpointManager((workdir / stage / "checkpoints").absolute()) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


def test_stages_save_adapters_and_not_their_base(config, whole):
    shapes = jax.tree.map(np.shape, restored(whole / "rlvr" / "params"))
    assert shapes["layers/q"] == {"a": (2, 16, 4), "b": (2, 4, 4, 8)}
    assert shapes["layers/down"] == {"a": (2, 32, 4), "b": (2, 4, 16)}
    assert len(shapes) == 7
    base = json.loads((whole / "opsd" / "params.base.json").read_text())
    assert base["name"] == "the result of the stage sft"
    assert base["checksums"] == json.loads((whole / "sft" / "params.checksums.json").read_text())
    for stage in ("rlvr", "opsd"):
        state = state_of(whole, stage)
        assert state["params"].keys() == shapes.keys()
        moments = sum(x.size for x in jax.tree.leaves(state["opt_state"]) if x.ndim)
        assert moments == 2 * sum(x.size for x in jax.tree.leaves(state["params"]))
    assert not (whole / "sft" / "params.base.json").exists()


def test_the_frozen_teacher_is_the_adapter_that_the_stage_began_with(whole):
    rlvr = restored(whole / "rlvr" / "params")
    jax.tree.map(np.testing.assert_array_equal, state_of(whole, "opsd")["teacher"], rlvr)
    assert state_of(whole, "rlvr")["teacher"] is None
    opsd = restored(whole / "opsd" / "params")
    assert not np.array_equal(opsd["layers/q"]["b"], rlvr["layers/q"]["b"])


def test_a_new_adapter_needs_no_copy_for_its_teacher(config, whole, tmp_path):
    """OPSD and a reference right after SFT: the teacher is the base model alone."""
    parameters = Parameters(parse_run(adapted(config)), whole)
    assert not parameters.is_new("opsd")
    config.stages, config.opsd.init_from = ("sft", "opsd"), "sft"
    parameters = Parameters(parse_run(config), whole)
    assert parameters.is_new("opsd")
    shutil.copytree(whole / "untrained", tmp_path / "untrained")
    shutil.copytree(whole / "sft", tmp_path / "sft")
    run(config, tmp_path)
    assert state_of(tmp_path, "opsd")["teacher"] is None
    curves = json.loads((tmp_path / "opsd" / "divergence.json").read_text())
    assert curves.keys() == {"before", "after"}


def test_a_run_with_an_adapter_resumes_bit_for_bit(config, whole, tmp_path, monkeypatch):
    make_stage = pipeline.make_stage

    def signalled(this, name, poll):
        stage = make_stage(this, name, poll)

        def batches(step, params):
            if (name, step) == ("opsd", 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return stage.batches(step, params)

        return stage._replace(batches=batches)

    monkeypatch.setattr(pipeline, "make_stage", signalled)
    with pytest.raises(Interrupted):
        run(adapted(config), tmp_path)
    monkeypatch.undo()
    run(config, tmp_path)
    assert_same(outcome(tmp_path), outcome(whole))


def test_another_base_model_is_refused_by_name(config, whole, stopped):
    path = stopped / "sft" / "params"
    params = restored(path)
    params["layers"]["q"] = params["layers"]["q"] + 1
    shutil.rmtree(path)
    checkpoint.save_params(path, params)
    message = (
        r"opsd/checkpoints/3 has an adapter of another base model: the result of the stage sft had "
        r"other values of layers/q than the result of the stage sft has now\. Expected the base"
    )
    with pytest.raises(RecordError, match=message):
        run(adapted(config), stopped)
    shutil.rmtree(stopped / "opsd" / "checkpoints")
    with pytest.raises(RecordError, match=r"rlvr/params has an adapter of another base model"):
        run(config, stopped)


def test_a_run_resumes_from_the_checkpoint_of_an_adapter(config, whole, stopped):
    run(adapted(config), stopped)
    assert_same(outcome(stopped), outcome(whole))


def test_an_exported_model_has_the_adapter_added(config, whole, tmp_path, capsys):
    assert main.main(["convert", "--workdir", str(whole), "--out", str(tmp_path / "merged")]) == 0
    arguments = ["convert", "--workdir", str(whole), "--adapter"]
    assert main.main([*arguments, "--out", str(tmp_path / "adapter")]) == 0
    assert f"adapter: {tmp_path}/adapter" in capsys.readouterr().out
    about = peft.about(tmp_path / "adapter")
    assert (about.rank, about.alpha, about.base, len(about.paths)) == (4, 8.0, "", 7)
    assert about.checksums["layers/q"].startswith("float32:")

    def read(directory, file, name):
        tensor = safetensors.tensors_in(tmp_path / directory / file)[name]
        return np.float64(tensor.read(0, np.prod(tensor.shape)).reshape(tensor.shape))

    module = "layers.1.mlp.down_proj"
    a, b = (
        read("adapter", peft.FILE, f"base_model.model.model.{module}.lora_{x}.weight") for x in "AB"
    )
    merged = read("merged", safetensors.FILE, f"model.{module}.weight")
    base = np.float64(restored(whole / "sft" / "params")["layers"]["down"][1]).T
    np.testing.assert_allclose(merged, base + 2 * b @ a, rtol=0, atol=1e-6)
    assert np.abs(merged - base).max() > 1e-3

    arguments = ["convert", "--workdir", str(whole), "--stage", "sft", "--adapter"]
    assert main.main([*arguments, "--out", str(tmp_path / "none")]) == 2
    assert "--adapter: the stage 'sft' trained no adapter" in capsys.readouterr().err


def test_evaluating_a_stage_again_gives_the_same_responses(whole, tmp_path):
    out = tmp_path / "again"
    assert main.main(["evaluate", "--workdir", str(whole), "--out", str(out)]) == 0
    name = "responses.jsonl"
    assert (out / name).read_text() == (whole / "opsd" / name).read_text()


def test_another_run_goes_on_with_an_adapter(config, whole, tmp_path, monkeypatch):
    """The base model is the one of the config, so the adapter must have been trained for it."""
    config.stages = ("rlvr",)
    config.rlvr.init_from, config.rlvr.steps = "", 1
    run(adapted(config, stages=()), tmp_path / "first")
    result = config.copy_and_resolve_references()
    result.stages, result.init_from = ("opsd",), str(tmp_path / "first" / "rlvr")
    result.opsd.init_from, result.opsd.steps = "", 1
    run(result, tmp_path / "second")
    first = restored(tmp_path / "first" / "rlvr" / "params")
    jax.tree.map(
        np.testing.assert_array_equal, state_of(tmp_path / "second", "opsd")["teacher"], first
    )
    names = [
        tmp_path / "first" / "rlvr" / "responses.jsonl",
        tmp_path / "second" / "untrained" / "responses.jsonl",
    ]
    assert names[0].read_text() == names[1].read_text()

    for name, value, message in (
        ("alpha", 16.0, r"adapter\.alpha is 16\.0; expected 8\.0, as the adapter in .*rlvr has"),
        ("rank", 2, r"adapter\.rank is 2; expected 4, as the adapter in"),
        (
            "targets",
            ("layers/q",),
            r"adapter\.targets is \('layers/q',\); expected \['layers/down'",
        ),
    ):
        other = result.copy_and_resolve_references()
        other.adapter[name] = value
        with pytest.raises(ConfigError, match=message):
            run(other, tmp_path / "other")
    other = result.copy_and_resolve_references()
    other.seed = 1
    with pytest.raises(ConfigError, match=r"(?s)config\.init_from is .*another base model"):
        run(other, tmp_path / "third")
    other = result.copy_and_resolve_references()
    other.adapter = config_lib.default().adapter
    with pytest.raises(ConfigError, match=r"init_from is .* an adapter; expected config\.adapter"):
        run(other, tmp_path / "fourth")


@pytest.mark.parametrize("kind", ["ema", "refresh", "trust_region", "live"])
def test_every_teacher_works_with_an_adapter(config, whole, tmp_path, kind):
    adapted(config)
    config.opsd.teacher.update({"kind": kind, "every": 2, "rate": 0.25})
    config.evaluation.divergence_responses = 0
    for name in ("untrained", "sft", "rlvr"):
        shutil.copytree(whole / name, tmp_path / name)
    run(config, tmp_path)
    teacher, params = (state_of(tmp_path, "opsd")[name] for name in ("teacher", "params"))
    before = restored(tmp_path / "rlvr" / "params")
    rows = metrics_lib.read(tmp_path / "opsd")
    assert len(rows) == 3
    assert all(row["token_divergence"] > 0 for row in rows)
    if kind == "live":
        assert teacher is None
        return
    b = [tree["layers/q"]["b"] for tree in (before, teacher, params)]
    if kind == "trust_region":
        np.testing.assert_array_equal(b[0], b[1])
    else:
        assert not np.array_equal(b[0], b[1])
        assert not np.array_equal(b[1], b[2])


def test_rollouts_in_8_bits_hold_the_base_in_8_bits(config, whole, tmp_path):
    """The run evaluates and exports the matrices that it trained: rounded, plus the adapter."""
    config.rollout_quantisation.weights = "int8"
    adapted(config)
    assert parse_run(config).adapter.base == "int8"
    for name in ("untrained", "sft"):
        shutil.copytree(whole / name, tmp_path / "run" / name)
    run(config, tmp_path / "run")
    rows = metrics_lib.read(tmp_path / "run" / "rlvr")
    assert all(0 < abs(row["sampler_drift"]) < 0.05 for row in rows)
    out = tmp_path / "again"
    assert main.main(["evaluate", "--workdir", str(tmp_path / "run"), "--out", str(out)]) == 0
    name = "responses.jsonl"
    assert (out / name).read_text() == (tmp_path / "run" / "opsd" / name).read_text()


def test_a_user_s_own_model_trains_an_adapter(config, tmp_path, monkeypatch, caplog):
    """All three stages train an adapter of the plain-dict model on eight devices."""
    monkeypatch.syspath_prepend(SUPPORT)
    with config.unlocked():
        config.model.make = "tiny_model:make"
    config.mesh = (4, 1, 2)
    config.sft.steps, config.rlvr.steps, config.opsd.steps = 20, 1, 1
    config.sft.optimizer.update({"warmup": 0, "learning_rate": 3e-2})
    config.adapter = config_lib.lora(rank=8, alpha=16.0, targets=("out",))
    run(config, tmp_path)
    rows = metrics_lib.read(tmp_path / "sft")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert restored(tmp_path / "opsd" / "params").keys() == {"out"}
    assert "sft trains an adapter of a model with random parameters" in caplog.text


def arguments_of_a_step(adapter, before=""):
    """Returns bytes per device of the arguments of an OPSD step at the sizes of Qwen3-0.6B.

    They are the parameters, the optimizer's state, the teacher and a batch. There are eight devices
    and matmuls in bfloat16, as on TPUs.

    Args:
      adapter: the config section; None trains all parameters.
      before: the stage that OPSD follows.
    """
    config = config_lib.default()
    config.mesh = (1, 8, 1)
    config.model = config_lib.preset("qwen3-0.6b")
    if adapter is not None:
        config.adapter = adapter
    config.opsd.init_from = before
    config.opsd.update({"microbatch": 8, "buckets": (128,), "teacher_buckets": (256,)})
    config.opsd.update({"prompt_tokens": 64, "response_tokens": 64, "teacher_prompt_tokens": 128})
    options = parse_run(config)
    parameters = Parameters(options, pathlib.Path())
    parts = placeholders.parts(parameters.trained("opsd"), row_shards=8)
    stage = opsd.ALGORITHM.make(options.sections["opsd"], parts)
    stage = parameters.adapt(stage, "opsd")
    optimizer = make_optimizer(options.sections["opsd"].optimizer, 100)
    abstract = abstract_state(
        parameters.trained_form("opsd"), optimizer, stage.teacher, parameters.mesh
    )
    form = parameters.form_in("opsd").abstract
    base = form.base if adapter is not None else None
    compiled = compile_train_step(stage, optimizer, abstract, parameters.mesh, base)
    return compiled.memory_analysis().argument_size_in_bytes


@pytest.mark.slow
def test_an_adapter_takes_a_fraction_of_the_memory():
    """The teacher of a new adapter takes nothing, and that of a trained one less than 1 %."""
    everything = arguments_of_a_step(None)
    adapter = config_lib.lora(rank=8, alpha=16.0)
    new, trained = (arguments_of_a_step(adapter, before) for before in ("", "rlvr"))
    print(f"bytes per device: {everything} in all, {new} new, {trained} trained")
    assert everything > 14 * 596e6 / 8  # weights, moments and a teacher in bfloat16
    assert trained < 0.3 * everything
    assert 0 < trained - new < 0.01 * everything
    assert 0 < trained - new < 0.05 * new


@pytest.mark.slow
def test_an_adapter_gives_the_same_results_on_another_mesh(config, whole, tmp_path):
    """Equal token ids in all responses, and metrics that are equal but for rounding."""
    other = adapted(config)
    other.mesh = (2, 2, 2)
    run(other, tmp_path)
    (_, expected, sampled), (_, metrics, responses) = outcome(whole), outcome(tmp_path)
    assert responses[:-1] == sampled[:-1]
    for stage, rows in expected.items():
        for row, got in zip(rows, metrics[stage], strict=True):
            for found in (row, got):
                found.pop("useful_tokens")
            assert got == pytest.approx(row, rel=1e-3, abs=1e-5), stage


def test_stages_that_do_not_exist_are_refused(config):
    with pytest.raises(ConfigError, match=r"adapter\.stages is \('rl',\); .*but 'rl' is none"):
        parse_run(adapted(config, stages=("rl",)))
    without_opsd = adapted(config.copy_and_resolve_references(), stages=("opsd",))
    without_opsd.stages = ("sft", "rlvr")
    with pytest.raises(ConfigError, match=r"adapter\.stages is \('opsd',\); expected \(\) or one"):
        parse_run(without_opsd)
    with pytest.raises(
        ConfigError, match=r"path is 'a'; expected '', because the first stage, 'sft"
    ):
        parse_run(adapted(config, path="a"))
    with pytest.raises(
        ConfigError, match=r"path is 'gs://a'; expected a directory on this machine"
    ):
        parse_run(adapted(config, path="gs://a"))
    for field, value, message in (
        (
            "rank",
            "8",
            r"rank is 8; expected 64, its default value, because config\.adapter\.kind is",
        ),
        ("path", "a", r"path is 'a'; expected '', its default value, because"),
        ("rank", "0", r"config\.adapter\.rank is 0; expected at least 1"),
        ("alpha", "0", r"config\.adapter\.alpha is 0\.0; expected a number above 0"),
        ("dropout", "1", r"config\.adapter\.dropout is 1\.0; expected a number in \[0, 1\)"),
        ("kind", "dora", r"config\.adapter\.kind is 'dora'; expected 'none' or 'lora'"),
        (
            "targets",
            "('layers/(',)",
            r"config\.adapter\.targets is .*; expected regular expressions",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            loading.load("quickstart", {f"adapter.{field}": value})
