"""Names of models and datasets on the Hugging Face Hub, with the hub's client and a full cache."""

import json
import pathlib

import huggingface_hub
import pytest
import tiny_tokenizer
from huggingface_hub import constants
from paths import CONFIGS

from opsd_jax import config as config_lib
from opsd_jax.cli import arguments, main, report
from opsd_jax.config import loading
from opsd_jax.data import files as data_files
from opsd_jax.data.text import make_tokenizer
from opsd_jax.models import pretrained
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.options import ConfigError
from opsd_jax.parallel import aot
from opsd_jax.run import pipeline
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.storage import hub

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline cache of the hub's client, and a function that puts a repository into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(kind, name, commit=COMMIT, revision="main"):
        repository = tmp_path / "hub" / f"{kind}s--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        return snapshot

    return put


def test_a_name_gets_the_commit_of_its_revision(cache):
    snapshot = cache(hub.MODEL, "Qwen/Qwen3-0.6B")
    cache(hub.MODEL, "Qwen/Qwen3-0.6B", OTHER, revision="old")
    pinned = hub.pinned("Qwen/Qwen3-0.6B", hub.MODEL, "f")
    assert pinned == f"Qwen/Qwen3-0.6B@{COMMIT}"
    assert hub.pinned("Qwen/Qwen3-0.6B@old", hub.MODEL, "f") == f"Qwen/Qwen3-0.6B@{OTHER}"
    assert hub.pinned(pinned, hub.MODEL, "f") == pinned
    assert hub.local(pinned, hub.MODEL, "f") == snapshot
    cache(hub.MODEL, "Qwen/Qwen3-0.6B", "c" * 40)  # the branch moves on
    assert hub.local(pinned, hub.MODEL, "f") == snapshot


def test_a_directory_of_a_dataset(cache):
    snapshot = cache(hub.DATASET, "openai/gsm8k")
    assert hub.pinned("openai/gsm8k/main", hub.DATASET, "f") == f"openai/gsm8k/main@{COMMIT}"
    assert hub.local("openai/gsm8k/main", hub.DATASET, "f") == snapshot / "main"


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "data.jsonl",
        "/models/Qwen3",
        "./a/b",
        "../a/b",
        "a/b/",
        "a//b",
        "gs://a/b",
        "a/b@",
        "data/x.jsonl",
    ],
)
def test_other_paths_are_not_names(path):
    for kind in (hub.MODEL, hub.DATASET):
        assert not hub.is_name(path, kind)
        assert hub.pinned(path, kind, "f") == path
        assert hub.local(path, kind, "f") == pathlib.Path(path)


def test_a_directory_on_this_machine_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("models/qwen", hub.MODEL)
    (tmp_path / "models").mkdir()
    assert not hub.is_name("models/qwen", hub.MODEL)
    (tmp_path / "models" / "qwen").mkdir()
    assert not hub.is_name("models/qwen", hub.MODEL)
    arguments_of = lambda path: arguments.parser().parse_args(
        ["convert", "--model", path, "--out", "out"]
    )
    assert arguments_of("models/qwen").model == str(tmp_path / "models" / "qwen")
    assert arguments_of("Qwen/Qwen3-0.6B@main").model == "Qwen/Qwen3-0.6B@main"


def test_what_cannot_be_downloaded_is_an_error_of_one_line(cache):
    with pytest.raises(ConfigError) as refused:
        pretrained.from_config(config_lib.pretrained("Qwen/none"))
    message = str(refused.value)
    assert message.startswith("config.model.path is 'Qwen/none'; expected a path on this machine")
    assert "cannot be downloaded (LocalEntryNotFound" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match=r"config.data.tokenizer is 'Qwen/none'; expected a path"):
        make_tokenizer("Qwen/none")
    with pytest.raises(ConfigError, match=r"config.data.train.a.path is 'a/b'; expected a path on"):
        [*data_files.rows("a/b", field="data.train.a")]


