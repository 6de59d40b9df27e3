"""The watchdog: which steps it warns about, and what the warning contains."""

import logging
import time

import pytest

from opsd_jax.parallel import watchdog
from opsd_jax.parallel.watchdog import Wait, Watchdog, waiting


@pytest.fixture
def dog(monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    caplog.set_level(logging.WARNING, "opsd_jax")
    with Watchdog("rlvr") as dog:
        yield dog


def take(dog, seconds):
    for step, length in enumerate(seconds):
        dog.begin(step)
        time.sleep(length)


def test_a_long_step_is_reported_with_what_it_waits_for(dog, caplog, capfd):
    take(dog, [0.01] * 5)
    dog.begin(5)
    with waiting(Wait.VERIFIER), waiting(Wait.HOSTS):
        time.sleep(0.5)
    (warning,) = caplog.messages
    assert warning.startswith("opsd-jax: step 5 of rlvr has taken 0 s. The median step time is 0.0")
    assert "has been waiting for the verifier > other hosts for 0 s" in warning
    assert "test_watchdog.py" in capfd.readouterr().err  # the stacks
    caplog.clear()
    time.sleep(0.6)  # twice as long
    (warning,) = caplog.messages
    assert "step 5 of rlvr has taken" in warning
    assert "for its own Python code" in warning


def test_a_first_step_that_hangs_is_reported(dog, monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "FIRST_SECONDS", 0.3)
    dog.begin(0)
    time.sleep(0.5)
    assert "has taken 0 s. The median step time is not known yet" in caplog.text


def test_first_steps_and_ordinary_steps_are_not_reported(dog, caplog):
    take(dog, [0.4, 0.02, 0.02])  # the first one compiles
    take(dog, [0.05] * 5)
    assert not caplog.messages
