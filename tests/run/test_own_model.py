"""`configs/*_hf.py` on a model directory and a data file: RLVR, export, OPSD, evaluation."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_config
import tiny_tokenizer
from paths import CONFIGS, SHARED

from opsd_jax.cli import main
from opsd_jax.config import loading
from opsd_jax.models import decoder
from opsd_jax.run import assembly
from opsd_jax.stages import teacher as teacher_lib
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.speed import without_times
from opsd_jax.training.state import abstract_state, init_state
from opsd_jax.training.step import batch_shardings, compile_train_step

MATHS = SHARED / "benchmarks/train_math_deepscaler.jsonl"
CONTEXTS = ("solution", "answer", "sibling", "concise", "memo", "column", "none")


def coin(problem, response):
    """A verifier that accepts half of all responses, by their hash.

    A model with random weights solves no problem.
    """
    return hashlib.sha256(response.encode()).digest()[0] % 2 == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a small random Qwen3, a BPE tokenizer trained on the problems, and a file of
    problems: from MATH if that file exists here, else generated.
    """
    root = tmp_path_factory.mktemp("own")
    if MATHS.is_file():
        rows = [json.loads(line) for line in MATHS.read_text().splitlines()]
        rows = [row for row in rows if row["answer"] and len(row["problem"]) < 120][:48]
        assert len(rows) == 48
    else:
        rows = [{"problem": f"What is ${i}^2 + {i}$?", "answer": str(i * i + i)} for i in range(48)]
    rows = [
        {"problem": row["problem"], "answer": row["answer"], "hint": f"Row {i}."}
        | ({"solution": row.get("solution") or f"It is {row['answer']}."} if i % 4 else {})
        for i, row in enumerate(rows)
    ]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in rows for text in row.values()]
    sizes = tiny_config.decoder(
        vocab_size=640,  # larger than the tokenizer's
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        scan_unroll=1,
    )
    model = decoder.from_config(sizes)
    model.save(jax.jit(model.init)(jax.random.key(0)), root / "model")
    tiny_tokenizer.write(root / "model", "qwen3", texts, vocab_size=600)
    # One token in six ends a response. Otherwise a random model would truncate every response.
    ends = {"eos_token_id": [3, *range(300, 400)]}
    (root / "model" / "generation_config.json").write_text(json.dumps(ends))
    return root


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Uses one device, for which programs compile faster; other tests cover meshes."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


SMALL = {
    "mesh": "(1, -1, 1)",
    "data.heldout_problems": "8",
    "data.train.problems.verifier.kind": "test_own_model:coin",
    "data.train.problems.extra": "('hint',)",
    "model.dtype": "float32",
    "evaluation.samples": "2",
    "evaluation.slots": "16",
    "evaluation.prompt_tokens": "200",
    "evaluation.response_tokens": "16",
}
STAGE = {
    "steps": "2",
    "prompts": "8",
    "slots": "16",
    "group_size": "2",
    "microbatch": "8",
    "prompt_tokens": "200",
    "response_tokens": "16",
    "buckets": "(160, 216)",
    "checkpoint_every": "1",
    "optimizer.learning_rate": "1e-2",
    "optimizer.warmup": "0",
}
OF_OPSD = {
    "opsd.teacher_prompt_tokens": "320",
    "opsd.teacher_buckets": "()",
    "opsd.memo.tokens": "6",
    "opsd.memo.close_tokens": "4",
    "opsd.memo.slots": "8",
}


def overrides(files, stage, model="model", **changes):
    return (
        {
            "model.path": str(files / model),
            "data.train.problems.path": str(files / "problems.jsonl"),
        }
        | SMALL
        | {f"{stage}.{field}": value for field, value in STAGE.items()}
        | (OF_OPSD if stage == "opsd" else {"rlvr.overlong_buffer": "8"})
        | changes
    )


def train(files, stage, workdir, model="model", **changes):
    """Runs `opsd-jax train` with `configs/<stage>_hf.py`; returns the rows of its metrics."""
    arguments = ["train", "--config", str(CONFIGS / f"{stage}_hf.py"), "--workdir", str(workdir)]
    arguments += [f"--config.{k}={v}" for k, v in overrides(files, stage, model, **changes).items()]
    assert main.main(arguments) == 0
    return metrics_lib.read(workdir / stage)


