"""Runs that begin with a checkpoint or a result of another run."""

import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest

from opsd_jax.cli import arguments, main
from opsd_jax.config.run_options import parse_run
from opsd_jax.options import ConfigError
from opsd_jax.run import lineage, pipeline
from opsd_jax.run.lineage import Origin
from opsd_jax.run.parameters import Parameters
from opsd_jax.storage.files import RecordError
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.speed import without_times


@pytest.fixture(scope="module")
def base(shared_config):
    """A config of two stages, with SFT checkpoints at steps 3 and 6."""
    base = shared_config.copy_and_resolve_references()
    with base.unlocked():
        base.stages = ("sft", "rlvr")
        base.rlvr.steps, base.rlvr.optimizer.warmup = 2, 1
        base.rlvr.checkpoint_every = 1
    return base


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
    """The finished run of `base`."""
    workdir = tmp_path_factory.mktemp("lineage") / "first"
    pipeline.run(parse_run(base), workdir)
    return workdir


def changed(base, fields):
    config = base.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def digest(directory):
    """Returns a digest of all files of a directory."""
    whole = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        whole.update(f"{path.relative_to(directory)}".encode())
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


def rows(workdir, stage):
    return [without_times(row) for row in metrics_lib.read(workdir / stage)]


def params(config, workdir, stage):
    return jax.tree.leaves(Parameters(parse_run(config), workdir).of(stage))


