"""The command `evaluate`: benchmarks, resuming, comparing, and the errors of bad arguments."""

import json
import os
import pathlib
import re
import signal

import hf_files
import huggingface_hub
import numpy as np
import pytest
import tiny_config
import tiny_tokenizer
from paths import SHARED

from opsd_jax import config as config_lib
from opsd_jax.cli import evaluate, main
from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.data import sources
from opsd_jax.evaluation import benchmarks
from opsd_jax.evaluation import records as records_lib
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.problem import DataError
from opsd_jax.rollout.collect import Collector, Rollouts
from opsd_jax.run import pipeline
from opsd_jax.training.signals import StopSignal
from opsd_jax.verify.verdict import Verdict
from opsd_jax.verify.verifiers import at_once

BENCHMARKS = SHARED / "benchmarks"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = [{"id": i, "problem": f"{i}+{i}?", "answer": str(2 * i)} for i in range(9)]
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)


@pytest.fixture(scope="module")
def workdir(shared_config, questions, tmp_path_factory):
    """The directory of a run that has trained nothing. Its file of training data does not exist."""
    workdir = tmp_path_factory.mktemp("runs") / "text"
    workdir.mkdir()
    run = shared_config.copy_and_resolve_references()
    run.unlock()
    run.task = "opsd_jax.data.text:task"
    run.mesh = (1, 1, -1)
    run.model.vocab_size, run.model.num_heads, run.model.num_kv_heads = 264, 8, 8
    run.data.train = {"gone": config_lib.source("gone.jsonl")}
    run.data.heldout = {"sums": config_lib.source(questions)}
    run.data.prompt = "{question}"
    # Some responses end early and others fill the budget, so problems do not finish in order.
    run.evaluation.update({"problems": 0, "slots": 6, "response_tokens": 160})
    (workdir / "config.json").write_text(loading.to_json(run.lock()))
    return workdir


