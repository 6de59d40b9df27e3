"""Reading rows of files as problems: every file format, every filter, every error message."""

import gzip
import json
import subprocess
import sys

import pytest

from opsd_jax import config as config_lib
from opsd_jax.data import files, sources
from opsd_jax.problem import DataError, Problem

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"id": "a", "problem": "What is 1 + 1?", "answer": "2", "solution": "1 + 1 = 2"},
    {"id": "b", "problem": "What is 2 + 3?", "answer": "5", "solution": None},
    {"id": "c", "problem": "What is π · 0?", "answer": "0", "solution": "0"},
]
PROBLEMS = [
    Problem("maths/a", "What is 1 + 1?", "1 + 1 = 2", "2", "maths"),
    Problem("maths/b", "What is 2 + 3?", "", "5", "maths"),
    Problem("maths/c", "What is π · 0?", "0", "0", "maths"),
]


def write_json_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_arrow(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return path


def write_saved_dataset(folder, rows, split=None):
    """Writes a folder like Dataset.save_to_disk: two Arrow files, and a list of them."""
    write_arrow(folder / "data-00000-of-00002.arrow", rows[:1])
    write_arrow(folder / "data-00001-of-00002.arrow", rows[1:])
    names = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": split}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_saved_dict(folder, rows):
    """Writes a folder like DatasetDict.save_to_disk: one dataset per split."""
    write_saved_dataset(folder / "train", rows, "train")
    write_saved_dataset(folder / "test", rows[:2], "test")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


def write_snapshot(folder, rows):
    """Writes a folder like a dataset's repository on the hub."""
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", rows[2:])
    write_json_lines(folder / "test_small.jsonl", rows[:1])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def read(path, check_golds=lambda problems: [""] * len(problems), **changes):
    source = config_lib.source(str(path), **changes)
    return sources.problems("maths", source, "data.train.maths", check_golds)


@pytest.mark.parametrize(
    ("write", "name", "split"),
    [
        (write_json_lines, "a.jsonl", ""),
        (write_json_lines, "a.jsonl.gz", ""),
        (write_parquet, "a.parquet", ""),
        (write_arrow, "a.arrow", ""),
        (write_saved_dataset, "saved", ""),
        (write_saved_dict, "dict", "train"),
        (write_snapshot, "snapshot", "train"),
    ],
)
def test_every_file_format_gives_the_same_problems(tmp_path, write, name, split):
    problems, counts = read(write(tmp_path / name, ROWS), split=split)
    assert problems == PROBLEMS
    assert counts == sources.Counts(rows=3, kept=3, unsolved=1)


@pytest.mark.slow
def test_files_of_the_datasets_package_give_the_same_problems(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert read(tmp_path / "saved")[0] == PROBLEMS
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([2, 0])})
    splits.save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict", split="train")[0] == PROBLEMS
    assert read(tmp_path / "dict", split="test")[0] == [PROBLEMS[2], PROBLEMS[0]]
    dataset.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    assert read(tmp_path / "hub")[0] == PROBLEMS