def test_from_rlvr_to_opsd(files, tmp_path):
    """Exports the result of an RLVR run and trains it with OPSD."""
    rows = train(files, "rlvr", tmp_path / "rlvr")
    assert len(rows) == 2
    assert any(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    exported = tmp_path / "model"
    assert main.main(["convert", "--workdir", str(tmp_path / "rlvr"), "--out", str(exported)]) == 0
    assert (exported / "tokenizer.json").read_bytes() == (
        files / "model/tokenizer.json"
    ).read_bytes()
    rows = train(files, "opsd", tmp_path / "opsd", model=exported)
    assert len(rows) == 2
    assert all(0 < row["active_rows"] <= 16 for row in rows)
    assert all(
        row["context/solution"] + row["context/answer"] == row["active_rows"] for row in rows
    )
    summary = json.loads((tmp_path / "opsd" / "opsd" / "evaluation.json").read_text())
    assert summary["problems"] == 8
    before = (tmp_path / "rlvr" / "rlvr" / "responses.jsonl").read_text().splitlines()
    same = (tmp_path / "opsd" / "untrained" / "responses.jsonl").read_text().splitlines()
    get = lambda lines: [json.loads(line)["tokens"] for line in lines]
    assert get(before) == get(same)  # the exported model is the trained one
    assert (tmp_path / "opsd" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_from_rlvr_to_opsd_with_gemma(files, tmp_path):
    """A small random Gemma 3, whose prompts are longer than its windows; OPSD resumes."""
    sizes = tiny_config.decoder(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        scan_unroll=1,
        tie_word_embeddings=True,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=20,
        rope_local_theta=1e4,
        query_scalar=12.0,
        activation="gelu",
        norm_offset=True,
        post_norms=True,
        scale_embeddings=True,
    )
    model = decoder.from_config(sizes)
    model.save(jax.jit(model.init)(jax.random.key(0)), tmp_path / "gemma")
    config = json.loads((tmp_path / "gemma" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    for path in (files / "model").iterdir():
        if not (tmp_path / "gemma" / path.name).exists():
            shutil.copy(path, tmp_path / "gemma")
    train(files, "rlvr", tmp_path / "rlvr", model=tmp_path / "gemma")
    exported = tmp_path / "model"
    assert main.main(["convert", "--workdir", str(tmp_path / "rlvr"), "--out", str(exported)]) == 0
    rows = train(files, "opsd", tmp_path / "opsd", model=exported, **{"opsd.steps": "1"})
    assert len(rows) == 1
    before = (tmp_path / "rlvr" / "rlvr" / "responses.jsonl").read_text()
    assert (tmp_path / "opsd" / "untrained" / "responses.jsonl").read_text() == before
    whole = train(files, "opsd", tmp_path / "whole", model=exported)
    assert len(whole) == 2
    fork = ["train", "--config", str(CONFIGS / "opsd_hf.py"), "--workdir", str(tmp_path / "fork")]
    fork += ["--fork", f"{tmp_path / 'opsd' / 'opsd'}@1"]
    fork += [f"--config.{k}={v}" for k, v in overrides(files, "opsd", exported).items()]
    assert main.main(fork) == 0
    resumed = metrics_lib.read(tmp_path / "fork" / "opsd")
    assert [without_times(row) for row in resumed] == [without_times(row) for row in whole]


LORA = {"adapter.kind": "lora", "adapter.rank": "4", "adapter.alpha": "8"}


def test_an_adapter_moves_between_runs_as_files(files, tmp_path, capsys):
    """RLVR trains an adapter, which is exported, evaluated, and trained further with OPSD."""
    run, adapter, merged = (tmp_path / name for name in ("rlvr", "adapter", "merged"))
    train(files, "rlvr", run, **LORA)
    convert = ["convert", "--workdir", str(run)]
    assert main.main([*convert, "--adapter", "--out", str(adapter)]) == 0
    assert main.main([*convert, "--out", str(merged)]) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(files / "model")
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    (moved / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/no/such/model"})
    )

    benchmark = ["--benchmark", f"own={files / 'problems.jsonl'}", "--problems", "6"]
    limits = ["--prompt-tokens", "200", "--response-tokens", "16", "--slots", "8"]
    evaluate = ["evaluate", *benchmark, *limits, "--samples", "2", "--temperature", "0"]
    chosen = {
        "adapter": ["--adapter", str(adapter)],  # its config names the model
        "merged": ["--model", str(merged)],
        "base": ["--model", str(files / "model")],
    }
    tokens = {}
    for name, arguments in chosen.items():
        assert main.main([*evaluate, *arguments, "--out", str(tmp_path / "of" / name)]) == 0
        lines = (tmp_path / "of" / name / "responses.jsonl").read_text().splitlines()
        tokens[name] = [json.loads(line)["tokens"] for line in lines]
    assert tokens["adapter"] == tokens["merged"]
    assert tokens["adapter"] != tokens["base"]

    given = LORA | {"adapter.path": str(adapter)}
    rows = train(files, "opsd", tmp_path / "opsd", **given)
    assert len(rows) == 2
    before = (run / "rlvr" / "responses.jsonl").read_text()
    assert (tmp_path / "opsd" / "untrained" / "responses.jsonl").read_text() == before
    capsys.readouterr()

    refused = [
        (["--adapter", str(adapter), "--model", str(merged)], "an adapter of another base model"),
        (["--adapter", str(merged)], "has no adapter_config.json"),
        (["--adapter", str(adapter), "--stage", "rlvr"], "--adapter evaluates a model outside a"),
        (["--adapter", str(moved)], "base_model_name_or_path in"),
        (["--adapter", str(adapter), "--workdir", str(run)], "expected --model in place of"),
    ]
    for arguments, message in refused:
        assert main.main([*evaluate, *arguments, "--out", str(tmp_path / "refused")]) == 2
        assert message in capsys.readouterr().err
    arguments = ["train", "--config", str(CONFIGS / "opsd_hf.py")]
    arguments += ["--workdir", str(tmp_path / "other")]
    wrong = overrides(files, "opsd", **given) | {"adapter.rank": "8"}
    arguments += [f"--config.{k}={v}" for k, v in wrong.items()]
    assert main.main(arguments) == 2
    assert (
        f"config.adapter.rank is 8; expected 4, as the adapter in {adapter} has"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTEXTS)
def test_each_kind_of_context(files, tmp_path, kind):
    """The runs have reminders, an EMA teacher and a checkpoint after every step."""
    rows = train(
        files,
        "opsd",
        tmp_path,
        **{
            "opsd.contexts": repr((kind,)),
            "opsd.gate": "all",
            "opsd.context_column": "hint",
            "opsd.teacher.kind": "ema",
            "opsd.reinject_every": "6",
            "opsd.reminder_tokens": "250",
        },
    )
    assert len(rows) == 2
    for row in rows:
        assert row["active_rows"] == row[f"context/{kind}"]
        assert row["active_rows"] + row["no_context"] == 16
        assert np.isfinite(row.get("loss", 0))
    assert sum(row["active_rows"] for row in rows) > 0
    if kind == "none":  # no reminders, and in the first step the teacher equals the student
        assert abs(rows[0]["token_divergence"]) < 1e-5
    else:
        divergences = [row["token_divergence"] for row in rows if row["active_rows"]]
        assert divergences[0] > 1e-3
    assert (tmp_path / "opsd" / "checkpoints" / "2").is_dir()
    assert (tmp_path / "opsd" / "divergence.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "teacher"), [*(("opsd", kind) for kind in teacher_lib.TEACHERS), ("rlvr", "")]
)
def test_the_loss_falls_on_a_fixed_batch(files, tmp_path, algorithm, teacher):
    """Builds the batch, loss and teacher of a run, then updates thirty times on that batch."""
    changes = {"rlvr.updates": "1"}
    if algorithm == "opsd":
        changes = {"opsd.teacher.kind": teacher, "opsd.gate": "all", "opsd.teacher.rate": "0.1"}
    path = CONFIGS / f"{algorithm}_hf.py"
    run = assembly.assemble(loading.load(path, overrides(files, algorithm, **changes)), tmp_path)
    with run.pool:
        stage, params = assembly.make_stage(run, algorithm), run.parameters.of("")
        (batch,), *_ = stage.batches(0, params)
    optimizer = make_optimizer(run.config.sections[algorithm].optimizer, 100)
    abstract = abstract_state(
        run.parameters.abstract, optimizer, stage.teacher, run.parameters.mesh
    )
    step = compile_train_step(stage, optimizer, abstract, run.parameters.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = lambda p: init_state(p, optimizer, stage.teacher)
    state = jax.jit(init, out_shardings=shardings)(params)
    losses, where = [], batch_shardings(batch, run.parameters.mesh)
    for _ in range(30):
        state, metrics = step(state, jax.device_put(batch, where))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    if algorithm == "opsd":
        assert losses[-1] < 0.7 * losses[0]
    else:  # the surrogate loss falls until its ratio is clipped
        assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": ""}, "model.path is ''; expected a directory with a Hugging Face"),
        ({"data.train.problems.path": ""}, "data.train.problems.path is ''; expected a file"),
        ({"data.heldout_problems": "0"}, "config.data.heldout is empty; expected sources"),
        ({"data.thinking": "maybe"}, "data.thinking is 'maybe'; expected one of '', 'on', 'off'"),
        ({"opsd.memo.request_tokens": "0"}, "opsd.memo.request_tokens is 0; expected at least 1"),
        (
            {"data.contexts.solution": "Hm"},
            "solution is 'Hm'; expected a text that contains {context}",
        ),
    ],
)
def test_a_bad_field_is_an_error_before_anything_compiles(
    files, tmp_path, capsys, changes, message
):
    arguments = ["train", "--config", str(CONFIGS / "opsd_hf.py"), "--workdir", str(tmp_path)]
    arguments += [f"--config.{k}={v}" for k, v in (overrides(files, "opsd") | changes).items()]
    assert main.main(arguments) == 2
    assert message in capsys.readouterr().err
