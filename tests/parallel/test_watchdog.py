"""What is said of a step that takes too long."""

import time

import pytest

from opsd_jax.parallel import watchdog
from opsd_jax.parallel.watchdog import Watchdog, waiting


@pytest.fixture
def dog(monkeypatch):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    with Watchdog("rlvr") as dog:
        yield dog


def take(dog, seconds):
    for step, length in enumerate(seconds):
        dog.begin(step)
        time.sleep(length)


def test_a_long_step_says_what_it_waits_for(dog, capfd):
    take(dog, [0.01] * 5)
    dog.begin(5)
    with waiting("the verifier"), waiting("other hosts"):
        time.sleep(0.5)
    said = capfd.readouterr().err
    assert said.count("opsd-jax: rlvr, step 5, has taken") == 1
    assert "the median is 0.0 s. It has waited 0 s for the verifier > other hosts. Its" in said
    assert "test_watchdog.py" in said  # where it is
    time.sleep(0.6)  # twice as long
    said = capfd.readouterr().err
    assert said.count("step 5, has taken") == 1
    assert "for its own Python" in said


def test_a_first_step_that_hangs_is_told_of_too(dog, monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "FIRST_SECONDS", 0.3)
    dog.begin(0)
    time.sleep(0.5)
    assert "step 0, has taken 0 s; the median is unknown yet" in capfd.readouterr().err


def test_the_first_steps_and_ordinary_ones_are_not_told_of(dog, capfd):
    take(dog, [0.4, 0.02, 0.02])  # the first compiles
    take(dog, [0.05] * 5)
    assert "has taken" not in capfd.readouterr().err
