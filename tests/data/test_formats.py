"""Problems in JSON arrays and CSV files."""

import csv
import json

import pytest

from opsd_jax.data import files
from opsd_jax.problem import DataError

ROWS = [
    {"problem": "What is 1 + 1?", "answer": "2"},
    {"problem": 'Say "a, b"\nin two lines.', "answer": "½"},
]


def read(path, split=""):
    return [row.columns or row.error for row in files.rows(str(path), split)]


def write_csv(path, rows, **options):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows(rows)


@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=2), "\ufeff  []"])
def test_a_json_array_of_objects(tmp_path, text):
    path = tmp_path / "problems.json"
    path.write_text(text, encoding="utf-8")
    assert read(path) == json.loads(text.lstrip("\ufeff"))


def test_a_json_file_may_have_one_row_per_line(tmp_path):
    path = tmp_path / "problems.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(path) == ROWS


def test_items_that_are_no_objects_are_bad_rows(tmp_path):
    path = tmp_path / "problems.json"
    path.write_text('[{"problem": "x"}, 3]')
    assert read(path) == [{"problem": "x"}, "a JSON value of type int; expected an object"]


def test_a_csv_file_names_its_columns_in_the_first_row(tmp_path):
    write_csv(tmp_path / "problems.csv", ROWS)
    assert read(tmp_path / "problems.csv") == ROWS
    locations = [row.location for row in files.rows(str(tmp_path / "problems.csv"))]
    assert locations == [f"{tmp_path}/problems.csv:{row}" for row in (2, 3)]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("problem,answer\nx,1\n\ny\n", [{"problem": "x", "answer": "1"}, "1 values; expected 2"]),
        ("problem,answer\n", []),
        ("", []),
    ],
)
def test_rows_of_another_length_are_bad(tmp_path, text, rows):
    (tmp_path / "problems.csv").write_text(text)
    assert read(tmp_path / "problems.csv") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x,x\n1,2\n", "columns 'x', 'x'; expected each name once"),
        ("a.csv", b'x\n"1\n', "cannot be read: Error: unexpected end of data"),
        ("a.csv", b"x\n\xff\n", "cannot be read: UnicodeDecodeError"),
        ("a.json", b'[{"x": 1}', "cannot be read: JSONDecodeError"),
        ("a.json", b"[" * 100_000, "nested over 100 levels deep"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_long_line_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 1000)
    (tmp_path / "a.csv").write_text("x\n" + "1" * 1001)
    with pytest.raises(DataError, match="has a line of over 1,000 characters"):
        read(tmp_path / "a.csv")


def test_other_formats_come_first_in_a_directory(tmp_path):
    (tmp_path / "dataset_infos.json").write_text("{}")
    write_csv(tmp_path / "train.csv", ROWS)
    assert read(tmp_path, "train") == ROWS
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]))
    assert read(tmp_path) == ROWS[:1]
