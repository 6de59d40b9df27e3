"""Bad input: every error names the field, the value and what was expected, before any work."""

import importlib.util
import json
import pathlib
import re
import sys

import jax.numpy as jnp
import pages_on_cpu
import pytest
import tiny_config
from paths import CONFIGS, ROOT

from opsd_jax import config as config_lib
from opsd_jax.cli import main
from opsd_jax.config import fields, loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.models import decoder
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.run import assembly, checks
from opsd_jax.run.workdir import claimed

QUICKSTART = str(CONFIGS / "quickstart.py")


def load(**overrides):
    return loading.load(QUICKSTART, {k.replace("__", "."): v for k, v in overrides.items()})


def test_overrides_take_the_type_of_the_field():
    config = load(
        opsd__gate="1,0.5,0",
        seed="7",
        rlvr__optimizer__learning_rate="1",
        model__tie_word_embeddings="true",
        mesh="(1, 1, 1)",
        evaluation__temperature="0.5",
    )
    assert config.sections["opsd"].gate == "1,0.5,0"
    assert config.seed == 7
    assert config.sections["rlvr"].optimizer.learning_rate == 1.0
    assert config.model.tie_word_embeddings is True
    assert config.mesh == (1, 1, 1)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("opsd.gat", "all", "no such field. Did you mean --config.opsd.gate"),
        ("opsd.learning_rate", "1e-4", r"Did you mean --config.opsd.optimizer.learning_rate"),
        ("opds.gate", "all", "Did you mean --config.opsd.gate"),
        ("seed.x", "1", "no such field"),
        ("xyzzy", "1", "no such field. Expected one of the fields that `opsd-jax train --help`"),
        ("opsd", "1", r"opsd is a section; expected one of its fields, .*--config.opsd.gate"),
        ("data.train", "a.jsonl", "data.train is a section; expected no override, because"),
        ("sft.steps", "3.5", "expected int, such as 1300"),
        ("sft.steps", "many", "expected int"),
        ("sft.steps", "True", "expected int"),
        ("model.tie_word_embeddings", "1", "expected bool"),
        ("sft.buckets", "56", "expected tuple"),
        ("sft.steps", "", "expected int"),
    ],
)
def test_a_bad_override_is_refused(field, text, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        loading.load(QUICKSTART, {field: text})


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("sft.batch_size", "-4", "sft.batch_size is -4; expected at least 1"),
        ("rlvr.prompts", "0", "rlvr.prompts is 0"),
        ("rlvr.group_size", "1", "rlvr.group_size is 1; expected at least 2"),
        ("rlvr.updates", "3", "rlvr.updates is 3; expected a divisor of prompts = 32"),
        ("opsd.temperature", "-0.1", "opsd.temperature is -0.1"),
        ("opsd.gate", "corect", "config.opsd.gate is 'corect'; expected one of correct"),
        ("opsd.loss.divergence", "kl", "config.opsd.loss: divergence is 'kl'; expected one of rev"),
        ("opsd.loss.clip", "-1.0", "config.opsd.loss: clip is -1.0; expected a number that"),
        ("opsd.loss_chunk", "-1", "opsd.loss_chunk is -1"),
        ("rlvr.objective.clip", "min", "config.rlvr.objective: clip is 'min'; expected one of ppo"),
        ("rlvr.objective.clip_high", "-0.2", "config.rlvr.objective: clip_high is -0.2"),
        ("rlvr.objective.baseline", "mean", "config.rlvr.objective: baseline is 'mean'"),
        ("rlvr.overlong_buffer", "89", "overlong_buffer is 89; .*at most response_tokens = 88"),
        ("opsd.buckets", "(40, 90)", r"opsd.buckets is .*a last length of at least 103"),
        (
            "opsd.teacher_buckets",
            "(126,)",
            r"teacher_buckets is .*one length for each entry of config.opsd",
        ),
        ("opsd.teacher_buckets", "(80, 90)", r"teacher_buckets is .*a last length of at least 126"),
        ("opsd.teacher_buckets", "(126, 80)", "ascending order"),
        ("opsd.buckets", "(88, 40)", "ascending order"),
        ("sft.buckets", "()", "ascending order"),
        ("opsd.init_from", "opsd", "opsd.init_from is 'opsd'; expected '' or a stage before"),
        ("opsd.algorithm", "ppo", "opsd.algorithm is 'ppo'"),
        ("stages", "('sft', 'dpo')", r"names of stages \(opsd, rlvr, sft\), but"),
        ("stages", "('sft', 'model')", "names of stages"),
        ("sft.optimizer.learning_rate", "0.0", "sft.optimizer.learning_rate is 0.0"),
        ("sft.optimizer.schedule", "linear", "expected 'constant' or 'cosine'"),
        ("sft.optimizer.b2", "1.0", "b2 is 1.0"),
        ("rlvr.temperature", "0.0", "rlvr.temperature is 0.0; expected a number above 0"),
        (
            "rlvr.overlong_buffer",
            "-1",
            "overlong_buffer is -1; expected 0 for no penalty, or at most",
        ),
        ("rlvr.objective.dual_clip", "0.5", "dual_clip is 0.5; expected 0, or a number that is at"),
        (
            "opsd.loss.floor",
            "1.5",
            r"config.opsd.loss: floor is 1.5; expected a number in \[0, 1\]",
        ),
        (
            "evaluation.problems",
            "1",
            "evaluation.problems is 1; expected 0 for all problems, or at le",
        ),
        ("evaluation.seed", "100000000000", r"a number in \[0, 2\^31\)"),
        ("sft.buckets", "('a',)", "buckets is .*a tuple of int"),
        ("mesh", "('a', 1, 1)", "a tuple of int"),
        ("decode_mesh", "('a', 1, 1)", "decode_mesh is .*a tuple of int"),
        ("mesh", "(1, 2)", r"config.mesh is \(1, 2\); expected sizes of data, fsdp, tensor, each"),
        ("mesh", "(-1, -1, 1)", r"config.mesh is \(-1, -1, 1\); .* One of them may be -1"),
        ("decode_mesh", "(1, 1, 0)", r"config.decode_mesh is .*; expected \(\) or sizes of data"),
        ("rlvr.slots", "0", "rlvr.slots is 0; expected at least 1"),
        ("opsd.memo.slots", "0", "opsd.memo.slots is 0; expected at least 1"),
        ("evaluation.min_p", "-0.1", r"evaluation.min_p is -0.1; expected a number in \[0, 1\]"),
        ("evaluation.min_p", "1.1", r"evaluation.min_p is 1.1; expected a number in \[0, 1\]"),
        ("stages", "(['sft'],)", "a tuple of str"),
        ("stages", "('sft', 'sft')", "distinct names"),
        ("stages", "('sft', 'report')", "none of them 'untrained', 'report', 'evaluations'"),
        ("opsd.optimizer.warmup", "25", "warmup is 25; expected less than 25, the number of opt"),
    ],
)
def test_a_config_that_cannot_run_is_refused(field, text, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        loading.load(QUICKSTART, {field: text})


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        (
            "task",
            "opsd_jax.data.nothing:task",
            "config.task: 'opsd_jax.data.nothing:task' cannot be imported",
        ),
        ("model.make", "nonsense", "config.model.make: 'nonsense' cannot be imported"),
        ("model.vocab_size", "16", "vocab_size is 16; expected at least 32, the size of the"),
        ("model.scan_unroll", "2", "scan_unroll is 2; expected a divisor"),
        ("model.num_kv_heads", "3", "num_heads is 4"),
        (
            "mesh",
            "(3, 1, 1)",
            r"config.mesh: mesh \(3, 1, 1\) over .* needs 3 devices, but there are 8",
        ),
        (
            "decode_mesh",
            "(4, 1, 1)",
            r"config.decode_mesh: mesh \(4, 1, 1\) over .* needs 4 devices, but there are 8",
        ),
        (
            "decode_mesh",
            "(-1, 3, 1)",
            r"config.decode_mesh: mesh .* needs 3 devices or a multiple of that, but there are 8",
        ),
        (
            "decode_mesh",
            "(1, 1, 8)",
            r"config.decode_mesh: parameter .* split over the mesh axis 'tensor' of size 8, which",
        ),
        ("rlvr.microbatch", "12", "rlvr.microbatch is 12; expected a multiple of 8, the product"),
        ("rlvr.slots", "20", "rlvr.slots is 20; expected a multiple of 8, the product"),
        ("opsd.slots", "12", "opsd.slots is 12; expected a multiple of 8, the product"),
        ("evaluation.slots", "4", "evaluation.slots is 4; expected a multiple of 8, the product"),
        (
            "opsd.teacher_prompt_tokens",
            "16",
            "teacher_prompt_tokens is 16; the prompt of problem .* has 39 tokens",
        ),
        ("rlvr.prompt_tokens", "8", "rlvr.prompt_tokens is 8; expected at least 16"),
        ("evaluation.prompt_tokens", "8", "evaluation.prompt_tokens is 8; expected at least 16"),
        ("evaluation.problems", "70000", "problems is 70000; expected at most 65536"),
        ("sft.buckets", "(56, 80)", "sft.buckets is 80; expected at least"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused_before_compiling(
    tmp_path, field, text, message
):
    config = loading.load(QUICKSTART, {field: text})
    with pytest.raises(config_lib.ConfigError, match=message):
        assembly.assemble(config, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sft.buckets": "(56, 129)"},
            r"config.sft: .* buckets are \[56, 129\]; expected multiples of 2, because",
        ),
        (
            {"rlvr.buckets": "(64, 104)", "opsd.teacher_buckets": "(80, 127)"},
            r"config.opsd: .* buckets are \[.*\]; expected multiples of 2, because",
        ),
    ],
)
@pytest.mark.parametrize("option", ["sequence_parallel", "context_parallel"])
def test_padded_lengths_must_divide_evenly_over_tensor(tmp_path, fields, message, option):
    fields = fields | {"mesh": "(4, 1, 2)", f"model.{option}": "True", "model.remat": "full"}
    config = loading.load(QUICKSTART, fields)
    with pytest.raises(config_lib.ConfigError, match=message):
        assembly.assemble(config, tmp_path)


