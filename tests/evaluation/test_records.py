"""The files of an evaluation: what was changed after it is an error that names the file."""

import json

import pytest

from opsd_jax.evaluation import records
from opsd_jax.storage.files import RecordError


@pytest.fixture
def directory(tmp_path):
    lines = [
        {"problem": f"p{i}", "response": f"the answer is {i}", "correct": True} for i in (1, 2)
    ]
    with records.recorder(tmp_path, lines):
        pass
    records.finish(tmp_path, {"accuracy": 0.5, "pass_at": {1: 0.5, 2: float("nan")}, "n": (1, 2)})
    return tmp_path


def test_an_evaluation_is_read_as_it_was_written(directory):
    responses, summary = records.read(directory)
    assert [r["problem"] for r in responses] == ["p1", "p2"]
    assert summary == {"accuracy": 0.5, "pass_at": {"1": 0.5, "2": None}, "n": [1, 2]}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("responses.jsonl", "answer is 2", "answer is 3"),
        ("responses.jsonl", '"correct": true', '"correct": false'),
        ("evaluation.json", '"accuracy": 0.5', '"accuracy": 0.9'),
    ],
)
def test_a_changed_file_is_named(directory, name, old, new):
    path = directory / name
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RecordError, match=rf"{name} is damaged: its content is not what"):
        records.read(directory)


def test_files_of_version_0_1_0_have_no_digests(directory):
    path = directory / "evaluation.json"
    summary = json.loads(path.read_text())
    del summary["sha256"]
    path.write_text(json.dumps(summary))
    assert records.read(directory)[1]["accuracy"] == 0.5
