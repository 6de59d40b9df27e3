"""Whole runs: their files, what they learn, and how they resume after an interruption."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from paths import SUPPORT

from opsd_jax import config as config_lib
from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.data.arithmetic import informed_prompt
from opsd_jax.evaluation.evaluator import Evaluator
from opsd_jax.losses import reverse_kl
from opsd_jax.run import assembly, pipeline
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.storage.files import RecordError
from opsd_jax.training import loop
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.signals import Interrupted
from opsd_jax.training.speed import without_times

# What a plan predicts for two of the stages.
PLANNED = {
    "rlvr": {
        "file": "plans/tiny.txt",
        "metrics": {"rollout_seconds": [0.1, 0.2], "useful_tokens": [0.75, 0.75]},
    },
    "opsd": {"file": "plans/tiny.txt", "differs": "it is for another config"},
}


def run(config, workdir, **options):
    pipeline.run(parse_run(config), workdir, **options)
    return pipeline.write_report(parse_run(config), workdir)


def outcome(workdir, stages=("sft", "rlvr", "opsd")):
    """Returns a run's results without times: parameters, metrics, responses, divergence curves."""
    with ocp.StandardCheckpointer() as checkpointer:
        params = {s: checkpointer.restore((workdir / s / "params").absolute()) for s in stages}
    metrics = {
        s: [
            without_times(json.loads(line))
            for line in (workdir / s / "metrics.jsonl").read_text().splitlines()
        ]
        for s in stages
    }
    responses = {
        s: [
            (workdir / s / file).read_text()
            for file in ("responses.jsonl", "groups.jsonl")
            if s != "sft" or file == "responses.jsonl"
        ]
        for s in stages
    }
    curves = (workdir / "opsd" / "divergence.json").read_text()
    return params, metrics, responses, curves


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_array_equal(x, y)
    assert a[1:] == b[1:]