def test_memos_have_slots_on_every_device(tmp_path):
    fields = {"opsd.memo.slots": "12", "opsd.contexts": "('memo',)"}
    config = loading.load(QUICKSTART, fields)
    message = "opsd.memo.slots is 12; expected a multiple of 8, the product"
    with pytest.raises(config_lib.ConfigError, match=message):
        assembly.assemble(config, tmp_path)


def test_too_many_key_value_heads_per_device_for_the_paged_kernel_are_refused(tmp_path):
    sizes = {"vocab_size": 128, "num_heads": 24, "num_kv_heads": 24, "head_dim": 128}
    model = {f"model.{name}": str(size) for name, size in sizes.items()}
    fields = {"decode_mesh": "(4, 1, 2)", "model.cache": "paged"} | model
    config = loading.load(QUICKSTART, fields)
    message = "config.decode_mesh: model.cache is 'paged', but each device has 12 key-value heads"
    with pytest.raises(config_lib.ConfigError, match=message):
        assembly.assemble(config, tmp_path)


@pytest.mark.parametrize(("field", "form"), [("cache", "paged"), ("attention", "splash")])
def test_tpu_kernels_are_refused_on_other_devices(tmp_path, field, form):
    fields = {"model.vocab_size": "128", "model.head_dim": "128", f"model.{field}": form}
    config = loading.load(QUICKSTART, fields)
    message = f"model.{field} is '{form}'; expected 'auto' on a cpu, because '{form}' runs only on"
    with pytest.raises(config_lib.ConfigError, match=message):
        assembly.assemble(config, tmp_path)


