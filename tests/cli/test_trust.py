"""A work directory from somebody else: its config imports nothing that the user does not trust."""

import contextlib
import json
import sys

import pytest
import tiny_config

from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.options import names_from, resolve

CODE = """
import pathlib

pathlib.Path({marker!r}).touch()


def __getattr__(name):
    return lambda *arguments: None
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A work directory, and a package `hostile` that leaves a file when it is imported."""
    (tmp_path / "hostile.py").write_text(CODE.format(marker=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    (tmp_path / "run" / "sft").mkdir(parents=True)
    return tmp_path / "run"


def save(workdir, changes):
    config = json.loads(loading.to_json(tiny_config.quickstart()))
    (workdir / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("evaluate", "task"),
        ("evaluate", "sft.algorithm"),
        ("convert", "model.make"),
        ("convert", "opsd.algorithm"),
        ("report", "rlvr.algorithm"),
    ],
)
def test_a_directory_imports_only_what_the_user_trusts(hostile, capsys, command, field):
    save(hostile, {field: "hostile:here"})
    arguments = {
        "evaluate": ["--stage", "untrained"],
        "convert": ["--stage", "untrained", "--out", str(hostile.parent / "out")],
        "report": [],
    }[command]
    given = [command, "--workdir", str(hostile), *arguments]
    marker = hostile.parent / "imported"

    assert main.main(given) == 2
    message = capsys.readouterr().err
    assert f"config.{field}: 'hostile:here' is not imported" in message
    assert "pass --trust hostile." in message
    assert str(hostile / "config.json") in message
    assert not marker.exists()

    assert main.main([*given, "--trust", "other"]) == 2
    assert not marker.exists()

    with contextlib.suppress(Exception):  # the objects of the package are of no use to a run
        main.main([*given, "--trust", "other", "--trust", "hostile"])
    assert marker.exists()


def test_a_run_that_resumes_imports_no_algorithm_of_the_directory(hostile, capsys):
    save(hostile, {"sft.algorithm": "hostile:here"})
    assert main.main(["train", "--config", "quickstart", "--workdir", str(hostile)]) == 2
    assert "is not imported" in capsys.readouterr().err
    assert not (hostile.parent / "imported").exists()


@pytest.mark.parametrize("name", ["json:dumps", "opsd_jax_evil:f", "opsd_jax.options:importlib"])
def test_only_objects_of_the_package_are_resolved(name):
    resolve(name) if "evil" not in name else None
    with (
        names_from("config.json", ()),
        pytest.raises(ValueError, match=r"not imported|not defined"),
    ):
        resolve(name)


@pytest.mark.parametrize("name", ["opsd_jax.models.decoder:from_config", "opsd_jax.data.text:task"])
def test_objects_of_the_package_need_no_trust(name):
    with names_from("config.json", ()):
        assert callable(resolve(name))


def test_trust_is_given_to_a_package(capsys):
    with pytest.raises(SystemExit):
        main.main(["report", "--workdir", "runs/a", "--trust", "mine.sub:f"])
    assert "mine.sub:f is not a package" in capsys.readouterr().err
