"""The training loop with the minimal stage of `training.stage`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout.diagnosis import Diagnosis
from opsd_jax.storage.files import RecordError
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.loop import LoopOptions, NoSignal, run_stage
from opsd_jax.training.signals import StopSignal
from opsd_jax.training.stage import Stage, StepData


def pack(x_N):
    x_Mxm = np.zeros((4, 8), np.float32)
    x_Mxm[: len(x_N) // 8] = x_N.reshape(-1, 8)
    return ({"count": np.int32(len(x_N) // 8), "rows": {"x": x_Mxm}},)


def batches(step, params):
    x_N = np.random.default_rng(step).normal(size=16).astype(np.float32)
    return StepData([pack(x_N)], {"tokens": 16.0})


def loss(params, teacher, microbatch):
    error_m = params["slope"] * microbatch["x"] - 2 * microbatch["x"]
    return jnp.sum(error_m**2), (jnp.float32(error_m.size), {})


STAGE = Stage(steps=10, updates=1, batches=batches, empty_batch=pack(np.zeros(0)), loss=loss)


@pytest.fixture
def train(tmp_path):
    """Runs a stage on all devices and returns the final parameters."""
    mesh = mesh_lib.make_mesh((-1, 1, 1))
    replicated = mesh_lib.replicated(mesh)
    make = jax.jit(lambda: {"slope": jnp.zeros(())}, out_shardings={"slope": replicated})

    def train(stage, **options):
        with StopSignal() as stop:
            return run_stage(
                stage,
                optax.sgd(0.1),
                make,
                abstract_params=mesh_lib.abstract_of(jax.eval_shape(make), {"slope": replicated}),
                mesh=mesh,
                directory=tmp_path,
                options=LoopOptions(checkpoint_every=4, max_nonfinite=1, **options),
                stop=stop,
            )

    return train


def test_the_minimal_stage_trains(train, tmp_path):
    params = train(STAGE)
    assert abs(float(params["slope"]) - 2) < 0.5
    rows = metrics_lib.read(tmp_path)
    assert [row["step"] for row in rows] == list(range(10))
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert all(row["tokens"] == 16 and row["empty"] == 0 for row in rows)


def test_a_longer_stage_resumes_from_the_last_checkpoint(train):
    shorter = STAGE._replace(steps=6)
    train(shorter)
    steps = []

    def recorded(step, params):
        steps.append(step)
        return batches(step, params)

    train(STAGE._replace(batches=recorded))
    assert steps == [6, 7, 8, 9]


def test_what_a_step_carries_over_is_in_the_checkpoint(train, tmp_path):
    """A step gets what the step before it carried over, also in a run that resumes."""
    given = []

    def carrying(step, params, carried):
        given.append((step, int(carried["sum"])))
        data = batches(step, params)
        return data._replace(carried={"sum": carried["sum"] + np.int32(step)})

    stage = STAGE._replace(batches=carrying, carried={"sum": np.zeros((), np.int32)})
    train(stage._replace(steps=6))
    train(stage)
    assert given == [(step, sum(range(step))) for step in range(10)]
    with pytest.raises(RecordError, match="has carried/sum, which this config does not use"):
        train(STAGE._replace(steps=11))


double = jax.jit(lambda x: 2 * x)


@pytest.mark.parametrize(
    "transfer",
    [
        lambda params: double(np.ones(8, np.float32)),
        lambda params: jnp.asarray(np.ones(8, np.float32)),
        lambda params: params["slope"] + 1,  # a Python scalar becomes an array on the device
        lambda params: params["slope"][None][0],  # so does an index
    ],
    ids=["argument", "asarray", "scalar", "index"],
)
def test_an_implicit_transfer_raises(train, transfer):
    """On CPU, JAX checks transfers to the device only: it reads arrays without a transfer."""

    def transferring(step, params):
        transfer(params)
        return batches(step, params)

    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(STAGE._replace(batches=transferring))
    transfer({"slope": jnp.zeros(())})  # the guard ends with the loop


def test_a_trace_of_one_step(train, tmp_path):
    train(STAGE, profile=3)
    (trace,) = tmp_path.glob("profile/**/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert len(metrics_lib.read(tmp_path)) == 10


def test_a_step_to_trace_that_does_not_run_is_named(train, tmp_path, caplog):
    train(STAGE, profile=10)
    assert f"--profile 10: {tmp_path.name} writes no trace; it runs the steps 0 to 9" in caplog.text


def test_explicit_transfers_are_allowed(train):
    def transferring(step, params):
        assert jax.device_get(double(jax.device_put(np.ones(8, np.float32)))).sum() == 16
        assert np.isfinite(jax.device_get(params["slope"]))
        return batches(step, params)

    train(STAGE._replace(steps=2, batches=transferring))


@pytest.mark.parametrize("x", [np.zeros(16, np.float32), np.zeros(0, np.float32)])
def test_a_stage_without_a_gradient_stops(train, tmp_path, caplog, x):
    """Rows with a gradient of 0 give no signal, and a batch without rows doesn't either."""
    signal = (0, 4)  # steps with a gradient

    def quiet(step, params):
        data = batches(step, params) if step in signal else StepData([pack(x)], {"tokens": 16.0})
        return data._replace(diagnose=lambda name: Diagnosis(f"seen by {name} in {step}.", "Fix."))

    stage = STAGE._replace(batches=quiet)
    with pytest.raises(NoSignal) as stopped, caplog.at_level("INFO", "opsd_jax"):
        train(stage, max_without_signal=4)
    name = tmp_path.name
    assert str(stopped.value) == (
        f"{name} learns nothing: no update had a gradient for 4 steps in a row, up to step 8; "
        "expected fewer than config.max_without_signal = 4 (0 for no limit). In this step, "
        f"seen by {name} in 8.\nFix."
    )
    assert caplog.messages == [
        f"{name}, step {step}: seen by {name} in {step}.\nFix." for step in range(3)
    ]
    assert [row["step"] for row in metrics_lib.read(tmp_path)] == list(range(9))


def test_a_stage_without_a_gradient_goes_on_if_the_config_says_so(train):
    train(STAGE._replace(batches=lambda *_: StepData([pack(np.zeros(0))], {"tokens": 16.0})))