def test_models_that_cannot_speculate_are_refused(shared_config):
    """The error names the field of the stage, and the field of the model if that can help."""
    section = shared_config.copy_and_resolve_references()
    section.opsd.speculation = 4
    config = parse_run(section)
    model = decoder.from_config(config.model)
    checks.check_speculation(config, model)
    paged = re.escape("config.opsd.speculation is 4, but the cache of the model is paged")
    dense = re.escape("expected 0. Or set config.model.cache to 'dense'.")
    with pytest.raises(config_lib.ConfigError, match=f"{paged}.*{dense}"):
        checks.check_speculation(config, model._replace(ragged=True))
    recurrent = model.policy._replace(init_cache=lambda batch, length: jnp.zeros((batch, 4)))
    message = r"config\.opsd\.speculation is 4, but .* recurrent state.*; expected 0\."
    with pytest.raises(config_lib.ConfigError, match=message):
        checks.check_speculation(config, model._replace(policy=recurrent))
    section.opsd.speculation = 0
    checks.check_speculation(parse_run(section), model._replace(ragged=True))
    section.opsd.speculation = 32
    with pytest.raises(config_lib.ConfigError, match=r"config\.opsd\.speculation is 32; expected"):
        parse_run(section)


@pytest.mark.parametrize(
    ("fields", "limit", "message"),
    [
        ({}, 64 + 24, ""),
        ({}, 64 + 23, "evaluation.response_tokens is 24; expected at most 23, so that the seq"),
        (
            {"evaluation.response_tokens": "4"},
            64 + 23,
            "rlvr.response_tokens is 24; expected at most 23, so that the sequence has at most 87",
        ),
        (
            {"opsd.teacher_prompt_tokens": "128", "opsd.buckets": "(88,)"},
            64 + 24,
            "opsd.teacher_prompt_tokens is 128; expected at most 64, so that the sequence has at",
        ),
        (
            {"evaluation.prompt_tokens": "100"},
            64 + 24,
            "evaluation.response_tokens is 24, in addition to 100 tokens of prompt and response; "
            "expected a sum of at most 88 tokens, the model's max_position_embeddings",
        ),
        ({"opsd.contexts": "('memo',)"}, 64 + 24, "opsd.memo.tokens is 1024, in addition to 344"),
    ],
)
def test_a_sequence_longer_than_the_model_was_made_for_is_refused(fields, limit, message):
    lengths = {
        f"{section}.{name}": str(value)
        for section in ("evaluation", "rlvr", "opsd")
        for name, value in (("prompt_tokens", 64), ("response_tokens", 24))
    }
    lengths |= {"rlvr.buckets": "(88,)", "opsd.buckets": "(88,)"}
    lengths |= {"opsd.teacher_prompt_tokens": "64", "opsd.teacher_buckets": "()"}
    config = load(**(lengths | fields))
    checks.check_positions(config, 0)
    if not message:
        checks.check_positions(config, limit)
        return
    with pytest.raises(config_lib.ConfigError, match=f"config.{re.escape(message)}"):
        checks.check_positions(config, limit)


