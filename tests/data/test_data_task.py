"""The task of problems from files: duplicates, mixtures, prompts, errors, and a whole run."""

import json
import logging
import pathlib
import re
import subprocess
import sys
import time
from collections import Counter

import grain
import jax
import pytest
import tiny_config
from paths import ROOT
from tiny_config import stage_options

from opsd_jax import config as config_lib
from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.data import arithmetic, load, text
from opsd_jax.data.contexts import Context
from opsd_jax.data.duplicates import normalise, without_duplicates
from opsd_jax.data.mixture import mixture
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.problem import DataError, Problem
from opsd_jax.run import assembly, checks, pipeline, workdir
from opsd_jax.stages import sft
from opsd_jax.training import metrics


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Find $x$.", "find x"),
        (r"$\left(\dfrac{1}{2},\, 3\right)$", r"\((\frac12, 3)\)"),
        (r"\tfrac 1 2 \quad x", r"$\frac{1}{2}x$"),
        ("10\\,000 or 10{,}000", "10000 or 10,000"),
        ("Costs \\$5, she\u2019s \u201clate\u201d \u2013 why?", 'costs $5, she\'s "late" - why'),
        (r"$x^{2} \leq 3 $" + "\u00d7 4", r"x^2 \le 3 \times 4"),
        (r"5\text{ cm}, \ldots, 9\mathrm{cm}", r"5 cm, ..., 9cm"),
        (r"\overline{r_1}", r"\overline{r}_1"),
        (r"\log_8 2", r"\log_82"),
        (r"\Bigl( a \Bigr)\!", "(a)"),
        (r"(1 \\ 2 \\[2pt] 3)", r"(1\\2\\[2pt]3)"),
        (r"a_{}^{}b^{ }", "ab"),
        (r"90^{\circ}, f^{\prime}(x), f^\prime", "90^\\circ, f'(x), f'"),
        (r"50\% of $\lvert x\rvert$, $\{x \mid x\}$", r"50% of |x|, \{x | x\}"),
        (r"x \lt 1 \gt y \geqslant 2 \leqslant 3", r"x < 1 > y \ge 2 \leq 3"),
        (r"\textbf{a} \textit{b} \emph{c}", "a b c"),
        ("x\u200b \u2011\xad1 \u22c5 \uff11\uff12", r"x - 1 \cdot 12"),
    ],
)
def test_two_ways_to_type_a_question_are_equal(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("2+3", "2-3"),
        ("2 3", "23"),
        ("x > 0", "x < 0"),
        ("x^{12}", "x^1 2"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("2.5", "25"),
        ("5!", "5"),
        ("2^{3+1}", "2^3+1"),
        ("8/(4/2)", "8/4/2"),
        (r"a \times b", r"a \div b"),
        ("f'(x)", "f(x)"),
        (r"\sin(-60^\circ)", r"\sin 60^\circ"),
        (r"1 \\ 2", r"1 \ 2"),
        (r"x^{\circ 2}", r"x^\circ 2"),
        ("x²", "x2"),
    ],
)
def test_questions_with_other_numbers_or_operators_differ(a, b):
    assert normalise(a) != normalise(b)


def test_normalise_takes_linear_time():
    """A search for the end of the text at every colon would take half a minute."""
    began = time.monotonic()
    normalise(": " * 100_000 + "x")
    assert time.monotonic() - began < 5


def test_without_duplicates_keeps_the_first_of_equal_questions():
    def problems(*questions):
        return [Problem(i, question, "", "1") for i, question in enumerate(questions)]

    kept, counts = without_duplicates(
        {"a": problems("x + 1", "$x+1$", "y", "z"), "b": problems("X+1", "w", "Y")},
        {"eval": ["z", "z."], "other": ["$ z $", "y"]},
    )
    assert [p.id for p in kept["a"]] == [0]
    assert [p.id for p in kept["b"]] == [1]
    assert counts == {"a": ({"other": 1, "eval": 1}, 1), "b": ({"other": 1}, 1)}


SOURCES = {name: [f"{name}{i}" for i in range(n)] for name, n in (("a", 40), ("b", 99), ("c", 7))}
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 0.5, "a name without elements": 9.0}


