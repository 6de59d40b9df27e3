"""Rollouts with a pool of pages equal those with a dense cache, also if they lose their pages."""

import collections
import json
import pathlib
from unittest import mock

import jax
import numpy as np
import pages_on_cpu
import processes
import pytest

from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.parallel.program import ProgramKind
from opsd_jax.rollout import programs as programs_lib
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout

V, EOS, PROMPT, BUDGET = 32, 2, 12, 20
LENGTHS = [3, 12, 1, 9, 5, 10]
PROMPTS = [[(7 * i + 3 * j) % 29 + 3 for j in range(n)] for i, n in enumerate(LENGTHS)]
IDS = [[4 * i + j for j in range(4)] for i in range(len(PROMPTS))]
ROLLOUT = PROMPT + BUDGET  # tokens of the longest rollout: 8 pages of 4


@pytest.fixture(scope="module", autouse=True)
def small():
    """Pages of 4 tokens, and chunks of 3 steps."""
    with pages_on_cpu.small_pages(), mock.patch.object(programs_lib, "STEPS_PER_CHUNK", 3):
        yield


@pytest.fixture(scope="module")
def make():
    """A function `(cache, slots, pool_tokens, mesh_shape, ...) -> sample`."""

    def make(cache="paged", slots=8, pool_tokens=0, mesh_shape=(1, 1, 1), int8=False):
        model, counts = pages_on_cpu.model(cache), collections.Counter()
        params = jax.jit(model.init)(jax.random.key(1))
        if int8:
            model = model.quantised(QuantisationOptions(cache="int8"))
        mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
        placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
        layout = decode_layout(
            model, abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed)), mesh
        )
        shape = EngineShape(
            slots,
            mesh_lib.row_shards(mesh),
            PROMPT,
            BUDGET,
            continues=pool_tokens > 0,
            pool_tokens=pool_tokens,
        )

        def compiled(key, lowered):
            program = lowered.compile()

            def call(*args):
                counts[key.kind] += 1
                return program(*args)

            return call

        with mock.patch.object(aot, "compiled", compiled):
            engine = Engine(model, layout.abstract, mesh, shape, cache_lengths=[ROLLOUT], pad_id=0)
        decoded = layout.convert(placed)

        def sample(prompts=PROMPTS, ids=IDS):
            ended = engine(
                decoded,
                prompts,
                ids,
                key=jax.random.key(5),
                sampling_params=sampling.params(V, stop=(EOS,)),
            )
            found = [r for batch in ended for r in batch.responses]
            assert len(found) == sum(map(len, ids))
            return {ids[r.prompt][r.member]: r for r in found}

        sample.engine, sample.counts = engine, counts
        return sample

    return make


@pytest.fixture(scope="module")
def expected(make):
    return make("dense")()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for i, response in found.items():
        np.testing.assert_array_equal(response.tokens, expected[i].tokens)
        np.testing.assert_allclose(response.model_logprobs, expected[i].model_logprobs, atol=1e-4)
        assert response.stop == expected[i].stop


@pytest.mark.parametrize(
    ("slots", "pool_tokens", "mesh_shape"),
    [
        (8, 0, (1, 1, 1)),
        (8, 0, (8, 1, 1)),
        (1, ROLLOUT, (1, 1, 1)),
        (8, 3 * ROLLOUT, (1, 1, 1)),
        pytest.param(64, 8 * ROLLOUT, (1, 1, 1), marks=pytest.mark.slow),
        (16, 8 * ROLLOUT, (8, 1, 1)),
        pytest.param(16, 5 * ROLLOUT, (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_rollouts_equal_those_with_a_dense_cache(make, expected, slots, pool_tokens, mesh_shape):
    sample = make("paged", slots, pool_tokens, mesh_shape)
    assert_same(sample(), expected)
    # The pool was too small for all slots, so rollouts lost their pages.
    shards = mesh_shape[0] * mesh_shape[1]
    limited = 0 < pool_tokens < slots * ROLLOUT
    assert (sample.counts[ProgramKind.CONTINUE] > 0) == limited
    tokens = pool_tokens or slots * ROLLOUT
    assert sample.engine.cache_tokens == tokens // (4 * shards) * 4 * shards


@pytest.mark.parametrize("int8", [False, True])
def test_rollouts_that_share_pages_equal_those_that_do_not(make, int8):
    """Without sharing, each rollout has a prompt of its own."""
    sample = make("paged", int8=int8)
    shared = sample()
    apart = sample([p for p in PROMPTS for _ in range(4)], [[i] for ids in IDS for i in ids])
    assert_same(apart, shared)


def test_the_memory_is_that_of_the_pool(make):
    full, half = make("paged", 8, 0), make("paged", 8, 4 * ROLLOUT)
    pages = lambda sample: sample.engine.cache_bytes - 8 * 8 * 4  # without the table
    assert pages(full) == 2 * pages(half)
    assert pages(full) == 2 * 8 * ROLLOUT * 2 * 2 * 128 * 4


@pytest.mark.parametrize(
    ("cache", "pool_tokens", "continues", "message"),
    [
        ("paged", 60, True, r"pool_tokens is 60; expected at least 64, .* 8 pages of 4 tokens"),
        (
            "dense",
            64,
            True,
            "pool_tokens is 64; expected 0, because the model's cache has no pages",
        ),
        ("paged", 64, False, "pool_tokens is 64 and continues is False; expected True"),
    ],
)
def test_a_pool_that_cannot_work_is_refused(cache, pool_tokens, continues, message):
    model, mesh = pages_on_cpu.model(cache), mesh_lib.make_mesh((2, 1, 1), jax.devices()[:2])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    abstract = abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
    shape = EngineShape(4, 2, PROMPT, BUDGET, continues=continues, pool_tokens=pool_tokens)
    with pytest.raises(ValueError, match=message):
        Engine(model, abstract, mesh, shape)


PROCESS = """
import json, pathlib
sys.path.insert(0, sys.argv[5])
import pages_on_cpu
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.rollout import programs as programs_lib
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout

pages_on_cpu.small_pages().start()
programs_lib.STEPS_PER_CHUNK = 3
model, mesh = pages_on_cpu.model(), mesh_lib.make_mesh((2, 2, 2))
shapes = jax.eval_shape(model.init, jax.random.key(0))
shardings = mesh_lib.tree_shardings(mesh, model.rules, shapes)
params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
layout = decode_layout(model, abstract_of(params, shardings), mesh)
shape = EngineShape(16, 4, 12, 20, continues=True, pool_tokens=6 * 32)
engine = Engine(model, layout.abstract, mesh, shape)
prompts = [[3 + i, 4, 5, 6, 7, 8][: 1 + i % 6] for i in range(12)]
ids = [[2 * i, 2 * i + 1] for i in range(12)]
options = {"key": jax.random.key(3), "sampling_params": sampling.params(32, stop=(2,))}
made = []
for ended in engine(layout.convert(params), prompts, ids, **options):
    made += [[r.prompt, r.member, r.stop, r.tokens.tolist()] for r in ended.responses]
pathlib.Path(sys.argv[4], f"{processes}-{number}.json").write_text(json.dumps(made))
"""


@pytest.mark.slow
def test_two_processes_take_the_same_decisions_as_one(tmp_path):
    """Rollouts end in the same order, so the same ones waited and lost their pages."""
    arguments = str(tmp_path), str(pathlib.Path(pages_on_cpu.__file__).parent)
    processes.run(PROCESS, *arguments, processes=1, devices=8)
    processes.run(PROCESS, *arguments, processes=2, devices=4)
    one, *two = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert len(one) == 24
    assert two == [one, one]
