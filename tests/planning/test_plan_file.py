"""Plan files in configs/plans: they describe the current configs, and configs quote them."""

import argparse
import importlib.util
import json
import pathlib
import re
import shlex
import types

import pytest
import tiny_config
from paths import CONFIGS

from opsd_jax.cli import main, plan, report
from opsd_jax.config import loading
from opsd_jax.models import architecture
from opsd_jax.models.presets import PRESETS
from opsd_jax.planning import plan_file, table
from opsd_jax.planning.keys import Part, PhaseKey, PhaseKind
from opsd_jax.planning.phases import Phase
from opsd_jax.planning.plan import Plan
from opsd_jax.run import pipeline

PLANS = sorted((CONFIGS / "plans").glob("*.txt"))


def field(text, name):
    """Returns the value of a header line."""
    return re.search(rf"^{name}: (.+)$", text, re.MULTILINE)[1]


def small_plan(config, devices=8, chip="cpu", **attributes):
    """Returns a plan of some phases of a run, as if XLA had compiled it."""
    return Plan(
        topology="v5e:2x2", slices=1, devices=devices, chip=chip, hbm=2.0**34,
        mesh={"data": 4}, decode_mesh={"data": 4}, config=config, programs=[],
        seconds_at_best=3600.0, seconds_in_turn=7200.0, response_length=0.5,
        largest_collective={}, smallest_weight=7, fits=True, **{"phases": [], **attributes},
    )  # fmt: skip


@pytest.fixture(params=PLANS, ids=lambda path: path.stem)
def planned(request):
    """A config's path, the config, and the text of its plan."""
    path = CONFIGS / f"{request.param.stem}.py"
    return path, loading.load(path, data=False, platform="tpu"), request.param.read_text()


def test_every_config_for_a_pod_has_a_plan():
    assert [path.stem for path in sorted(CONFIGS.glob("*_v5*.py"))] == [p.stem for p in PLANS]


def test_a_plan_describes_the_current_config(planned):
    path, config, text = planned
    command = text.partition("\n")[0]
    words = shlex.split(command)
    assert words[:4] == ["opsd-jax", "plan", "--config", f"configs/{path.name}"]
    assert words[-2:] == ["--out", f"configs/plans/{path.stem}.txt"]
    assert field(text, "config sha256") == plan_file.config_hash(loading.flatten(config)), (
        f"configs/{path.name} has changed since its plan was made; make it again: {command}"
    )
    assert field(text, "status") == "compiled, not run"


def test_a_plan_fits_and_has_the_meshes_of_its_config(planned):
    _, config, text = planned
    mesh, decode_mesh = re.findall(r"\d+ x \d+ x \d+", text)
    for sizes, shape in ((config.mesh, mesh), (config.decode_mesh or config.mesh, decode_mesh)):
        pairs = zip(sizes, shape.split(" x "), strict=True)
        assert all(size in (-1, int(printed)) for size, printed in pairs)
    assert "DOES NOT FIT" not in text


