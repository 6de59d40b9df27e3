"""Settings and fixtures of all tests: eight CPU devices, and an error for rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "64")  # as `hosts.start` does
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # tests spend their time on compilation
        "--xla_llvm_disable_expensive_passes=true",
        # The fusion emitters take half of the time of compilation. jax 0.11 has no flag of its own.
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # takes a tenth of it
        "--xla_cpu_parallel_codegen_split_count=1",  # the other core runs the other worker's tests
    ]
)

import jax
import jax.numpy as jnp
import pytest
import tiny_config

from opsd_jax.config import loading
from opsd_jax.config.run_options import parse_run
from opsd_jax.data import arithmetic
from opsd_jax.models import decoder
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.verify.outcomes import Outcomes

jax.config.update("jax_numpy_rank_promotion", "raise")


# Files that take minutes go first, so that two workers (pytest-xdist) end at about the same time.
LONG = (
    "test_run",
    "test_smollm2",
    "test_own_model",
    "test_evaluate",
    "test_pool",
    "test_fused",
    "test_transformers",
)


# Meshes of eight devices. The last one splits over all axes; the others are slow tests.
MESHES = (*(pytest.param(m, marks=pytest.mark.slow) for m in ((8, 1, 1), (1, 8, 1))), (2, 2, 2))


def pytest_collection_modifyitems(items):
    names = [item.path.stem for item in items]
    order = {name: i for i, name in enumerate(LONG)}
    by_file = sorted(zip(names, items, strict=True), key=lambda x: order.get(x[0], len(LONG)))
    items[:] = [item for _, item in by_file]


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Caches compiled programs, so that tests, their processes and both workers share them.

    `.ci/run` names a directory, which its two parts share.
    """
    workers = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        workers = workers.parent
    for name, value in {
        "jax_compilation_cache_dir": os.environ.get("TESTS_COMPILED") or str(workers / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def task():
    return arithmetic.task(tiny_config.quickstart().data)


@pytest.fixture(scope="session")
def shared_config():
    """A config whose whole run takes seconds, for fixtures that live longer than a test."""
    config = tiny_config.quickstart()
    changes = {
        "mesh": "(-1, 1, 1)",
        "model.hidden_size": "16",
        "model.intermediate_size": "32",
        "model.num_layers": "2",
        "model.num_heads": "4",
        "model.num_kv_heads": "2",
        "model.head_dim": "8",
        "model.scan_unroll": "1",
        "sft.steps": "6",
        "sft.batch_size": "16",
        "sft.microbatch": "8",
        "sft.buckets": "(72, 128)",
        "sft.checkpoint_every": "3",
        "sft.optimizer.warmup": "2",
        "rlvr.steps": "3",
        "rlvr.prompts": "16",
        "rlvr.slots": "16",
        "rlvr.group_size": "2",
        "rlvr.microbatch": "8",
        "rlvr.packing": "True",
        "rlvr.checkpoint_every": "1",
        "opsd.steps": "3",
        "opsd.prompts": "16",
        "opsd.slots": "8",
        "opsd.max_rows": "16",
        "opsd.microbatch": "8",
        "opsd.packing": "True",
        "opsd.gate": "all",
        "opsd.checkpoint_every": "2",
        "evaluation.problems": "8",
        "evaluation.samples": "2",
        "evaluation.slots": "16",
    }
    for field, text in changes.items():
        loading.override(config, field, text)
    parse_run(config)
    return config


@pytest.fixture
def config(shared_config):
    """A copy of `shared_config` that a test may change."""
    return shared_config.copy_and_resolve_references()


@pytest.fixture(scope="session")
def model(shared_config):
    return decoder.from_config(shared_config.model)


@pytest.fixture(scope="session")
def score(model):
    """The jitted function `(params, tokens, positions) -> logits`."""

    @jax.jit
    def score(params, tokens, positions):
        return model.policy.unembed(params, model.policy.forward(params, tokens, positions)[0])

    return score


@pytest.fixture(scope="session")
def params(model):
    """Parameters with predictions far from uniform, so that tests notice mistakes."""
    params = jax.jit(model.init)(jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


@pytest.fixture(scope="session")
def one_device():
    return mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])


def random_tokens(seed, shape, vocab_size=32):
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)


def opsd_row(task, i, rng):
    """Returns a row of an OPSD step: problem i, a random response to it, and its outcome."""
    problem = task.train[i]
    return {
        "student": task.prompt(problem),
        "teacher": arithmetic.informed_prompt(problem, problem.solution),
        "response": rng.integers(1, 32, rng.integers(1, 40)).tolist(),
        **{outcome: i % 3 == j for j, outcome in enumerate(Outcomes._fields)},
    }