def test_a_config_records_the_commits(cache, tmp_path):
    model = cache(hub.MODEL, "Qwen/tiny")
    tiny_tokenizer.write(model, "qwen3")
    dataset = cache(hub.DATASET, "openai/gsm8k")
    (dataset / "main").mkdir()
    (dataset / "main" / "train.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    fields = {"model.path": "Qwen/tiny", "data.train.problems.path": "openai/gsm8k/main"}
    options = loading.load(str(CONFIGS / "rlvr_hf.py"), fields)
    assert options.model.path == options.data.tokenizer == f"Qwen/tiny@{COMMIT}"
    source = options.data.train["problems"]
    assert source.path == f"openai/gsm8k/main@{COMMIT}"
    (row,) = data_files.rows(source.path)
    assert row.columns == {"problem": "1 + 1?", "answer": "2"}
    assert make_tokenizer(options.data.tokenizer).encode("1")
    planned = loading.load(str(CONFIGS / "rlvr_hf.py"), {"model.path": "Qwen/none"}, data=False)
    assert planned.model.path == "Qwen/none"  # nothing was downloaded


def test_a_run_resumes_with_the_commits_that_it_began_with(cache, tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    load = lambda model, *earlier: loading.load(
        str(CONFIGS / "rlvr_hf.py"),
        {"model.path": model, "data.train.problems.path": str(data)},
        *earlier,
    )
    tiny_tokenizer.write(cache(hub.MODEL, "Qwen/tiny"), "qwen3")
    before = load("Qwen/tiny")
    tiny_tokenizer.write(cache(hub.MODEL, "Qwen/tiny", OTHER), "qwen3")  # the branch moves on
    earlier = lambda: loading.flatten(before)
    again = load("Qwen/tiny", earlier)
    assert again.model.path == again.data.tokenizer == f"Qwen/tiny@{COMMIT}"
    other = f"Qwen/tiny@{OTHER}"
    assert load("Qwen/tiny").model.path == load(other, earlier).model.path == other


def test_train_uses_the_commits_of_its_work_directory(cache, tmp_path, monkeypatch):
    """The command itself, but for the training."""
    seen = []

    def run(config, workdir, fork, **options):
        with workdir_lib.claimed(config, workdir):
            seen.append(config.model.path)

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(report, "write", lambda config, workdir: 0)
    data = tmp_path / "problems.jsonl"
    data.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    command = ["train", "--config", str(CONFIGS / "rlvr_hf.py"), "--config.model.path=Qwen/tiny"]
    command.append(f"--config.data.train.problems.path={data}")
    run_in = lambda name: main.main([*command, "--workdir", str(tmp_path / name)])
    tiny_tokenizer.write(cache(hub.MODEL, "Qwen/tiny"), "qwen3")
    assert run_in("first") == 0
    tiny_tokenizer.write(cache(hub.MODEL, "Qwen/tiny", OTHER), "qwen3")  # the branch moves on
    assert (run_in("first"), run_in("second")) == (0, 0)
    assert seen == [f"Qwen/tiny@{commit}" for commit in (COMMIT, COMMIT, OTHER)]


def test_a_plan_downloads_only_the_config_of_a_model(cache, monkeypatch):
    snapshot = cache(hub.MODEL, "Qwen/tiny")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    fields = {**sizes, **heads, "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}
    (snapshot / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 640}))
    asked = []
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *names, **options: (
            asked.append(options["allow_patterns"]) or download(*names, **options)
        ),
    )
    with aot.planning(lambda key, lowered: None):
        model = pretrained.from_config(config_lib.pretrained("Qwen/tiny"))
    assert (model.vocab_size, model.max_positions) == (32, 640)
    assert asked == [["config.json"]]
    with pytest.raises(WeightsError, match="safetensors"):
        pretrained.from_config(config_lib.pretrained("Qwen/tiny"))
    assert "*.safetensors" in asked[-1]