@pytest.mark.parametrize(
    ("cache", "tokens", "message"),
    [
        ("dense", 4096, "rlvr.pool_tokens is 4096; expected 0, because the model's cache has no"),
        ("paged", 0, ""),
        ("paged", 1024, ""),
        ("paged", 1020, "rlvr.pool_tokens is 1020; expected at least 1024, or 0 for a full cache"),
    ],
)
def test_a_pool_without_room_for_a_rollout_is_refused(cache, tokens, message):
    """A rollout of 128 tokens takes 32 pages of 4, and 8 devices each have to hold one."""
    lengths = {"rlvr.prompt_tokens": "40", "rlvr.response_tokens": "88", "rlvr.buckets": "(128,)"}
    lengths |= {"rlvr.init_from": "", "stages": "('rlvr',)"}
    config = load(**lengths, **{"rlvr.pool_tokens": str(tokens)})
    mesh = mesh_lib.make_mesh((4, 2, 1))
    with pages_on_cpu.small_pages():
        policy = pages_on_cpu.model(cache).policy
        if not message:
            checks.check_pools(config, policy, mesh)
            return
        with pytest.raises(config_lib.ConfigError, match=f"config.{re.escape(message)}"):
            checks.check_pools(config, policy, mesh)


def test_the_dtype_of_a_pretrained_model_follows_the_platform(tmp_path):
    pretrained = loading.read("rlvr_hf")
    dtype = lambda **how: parse_run(pretrained, **how).model.dtype
    assert (dtype(), dtype(platform="tpu")) == ("float32", "bfloat16")
    pretrained.model.dtype = "bfloat16"
    assert dtype() == "bfloat16"
    fields = {"model.preset": "qwen3-0.6b"}
    assert loading.load("rlvr_hf", fields, data=False, platform="tpu").model.dtype == "bfloat16"