@pytest.fixture
def command(workdir, capsys):
    """Runs `evaluate` on the run; returns the exit code, and the printed JSON or the errors."""

    def run(*arguments):
        code = main.main(["evaluate", "--workdir", str(workdir), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if code == 0 else printed.err

    return run


FEW = ("--samples", 2, "--response-tokens", 6, "--prompt-tokens", 16)


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    """The directory of an evaluation that was not interrupted."""
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    arguments = ["evaluate", "--workdir", str(workdir), "--out", str(out)]
    assert main.main(arguments) == 0
    return out


def test_the_statistics_come_with_their_settings(whole, command):
    statistics = json.loads((whole / "evaluation.json").read_text())
    settings = statistics["settings"]
    names = ("problems", "samples", "temperature", "top_p", "top_k", "min_p")
    assert {k: settings[k] for k in names} == {
        "problems": 9, "samples": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    }  # fmt: skip
    assert settings["model"].endswith("text/untrained")
    assert (settings["response_tokens"], settings["seed"]) == (160, 0)
    records = [json.loads(line) for line in (whole / "responses.jsonl").open()]
    assert [(r["problem"], r["sample"]) for r in records] == [
        (f"sums/{i}", j) for i in range(9) for j in range(2)
    ]
    assert {r["truncated"] for r in records} == {True, False}
    assert {r["source"] for r in records} == {"sums"}
    assert all("extracted" in r for r in records)
    for name in ("report.md", "index.html"):
        text = (whole / name).read_text()
        assert "maj@2, %" in text
        assert "up to 160 tokens (seed 0)" in text
    assert (whole / "lengths_sums.svg").exists()
    page = (whole / "index.html").read_text()
    assert page.count("<svg") == 2


class Crash(BaseException):
    """An exception that the library does not catch."""


def problem_of(made):
    """Returns the problem of the records that one write contains."""
    (problem,) = {record["problem"] for record in made}
    assert [record["sample"] for record in made] == [0, 1]
    return problem


def assert_same(directory, expected, names):
    for name in names:
        assert (directory / name).read_text() == (expected / name).read_text(), name


FILES = ("settings.json", "responses.jsonl", "evaluation.json", "report.md", "index.html")


@pytest.mark.parametrize("done", [1, 3, 8])
def test_after_a_kill_it_resumes_to_the_same_files(whole, command, tmp_path, monkeypatch, done):
    """The process is killed while it writes the records of a problem. The resumed evaluation drops
    the incomplete line. It keeps the complete problems, in the order in which they finished.
    """
    append, written = records_lib.append, []

    def append_or_crash(file, made):
        if len(written) == done:
            torn = records_lib.to_lines(made)
            file.write(torn[: torn.index("\n") + 20])
            raise Crash
        written.append(problem_of(made))
        append(file, made)

    monkeypatch.setattr(records_lib, "append", append_or_crash)
    with pytest.raises(Crash):
        command("--out", tmp_path)
    assert len(written) == done
    monkeypatch.setattr(
        records_lib, "append", lambda *a: (written.append(problem_of(a[1])), append(*a))
    )
    assert command("--out", tmp_path)[0] == 0
    assert sorted(written) == [f"sums/{i}" for i in range(9)]
    assert written != sorted(written)
    assert_same(tmp_path, whole, FILES)


def test_after_a_kill_before_sorting_nothing_is_sampled(whole, command, tmp_path, monkeypatch):
    """The records are complete, but in the order in which the problems finished."""

    def crash(file, responses):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(records_lib, "rewrite", crash)
        with pytest.raises(Crash):
            command("--out", tmp_path)
    there, expected = ((d / "responses.jsonl").read_text() for d in (tmp_path, whole))
    assert sorted(there.splitlines()) == sorted(expected.splitlines())
    assert there != expected
    monkeypatch.setattr(records_lib, "append", None)
    assert command("--out", tmp_path)[0] == 0
    assert_same(tmp_path, whole, FILES)


def test_an_evaluation_within_a_run_resumes_too(config, tmp_path, monkeypatch):
    run = config.copy_and_resolve_references()
    with run.unlocked():
        run.stages = ()
        run.evaluation.problems = 20  # eight of them are sampled at the same time
    pipeline.run(parse_run(run), tmp_path / "whole")
    append, written = records_lib.append, []

    def append_or_crash(file, made):
        append(file, made)
        written.append(problem_of(made))
        if len(written) == 7:
            raise Crash

    monkeypatch.setattr(records_lib, "append", append_or_crash)
    with pytest.raises(Crash):
        pipeline.run(parse_run(run), tmp_path / "killed")
    before = sorted(written)
    pipeline.run(parse_run(run), tmp_path / "killed")
    whole, killed = (tmp_path / name / "untrained" for name in ("whole", "killed"))
    records = [json.loads(line) for line in (whole / "responses.jsonl").open()]
    in_order = [record["problem"] for record in records[::2]]
    assert len({*in_order}) == len(written) == 20
    assert {*written} == {*in_order}
    assert written != in_order
    assert before != sorted(in_order[:7])  # the remaining problems have gaps between them
    assert_same(killed, whole, ("responses.jsonl", "settings.json"))
    times = {"seconds", "peak_rss_gib", "sha256"}  # digests of the times too
    statistics = [json.loads((d / "evaluation.json").read_text()) for d in (whole, killed)]
    a, b = ({k: v for k, v in f.items() if k not in times} for f in statistics)
    assert a == b
    assert a["majority"] is not None


def test_a_signal_stops_it_before_the_next_chunk(whole, command, tmp_path, monkeypatch):
    append, check, written, checks = records_lib.append, StopSignal.check, [], []

    def signalled(file, made):
        append(file, made)
        written.append(problem_of(made))
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def counted_check(stop):
        checks.append(len(written))
        check(stop)

    monkeypatch.setattr(records_lib, "append", signalled)
    monkeypatch.setattr(StopSignal, "check", counted_check)
    code, errors = command("--out", tmp_path)
    assert code == 143
    assert "run the same command again to resume" in errors
    assert [*map(bool, checks)].count(True) == 1  # the first check after the signal is the last one
    assert 1 <= len(written) < 9
    lines = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem"] for line in lines[::2]] == written
    assert len(lines) == 2 * len(written)
    monkeypatch.undo()
    assert command("--out", tmp_path)[0] == 0
    assert_same(tmp_path, whole, FILES)


def test_a_signal_loses_no_problem_that_was_sampled(whole, command, tmp_path, monkeypatch):
    """The evaluation waits for the late verdicts of sampled problems before it stops."""
    by_problem, sampled = Collector.by_problem, []

    def watched(*args, **kwargs):
        for number, rollouts in by_problem(*args, **kwargs):
            sampled.append(rollouts.problems[0].id)
            if len(sampled) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield number, rollouts

    monkeypatch.setattr(Collector, "by_problem", watched)
    monkeypatch.setattr(Rollouts, "are_judged", False)
    assert command("--out", tmp_path)[0] == 143
    lines = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem"] for line in lines[::2]] == sampled
    assert 2 <= len(sampled) < 9
    monkeypatch.undo()
    assert command("--out", tmp_path)[0] == 0
    assert_same(tmp_path, whole, FILES)


def test_earlier_settings_without_min_p_mean_zero():
    assert not records_lib.differences({"top_k": 1}, {"top_k": 1, "min_p": 0.0})
    assert records_lib.differences({}, {"min_p": 0.1}) == [("min_p", 0.0, 0.1)]


@pytest.mark.parametrize(
    "sizes", [("--slots", 2), ("--slots", 18), ("--mesh", "2,2,2", "--slots", 8)]
)
def test_neither_slots_nor_mesh_change_a_response(whole, command, tmp_path, sizes):
    assert command("--out", tmp_path, *sizes)[0] == 0
    assert_same(tmp_path, whole, FILES)


def test_a_run_of_a_pod_is_evaluated_on_the_given_mesh(whole, workdir, tmp_path, capsys):
    pod = {"mesh": [1, 16, 1], "decode_mesh": [8, 1, 2]}
    there = json.loads((workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(there | pod))
    command = ["evaluate", "--workdir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main.main(command) == 2
    assert "config.mesh: mesh (1, 16, 1) over" in capsys.readouterr().err
    assert main.main([*command, "--mesh", "1,1,8"]) == 0
    assert_same(tmp_path / "out", whole, ("responses.jsonl",))


def test_an_evaluation_of_unknown_settings_is_left_alone(command, tmp_path):
    for name in ("evaluation.json", "responses.jsonl"):
        (tmp_path / name).write_text("{}\n")
    code, errors = command("--out", tmp_path)
    assert code == 2
    assert "holds an evaluation without its settings.json, so it cannot be resumed" in errors
    assert (tmp_path / "responses.jsonl").read_text() == "{}\n"


def test_an_extraction_that_raises_loses_only_its_answer(task):
    def fail(problem, response):
        raise ValueError(response)

    own = task._replace(verify=at_once(task.verify.prepare, fail))
    rollouts = Rollouts(
        problems=[task.heldout[0]],
        responses=[np.array([5, 2], np.int32)],
        sampling_logprobs=[],
        model_logprobs=[],
        truncated=np.array([False]),
        replies=[Verdict(False, "mismatch")],
    )
    (record,) = records_lib.records(rollouts, own, 1)
    assert record["extracted"] is None
    assert record["verdict"] == "mismatch"


def test_a_finished_evaluation_is_not_repeated(whole, command, monkeypatch):
    monkeypatch.setattr(records_lib, "append", None)
    code, statistics = command("--out", whole)
    assert code == 0
    assert statistics["directory"] == str(whole)


def test_other_settings_are_refused(whole, command):
    code, errors = command("--out", whole, "--temperature", 0.5, "--samples", 4)
    assert code == 2
    assert "holds an evaluation with different settings:" in errors
    expected = (
        "  samples: 2 in the directory, 4 now\n  temperature: 1.0 in the directory, 0.5 now\n"
    )
    assert expected in errors


def test_other_weights_are_refused_but_another_path_is_not(tmp_path):
    """A model is identified by the contents of its files, not by its path."""
    for name, content in {"a": b"x" * 10**6, "b": b"x" * 10**6, "c": b"x" * 10**6}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    with (tmp_path / "c" / "model.safetensors").open("r+b") as file:
        file.seek(5 * 10**5)
        file.write(b"y" * 10)
    a, b, c = (records_lib.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    out, there = tmp_path / "out", {"model": "a", "weights": a}
    records_lib.check_settings(out, there)
    records_lib.check_settings(out, {"model": "b", "weights": b})
    with pytest.raises(config_lib.ConfigError, match=f"weights: '{a}' in the directory, '{c}' now"):
        records_lib.check_settings(out, {"model": "a", "weights": c})


def test_a_mesh_may_begin_with_a_minus():
    arguments, _ = main.split_overrides(["evaluate", "--model", "m", "--mesh", "-1,1,1"])
    assert main.parser().parse_args(arguments).mesh == (-1, 1, 1)


def test_an_evaluation_is_compared_with_an_earlier_one(whole, command, workdir):
    code, statistics = command(*FEW[:2], "--top-k", 5, "--min-p", 0.1, "--compare", whole)
    assert code == 0
    directory = pathlib.Path(statistics["directory"])
    assert directory.parent == workdir / "evaluations" / "untrained"
    assert directory.name.startswith("sums-")
    change = json.loads((directory / "comparison.json").read_text())
    assert change == statistics["comparison"]
    assert change["settings"] == [["top_k", 0, 5], ["min_p", 0.0, 0.1]]
    records = (records_lib.read(side)[0] for side in (whole, directory))
    lengths = [sum(r["length"] for r in side) for side in records]
    assert change["d_length_percent"] == pytest.approx(100 * (lengths[1] / lengths[0] - 1))
    assert change["d_length_percent_low"] <= change["d_length_percent"]
    text = (directory / "report.md").read_text()
    assert "have different settings: top_k 0 and 5, min_p 0.0 and 0.1." in text
    assert "sampled at temperature 1, top_k 5, min_p 0.1, of up to 160 tokens" in text
    assert "| change | accuracy, points | length, % |" in text
    assert "before and after" in (directory / "index.html").read_text()


def test_a_comparison_with_other_problems_is_refused_before_anything_is_sampled(
    whole, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(records_lib, "append", None)
    code, errors = command("--problems", 5, "--compare", whole)
    assert code == 2
    assert "it has 9 problems, the new evaluation has 5, and 5 are in both" in errors
    code, errors = command("--compare", tmp_path)
    assert code == 2
    assert "holds no finished evaluation: evaluation.json is missing" in errors


def test_benchmarks_replace_the_held_out_problems(command, questions, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", [{"problem": "1?", "answer": "1"}])
    arguments = ("--benchmark", f"b={questions}", "--benchmark", f"a={more}", *FEW)
    code, statistics = command(*arguments, "--problems", 2)
    assert code == 0
    assert {k: v["problems"] for k, v in statistics["sources"].items()} == {"a": 1, "b": 2}
    settings = statistics["settings"]
    assert [settings[k] for k in ("temperature", "top_p", "top_k", "min_p")] == [0.6, 0.95, 20, 0]
    assert "a+b-" in statistics["directory"]
    text = (pathlib.Path(statistics["directory"]) / "report.md").read_text()
    assert text.count("\n| all |") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "mmlu"], "expected NAME=PATH, or one of math500, aime24, aime25, gsm8k"),
        (["--benchmark", "a=none.jsonl"], "config.data.heldout.a.path is 'none.jsonl'"),
        (["--top-p", "0"], r"config.evaluation.top_p is 0.0; expected a number in \(0, 1\]"),
        (["--top-k", "-1"], "config.evaluation.top_k is -1; expected at least 0"),
        (["--min-p", "1.5"], r"config.evaluation.min_p is 1.5; expected a number in \[0, 1\]"),
        (["--slots", "0"], "config.evaluation.slots is 0; expected at least 1"),
        (
            ["--mesh", "8,1,1"],
            "config.evaluation.slots is 6; expected a multiple of 8, the product",
        ),
        (
            ["--problems", "1"],
            "config.evaluation.problems is 1; expected 0 for all problems, or at least 2",
        ),
        (["--problems", "10"], "config.evaluation.problems is 10; expected at most 9"),
        (["--stage", "dpo"], "--stage is 'dpo'; expected one of untrained, sft, rlvr, opsd"),
        (["--stage", "rlvr"], "the stage 'rlvr' has not finished"),
        (["--mesh", "3,1,1"], r"mesh \(3, 1, 1\) over .* needs 3 devices"),
        (["--problems", "-2"], "--problems is -2; expected a positive number, or 0 for all"),
    ],
)
def test_invalid_arguments_are_refused(command, arguments, message):
    code, errors = command(*arguments)
    assert code == 2
    assert re.search(message, errors), errors


def test_kernels_of_a_tpu_run_become_auto(tmp_path):
    config = tiny_config.quickstart()
    config.model.update({"cache": "paged", "attention": "splash"})
    (tmp_path / "config.json").write_text(loading.to_json(config))
    arguments = main.parser().parse_args(["evaluate", "--workdir", str(tmp_path)])
    _, evaluated = evaluate.config_of(arguments)
    assert (evaluated.model.cache, evaluated.model.attention) == ("auto", "auto")


@pytest.mark.parametrize("saved", ["int8", None])
def test_an_evaluation_samples_from_the_exact_model(workdir, tmp_path, saved):
    """Whatever the run's rollouts are, and if the run is older than the option."""
    config = json.loads((workdir / "config.json").read_text())
    for part in ("weights", "cache"):
        field = f"rollout_quantisation.{part}"
        config = {name: value for name, value in config.items() if name != field}
        config |= {field: saved} if saved else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = main.parser().parse_args(["evaluate", "--workdir", str(tmp_path)])
    _, evaluated = evaluate.config_of(arguments)
    assert evaluated.rollout_quantisation == QuantisationOptions()


def test_a_model_needs_benchmarks_and_a_directory(capsys, tmp_path):
    assert main.main(["evaluate", "--model", str(tmp_path)]) == 2
    assert "expected --benchmark and --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["evaluate", "--stage", "rlvr"])


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A small random Qwen2 with a tokenizer and a chat template that supports thinking."""
    config = hf_files.CONFIG | {"vocab_size": 500}
    path = tmp_path_factory.mktemp("models") / "tiny"
    hf_files.write(path, hf_files.tensors_of(config), config)
    return tiny_tokenizer.write(path, "qwen3")


def test_a_hugging_face_model(model_directory, questions, tmp_path, capsys):
    """The first evaluation has the paper's settings. The second one is without thinking and is
    compared with the first.
    """

    def run(out, *arguments):
        command = ["evaluate", "--model", model_directory, "--benchmark", f"sums={questions}"]
        code = main.main([*map(str, (*command, "--out", out, *arguments))])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out), printed.err

    few = ("--response-tokens", 5, "--prompt-tokens", 120)
    statistics, _ = run(tmp_path / "a", *few)
    settings = statistics["settings"]
    assert settings["model"] == str(model_directory)
    assert (settings["samples"], settings["temperature"], settings["top_k"]) == (8, 0.6, 20)
    assert (statistics["name"], statistics["problems"], statistics["responses"]) == ("tiny", 9, 72)
    again, errors = run(tmp_path / "b", *few, "--thinking", "off", "--compare", tmp_path / "a")
    assert again["settings"]["prompts_digest"] != settings["prompts_digest"]
    assert "have different settings: thinking '' and 'off', prompts_digest" in errors


def test_a_failed_download_suggests_a_path(monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(config_lib.ConfigError, match=r"OSError: no route.*--benchmark aime24=PATH"):
        benchmarks.source("aime24")


@pytest.mark.parametrize("spelling", ["math-500", "MATH500", "AIME_2024", "aime-2025", "aime24"])
def test_a_benchmark_has_several_spellings(tmp_path, spelling):
    path = write_rows(tmp_path / "rows.jsonl", [{"problem": "a", "answer": "7"}])
    name, _ = benchmarks.source(f"{spelling}={path}")
    assert name in ("math500", "aime24", "aime25")


def test_the_name_of_one_s_own_benchmark_is_kept(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"problem": "a", "answer": "7"}])
    assert benchmarks.source(f"My-2024_set={path}")[0] == "My-2024_set"


def test_a_download_is_read_with_the_columns_of_the_hub(monkeypatch, tmp_path):
    rows = [{"question": "2+3?", "answer": "Two and three.\n#### 5"}]
    path = write_rows(tmp_path / "test.jsonl", rows)
    asked = []
    download = lambda *what, **how: asked.append((what, how)) or str(path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    name, section = benchmarks.source("gsm8k")
    what = ("openai/gsm8k", "main/test-00000-of-00001.parquet"), {"repo_type": "dataset"}
    assert asked == [what]
    found, _ = sources.problems(name, section, "data.heldout.gsm8k", lambda problems: [""])
    assert (found[0].question, found[0].answer) == ("2+3?", "5")
    assert found[0].solution == rows[0]["answer"]


def test_an_answer_follows_the_marker(tmp_path):
    rows = [{"problem": "a", "answer": "#### 1\n#### 1,234 "}, {"problem": "b", "answer": "7"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    section = config_lib.source(path, answer_after="####", bad_rows="drop")
    found, counts = sources.problems("s", section, "data.heldout.s", lambda problems: [""])
    assert [p.answer for p in found] == ["1,234"]
    assert counts.bad == 1
    section = config_lib.source(path, answer_after="####")
    with pytest.raises(DataError, match=r"'answer' is '7'; expected a string with '####' and an"):
        sources.problems("s", section, "data.heldout.s", lambda problems: [""])


@pytest.mark.skipif(not BENCHMARKS.exists(), reason=f"there is no {BENCHMARKS}")
@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("math500", "math500.jsonl", 500),
        ("aime24", "aime24.jsonl", 30),
        ("aime25", "aime25.jsonl", 30),
        ("gsm8k", "gsm8k_test.jsonl", 1319),
    ],
)
def test_copies_of_the_benchmarks(name, file, rows):
    """The local copies are readable with the default columns."""
    name, section = benchmarks.source(f"{name}={BENCHMARKS / file}")
    check = lambda problems: [""] * len(problems)
    found, _ = sources.problems(name, section, f"data.heldout.{name}", check)
    assert len(found) == rows
    assert len({p.id for p in found}) == rows
    if name == "gsm8k":
        columns = {"question": "problem", "answer": "solution"}
        original = config_lib.source(section.path, columns=columns, answer_after="####")
        again, _ = sources.problems(name, original, "data.heldout.gsm8k", check)
        assert [p.answer.replace(",", "") for p in again] == [p.answer for p in found]
