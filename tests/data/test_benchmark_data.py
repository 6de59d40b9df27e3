"""Loading the datasets that our training and evaluation use.

They are in shared/data/benchmarks next to the checkout. Without them, the tests are skipped.
"""

import json

import pytest
import tiny_config
from paths import SHARED

from opsd_jax import config as config_lib
from opsd_jax.data import load, sources
from opsd_jax.data.duplicates import without_duplicates
from opsd_jax.problem import DataError

FOLDER = SHARED / "benchmarks"
EVALUATION = ("aime24", "aime25", "gsm8k_test", "math500")
TRAINING = ("gsm8k_train", "train_aime_1983_2023", "train_math_deepscaler")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there is no {FOLDER}")


def source(name, **changes):
    return config_lib.source(str(FOLDER / f"{name}.jsonl"), **changes)


@pytest.fixture(scope="module")
def data():
    """All datasets, with each answer verified against itself."""
    config = tiny_config.quickstart().data
    for name in EVALUATION:
        config.heldout[name] = source(name)
    for name in TRAINING:
        config.train[name] = source(name)
    config.train.train_math_deepscaler.bad_rows = "drop"
    return load.load(config)


def test_the_rows_that_cannot_be_used_are_listed():
    with pytest.raises(DataError) as error:
        sources.problems("maths", source(TRAINING[2]), "data.train.maths", lambda p: [""] * len(p))
    lines = str(error.value).splitlines()
    assert lines[0] == "config.data.train.maths: 2 bad of 7474 rows:"
    for line, number in zip(
        lines[1:3], (5329, 5331), strict=True
    ):  # the original has no right choice
        assert f"{TRAINING[2]}.jsonl:{number}: field 'answer' is ''; expected a string" in line


def test_the_rows_of_each_source_are_counted(data):
    assert data.counts == {
        "aime24": sources.Counts(rows=30, kept=30),
        "aime25": sources.Counts(rows=30, kept=30, unsolved=30),
        "gsm8k_test": sources.Counts(rows=1319, kept=1319),
        "math500": sources.Counts(rows=500, kept=500),
        "gsm8k_train": sources.Counts(rows=7473, kept=7473),
        "train_aime_1983_2023": sources.Counts(rows=975, kept=968, overlap={"math500": 7}),
        # Two answers are empty and two are 'None'. 5 problems occur twice; 355 are also in the AIME
        # source above.
        "train_math_deepscaler": sources.Counts(
            rows=7474, kept=7110, bad=4, repeated=360, unsolved=7110
        ),
    }


def test_training_problems_that_are_in_math500_are_left_out(data):
    """The file marks six. One more differs only in its dots: \\cdots or \\dots."""
    lines = (FOLDER / "train_aime_1983_2023.jsonl").read_text().splitlines()
    rows = {f"train_aime_1983_2023/{row['id']}": row for row in map(json.loads, lines)}
    flagged = {key for key, row in rows.items() if row.get("in_math500")}
    left_out = rows.keys() - {problem.id for problem in data.train["train_aime_1983_2023"]}
    assert len(flagged) == 6
    assert left_out == flagged | {"train_aime_1983_2023/aime-train-744"}


def test_ids_are_unique_over_all_sources(data):
    ids = [p.id for part in (data.train, data.heldout) for ps in part.values() for p in ps]
    assert len(set(ids)) == len(ids) == 30 + 30 + 1319 + 500 + 7473 + 968 + 7110


def test_problems_that_differ_only_in_a_sign_are_kept(data):
    """These pairs have equal letters and digits but different answers: k > 0 and k < 0."""
    kept = {problem.id.rsplit("-", 1)[1] for problem in data.train["train_math_deepscaler"]}
    for pair in ((142, 167), (2608, 3190), (3409, 3865), (6405, 6477), (7028, 7138)):
        assert kept.issuperset(map(str, pair))


def test_repeated_problems_of_one_file_are_counted():
    """Here the file is the only source."""
    options = source("train_math_deepscaler", bad_rows="drop")
    problems, _ = sources.problems("maths", options, "", lambda p: [""] * len(p))
    _, counts = without_duplicates({"maths": problems}, {})
    assert counts == {"maths": ({}, 5)}