def test_every_epoch_of_a_source_has_its_own_order():
    data = mixture(SOURCES, WEIGHTS, seed=1)
    drawn = [data[i] for i in range(4545)]
    for name, elements in SOURCES.items():
        own = [element for element in drawn if element[0] == name]
        n = len(elements)
        epochs = [own[i : i + n] for i in range(0, len(own) - n + 1, n)]
        assert len(epochs) > 9
        assert all(sorted(epoch) == sorted(elements) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    fractions = {name: count / len(drawn) for name, count in Counter(e[0] for e in drawn).items()}
    assert fractions == pytest.approx({"a": 3 / 4.5, "b": 1 / 4.5, "c": 0.5 / 4.5}, abs=1e-3)
    other = mixture(SOURCES, WEIGHTS, seed=2)
    assert [other[i] for i in range(100)] != drawn[:100]


def test_a_mixture_s_length_includes_every_element():
    """The checks before a run rely on it."""
    for sources, weights in (
        (SOURCES, WEIGHTS),
        (SOURCES, {"a": 1.009, "b": 1.0, "c": 5.0}),
        ({"a": SOURCES["a"]}, {"a": 0.3}),
    ):
        data = mixture(sources, weights, seed=0)
        assert {data[i] for i in range(len(data))} == {e for part in sources.values() for e in part}
    assert len(data) == 80  # for forty elements


def test_an_element_is_a_function_of_seed_and_index(tmp_path):
    """A new process that reads no other element gets the same one."""
    data = mixture(SOURCES, WEIGHTS, seed=1)
    indices = [1000, 3, 10**9]
    backwards = [mixture(SOURCES, WEIGHTS, seed=1)[i] for i in reversed(indices)]
    assert [data[i] for i in range(1001)][1000] == data[1000]
    assert [data[i] for i in indices] == backwards[::-1]
    code = (
        "from opsd_jax.data.mixture import mixture\n"
        f"data = mixture({SOURCES!r}, {WEIGHTS!r}, seed=1)\n"
        f"print([data[i] for i in {indices!r}])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([data[i] for i in indices])


def test_grain_shuffles_each_epoch_differently(task):
    """A task without `stream` relies on it."""
    data = grain.MapDataset.source(list(range(20))).shuffle(seed=3).repeat()
    epochs = [[data[20 * e + i] for i in range(20)] for e in range(5)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert task.stream is None


def test_byte_tokenizer_decodes_what_it_encodes():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("π = {3}\n")
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([0, *ids, 1, 0, 258, 9999]) == "π = {3}\n"
    assert tokenizer.decode(ids[:1]) == "�"
    assert tokenizer.decode([2 + b for b in range(256)]).startswith("\0\1")


def test_fill_does_not_fill_placeholders_in_values():
    template = r"{question}|{context}|\boxed{}|{{context}}|{other}"
    filled = text.fill(template, question="{context} \\1", context="{question}")
    assert filled == r"{context} \1|{question}|\boxed{}|{{question}}|{other}"


TOKENIZER = "opsd_jax.data.tokenizer:ByteTokenizer"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(config, tmp_path, monkeypatch):
    """Three stages on a dozen small problems, on one device."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    rows = [
        {"id": i, "problem": f"{a} + {b}", "answer": a + b, "solution": rf"\boxed{{{a + b}}}"}
        for i, (a, b) in enumerate((a, b) for a in range(1, 8) for b in (1, 2))
    ]
    rows[5].pop("solution")
    with config.unlocked():
        config.task = "opsd_jax.data.text:task"
        config.data.train.sums = config_lib.source(write(tmp_path / "train.jsonl", rows))
        more = [{"problem": "9 + 9", "answer": "18"}, {"problem": "$1+1$", "answer": "2"}]
        config.data.train.more = config_lib.source(write(tmp_path / "more.jsonl", more), weight=0.5)
        config.data.heldout.tests = config_lib.source(write(tmp_path / "h.jsonl", rows[-2:]))
        config.data.exclude.others = config_lib.source(
            write(tmp_path / "x.jsonl", [{"problem": "$2+1$"}])
        )
        config.data.prompt = "{question} = "
        config.data.teacher_prompt = "{question} ({context}) = "
        config.data.contexts.solution = "{context}"
        config.model.vocab_size = 258
        config.mesh = (1, 1, 1)
        config.sft.update({"steps": 2, "batch_size": 4, "buckets": (24,)})
        config.sft.optimizer.warmup = 0
        for stage in (config.rlvr, config.opsd):
            stage.update({"steps": 1, "prompts": 4, "slots": 8, "response_tokens": 12})
            stage.update({"prompt_tokens": 8, "buckets": (24,)})
        config.opsd.update({"teacher_prompt_tokens": 20, "teacher_buckets": ()})
        config.evaluation.update({"problems": 2, "slots": 4, "samples": 2})
        config.evaluation.update({"prompt_tokens": 8, "response_tokens": 12})
    return config.lock()


@pytest.fixture
def logged(caplog):
    """Returns a function that returns the messages that the package has logged so far."""
    caplog.set_level(logging.INFO, "opsd_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def loaded(config):
    """Returns the data of a config."""
    return load.load(parse_run(config).data)


def task_of(config):
    """Returns the task of a config."""
    return text.task(parse_run(config).data)


def assemble(config, workdir):
    """Builds a run, with all checks of a config and its data."""
    options = parse_run(config)
    options.data.check_sources("data")
    return assembly.assemble(options, workdir)


def test_load_counts_the_rows_that_it_leaves_out(config, logged):
    data = loaded(config)
    assert {name: tuple(counts[:2]) for name, counts in data.counts.items()} == {
        "more": (2, 2), "sums": (14, 10), "tests": (2, 2), "others": (1, 1),
    }  # fmt: skip
    assert data.counts["sums"].overlap == {"tests": 2, "others": 1}
    assert (
        data.counts["sums"].repeated == 1
    )  # "$1+1$": sources are processed in the order of their names
    assert [p.id for p in data.train["sums"]] == [f"sums/{i}" for i in (1, *range(3, 12))]
    assert [p.id for p in data.heldout["tests"]] == ["tests/12", "tests/13"]
    counts = "14 rows, 1 also in others, 2 also in tests, 1 repeated, 10 kept, 1 without a solution"
    assert logged() == [
        "data: heldout.tests: 2 rows, 2 kept",
        "data: exclude.others: 1 rows, 1 kept",
        "data: train.more: 2 rows, 2 kept, 2 without a solution",
        f"data: train.sums: {counts}",
    ]


def test_without_a_heldout_source_training_problems_are_held_out(config, logged):
    """The choice depends on the questions, not on the order of the rows."""
    with config.unlocked():
        config.data.heldout = {}
        config.data.heldout_problems = 4
    data = loaded(config)
    held = {p.question for part in data.heldout.values() for p in part}
    trained = {p.question for part in data.train.values() for p in part}
    assert len(held) == 4
    assert not held & trained
    assert len(trained) == 10
    assert logged()[-1] == "data: held out of these: 4 of sums"
    path = pathlib.Path(config.data.train.sums.path)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    again = loaded(config)
    assert {p.question for part in again.heldout.values() for p in part} == held
    assert task_of(config).verify(data.heldout["sums"][0], "?").reason == "no answer"
    config.data.heldout_problems = 14
    with pytest.raises(DataError, match="heldout_problems is 14; expected fewer than the 14 probl"):
        loaded(config)


def test_a_task_from_files(config):
    task = task_of(config)
    decode = task.tokenizer.decode
    assert [task.train[i].source for i in range(len(task.train))] == ["more"] * 2 + ["sums"] * 10
    problem = next(task.train[i] for i in range(12) if task.train[i].id == "sums/5")
    assert decode(task.prompt(problem)) == "3 + 2 = "
    assert decode(task.teacher_prompt(problem, Context("solution", "5"), 20)[0]) == "3 + 2 (5) = "
    assert task.teacher_prompt(problem, Context("none", ""), 8) == (task.prompt(problem), False)
    assert task.verify(problem, r"So \boxed{5}").correct
    assert not task.verify(problem, r"So \boxed{6}").correct
    stream = task.stream(0)
    assert {stream[i].id for i in range(99)} == {task.train[i].id for i in range(12)}
    shown = task.demonstrations(0)
    texts = {decode(shown[i].prompt) + decode(shown[i].response) for i in range(len(shown))}
    assert len(texts) == 9  # one of ten sums has no solution, and `more` has none
    assert r"1 + 2 = \boxed{3}" in texts
    assert all(shown[i].response[-1] == task.tokenizer.eos_ids[0] for i in range(len(shown)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.prompt", "Hm?", "data.prompt is 'Hm.'; expected a text that contains {q"),
        (
            "data.prompt",
            "{question} {answer}",
            "expected no placeholder except {question}, because opsd_jax does not fill in {answer}",
        ),
        (
            "data.teacher_prompt",
            "{context}",
            "is '{context}'; expected a text that contains {question}",
        ),
        (
            "data.teacher_prompt",
            "{question}",
            "is '{question}'; expected a text that contains {context}",
        ),
        ("data.contexts.answer", "Hm", "data.contexts.answer is 'Hm'; expected a text that"),
        (
            "data.memo.correct",
            "{question}",
            "no placeholder except {answer} and {solution}, because",
        ),
        ("data.chat_template", "absent", "data.chat_template is 'absent'; expected '' for the to"),
        ("data.tokenizer", "absent", "there is no absent/tokenizer.json; expected a Hugging Face"),
        (
            "data.tokenizer",
            "nothing:of",
            "config.data.tokenizer: 'nothing:of' cannot be imported",
        ),
        (
            "data.train.sums.path",
            "absent.jsonl",
            "config.data.train.sums.path is 'absent.jsonl'; t",
        ),
        ("data.train.sums.split", "dev", "config.data.train.sums.split is 'dev'; expected one of "),
        ("data.train.sums.columns.answer", "gold", "14 bad of 14 rows:\n.*field 'gold' is missing"),
        (
            "data.train.sums.verifier.kind",
            "nosuch",
            "config.data.train.sums.verifier: kind is 'nos",
        ),
        ("data.train.sums.columns.solution", "", "SFT trains on worked solutions, but no"),
        ("rlvr.prompt_tokens", "7", "prompt_tokens is 7; expected at least 8, the number of tok"),
        (
            "opsd.teacher_prompt_tokens",
            "10",
            "tokens even without the privileged context; expected at most 10",
        ),
        ("sft.buckets", "(16,)", "17, the number of tokens in the demonstration for '. . . ="),
        ("model.vocab_size", "257", "model.vocab_size is 257; expected at least 258"),
    ],
)
def test_a_config_that_does_not_fit_its_data_fails_before_compiling(
    config, tmp_path, field, value, message
):
    loading.override(config, field, value)
    message = message.replace("(", r"\(").replace("{", r"\{")
    with pytest.raises((config_lib.ConfigError, DataError), match=f"(?s){message}"):
        assemble(config, tmp_path)


def test_only_the_longest_of_many_problems_are_checked(config, tmp_path, monkeypatch, logged):
    rows = [{"problem": f"{i} + 0", "answer": f"{i}", "solution": f"{i}"} for i in range(10, 60)]
    rows[1]["problem"] = "11 + 0 + 0"
    rows[2]["solution"] = "a rather long solution"
    for name in ("WHOLE", "LONGEST", "FIRST"):
        monkeypatch.setattr(checks, name, 1)
    with config.unlocked():
        config.data.train = {"sums": config_lib.source(write(tmp_path / "many.jsonl", rows))}
    message = (
        "rlvr.prompt_tokens is 8; expected at least 13, the number of tokens in problem sums/2"
    )
    with pytest.raises(config_lib.ConfigError, match=message):
        assemble(config, tmp_path)
    config.rlvr.prompt_tokens = config.opsd.prompt_tokens = 13
    assemble(config, tmp_path)
    cut = (
        "opsd: of 3 problems checked, 3 have a context of kind 'solution', and 1 of these contexts"
    )
    assert any(message.startswith(cut) for message in logged())


def test_a_demonstration_that_is_too_long_is_named(config, tmp_path):
    task = assemble(config, tmp_path).task
    stage = sft.stage(stage_options(config.sft, buckets=(16,)), task, None, seed=0)
    with pytest.raises(DataError, match=r"for '. . . = ' has 18 tokens; expected at most 17, one"):
        stage.batches(0, None)


def test_a_task_needs_data(config, tmp_path):
    empty = tiny_config.quickstart()
    with pytest.raises(DataError, match=r"config.data.heldout is empty; expected sources"):
        task_of(empty)
    empty.data.heldout = config.data.heldout
    assert len(task_of(empty).train) == 0  # enough for an evaluation
    untaught = config.copy_and_resolve_references()
    with untaught.unlocked():
        untaught.data.train = {}
    with pytest.raises(config_lib.ConfigError, match=r"config.data.train is empty; expected sour"):
        assemble(untaught, pathlib.Path())
    empty.data.train.copy = config.data.heldout.tests
    with pytest.raises(
        DataError, match=r"train.copy: no problems are left .2 rows, 2 also in tests"
    ):
        task_of(empty)
    with pytest.raises(ValueError, match=r"reads no files, but config.data has sources"):
        arithmetic.task(parse_run(config).data)
    loading.override(config, "task", "opsd_jax.data.arithmetic:task")
    with pytest.raises(
        config_lib.ConfigError, match=r"config.task is '.*arithmetic:task': the arith"
    ):
        assemble(config, tmp_path)


def test_infinite_bounds_are_saved_as_strict_json(tmp_path):
    config = tiny_config.quickstart()
    config.data.train.a = config_lib.source("a")
    config.lock()
    loading.override(config, "data.train.a.difficulty.high", "inf")
    assert config.data.train.a.difficulty.high == float("inf")
    text = loading.to_json(parse_run(config))
    assert "Infinity" not in text
    saved = parse_run(loading.from_flat(json.loads(text)))
    loading.check_same(config, saved, tmp_path)
    assert saved.data.train["a"].difficulty.high > 1e308


def test_the_config_in_the_documentation_loads(tmp_path, monkeypatch):
    """It fails only because its files do not exist. The page describes every field of a source."""
    page = (ROOT / "docs" / "data.md").read_text()
    path = tmp_path / "maths.py"
    path.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    overrides = {"data.train.maths.weight": "3", "data.tokenizer": TOKENIZER}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    config = loading.load(path, overrides)
    assert config.data.train["maths"].weight == 3.0
    assert main.main(["train", "--config", str(path), "--workdir", "run"]) == 2
    with pytest.raises(DataError, match=r"math500.path is 'data/math500.jsonl'; there is no such"):
        text.task(config.data)
    table = set(re.findall(r"`([a-z_.]+)`", page))
    for field in loading.flatten(config_lib.source()):
        parts = field.split(".")
        assert field in table or parts[0] in table or f".{parts[-1]}" in table


def test_a_run_resumes_only_with_the_data_that_it_began_with(config, tmp_path):
    check = lambda: workdir.check_data(task_of(config), tmp_path)
    check()
    check()
    path = pathlib.Path(config.data.train.more.path)
    path.write_text(path.read_text().replace('"18"', '"19"'))
    message = (
        r"(?s)holds a run with different data\. .*"
        r"  config.data.train.more: 2 problems, \w+ there, 2 problems, \w+ now"
    )
    with pytest.raises(config_lib.ConfigError, match=message) as error:
        check()
    assert "train.sums" not in str(error.value)
    with config.unlocked():
        del config.data.train.more
    with pytest.raises(config_lib.ConfigError, match=r"more: 2 problems, \w+ there, absent now"):
        check()


def test_a_run_on_files(config, tmp_path):
    """It runs SFT, RLVR, OPSD and the report, and saves its config."""
    workdir = tmp_path / "run"
    pipeline.run(parse_run(config), workdir)
    assert main.main(["report", "--workdir", str(workdir)]) == 0
    report = json.loads((workdir / "report" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["sft", "rlvr", "opsd"]
    assert [len(metrics.read(workdir / name)) for name in ("sft", "rlvr", "opsd")] == [2, 1, 1]
    records = (workdir / "opsd" / "responses.jsonl").read_text().splitlines()
    assert {json.loads(line)["problem"] for line in records} == {"tests/12", "tests/13"}
    saved = json.loads((workdir / "config.json").read_text())
    assert loading.flatten(loading.from_flat(saved)) == loading.flatten(config)


def test_a_run_does_not_resume_with_another_tokenizer(config, tmp_path):
    task = task_of(config)
    workdir.check_data(task, tmp_path)
    other = task._replace(prompt=lambda problem: [id + 1 for id in task.prompt(problem)])
    message = (
        r"(?s)holds a run with different data\. .*"
        r"  config.data.prompts: the first 8 of each source as tokens, \w+ there"
    )
    with pytest.raises(config_lib.ConfigError, match=message):
        workdir.check_data(other, tmp_path)