@pytest.fixture(scope="module")
def undisturbed(shared_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(shared_config, workdir, planned=PLANNED)
    return workdir


def test_a_run_writes_its_records_and_its_report(config, undisturbed):
    report = json.loads((undisturbed / "report" / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == ["sft", "rlvr", "opsd"]
    fields = [
        "accuracy",
        "accuracy_se",
        "mean_length",
        "truncation_rate",
        "problems",
        "samples",
        "seconds",
    ]
    for stage in report["stages"]:
        assert all(isinstance(stage[field], int | float) for field in fields)
        lines = (undisturbed / stage["name"] / "responses.jsonl").read_text().splitlines()
        responses = [json.loads(line) for line in lines]
        assert len(responses) == 16
        assert stage["accuracy"] == np.mean([r["correct"] for r in responses])
        assert stage["mean_length"] == np.mean([len(r["tokens"]) for r in responses])
        assert stage["truncation_rate"] == np.mean([r["truncated"] for r in responses])
        lines = (undisturbed / stage["name"] / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == list(range(config[stage["name"]].steps))
        for row in rows:
            parts = [value for name, value in row.items() if name.startswith("seconds/")]
            assert sum(parts) == pytest.approx(row["seconds"])
        assert sum(stage["time_shares"].values()) == pytest.approx(1)
        assert min(stage["time_shares"].values()) >= 0
        assert stage["speed"]["tflops_per_device"] > 0
        assert not {"mfu", "mbu"} & stage["speed"].keys()
        assert list((undisturbed / stage["name"]).glob("events.out.tfevents.*"))
    for stage in report["stages"][1:]:
        rows = metrics_lib.read(undisturbed / stage["name"])
        assert stage["speed"]["decode_gb_per_device"] > 0
        assert all(0 < row["rollout_seconds"] < row["seconds"] for row in rows)
        # The arithmetic task judges at once, but a busy machine may pause during one verification.
        assert min(row["verifier_wait_seconds"] / row["seconds"] for row in rows[1:]) < 0.01
        assert 0 <= stage["verifier_wait_share"] < 1
        section = config[stage["name"]]
        rollouts = section.steps * section.prompts * section.group_size
        assert sum(stage["verdicts"].values()) == rollouts
        assert stage["verdicts"]["timeout"] == 0
        groups = metrics_lib.read(undisturbed / stage["name"], metrics_lib.GROUPS)
        assert [g["step"] for g in groups] == sorted(list(range(section.steps)) * section.prompts)
        assert sum(g["correct"] for g in groups) == stage["verdicts"]["match"]
    page = (undisturbed / "report" / "index.html").read_text()
    assert page.count("<svg") == 6
    assert (page.count("no MFU: unknown device"), page.count("no MBU: unknown device")) == (3, 2)
    assert not re.findall(r"(?:src|href)=.https?://(?!www\.w3\.org|purl|creativecommons)", page)
    assert (undisturbed / "report" / "report.md").read_text().count("±") >= 11


def test_a_stage_is_shown_beside_its_plan(undisturbed):
    report = json.loads((undisturbed / "report" / "report.json").read_text())
    sft, rlvr, opsd = report["stages"]
    assert "plan" not in sft
    assert opsd["plan"] == PLANNED["opsd"]
    recorded = json.loads((undisturbed / "rlvr" / "evaluation.json").read_text())
    assert recorded["plan"] == rlvr["plan"]
    rows = metrics_lib.read(undisturbed / "rlvr")[1:]
    assert rlvr["plan"]["metrics"] == {
        name: {"planned": limits, "measured": np.median([row[name] for row in rows])}
        for name, limits in PLANNED["rlvr"]["metrics"].items()
    }
    page = (undisturbed / "report" / "index.html").read_text()
    rollouts, useful = (m["measured"] for m in rlvr["plan"]["metrics"].values())
    assert (
        f"Median beside the plan plans/tiny.txt: rollouts {rollouts:.1f} s, planned 0.1 s to "
        f"0.2 s; useful tokens {useful:.0%}, planned 75%." in page
    )
    assert "Not compared with the plan plans/tiny.txt: it is for another config." in page


def test_the_speed_of_an_update_computed_by_hand(config, undisturbed):
    this = assembly.assemble(parse_run(config), undisturbed)
    (batch,) = assembly.make_stage(this, "sft", lambda: None).batches(5, None).batches
    m, flops = config.model, 0
    D, F, H, K, C = m.hidden_size, m.intermediate_size, m.num_heads, m.num_kv_heads, m.head_dim
    for bucket in batch:
        rows = bucket["rows"]
        for positions, mask in zip(
            rows["student"]["positions"].reshape(-1, rows["mask"].shape[-1]),
            rows["mask"].reshape(-1, rows["mask"].shape[-1]),
            strict=True,
        ):
            n = int(sum(positions >= 0))
            layer = n * (D * H * C + 2 * D * K * C + H * C * D + 3 * D * F)  # the weights
            layer += sum(2 * H * C * (p + 1) for p in range(n))  # q · k and p · v
            flops += 3 * 2 * (m.num_layers * layer + D * m.vocab_size * int(mask.sum()))
    (row,) = metrics_lib.read(undisturbed / "sft")[5:]
    found = row["speed/tflops_per_device"] * 1e12 * 8 * row["update_seconds"]
    assert found == pytest.approx(flops, rel=1e-9)
    assert row["update_seconds"] <= sum(r["seconds"] for r in metrics_lib.read(undisturbed / "sft"))


def test_repeating_a_finished_run_changes_nothing(config, undisturbed, monkeypatch):
    before = outcome(undisturbed)
    monkeypatch.setattr(pipeline, "run_stage", None)
    run(config, undisturbed)
    assert_same(outcome(undisturbed), before)


def test_the_frozen_teacher_keeps_the_initial_parameters_exactly(config, undisturbed):
    """The teacher in the last OPSD checkpoint is the result of RLVR, bit for bit."""
    directory = (undisturbed / "opsd" / "checkpoints").absolute()
    with ocp.CheckpointManager(directory) as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    with ocp.StandardCheckpointer() as checkpointer:
        rlvr = checkpointer.restore((undisturbed / "rlvr" / "params").absolute())
    for a, b in zip(jax.tree.leaves(state["teacher"]), jax.tree.leaves(rlvr), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = zip(jax.tree.leaves(state["params"]), jax.tree.leaves(rlvr), strict=True)
    assert not all(np.array_equal(a, b) for a, b in changed)


class Crash(BaseException):
    """An exception that the library never catches."""


def test_a_run_that_crashes_before_any_step_resumes_exactly(
    config, undisturbed, tmp_path, monkeypatch
):
    """The run crashes before the first and the last step and in the evaluation of each stage."""
    points = {s: (0, config[s].steps - 1, "evaluation") for s in config.stages}
    pending = [(s, i) for s in config.stages for i in points[s]]
    make_stage, evaluate = pipeline.make_stage, Evaluator.__call__

    def crash_at(point):
        if pending and pending[0] == point:
            raise Crash(pending.pop(0))

    def crashing_stage(this, name, poll):
        stage = make_stage(this, name, poll)

        def batches(step, params):
            crash_at((name, step))
            return stage.batches(step, params)

        return stage._replace(batches=batches)

    def crashing_evaluate(self, name, *arguments, **options):
        crash_at((name, "evaluation"))
        return evaluate(self, name, *arguments, **options)

    monkeypatch.setattr(pipeline, "make_stage", crashing_stage)
    monkeypatch.setattr(Evaluator, "__call__", crashing_evaluate)
    crashes = 0
    while pending:
        with pytest.raises(Crash):
            run(config, tmp_path)
        crashes += 1
    run(config, tmp_path)
    assert crashes == 3 * 3
    assert_same(outcome(tmp_path), outcome(undisturbed))


@pytest.mark.parametrize(
    ("stage", "saved"), [pytest.param("sft", "2", marks=pytest.mark.slow), ("opsd", "1")]
)
def test_a_signal_saves_a_checkpoint_and_the_run_resumes(
    config, undisturbed, tmp_path, monkeypatch, stage, saved
):
    """A signal before the rollouts of a step ends the sampling early."""
    signalled, make_stage = stage, pipeline.make_stage

    def signalled_stage(this, name, poll):
        stage = make_stage(this, name, poll)

        def batches(step, params):
            if (name, step) == (signalled, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return stage.batches(step, params)

        return stage._replace(batches=batches)

    monkeypatch.setattr(pipeline, "make_stage", signalled_stage)
    with pytest.raises(Interrupted) as stop:
        run(config, tmp_path)
    assert stop.value.exit_code == 143
    checkpoints = [p.name for p in (tmp_path / stage / "checkpoints").iterdir()]
    assert checkpoints == [saved]  # no completed step is lost
    monkeypatch.undo()
    run(config, tmp_path)
    assert_same(outcome(tmp_path), outcome(undisturbed))


def halve_files(directory):
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_shard(directory):
    shutil.rmtree(directory / "default" / "d")


@pytest.fixture
def stopped(config, undisturbed, tmp_path):
    """A copy of the undisturbed run as it was after the last step of SFT."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for name in ("rlvr", "opsd", "report"):
        shutil.rmtree(workdir / name)
    (workdir / "sft" / "evaluation.json").unlink()
    return workdir


@pytest.mark.parametrize(
    "damage", [halve_files, pytest.param(lose_a_shard, marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_is_moved_aside(config, undisturbed, stopped, damage, caplog):
    damage(stopped / "sft" / "checkpoints" / "6")
    run(config, stopped)
    assert f"{stopped}/sft/checkpoints/6 cannot be restored" in caplog.text
    assert f"It has been moved to {stopped}/sft/damaged/6.0" in caplog.text
    assert (stopped / "sft" / "damaged" / "6.0").is_dir()
    assert_same(outcome(stopped), outcome(undisturbed))


def test_a_damaged_stage_result_can_be_deleted_and_is_made_again(config, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "opsd")
    halve_files(workdir / "rlvr" / "params")
    with pytest.raises(RecordError, match=f"{workdir}/rlvr/params cannot be restored.*made again"):
        pipeline.run(parse_run(config), workdir)
    shutil.rmtree(workdir / "rlvr" / "params")
    run(config, workdir)
    assert_same(outcome(workdir), outcome(undisturbed))


def test_a_half_written_checkpoint_is_ignored(config, undisturbed, stopped):
    directory = stopped / "sft" / "checkpoints"
    (directory / "6").rename(directory / "6.orbax-checkpoint-tmp")
    run(config, stopped)
    assert_same(outcome(stopped), outcome(undisturbed))


def test_if_every_checkpoint_is_damaged_none_is_moved(config, stopped):
    for step in ("3", "6"):
        halve_files(stopped / "sft" / "checkpoints" / step)
    message = f"{stopped}/sft/checkpoints/6 cannot be restored.*delete that directory"
    with pytest.raises(RecordError, match=message):
        pipeline.run(parse_run(config), stopped)
    assert (stopped / "sft" / "checkpoints" / "6").is_dir()


def test_a_checkpoint_of_another_run_is_an_error(config, stopped):
    """The config in the directory is changed too, because it is compared first."""
    other = config.copy_and_resolve_references()
    other.sft.optimizer.learning_rate, other.seed = 0.1, 5
    (stopped / "config.json").write_text(loading.to_json(other))
    with pytest.raises(RecordError, match=r"sft/checkpoints/6 is a checkpoint of another run") as e:
        pipeline.run(parse_run(other), stopped)
    assert "seed: 0 there, 5 now" in str(e.value)
    assert "sft.optimizer.learning_rate: 0.003 there, 0.1 now" in str(e.value)
    assert (stopped / "sft" / "checkpoints" / "6").is_dir()


def test_which_checkpoints_are_kept(config, tmp_path):
    """The last one, every third one, and the one with the lowest loss."""
    short = config.copy_and_resolve_references()
    short.sft.update({"steps": 8, "checkpoint_every": 1})
    short.stages = ("sft",)
    short.checkpoints.update({"last": 1, "period": 3, "best": "-loss"})
    pipeline.run(parse_run(short), tmp_path)
    kept = {int(p.name) for p in (tmp_path / "sft" / "checkpoints").iterdir()}
    losses = [row["loss"] for row in metrics_lib.read(tmp_path / "sft")]
    assert kept == {8, 3, 6, 1 + int(np.argmin(losses))}


@pytest.mark.slow
@pytest.mark.parametrize("room", [8 << 10, 64 << 10])
def test_a_full_disk_is_named_and_damages_nothing(config, undisturbed, tmp_path, room):
    """No file may exceed `room` bytes, which is too little for records or for a checkpoint."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(loading.to_json(config))
    script = f"""
import pathlib, resource, sys
sys.path.insert(0, {str(SUPPORT)!r})
from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.cli import main
from opsd_jax.run import pipeline
from opsd_jax.run import workdir as workdir_lib
config = parse_run(workdir_lib.config_of(pathlib.Path({str(workdir)!r})))
loading.load = lambda *_: config
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))
sys.exit(main.main(["train", "--config", "-", "--workdir", {str(workdir)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=processes.environment(devices=8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    # A thread of Orbax may print an error about its event loop at the same time.
    messages = re.findall("opsd-jax: .*", done.stderr)
    assert messages, done.stderr[-3000:]
    assert re.match(rf"opsd-jax: {workdir}\S* cannot be (used|written)", messages[-1])
    assert "the same command" in messages[-1]
    run(config, workdir)
    assert_same(outcome(workdir), outcome(undisturbed))


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(config, undisturbed, stopped):
    """The restored parameters are equal; later steps differ by rounding."""
    other = config.copy_and_resolve_references()
    other.mesh = (2, 2, 2)
    assert len(metrics_lib.read(stopped / "sft")) == 6
    run(other, stopped)
    path = undisturbed / "sft" / "params", stopped / "sft" / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        before, after = (checkpointer.restore(p.absolute()) for p in path)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert json.loads((stopped / "config.json").read_text())["mesh"] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_a_run_gives_the_same_results_on_any_mesh(config, undisturbed, tmp_path, monkeypatch, mesh):
    """Compares with `undisturbed`, on an (8, 1, 1) mesh: equal token ids in all rollouts and
    responses, and metrics that are equal but for rounding, which Adam amplifies. How many of the
    computed tokens are padding depends on the mesh: its data axis divides every microbatch.
    """
    other = config.copy_and_resolve_references()
    other.mesh = mesh
    devices = jax.devices()[: int(np.prod(mesh))]
    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: devices)
        run(other, tmp_path)
    _, expected, sampled, _ = outcome(undisturbed)
    _, metrics, responses, _ = outcome(tmp_path)
    assert responses == sampled
    for stage, rows in expected.items():
        for row, got in zip(rows, metrics[stage], strict=True):
            assert 0 < row.pop("useful_tokens") <= 1
            assert 0 < got.pop("useful_tokens") <= 1
            assert got == pytest.approx(row, rel=1e-3, abs=1e-5), stage


def test_damaged_records_are_named(config, undisturbed, tmp_path):
    """An incomplete last line of metrics is not damage, because a killed run leaves one."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    rows = metrics_lib.read(workdir / "sft")
    with (workdir / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert metrics_lib.read(workdir / "sft") == rows
    with (workdir / "sft" / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RecordError, match=r"line 7 of .*metrics.jsonl is not valid JSON"):
        metrics_lib.read(workdir / "sft")
    for path in (workdir / "rlvr" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(RecordError, match=r"rlvr/params cannot be restored.*delete that directory"):
        assembly.assemble(parse_run(config), workdir).parameters.of("rlvr")
    (workdir / "opsd" / "evaluation.json").write_text("{")
    with pytest.raises(RecordError, match=r"opsd/evaluation.json is damaged"):
        pipeline.write_report(parse_run(config), workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(RecordError, match=r"config.json is damaged"):
        workdir_lib.config_of(workdir)


def test_a_run_of_another_version_is_an_error(config, tmp_path):
    flat = loading.flatten(config)
    for field in ("decode_mesh", "rlvr.slots"):
        del flat[field]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with pytest.raises(config_lib.ConfigError, match=r"it lacks decode_mesh, rlvr\.slots\. Use"):
        workdir_lib.config_of(tmp_path)


def test_evaluate_reproduces_the_recorded_metrics(config, undisturbed, capsys):
    recorded = json.loads((undisturbed / "rlvr" / "evaluation.json").read_text())
    assert main.main(["evaluate", "--workdir", str(undisturbed), "--stage", "rlvr"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for field in ("accuracy", "mean_length", "truncation_rate", "problems", "samples"):
        assert printed[field] == recorded[field]
    assert main.main(["evaluate", "--workdir", str(undisturbed), "--stage", "dpo"]) == 2
    assert "expected one of untrained, sft, rlvr, opsd" in capsys.readouterr().err


def test_divergence_by_position_equals_full_forward_passes(config, undisturbed, task, model, score):
    """Recomputes the curve before OPSD, one response at a time."""
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((undisturbed / "rlvr" / "params").absolute())
    lines = (undisturbed / "rlvr" / "responses.jsonl").read_text().splitlines()
    responses = [r for r in map(json.loads, lines) if not r["correct"] and not r["truncated"]]
    values = []
    for response in responses:
        problem = next(p for i in range(8) if (p := task.heldout[i]).id == response["problem"])
        logits = []
        for prompt in (task.prompt(problem), informed_prompt(problem, problem.solution)):
            ids = [*prompt, *response["tokens"]]
            tokens, positions = np.zeros((1, 128), np.int32), np.full((1, 128), -1, np.int32)
            tokens[0, : len(ids)], positions[0, : len(ids)] = ids, np.arange(len(ids))
            predicting = slice(len(prompt) - 1, len(ids) - 1)
            logits.append(score(params, tokens, positions)[0, predicting])
        values.append(reverse_kl(student_logits=logits[0], teacher_logits=logits[1]))
    curve = json.loads((undisturbed / "opsd" / "divergence.json").read_text())["before"][
        "incorrect"
    ]
    assert curve["count"][0] == len(responses)
    for t, (mean, count) in enumerate(zip(curve["mean"], curve["count"], strict=True)):
        at = [float(v[t]) for v in values if len(v) > t]
        assert count == len(at)
        np.testing.assert_allclose(mean, np.mean(at), rtol=1e-3, atol=1e-5)


def test_steps_without_active_rows_are_counted_and_change_nothing(config, undisturbed, tmp_path):
    """An untrained model has no correct rollout, so Correct-only OPSD does nothing."""
    idle = config.copy_and_resolve_references()
    with idle.unlocked():
        idle.stages = ("opsd",)
        idle.opsd.init_from, idle.opsd.gate = "", "correct"
    run(idle, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "opsd" / "metrics.jsonl").open()]
    active = [row["active_rows"] for row in rows]
    assert [row["empty"] for row in rows] == [float(n == 0) for n in active]
    assert 0 in active
    if not any(active):
        start = assembly.assemble(parse_run(idle), tmp_path).parameters.initial()
        end = assembly.assemble(parse_run(idle), tmp_path).parameters.of("opsd")
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_step_to_trace_that_no_stage_has(config, tmp_path):
    with pytest.raises(config_lib.ConfigError, match="--profile is 6; expected less than 6, the"):
        pipeline.run(parse_run(config), tmp_path / "run", profile=6)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_with_an_error(config, tmp_path):
    wild = config.copy_and_resolve_references()
    with wild.unlocked():
        wild.max_nonfinite = 2
        wild.sft.optimizer.learning_rate = 1e30
        wild.sft.optimizer.warmup = 0
        wild.sft.optimizer.schedule = "constant"
    with pytest.raises(loop.Diverged, match="not finite for 2 steps in a row, up to step 2"):
        run(wild, tmp_path)


@pytest.fixture
def tiny(config):
    """A config that trains three stages in about a minute, on a task of a few tokens."""
    tiny = config.copy_and_resolve_references()
    with tiny.unlocked():
        tiny.task = "tiny_task:task"
        tiny.mesh = (1, 1, 1)
        tiny.model.vocab_size = 16
        tiny.model.hidden_size, tiny.model.intermediate_size = 32, 64
        tiny.sft.update({"steps": 400, "batch_size": 64, "microbatch": 64, "buckets": (16,)})
        tiny.sft.checkpoint_every = 1000
        for stage in (tiny.rlvr, tiny.opsd):
            stage.update({"prompt_tokens": 3, "response_tokens": 12, "buckets": (16,)})
            stage.update({"checkpoint_every": 1000, "slots": 256, "microbatch": 32})
            stage.optimizer.learning_rate = 5e-4
        tiny.rlvr.update({"steps": 20, "prompts": 32, "group_size": 8})
        tiny.opsd.update({"steps": 50, "prompts": 64, "max_rows": 64, "gate": "correct"})
        tiny.opsd.update({"teacher_prompt_tokens": 5, "teacher_buckets": ()})
        tiny.evaluation.update({"prompt_tokens": 3, "response_tokens": 12})
        tiny.evaluation.update({"problems": 200, "samples": 4, "slots": 400})
    parse_run(tiny)
    return tiny


@pytest.mark.alone
def test_the_miniature_learns(tiny, tmp_path, monkeypatch):
    """The bounds were fixed in advance. SFT imitates demonstrations of which 76 % are correct, RLVR
    must be clearly more accurate, and OPSD must shorten responses by a quarter at equal accuracy.
    """
    monkeypatch.syspath_prepend(SUPPORT)
    began = time.monotonic()
    with jax.default_device(jax.devices()[0]):
        first = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda: first)
        run(tiny, tmp_path)
    seconds = time.monotonic() - began
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    sft, rlvr, opsd = report["stages"]
    assert 0.6 < sft["accuracy"] < 0.85
    assert rlvr["accuracy"] > 0.9
    assert opsd["accuracy"] > rlvr["accuracy"] - 0.05
    assert opsd["mean_length"] < 0.75 * rlvr["mean_length"]
    assert seconds < 120  # a minute on two idle cores


def test_a_user_s_own_model_trains(tiny, tmp_path, monkeypatch):
    """Runs three stages with the plain-dict model of tiny_model.py on eight devices."""
    monkeypatch.syspath_prepend(SUPPORT)
    with tiny.unlocked():
        tiny.model.make = "tiny_model:make"
        tiny.mesh = (4, 1, 2)
        tiny.sft.steps, tiny.rlvr.steps, tiny.opsd.steps = 60, 2, 2
        tiny.sft.optimizer.warmup = 0
    run(tiny, tmp_path)
    rows = metrics_lib.read(tmp_path / "sft")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == ["sft", "rlvr", "opsd"]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_gives_the_same_results(config, tmp_path):
    """A run that is killed three times ends with the same results as one that is not.

    RLVR carries rollouts over, and OPSD trains an adapter.
    """
    config.rlvr.carry_over = 4
    config.adapter = config_lib.lora(rank=4, alpha=8.0, stages=("opsd",))
    (tmp_path / "tiny.py").write_text(
        "from opsd_jax.config import loading\n"
        f"def get_config():\n    return loading.from_flat({loading.flatten(config)!r})\n"
    )

    def start(workdir):
        command = [sys.executable, "-m", "opsd_jax", "train"]
        command += ["--config", str(tmp_path / "tiny.py"), "--workdir", str(workdir)]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env=processes.environment(devices=8), **silent)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.monotonic() - began
    rng, kills = random.Random(0), 0
    while kills < 3:
        began, process = time.monotonic(), start(tmp_path / "killed")
        try:
            process.wait(timeout=rng.uniform(0.2, 0.8) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        if process.wait() == 0:
            if kills:
                break
            # It ended before its first kill: the machine was busier while `whole` was measured.
            whole = min(0.9 * whole, time.monotonic() - began)
            shutil.rmtree(tmp_path / "killed")
    assert start(tmp_path / "killed").wait() == 0
    assert kills > 0
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