def test_a_fork_with_the_same_config_ends_like_the_run(base, first, tmp_path):
    before = digest(first)
    workdir = tmp_path / "forked"
    config = changed(base, {"stages": ("sft",)})
    pipeline.run(parse_run(config), workdir, Origin(first, "sft", 3))
    assert digest(first) == before
    assert rows(workdir, "sft") == rows(first, "sft")
    for a, b in zip(params(config, workdir, "sft"), params(base, first, "sft"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fork_goes_on_with_other_options(base, first, tmp_path):
    workdir = tmp_path / "forked"
    config = parse_run(
        changed(base, {"stages": ("sft",), "sft.optimizer.learning_rate": 0.1, "sft.steps": 7})
    )
    pipeline.run(config, workdir, Origin(first, "sft", 3))
    old, new = rows(first, "sft"), rows(workdir, "sft")
    assert [row["step"] for row in new] == list(range(7))
    assert new[:3] == old[:3]
    assert new[3]["loss"] == old[3]["loss"]  # of the parameters before the first new update
    assert new[4]["loss"] != old[4]["loss"]
    (entry,) = lineage.read(workdir)
    rate = base.sft.optimizer.learning_rate
    assert entry["checkpoint"] == f"{first}/sft@3"
    assert entry["changes"] == {
        "sft.optimizer.learning_rate": [rate, 0.1],
        "sft.steps": [6, 7],
        "stages": [["sft", "rlvr"], ["sft"]],
    }
    page = pipeline.write_report(config, workdir).read_text()
    assert f"Forked from {first}/sft@3" in page
    assert f"sft.optimizer.learning_rate: {rate} there, 0.1 from then on" in page
    finished = digest(workdir / "sft")
    pipeline.run(config, workdir, Origin(first, "sft", 3))
    pipeline.run(config, workdir)
    assert digest(workdir / "sft") == finished
    with pytest.raises(ConfigError, match=rf"--fork is {first}/sft@6, but the run .*/sft@3; expe"):
        pipeline.run(config, workdir, Origin(first, "sft", 6))


def test_more_steps_of_a_finished_stage(base, first, tmp_path):
    """The results of the stages before it are copied, and not made again."""
    workdir = tmp_path / "longer"
    config = parse_run(changed(base, {"rlvr.steps": 3}))
    pipeline.run(config, workdir, Origin(first, "rlvr"))
    assert [row["step"] for row in rows(workdir, "rlvr")] == [0, 1, 2]
    assert rows(workdir, "rlvr")[:2] == rows(first, "rlvr")
    for name in ("untrained", "sft"):
        file = "evaluation.json"
        assert (workdir / name / file).read_text() == (first / name / file).read_text()
    assert lineage.read(workdir)[0]["checkpoint"] == f"{first}/rlvr@2"
    longer = parse_run(changed(base, {"rlvr.steps": 4}))
    pipeline.run(longer, tmp_path / "longest", Origin(workdir, "rlvr"))
    ancestors = [entry["checkpoint"] for entry in lineage.read(tmp_path / "longest")]
    assert ancestors == [f"{first}/rlvr@2", f"{workdir}/rlvr@3"]


def test_a_copy_that_was_interrupted_is_made_again(base, first, tmp_path, monkeypatch):
    workdir = tmp_path / "forked"
    workdir.mkdir()
    config = parse_run(changed(base, {"stages": ("sft",), "sft.steps": 7}))
    copy = lineage._copy

    def failing(source, target):
        copy(source, target)
        if source.name == "untrained":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(lineage, "_copy", failing)
    with pytest.raises(OSError, match="No space left"):
        lineage.begin(config, workdir, Origin(first, "sft"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"sft@6 was interrupted; expected --fork .*sft@6 again"):
        lineage.begin(config, workdir, None)
    partial = workdir / "sft" / "checkpoints" / "9"
    partial.mkdir(parents=True)
    lineage.begin(config, workdir, Origin(first, "sft"))
    assert not partial.exists()
    assert "copying" not in lineage.read(workdir)[0]
    assert digest(workdir / "sft" / "checkpoints" / "6") == digest(
        first / "sft" / "checkpoints" / "6"
    )


@pytest.mark.parametrize(
    ("fields", "stage", "step", "message"),
    [
        ({}, "opsd", None, "has no stage 'opsd'; expected RUN/STAGE"),
        ({"rlvr.steps": 3}, "rlvr", 7, r"there is no such checkpoint; expected one of \[1, 2\]"),
        ({}, "rlvr", None, "at step 2, and config.rlvr.steps is 2; expected more steps"),
        ({"rlvr.steps": 3, "seed": 1}, "rlvr", None, r"different config:\n  seed: 0 there, 1 now"),
        ({"rlvr.steps": 3, "sft.steps": 7}, "rlvr", None, r"sft\.steps: 6 there, 7 now"),
        (
            {"rlvr.steps": 3, "stages": ("rlvr",), "rlvr.init_from": ""},
            "rlvr",
            None,
            r"the stages before rlvr: \('sft',\) there, \(\) now",
        ),
    ],
)
def test_what_cannot_be_forked_is_an_error(base, first, tmp_path, fields, stage, step, message):
    with pytest.raises(ConfigError, match=message):
        lineage.begin(parse_run(changed(base, fields)), tmp_path, Origin(first, stage, step))
    assert not [*tmp_path.iterdir()]


def test_a_directory_for_which_a_fork_was_refused_can_be_used(base, first, tmp_path):
    workdir = tmp_path / "longer"
    refused = parse_run(changed(base, {"stages": ("sft",)}))
    with pytest.raises(ConfigError, match="expected more steps"):
        pipeline.run(refused, workdir, Origin(first, "sft"))
    assert [path.name for path in workdir.iterdir()] == ["lock"]
    longer = parse_run(changed(base, {"stages": ("sft",), "sft.steps": 7}))
    pipeline.run(longer, workdir, Origin(first, "sft"))
    assert len(rows(workdir, "sft")) == 7


def test_a_fork_cannot_change_which_arrays_there_are(base, first, tmp_path):
    config = changed(base, {"rlvr.steps": 3, "rlvr.objective.kl_coefficient": 0.1})
    message = (
        r"rlvr/checkpoints/1 lacks teacher/\S+, teacher/.* and \d+ more, which this config needs"
    )
    with pytest.raises(RecordError, match=message):
        pipeline.run(parse_run(config), tmp_path / "forked", Origin(first, "rlvr", 1))
    assert (tmp_path / "forked" / "rlvr" / "checkpoints" / "1").is_dir()  # nothing is set aside


@pytest.mark.parametrize(
    ("field", "value"), [("carry_over", 4), ("carry_over", 0), ("prompts", 32)]
)
def test_a_fork_cannot_change_what_is_carried_over(field, value):
    there = {"rlvr.carry_over": 8, "rlvr.prompts": 16, "rlvr.steps": 3}
    now = there | {"rlvr.steps": 6}
    origin = Origin(pathlib.Path("a"), "rlvr", 1)
    lineage._check_carried(origin, there, now)
    changed = {name: number for name, number in (now | {f"rlvr.{field}": value}).items() if number}
    message = rf"config.rlvr.{field} is {value}; expected {there[f'rlvr.{field}']}, its value there"
    with pytest.raises(ConfigError, match=message):
        lineage._check_carried(origin, there, changed)


def test_a_fork_needs_a_new_directory(base, first):
    config = parse_run(changed(base, {"rlvr.steps": 3}))
    with pytest.raises(ConfigError, match="holds a run already; expected a new directory"):
        lineage.begin(config, first, Origin(first, "rlvr"))


@pytest.mark.parametrize("text", ["runs/a/rlvr@", "runs/a/rlvr@x", "runs/a@b/rlvr"])
def test_a_checkpoint_without_a_step_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--config", "quickstart", "--workdir", "w", "--fork", text])
    assert "argument --fork" in capsys.readouterr().err


def test_the_argument_names_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = lambda text: arguments.parser().parse_args(
        ["train", "--config", "quickstart", "--workdir", "w", "--fork", text]
    )
    assert parsed("runs/a/rlvr@20").fork == (tmp_path / "runs/a/rlvr", 20)
    assert parsed("runs/a/rlvr").fork == (tmp_path / "runs/a/rlvr", None)


def test_a_run_begins_with_the_result_of_another(base, first, tmp_path):
    """Its initial evaluation samples the responses that the other run sampled from its result."""
    fields = {"stages": ("rlvr",), "rlvr.init_from": "", "init_from": str(first / "sft")}
    config = changed(base, fields)
    workdir = tmp_path / "second"
    pipeline.run(parse_run(config), workdir)
    for a, b in zip(params(config, workdir, ""), params(base, first, "sft"), strict=True):
        np.testing.assert_array_equal(a, b)
    file = "responses.jsonl"
    assert (workdir / "untrained" / file).read_text() == (first / "sft" / file).read_text()
    assert rows(workdir, "rlvr") == rows(first, "rlvr")
    report = pipeline.write_report(parse_run(config), workdir)
    assert f"The initial parameters are a result of another run: {first / 'sft'}." in (
        report.read_text()
    )
    entries = json.loads((workdir / "lineage.json").read_text())
    entries[0]["sha256"] = "0"
    (workdir / "lineage.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"config.init_from is '.*', which has changed since"):
        pipeline.run(parse_run(config), workdir)


def test_a_result_of_another_model_is_an_error(base, first, tmp_path):
    config = parse_run(changed(base, {"init_from": str(first / "sft"), "model.num_layers": 1}))
    with pytest.raises(ConfigError, match=r"expected the result of a run with the same config\.mo"):
        pipeline.run(config, tmp_path / "second")


def test_a_result_that_does_not_exist_is_an_error(base, first, tmp_path):
    for directory in (first, first / "nothing", tmp_path):
        config = parse_run(changed(base, {"init_from": str(directory)}))
        with pytest.raises(ConfigError, match="expected the directory of a finished stage, such"):
            lineage.begin(config, tmp_path / "second", None)
