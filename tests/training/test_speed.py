"""The figures of a step: the parts of its time, its speed, and its trace."""

import itertools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.parallel import chips, watchdog
from opsd_jax.parallel.watchdog import Wait, waiting
from opsd_jax.rollout.decoding import Decoding
from opsd_jax.training import profile, speed
from opsd_jax.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Time passes only when a test says so."""
    time = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: time[0])

    def sleep(seconds):
        time[0] += seconds

    return sleep


def test_the_parts_add_up_and_only_the_innermost_wait_counts(clock):
    began = watchdog.now()
    clock(1)
    with waiting(Wait.VERIFIER):
        clock(2)
        with waiting(Wait.HOSTS):
            clock(4)
        clock(8)
    with pytest.raises(ZeroDivisionError), waiting(Wait.VERIFIER):
        _ = 1 // 0
    with waiting(Wait.VERIFIER):
        clock(16)
    middle = watchdog.now()
    with waiting(Wait.DECODING):
        clock(32)
        inside = watchdog.now()
        clock(64)
    ended = watchdog.now()

    found = speed.seconds(began, middle)
    assert found["seconds"] == 31
    assert found["seconds/other"] == 1
    assert found["seconds/verifier"] == 26
    assert found["seconds/hosts"] == 4
    assert speed.seconds(middle, inside)["seconds/decoding"] == 32
    for a, b in itertools.combinations([began, middle, inside, ended], 2):
        found = speed.seconds(a, b)
        assert found.pop("seconds") == b.seconds - a.seconds == sum(found.values())


def test_speed_of_known_and_of_unknown_devices(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "opsd_jax")
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    metrics = {"tokens": 1600.0, "seconds": 10.0}
    found = speed.Speed(mesh)(metrics, 8e12, 2.0, Decoding(bytes=6e9, seconds=4.0))
    assert found == {
        "update_seconds": 2.0, "speed/tokens_per_device": 20.0, "speed/tflops_per_device": 0.5,
        "rollout_seconds": 4.0, "speed/decode_gb_per_device": 1.5,
    }  # fmt: skip
    assert not caplog.text  # nobody expects an MFU on a CPU
    unknown = types.SimpleNamespace(device_kind="TPU v9", platform="tpu")
    speed.Speed(types.SimpleNamespace(devices=np.array([unknown])))
    assert "no MFU and no MBU: the peak rates of 'TPU v9' devices are unknown" in caplog.text

    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(flops=2e12, hbm=6e9, ici=1e9))
    found = speed.Speed(mesh)(metrics, 8e12, 2.0, Decoding(bytes=6e9, seconds=4.0))
    assert found["speed/mfu"] == 0.25
    assert found["speed/mbu"] == 0.25
    assert "speed/mbu" not in speed.Speed(mesh)(metrics, 8e12, 2.0)  # no rollouts
    for unknown in (None, 0.0):  # the model counts no FLOPs; no row was active
        assert "speed/mfu" not in speed.Speed(mesh)(metrics, unknown, 2.0)


def test_the_progress_bar_shows_the_utilisations(capsys):
    values = {"tokens": 1600.0, "seconds": 10.0, speed.MFU: 0.25, speed.MBU: 0.5}
    with Progress() as bar:
        bar.start("opsd", 1, "step")
        bar.step(0, values)
        bar.finish()
    assert "160 tokens/s, MFU 25.0%, MBU 50.0%" in capsys.readouterr().err


def test_the_steps_of_a_stage_beside_its_plan():
    planned = {"file": "p.txt", "metrics": {"seconds": (2.0, 3.0), "useful_tokens": (0.5, 0.5)}}
    rows = [{"seconds": s} for s in (90.0, 4.0, 5.0, 7.0)]  # the first step compiles
    assert speed.beside(planned, rows) == {
        "file": "p.txt", "metrics": {"seconds": {"planned": [2.0, 3.0], "measured": 5.0}}
    }  # fmt: skip
    assert speed.beside(planned, rows[:1])["metrics"]["seconds"]["measured"] == 90
    other = {"file": "p.txt", "differs": "it is for another config"}
    assert speed.beside(other, rows) == other


def test_a_v4_of_a_run_is_two_devices_of_a_topology():
    device = types.SimpleNamespace(device_kind="TPU v4")
    assert chips.chip_of(device) == chips.Chip(2.74e14, 1.22e12, 9.0e10)
    device.device_kind = "TPU v5e"
    assert chips.chip_of(device) == chips.CHIPS["TPU v5 lite"]


def test_the_trace_of_one_step(tmp_path):
    for step in range(3):
        with profile.trace(tmp_path, step, wanted=1):
            jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
        traces = list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
        assert len(traces) == (step >= 1)
    assert traces[0].stat().st_size > 1000