def test_a_config_quotes_the_memory_and_time_of_its_plan(planned):
    path, config, text = planned
    header = path.read_text()
    (stage,) = config.stages
    left = min(float(gib) for gib in re.findall(r"([\d.]+) left$", text, re.MULTILINE))
    hbm = re.search(r"HBM of a device, in GiB, out of ([\d.]+)", text)[1]
    assert f"the fullest phase leaves {left:.1f} GiB of {hbm} GiB free on each chip" in header
    low, high = re.search(r"total: (\S+) to (\S+) hours", text).groups()
    assert f"Time: {low} to {high} hours for {config.sections[stage].steps} steps" in header


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"seed": 7}, True),
        ({"wandb_project": "runs"}, True),
        ({"pool.workers": 3}, True),
        ({"checkpoints.last": 9}, True),
        ({"data.system": "Be brief."}, True),
        ({"sft.batch_size": 64}, True),
        ({"evaluation.seed": 3}, True),
        ({"opsd.response_tokens": 99}, False),
        ({"evaluation.slots": 99}, False),
        ({"model.num_layers": 99}, False),
        ({"mesh": [1, 2, 3]}, False),
        ({"rollout_quantisation.weights": "int8"}, False),
        ({"adapter.kind": "lora"}, False),
        ({"data.heldout_problems": 99}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_hash_depends_on_the_fields_that_change_a_plan(change, is_same):
    config = loading.flatten(tiny_config.quickstart()) | {"stages": ["opsd"]}
    assert change.keys() <= config.keys()
    before, after = plan_file.config_hash(config), plan_file.config_hash(config | change)
    assert (before == after) is is_same


def test_the_command_of_a_plan_has_the_arguments_that_are_not_defaults():
    arguments = argparse.Namespace(
        config="c.py", topology="v5e:4x4", slices=2, length=0.3, out=pathlib.Path("plans/c.txt")
    )
    assert plan_file.command(arguments, {"opsd.contexts": "('memo',)"}) == (
        "opsd-jax plan --config c.py --topology v5e:4x4 --slices 2 --length 0.3 "
        "'--config.opsd.contexts=('\"'\"'memo'\"'\"',)' --out plans/c.txt"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'opsd-jax[tpu]'"
)
def test_the_command_line_writes_a_plan_file(tmp_path, monkeypatch, capsys):
    flat = loading.flatten(tiny_config.quickstart())
    made = small_plan(flat, 4, "TPU v5 lite")
    monkeypatch.setattr(plan, "plan", lambda *arguments, **options: made)
    out = tmp_path / "plan.txt"
    arguments = ["plan", "--config", "quickstart", "--topology", "v5e:2x2", "--out", str(out)]
    assert main.main(arguments) == 0
    text = out.read_text()
    assert text.startswith(f"opsd-jax plan --config quickstart --topology v5e:2x2 --out {out}\n")
    assert field(text, "config sha256") == plan_file.config_hash(flat)
    assert {"date", "jax", "libtpu"} <= {line.partition(":")[0] for line in text.splitlines()}
    assert "  total: 1 to 2 hours, or 4 to 8 device-hours" in text
    assert "HBM of a device" in capsys.readouterr().out


PHASES = [
    (PhaseKey("rlvr", PhaseKind.RESHARD), 0.5, 0.75, None),
    (PhaseKey("rlvr", PhaseKind.SAMPLING, "rollouts"), 20.0, 1321.5, None),
    (PhaseKey("rlvr", PhaseKind.STEP), 2.25, 5.0, 0.62),
    (PhaseKey("rlvr", PhaseKind.PROBE), 400.0, 500.0, None),  # not in every step
    (PhaseKey("rlvr_long", PhaseKind.STEP), 70.0, 80.0, None),  # of another stage
]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function `(*arguments) -> predictions`: the command `train` without the training.

    It trains the stage `rlvr` of the quickstart on this machine's devices.
    """
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda *_, planned, **options: seen.append(planned))
    monkeypatch.setattr(report, "write", lambda config, workdir: 0)
    (tmp_path / "small.py").write_text(
        "from opsd_jax.config import loading\n"
        "def get_config():\n"
        "    config = loading.read('quickstart')\n"
        "    config.stages = ('rlvr',)\n"
        "    config.rlvr.init_from = ''\n"
        "    return config\n"
    )

    def trained(*arguments):
        command = [
            "train",
            "--config",
            str(tmp_path / "small.py"),
            "--workdir",
            str(tmp_path / "w"),
        ]
        assert main.main([*command, *arguments]) == 0
        return seen[-1]

    return trained


@pytest.fixture
def plan_beside(tmp_path):
    """A function `(**attributes) -> path` that writes a plan of `trained`'s config beside it."""

    def write(**attributes):
        config = loading.flatten(loading.load(tmp_path / "small.py", data=False, platform="tpu"))
        phases = [
            Phase(key, 9, {Part.PARAMETERS: 1.0}, [], best, in_turn, useful_tokens=useful)
            for key, best, in_turn, useful in PHASES
        ]
        made = small_plan(config, phases=phases, **attributes)
        path = tmp_path / "plans" / "small.txt"
        path.parent.mkdir()
        lines = [f"config sha256: {plan_file.config_hash(config)}", *table.summary(made)]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def test_a_run_without_a_plan_has_no_predictions(trained):
    assert trained() == {}


def test_a_run_gets_the_predictions_of_the_plan_beside_its_config(trained, plan_beside):
    path = plan_beside()
    metrics = {
        "seconds": [22.7, 1327.3],  # the file has one decimal of each phase
        "rollout_seconds": [20.0, 1321.5],
        "update_seconds": [2.2, 5.0],
        "useful_tokens": [0.62, 0.62],
    }
    # No plan depends on the seed.
    assert trained("--config.seed=7") == {"rlvr": {"file": path, "metrics": metrics}}


@pytest.mark.parametrize(
    ("attributes", "here"),
    [({"chip": "TPU v5 lite"}, "8 x TPU v5 lite"), ({"devices": 4}, "4 x cpu")],
)
def test_a_plan_for_other_devices_predicts_nothing(trained, plan_beside, attributes, here):
    path = plan_beside(**attributes)
    reason = f"it is for {here}, and the run has 8 x cpu"
    assert trained() == {"rlvr": {"file": path, "differs": reason}}


def test_a_plan_for_another_config_predicts_nothing(trained, plan_beside):
    path = plan_beside()
    changed = trained("--config.rlvr.response_tokens=7")
    assert changed == {"rlvr": {"file": path, "differs": "it is for another config"}}


def test_a_plan_of_a_preset_is_one_of_a_run_with_its_weights(planned, tmp_path):
    path, config, text = planned
    devices, chip = re.search(r": (\d+) x (.+)$", text, re.MULTILINE).groups()
    devices = int(devices) * [types.SimpleNamespace(device_kind=chip)]
    sizes = architecture.DecoderConfig(**PRESETS[config.model.preset])
    written = architecture.to_json(sizes, "bfloat16")
    overrides = {"model.path": str(tmp_path)}
    predicted = lambda: plan_file.predictions(
        path, overrides, loading.load(path, overrides, data=False), devices
    )
    (tmp_path / "config.json").write_text(json.dumps(written))
    (found,) = predicted().values()
    step, rollouts, update, useful = found["metrics"].values()
    assert rollouts[0] + update[0] <= step[0] <= step[1]
    assert 0 < useful[0] <= 1
    (tmp_path / "config.json").write_text(json.dumps({**written, "num_hidden_layers": 2}))
    (found,) = predicted().values()
    assert found["differs"] == "it is for another config"