def test_a_split_is_selected_by_name(tmp_path):
    assert len(read(write_saved_dict(tmp_path / "d", ROWS), split="test")[0]) == 2
    assert len(read(write_snapshot(tmp_path / "s", ROWS), split="test_small")[0]) == 1
    assert len(read(write_saved_dataset(tmp_path / "one", ROWS, "train"), split="train")[0]) == 3


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (lambda p: p / "absent.jsonl", "", r"absent.jsonl'; there is no such file or directory"),
        (lambda p: p, "", "a directory without data; expected state.json, dataset_dict.json, or"),
        (lambda p: write_json_lines(p / "a.txt", []), "", r"ends in .jsonl, .jsonl.gz, .json, "),
        (
            lambda p: write_json_lines(p / "a.jsonl", ROWS),
            "train",
            "split is 'train'; expected one",
        ),
        (
            lambda p: write_saved_dict(p / "d", ROWS),
            "",
            "split is ''; expected one of 'train', 'te",
        ),
        (
            lambda p: write_saved_dataset(p / "d", ROWS, "train"),
            "test",
            "expected one of 'train', ",
        ),
        (lambda p: write_snapshot(p / "s", ROWS), "dev", "expected one of 'train', 'test_small', "),
        (lambda p: write_json_lines(p / "a.jsonl", []), "", "no problem of .* remains .0 rows, 0"),
    ],
)
def test_a_path_without_data_is_an_error(tmp_path, make, split, message):
    with pytest.raises(DataError, match=rf"config.data.train.maths\W.*{message}"):
        read(make(tmp_path), split=split)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b" " * (files.LINE_BYTES + 1), r"1 has over 16,777,216 bytes; expected one row"),
        (lambda: b"{}\n" + b"\n" * 200_000, r"100002 is after 100,000 blank lines"),
        (lambda: b'{"a": 1}\n' * 9 + b"{\n" * 20_000, r"10010 is not JSON .* Over 10,000 lines"),
        (lambda: b'{"a": 1}\n' * 30_000, r"20001 bad of 20001 rows:"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_beyond_a_limit_is_refused(tmp_path, content, reason, name):
    path = tmp_path / name
    content = content()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    for check in (read, lambda path: sources.questions(config_lib.source(str(path)), "data.x")):
        with pytest.raises(DataError, match=reason):
            check(path)


def test_a_file_that_inflates_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    row = json.dumps({"problem": "What?" * 9999, "answer": "1"}).encode() + b"\n"
    path.write_bytes(gzip.compress(row * 90))
    assert len(read(path)[0]) == 90  # small files may compress well
    monkeypatch.setattr(files, "INFLATED_FREE", 2**20)
    with pytest.raises(DataError, match="over 100 times the bytes of the compressed file"):
        read(path)


def test_a_file_with_too_many_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS", 2)
    path = write_json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=f"{path}:3 is after 2 rows"):
        read(path)
    with pytest.raises(DataError, match="has 3 rows; expected at most 2"):
        read(write_parquet(tmp_path / "a.parquet", ROWS))


def test_blank_lines_between_rows_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n" * 99_999)
    assert read(path)[0] == PROBLEMS


def test_the_names_of_columns_are_escaped_in_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"a\nconfig: all is well\x1b[0m": 1} | {f"c{i}": 0 for i in range(99)})
    )
    with pytest.raises(DataError) as error:
        read(path)
    assert r"(the row has a\nconfig: all is well\x1b[0m, c0, " in str(error.value)
    assert "c28, and 70 more)" in str(error.value)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "", "x" * 300, 3, None])
def test_a_dataset_lists_only_files_of_its_own(tmp_path, name):
    write_arrow(tmp_path / "secret.arrow", ROWS)
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="is not the name of a file in the directory"):
        read(directory)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "d/state.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b'{"id": "a"}\n' * 9999)[:-30] if name[-1] == "z" else b"{ PAR1")
    path = path.parent if name[0] == "d" else path
    with pytest.raises(DataError, match=f"config.data.train.maths.path is '{path}', which cannot"):
        read(path)


def test_an_arrow_file_with_damage_inside_is_named(tmp_path):
    """The damage can be at any byte. Converting a damaged batch would end the process."""
    path = write_arrow(tmp_path / "a.arrow", ROWS)
    whole = path.read_bytes()
    code = (
        "import sys\n"
        "from opsd_jax.data import files\n"
        "from opsd_jax.problem import DataError\n"
        "path, whole = sys.argv[1], open(sys.argv[1], 'rb').read()\n"
        "refused = 0\n"
        "for i in range(0, len(whole), 3):\n"
        "    open(path, 'wb').write(whole[:i] + b'\\x7f' * 3 + whole[i + 3 :])\n"
        "    try:\n"
        "        list(files.rows(path))\n"
        "    except DataError:\n"
        "        refused += 1\n"
        "print(refused)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > len(whole) // 100


@pytest.mark.parametrize(
    ("write", "name"), [(write_parquet, "a.parquet"), (write_arrow, "a.arrow")]
)
def test_a_column_that_is_not_needed_may_have_any_type(tmp_path, write, name):
    took = pyarrow.scalar(
        10**14, pyarrow.timestamp("s")
    )  # a year that Python's datetime cannot represent
    rows = [row | {"meta": {"level": 3}, "meta.x": 1, "took": took} for row in ROWS]
    path = write(tmp_path / name, rows)
    assert read(path, difficulty={"column": "meta.level", "low": 1.0})[0] == PROBLEMS
    with pytest.raises(DataError, match=r"'gold' is missing.*has id, .*answer, .*meta.*took"):
        read(path, columns={"answer": "gold"})
    with pytest.raises(DataError, match="which cannot be read: OverflowError"):
        read(path, extra=("took",))
    source = config_lib.source(str(path), columns={"question": "absent"})
    with pytest.raises(DataError, match="3 bad of 3 rows"):
        sources.questions(source, "data.exclude.x")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'opsd-jax\[data\]'"):
        read(path)


def test_json_lines_need_no_pyarrow():
    code = "import sys, opsd_jax.data.text; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_column_names_may_be_dotted(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}"}],
            "reward": {"gold": gold},
            "a.b": "dotted",
            "tests": [1, 2],
        }
        for i, gold in enumerate(["7", 7, 7.0, ["7"]])
    ]
    columns = {"question": "prompt.0.content", "answer": "reward.gold", "solution": "a.b"}
    for path in (
        write_json_lines(tmp_path / "a.jsonl", rows),
        write_parquet(tmp_path / "a.parquet", rows[:1]),
    ):
        problems, _ = read(path, columns=columns, extra=("tests",))
        for i, problem in enumerate(problems):
            assert problem == Problem(
                f"maths/{i + 1}", f"Question {i}", "dotted", "7", "maths", {"tests": [1, 2]}
            )
    no_answer, _ = read(path, columns=columns | {"answer": ""})
    assert no_answer[0].answer == ""