def test_sampling_may_have_its_own_mesh(tmp_path):
    """Microbatches must divide over the training mesh, and decoding slots over the sampling mesh.
    The problems of a step need not divide over either.
    """
    fields = {"decode_mesh": "(-1, 1, 2)", "rlvr.slots": "12", "rlvr.prompts": "6"}
    fields |= {"rlvr.microbatch": "16", "rlvr.updates": "1"}
    made = lambda **changes: assembly.assemble(loading.load(QUICKSTART, fields | changes), tmp_path)
    run = made()
    mesh = run.parameters.mesh
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    decode_mesh = run.parameters.decode_mesh
    assert dict(decode_mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert decode_mesh.devices.flatten().tolist() == mesh.devices.flatten().tolist()
    with pytest.raises(config_lib.ConfigError, match=r"slots is 6; expected a multiple of 4, the"):
        made(**{"rlvr.slots": "6"})
    with pytest.raises(config_lib.ConfigError, match=r"batch is 12; expected a multiple of 8, the"):
        made(**{"rlvr.microbatch": "12"})


def test_wandb_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config_lib.ConfigError, match=r"wandb_project is .mine.*wandb is not"):
        load(wandb_project="mine")


def test_a_task_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "task_of_mine.py").write_text(
        "def task(data):\n    raise OSError('it was called')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["train", "--config", QUICKSTART, "--workdir", "run"]
    with pytest.raises(OSError, match="it was called"):
        main.main([*command, "--config.task=task_of_mine:task"])


def test_a_config_file_with_an_error_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from opsd_jax.config import default\n"
        "def get_config():\n"
        "    config = default()\n"
        "    config.opsd.gat = 'all'\n"
        "    return config\n"
    )
    with pytest.raises(config_lib.ConfigError, match=r"mine.py failed with .*gat.*[\s\S]*gate"):
        loading.load(path)
    with pytest.raises(config_lib.ConfigError, match="there is no such Python file"):
        loading.load(tmp_path / "absent.py")
    path.write_text("def get_config():\n    return None\n")
    with pytest.raises(config_lib.ConfigError, match="returned None; expected a ConfigDict"):
        loading.load(path)
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(config_lib.ConfigError, match=r"mine.py failed with ModuleNotFoundError"):
        loading.load(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model.hidden_size = 128", r"first set config.model = config_lib.decoder\(...\)"),
        ("config_lib.LARGE", r"pretrained\(...\) and preset\(...\) have its values"),
        ("config_lib.import_function", "opsd_jax.options.import_function"),
    ],
)
def test_a_config_file_of_version_0_1_0_is_told_the_new_place(tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(
        "from opsd_jax import config as config_lib\n"
        f"def get_config():\n    config = config_lib.default()\n    {line}\n    return config\n"
    )
    with pytest.raises(config_lib.ConfigError, match=message):
        loading.load(path)


def test_a_field_in_another_section_is_suggested_by_its_name():
    with pytest.raises(config_lib.ConfigError, match=r"mean --config\.opsd\.gate"):
        loading.load("quickstart", {"opsd.loss.gate": "all"})


def test_json_keeps_a_config():
    config = loading.load("quickstart_arms")
    saved = json.loads(loading.to_json(config))
    assert parse_run(loading.from_flat(saved)) == config


def test_a_config_json_of_version_0_1_0_is_read():
    """Stages that do not run may contradict themselves. Fields added later have default values."""
    saved = json.loads((pathlib.Path(__file__).parent / "rlvr_hf_0_1_0.json").read_text())
    config = parse_run(loading.from_flat(saved))
    to_decoders = {
        "model.activation": "silu",
        "model.layer_types": [],
        "model.norm_offset": False,
        "model.post_norms": False,
        "model.query_scalar": 0.0,
        "model.rope_local_theta": 0.0,
        "model.scale_embeddings": False,
        "model.sliding_window": 0,
    }
    to_runs = {
        "adapter.alpha": 128.0,
        "adapter.base": "auto",
        "adapter.dropout": 0.0,
        "adapter.kind": "none",
        "adapter.path": "",
        "adapter.rank": 64,
        "adapter.stages": [],
        "adapter.targets": [],
        "compilation_cache": "auto",
        "evaluation.divergence_responses": 1024,
        "executables": "",
        "init_from": "",
        "max_without_signal": 50,
        "model.context_parallel": False,
        "model.max_positions": 0,
        "pool.failures": 0.5,
        "rollout_quantisation.cache": "none",
        "rollout_quantisation.weights": "none",
    }
    assert to_runs | to_decoders == loading.ADDED
    to_every_stage = {"optimizer.second_moment_dtype": "parameters", "packing": False}
    to_rollouts = {"carry_over": 0, "max_staleness": 4, "pool_tokens": 0, "speculation": 0}
    assert to_every_stage | to_rollouts == loading.ADDED_TO_STAGES
    added = to_runs | {
        f"{stage}.{field}": value
        for stage, fields in (
            ("sft", to_every_stage),
            ("rlvr", to_every_stage | to_rollouts),
            ("opsd", to_every_stage | to_rollouts),
        )
        for field, value in fields.items()
    }
    assert loading.flatten(config) == saved | added
    assert loading.identity(config).keys() <= saved.keys()
    loading.check_same(config, loading.load("rlvr_hf", data=False, platform="tpu"), "workdir")
    saved["stages"] = ["rlvr", "opsd"]
    with pytest.raises(config_lib.ConfigError, match="teacher_buckets is"):
        parse_run(loading.from_flat(saved))


def test_a_field_added_later_may_be_missing_from_a_stage_that_does_not_run():
    flat = loading.flatten(loading.load("rlvr_hf", data=False))
    del flat["opsd.gate"]
    assert parse_run(loading.from_flat(flat)).sections["opsd"].gate == "correct"


def test_a_workdir_of_another_config_is_refused(tmp_path):
    for _ in range(2):  # the same config is accepted again
        with claimed(load(), tmp_path):
            pass
    other = claimed(load(opsd__gate="all", seed="1"), tmp_path)
    with pytest.raises(config_lib.ConfigError) as error, other:
        pass
    assert "opsd.gate: 'correct' there, 'all' now" in str(error.value)
    assert "seed: 0 there, 1 now" in str(error.value)


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", pathlib.Path("/proc/opsd_jax")):
        workdir = claimed(load(), path)
        with pytest.raises(config_lib.ConfigError, match=f"{path} cannot be written"), workdir:
            pass


def test_a_workdir_in_use_is_refused(tmp_path):
    second = claimed(load(), tmp_path)
    with claimed(load(), tmp_path), pytest.raises(config_lib.ConfigError, match="is in use"):
        second.__enter__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", QUICKSTART, "--config.opsd.gat=all"], "Did you mean"),
        (["train", "--config", QUICKSTART, "--config.sft.batch_size", "-4"], "at least 1"),
        (["train", "--config", "absent.py"], "there is no such Python file"),
        (["evaluate"], "holds no run"),
        (["report"], "holds no run"),
    ],
)
def test_the_command_line_reports_errors_and_writes_nothing(tmp_path, capsys, arguments, message):
    workdir = tmp_path / "run"
    assert main.main([*arguments, "--workdir", str(workdir)]) == 2
    assert message in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["report", "--config.seed=1"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert "usage: opsd-jax" in capsys.readouterr().err


def test_help_shows_the_commands_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("train", "evaluate", "report", "--config quickstart"))