def test_a_named_column_that_no_row_has_is_an_error(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"maths.columns.solution is 'proof', which no row of .*a.j"
    ):
        read(path, columns={"solution": "proof"})
    with pytest.raises(DataError, match="1: field 'tests' is missing; expected a value"):
        read(path, extra=("tests",))
    wrong = ["no gold", "no gold", "no gold"]
    with pytest.raises(DataError, match=r"columns.answer is '', .*maths.verifier, of kind 'maths'"):
        read(path, lambda problems: wrong, columns={"answer": ""})


BAD = [
    ("{", "not JSON (Expecting property name"),
    ("[" * 100_000, "not JSON"),
    (
        '{"problem": "q", "answer": "1", "a": {"b": 1, "b": 2}}',
        "the key 'b' occurs twice",
    ),
    ({"problem": "q", "answer": 1e16}, "field 'answer' is 1e+16; expected a string"),
    ('"text"', "a JSON value of type str; expected an object"),
    ({}, "field 'problem' is missing; .* (the row has no columns); field 'answer' is missing"),
    ({"problem": "q"}, "field 'answer' is missing; expected a string .* (the row has problem)"),
    ({"problem": "q", "answer": None}, "field 'answer' is missing"),
    (
        {"answer": "1"},
        "field 'problem' is missing; expected a string that is not empty (the row has answer)",
    ),
    (
        {"problem": " ", "answer": "1"},
        "field 'problem' is ' '; expected a string that is not empty",
    ),
    ({"problem": 3, "answer": "1"}, "field 'problem' is 3"),
    ({"problem": "q", "answer": ""}, "field 'answer' is ''"),
    ({"problem": "q", "answer": True}, "field 'answer' is True"),
    ({"problem": "q", "answer": 0.5}, "field 'answer' is 0.5; expected a string"),
    ({"problem": "q", "answer": float("nan")}, "field 'answer' is nan"),
    ({"problem": "q", "answer": ["1", "2"]}, "an integer, or a list of one such string"),
    ({"problem": "q", "answer": [1]}, "field 'answer' is [1]"),
    ({"problem": "q", "answer": {"a": "x" * 99}}, "field 'answer' is {'a': 'xxx"),
    ({"problem": "q", "answer": "1", "solution": 3}, "field 'solution' is 3; expected a string"),
    ({"problem": "q", "answer": "1", "id": 1.5}, "field 'id' is 1.5; expected a string or an int"),
    ({"problem": "\ud800", "answer": "1"}, r"field 'problem' is '\ud800'"),
    ({"problem": 3, "answer": 0.5}, "field 'problem' is 3; expected .*; field 'answer' is 0.5"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_refused_with_file_line_field_and_reason(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    good = '{"problem": "What?", "answer": "1"}\n'
    path.write_text(good + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(DataError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith("config.data.train.maths: 1 bad of 2 rows:\n")
    assert f"\n  {path}:3: " in message
    position = 0
    for part in reason.split(".*"):  # the parts occur in this order
        position = message.index(part, position)
    assert "config.data.train.maths.bad_rows='drop'" in message


def test_all_bad_rows_are_in_one_message(tmp_path, caplog):
    rows = [{"problem": f"q{i}", "answer": "" if i % 2 else "1"} for i in range(30)]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        read(path)
    lines = str(error.value).splitlines()
    assert lines[0] == "config.data.train.maths: 15 bad of 30 rows:"
    assert [line.split(":")[1] for line in lines[1:11]] == [str(i) for i in range(2, 22, 2)]
    assert lines[11] == "  and 5 more"
    assert len(lines) == 13
    problems, counts = read(path, bad_rows="drop")
    assert [p.question for p in problems] == [f"q{i}" for i in range(0, 30, 2)]
    assert counts == sources.Counts(rows=30, kept=15, bad=15, unsolved=15)
    assert "15 bad of 30 rows:" in caplog.text


def test_a_repeated_id_is_a_bad_row(tmp_path):
    rows = [*ROWS, ROWS[1] | {"problem": "another"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(
        DataError, match=f"{path}:4: field 'id' is also the id of {path}:2; expected"
    ):
        read(path)


def test_the_id_of_a_bad_row_may_be_used_again(tmp_path):
    rows = [ROWS[0] | {"answer": ""}, *ROWS]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    problems, counts = read(path, bad_rows="drop")
    assert problems == PROBLEMS
    assert counts == sources.Counts(rows=4, kept=3, bad=1, unsolved=1)


def test_a_row_number_that_is_another_row_s_id_is_a_bad_row(tmp_path):
    without, second = {"problem": "q", "answer": "1"}, ROWS[0] | {"id": 2}
    path = write_json_lines(tmp_path / "a.jsonl", [second, without])
    with pytest.raises(DataError, match=f"2: field 'id' is missing, and the row's .* of {path}:1;"):
        read(path)
    write_json_lines(path, [ROWS[0], without, second])
    with pytest.raises(DataError, match=f"3: field 'id' is the number of {path}:2, which has no"):
        read(path)


def test_a_gold_that_does_not_verify_is_a_bad_row(tmp_path):
    rows = [*ROWS, {"id": "d", "problem": "Why?", "answer": ""}]
    path = write_json_lines(tmp_path / "a.jsonl", rows)

    def check_golds(problems):
        assert problems == PROBLEMS  # rows that are bad already are not verified
        return ["", "mismatch", ""]

    with pytest.raises(DataError) as error:
        read(path, check_golds)
    assert str(error.value).splitlines()[:3] == [
        "config.data.train.maths: 2 bad of 4 rows:",
        f"  {path}:2: field 'answer' is '5'; it does not verify against itself: mismatch",
        f"  {path}:4: field 'answer' is ''; expected a string that is not empty, an integer, or a "
        "list of one such string",
    ]


def test_difficulty_filters_rows(tmp_path):
    rows = [row | {"meta": {"level": level}} for row, level in zip(ROWS, (1, 2.5, 5), strict=True)]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    problems, counts = read(path, difficulty={"column": "meta.level", "low": 2.0})
    assert problems == PROBLEMS[1:]
    assert counts == sources.Counts(rows=3, kept=2, difficulty=1, unsolved=1)
    assert len(read(path, difficulty={"column": "meta.level", "high": 2.5})[0]) == 2
    rows[1]["meta"]["level"] = "Level 5"
    write_json_lines(path, rows)
    with pytest.raises(DataError, match=r"2: field 'meta.level' is 'Level 5'; expected a number"):
        read(path, difficulty={"column": "meta.level", "low": 2.0})
    with pytest.raises(DataError, match="field 'level' is missing; expected a number"):
        read(path, difficulty={"column": "level"})


def test_pass_rates_filter_problems(tmp_path):
    """The records are those of an evaluation (one rollout per row) or a stage (one group)."""
    path = write_json_lines(tmp_path / "a.jsonl", ROWS)
    records = write_json_lines(
        tmp_path / "responses.jsonl",
        [
            {"problem": "maths/a", "correct": True, "response": "2"},
            {"problem": "maths/a", "correct": False},
            {"problem": "b", "correct": 4, "rollouts": 4, "source": "maths"},
            {"problem": "c", "correct": 4, "rollouts": 4, "source": "another"},
        ],
    )
    rates = {"path": str(records), "low": 0.1, "high": 0.9}
    problems, counts = read(path, pass_rates=rates)
    assert problems == [PROBLEMS[0], PROBLEMS[2]]  # solved in half of its rollouts; without a rate
    assert counts == sources.Counts(rows=3, kept=2, pass_rate=1, unrated=1)
    assert (
        str(counts) == "3 rows, 1 outside the bounds of pass_rates, 2 kept, 1 without a pass rate"
    )
    with records.open("a") as file:
        file.write('{"problem": "maths/c", "corr')  # as a killed run leaves it
    assert read(path, pass_rates=rates) == (problems, counts)
    for bad, reason in [
        ({"problem": "a"}, "responses.jsonl:2 has problem 'a', correct None and rollouts 1; exp"),
        ({"problem": "a", "correct": 3, "rollouts": 2}, "correct 3 and rollouts 2; expected"),
        ({"problem": "a", "correct": 0, "rollouts": 0}, "correct 0 and rollouts 0; expected"),
        ([], "responses.jsonl:2 is a JSON value of type list"),
    ]:
        write_json_lines(records, [{"problem": "a", "correct": True}, bad])
        with pytest.raises(DataError, match=f"data.train.maths.pass_rates: .*{reason}"):
            read(path, pass_rates=rates)


def test_pass_rates_of_other_problems_are_an_error(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", ROWS)
    lines = [{"problem": "tests/1", "correct": True}]
    for records, message in (
        (lines, "which has problem ids such as 'tests/1', but the problems of .*'maths/a'"),
        (
            [lines[0] | {"source": "tests"}],
            "which has no records of this source, but the problems of .*a.jsonl have ids such a",
        ),
    ):
        path_of_rates = write_json_lines(tmp_path / "responses.jsonl", records)
        with pytest.raises(DataError, match=f"pass_rates.path is '{path_of_rates}', {message}"):
            read(path, pass_rates={"path": str(path_of_rates)})
    with pytest.raises(DataError, match=r"pass_rates.path is 'absent'.*cannot be read"):
        read(path, pass_rates={"path": "absent"})


def test_questions_need_no_other_column(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"q": "What?"}, {"q": ""}])
    source = config_lib.source(str(path), columns={"question": "q"})
    with pytest.raises(DataError, match=r"data.exclude.x: 1 bad of 2 rows:\n  .*:2: field 'q' is"):
        sources.questions(source, "data.exclude.x")
    source.bad_rows = "drop"
    assert sources.questions(source, "data.exclude.x") == (
        ["What?"],
        sources.Counts(rows=2, kept=1, bad=1),
    )


def test_a_snapshot_s_shards_may_have_a_hash(tmp_path):
    """Files whose name starts with a dot are ignored."""
    for i in range(2):
        path = tmp_path / f"train-0000{i}-of-00002-a09b74b3ef9c3b5{i}.parquet"
        write_parquet(path, ROWS[2 * i : 2 * i + 2])
    write_json_lines(tmp_path / ".train.jsonl", ROWS)
    assert read(tmp_path)[0] == PROBLEMS
    write_json_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"several formats: train-00000.*, train.jsonl; expected"):
        read(tmp_path, split="train")


def test_a_row_has_its_location(tmp_path):
    folder = write_snapshot(tmp_path / "s", ROWS)
    locations = [row.location for row in files.rows(str(folder), "train")]
    first, second = (f"{folder}/data/train-0000{i}-of-00002.parquet" for i in range(2))
    assert locations == [f"{first}:1", f"{first}:2", f"{second}:1"]