def test_help_of_train_lists_the_fields(capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    out = capsys.readouterr().out
    shown = [
        field for field in loading.flatten(tiny_config.quickstart()) if "contexts." not in field
    ]
    assert all(f"--config.{field}=" in out for field in shown)
    assert "Decoding slots" in out  # the description of a field


def test_config_json_is_readable(tmp_path):
    with claimed(load(), tmp_path):
        pass
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["opsd.gate"] == "correct"
    assert saved["stages"] == ["sft", "rlvr", "opsd"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads_and_names_itself(path):
    loading.load(path, data=False)
    text = path.read_text()
    named = {f"--config configs/{path.relative_to(CONFIGS)}", f"--config {path.stem} "}
    assert any(name in text for name in named)


def test_the_page_of_fields_is_current():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == fields.for_page(), "run: python -m opsd_jax.config.fields > docs/config.md"


def test_every_field_says_what_it_does():
    for _, listed in fields.all_fields():
        for field in listed:
            assert field.description, field.name
            assert "\n" not in field.description, field.name
            assert field.description[0].isupper() or field.description[0] in "'\"", field.name


def test_every_option_of_a_loss_says_what_is_valid():
    free = {"opsd.loss.rate", "opsd.loss.centre"}
    for _, listed in fields.all_fields():
        for field in listed:
            if field.name.startswith(("opsd.loss.", "rlvr.objective.")) and field.kind != "bool":
                assert bool(field.bounds) == (field.name not in free), field.name
