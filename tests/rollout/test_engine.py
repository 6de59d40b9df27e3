"""The engine: log-probabilities, reproducibility, stopping, slots, compilation and memory."""

import contextlib
import itertools
import json
import re
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from scipy import stats
from scipy.special import log_softmax

from opsd_jax.models import decoder
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.parallel.program import ProgramKind
from opsd_jax.rollout import engine as engine_lib
from opsd_jax.rollout import programs as programs_lib
from opsd_jax.rollout import sampling, slots
from opsd_jax.rollout.engine import STOP_EOS, STOP_LENGTH, Engine, EngineShape, left_pad
from opsd_jax.rollout.layout import decode_layout
from opsd_jax.rollout.slots import RUNNING

EOS, V, BUDGET = 2, 32, 24
PROMPTS = [[1, 9, 20], [1, 5, 6, 7, 8, 3], [4], [1, 7], [9, 9, 4], [3, 1, 2, 30, 7, 7, 7, 1]]
IDS = [[4 * i + j for j in range(4)] for i in range(len(PROMPTS))]


class Programs:
    """The compiled programs of an engine.

    Within `watched(hook)`, a call runs `hook(key, program, *args)`, which returns the outputs.
    """

    def __init__(self):
        self.by_key, self.hook = {}, None

    def compile(self, key, lowered):
        program = self.by_key[key] = lowered.compile()

        def call(*args):
            return program(*args) if self.hook is None else self.hook(key, program, *args)

        return call

    @contextlib.contextmanager
    def watched(self, hook):
        self.hook = hook
        try:
            yield
        finally:
            self.hook = None


@pytest.fixture(scope="module")
def make(model, params):
    """A function `(slots, mesh_shape, ...) -> sample`, which compiles equal engines only once."""
    made = {}

    def make(
        slots=8,
        mesh_shape=(1, 1, 1),
        prompts=None,
        decode_mesh=(),
        budget=BUDGET,
        continues=False,
        **options,
    ):
        which = (
            slots,
            mesh_shape,
            prompts,
            decode_mesh,
            budget,
            continues,
            *map(str, options.items()),
        )
        if which not in made:
            mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
            placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
            shardings = jax.tree.map(lambda x: x.sharding, placed)
            layout = decode_layout(
                model, abstract_of(placed, shardings), mesh_lib.reshaped(mesh, decode_mesh)
            )
            shards = mesh_lib.row_shards(layout.mesh)
            shape = EngineShape(slots, prompts or shards, 8, budget, continues)
            programs = Programs()
            with mock.patch.object(aot, "compiled", programs.compile):
                engine = Engine(model, layout.abstract, layout.mesh, shape, **options)
            made[which] = engine, layout.convert(placed), programs
        engine, placed, programs = made[which]

        def sample(
            prompts=PROMPTS,
            ids=IDS,
            seed=5,
            budgets=None,
            stop=(EOS,),
            begun=engine_lib.NOTHING_BEGUN,
            enough=lambda ended: False,
            **options,
        ):
            ended = engine(
                placed,
                prompts,
                ids,
                key=jax.random.key(seed),
                sampling_params=sampling.params(V, stop=stop, **options),
                budgets=budgets,
                begun=begun,
                enough=enough,
            )
            return [response for batch in ended for response in batch.responses]

        sample.engine, sample.params, sample.programs = engine, placed, programs
        return sample

    return make


def by_id(responses, ids=IDS):
    """Returns the response of each rollout, by rollout id."""
    found = {ids[r.prompt][r.member]: r for r in responses}
    assert len(found) == len(responses) == sum(map(len, ids))
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for i in a:
        np.testing.assert_array_equal(a[i].tokens, b[i].tokens)
        np.testing.assert_allclose(a[i].model_logprobs, b[i].model_logprobs, atol=1e-4)
        assert a[i].stop == b[i].stop


@pytest.fixture(scope="module")
def rollouts(make):
    return by_id(make()())


def full_logits(score, params, tokens):
    """Computes float64 logits [T, V] in one forward pass over all tokens, without a cache."""
    padded, positions = np.zeros((1, 32), np.int32), np.full((1, 32), -1, np.int32)
    padded[0, : len(tokens)], positions[0, : len(tokens)] = tokens, np.arange(len(tokens))
    return np.asarray(score(params, padded, positions), np.float64)[0, : len(tokens)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_a_full_forward_pass(make, score, params, temperature):
    for response in make()(temperature=temperature):
        prompt, n = PROMPTS[response.prompt], len(response.tokens)
        logits = full_logits(score, params, [*prompt, *response.tokens])[len(prompt) - 1 : -1]
        for given, T in (
            (response.model_logprobs, 1.0),
            (response.sampling_logprobs, temperature),
        ):
            expected = log_softmax(logits / T, axis=-1)[np.arange(n), response.tokens]
            np.testing.assert_allclose(given, expected, atol=1e-4)


def test_a_response_ends_with_its_eos_or_its_budget(rollouts):
    assert {r.stop for r in rollouts.values()} == {STOP_EOS, STOP_LENGTH}  # both occur
    for r in rollouts.values():
        n = len(r.tokens)
        assert len(r.model_logprobs) == len(r.sampling_logprobs) == n
        assert EOS not in r.tokens[: n - 1]
        assert (r.model_logprobs < 0).all()
        assert (r.tokens[n - 1] == EOS) == (r.stop == STOP_EOS)
        assert n == BUDGET or r.stop == STOP_EOS


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_bytes_that_decoding_reads_computed_by_hand(make, shared_config, tensor):
    sample, m = make(1, (1, 1, tensor)), shared_config.model
    before, began = sample.engine.decoding, time.monotonic()
    responses = sample()
    found, seconds = sample.engine.decoding.since(before), time.monotonic() - began
    weights = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(sample.params))
    token = m.num_layers * 2 * m.num_kv_heads * m.head_dim * 4 / tensor
    # With one slot, each token takes a forward pass, which reads the tokens before its input.
    read = sum(
        weights + token * (len(PROMPTS[r.prompt]) - 1 + i)
        for r in responses
        for i in range(len(r.tokens))
    )
    assert found.bytes == pytest.approx(read, rel=1e-9)
    assert 0.5 * seconds < found.seconds <= seconds


@pytest.mark.parametrize("count", [1, 3, pytest.param(64, marks=pytest.mark.slow)])
def test_the_number_of_slots_changes_nothing(make, rollouts, count):
    assert_same(by_id(make(count)()), rollouts)


@pytest.mark.parametrize(
    ("mesh_shape", "decode_mesh"),
    [
        ((8, 1, 1), ()),
        pytest.param((1, 8, 1), (), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), (), marks=pytest.mark.slow),
        pytest.param((2, 4, 1), (4, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_sample_the_same_rollouts_as_one(make, rollouts, mesh_shape, decode_mesh):
    assert_same(by_id(make(8, mesh_shape, decode_mesh=decode_mesh)()), rollouts)


@pytest.mark.parametrize(
    ("count", "mesh_shape"),
    [(8, (1, 1, 1)), (3, (1, 1, 1)), pytest.param(8, (2, 2, 2), marks=pytest.mark.slow)],
)
def test_a_rollout_that_continues_ends_as_an_uninterrupted_one(
    make, rollouts, monkeypatch, count, mesh_shape
):
    """The engine stops as soon as a rollout has ended, and the next call continues the others."""
    monkeypatch.setattr(programs_lib, "STEPS_PER_CHUNK", 3)
    sample, ended, begun, calls = make(count, mesh_shape, continues=True), {}, {}, 0
    while len(ended) < len(rollouts):
        left = [[i for i in own if i not in ended] for own in IDS]
        place = {i: (p, m) for p, own in enumerate(left) for m, i in enumerate(own)}
        starts = {place[i]: response for i, response in begun.items()}
        found = by_id(sample(ids=left, begun=starts, enough=lambda ended: True), left)
        ended |= {i: r for i, r in found.items() if r.stop != RUNNING}
        begun = {i: r for i, r in found.items() if r.stop == RUNNING}
        calls += 1
    assert calls > 4
    assert_same(ended, rollouts)


def test_rollouts_that_cannot_continue_are_refused(make):
    sample = make(continues=True)
    some = sample()[0]
    with pytest.raises(ValueError, match="rollout 1 of prompt 0; expected fewer tokens than its"):
        sample(begun={(0, 1): some})
    with pytest.raises(ValueError, match="compiled without `continues` in its shape"):
        make()(begun={(0, 1): some._replace(stop=RUNNING)})


def test_a_rollout_depends_on_its_id_alone(make, rollouts):
    """It does not depend on the order of prompts, on other rollouts, or on earlier calls."""
    order = [3, 5, 0, 4, 2, 1]
    ids = [IDS[i][::-1] for i in order]
    assert_same(by_id(make()([PROMPTS[i] for i in order], ids), ids), rollouts)
    some = by_id(make()(PROMPTS[1:2], [[6, 4]]), [[6, 4]])
    assert_same(some, {i: rollouts[i] for i in (4, 6)})
    assert make()([], []) == []
    assert make()(PROMPTS[:2], [[], []]) == []


def test_steps_and_rollouts_have_their_own_random_numbers(make, rollouts):
    first = {tuple(r.tokens) for r in rollouts.values()}
    assert len(first) == len(rollouts)
    other = {tuple(r.tokens) for r in make()(seed=6)}
    assert len({row for row in first & other if len(row) > 4}) == 0


def test_greedy_takes_the_most_likely_token(make, score, params):
    for response in make()(ids=[[i] for i in range(len(PROMPTS))], temperature=0.0):
        prompt = PROMPTS[response.prompt]
        logits = full_logits(score, params, [*prompt, *response.tokens])[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(response.tokens, logits.argmax(axis=-1))
        np.testing.assert_array_equal(response.sampling_logprobs, 0)


@pytest.mark.parametrize("options", [{"temperature": 1.3}, {"top_k": 12, "top_p": 0.9}], ids=str)
def test_sampled_frequencies_are_the_distribution(make, score, params, options):
    """First tokens of 8,000 rollouts against the exact distribution: chi-square, fixed seed."""
    n = 8_000
    responses = make(64)([PROMPTS[0]], [range(n)], budgets=[[1] * n], **options)
    logits = full_logits(score, params, PROMPTS[0])[-1] / options.get("temperature", 1)
    p = np.exp(log_softmax(logits))
    top = np.argsort(-p)[: options.get("top_k", V)]
    before = np.cumsum(p[top]) - p[top]
    kept = top[before < options.get("top_p", 1.0) * p[top].sum()]
    counts = np.bincount([r.tokens[0] for r in responses], minlength=V)
    assert counts[kept].sum() == n
    often = kept[p[kept] * n >= 5]
    expected = p[often] / p[often].sum() * counts[often].sum()
    assert stats.chisquare(counts[often], expected).pvalue > 1e-3


def test_every_rollout_has_its_own_budget(make, rollouts):
    budgets = [[1 + (5 * i + j) % 7 for j in range(4)] for i in range(len(PROMPTS))]
    for i, response in by_id(make()(budgets=budgets)).items():
        budget = budgets[i // 4][i % 4]
        np.testing.assert_array_equal(response.tokens, rollouts[i].tokens[:budget])
        ended = len(rollouts[i].tokens) <= budget and rollouts[i].stop == STOP_EOS
        assert response.stop == (STOP_EOS if ended else STOP_LENGTH)


def test_any_stop_token_ends_a_response(make, rollouts):
    stop = (EOS, 5, 11)
    for i, response in by_id(make()(stop=stop)).items():
        tokens = rollouts[i].tokens.tolist()
        at = next((t for t, token in enumerate(tokens) if token in stop), len(tokens) - 1)
        assert response.tokens.tolist() == tokens[: at + 1]
        assert (response.stop == STOP_EOS) == (response.tokens[-1] in stop)
    assert all(len(r.tokens) == BUDGET for r in make()(stop=()))


def test_forbidden_tokens_are_never_sampled(make):
    forbidden = [EOS, *range(3, 32, 2)]
    responses = make()(forbidden=forbidden)
    assert not {int(t) for r in responses for t in r.tokens} & set(forbidden)
    assert all(r.stop == STOP_LENGTH for r in responses)
    assert all((r.sampling_logprobs > r.model_logprobs).all() for r in responses)


def test_a_long_rollout_does_not_delay_others(make):
    """While one of two slots decodes a long rollout, the other decodes the short ones."""
    sample, steps = make(2), []

    def record_steps(key, program, *args):
        outputs = program(*args)
        if key.kind is ProgramKind.DECODE:
            steps.append(int(outputs[1].drawn.max()))
        return outputs

    ids = [[0], [1], [2], [3], [4], [5]]
    budgets = [[24], [4], [4], [4], [4], [4]]
    with sample.programs.watched(record_steps):
        order = [r.prompt for r in sample(ids=ids, budgets=budgets, stop=())]
    assert order[:4] == [1, 2, 3, 4]
    assert sum(steps) == 24


def test_ended_rollouts_are_yielded_while_others_are_decoded(make, monkeypatch):
    """Each prompt is prefilled once, each chunk fetched once, and the device is a chunk ahead."""
    sample, calls, fetch = make(2, prompts=1), [], jax.device_get

    def record_call(key, program, *args):
        calls.append(key.kind)
        return program(*args)

    def record_fetch(tree):
        calls.append("fetch")
        return fetch(tree)

    monkeypatch.setattr(jax, "device_get", record_fetch)
    ids = [[0, 1, 2], [3, 4, 5]]
    sampling_params, key = sampling.params(V, stop=()), jax.random.key(0)
    with sample.programs.watched(record_call):
        for batch in sample.engine(
            sample.params,
            PROMPTS[:2],
            ids,
            key=key,
            sampling_params=sampling_params,
            budgets=[[3, 9, 5], [4, 4, 4]],
        ):
            calls.append("ended")
            assert batch.responses
    assert calls.count(ProgramKind.PREFILL) == 2
    assert calls.count(ProgramKind.DECODE) == calls.count("fetch")
    assert calls.count("ended") >= 4
    # The engine yields the rollouts of a chunk after it starts the next one. The last has no next.
    order = [call for call in calls if call in (ProgramKind.DECODE, "fetch", "ended")]
    assert order == [
        ProgramKind.DECODE,
        *["fetch", ProgramKind.DECODE, "ended"] * (len(order) // 3 - 1),
        "fetch",
        "ended",
    ]


def test_changed_arguments_do_not_recompile(make):
    """Sampling parameters, budgets, stop tokens, prompts and the number of active slots change."""
    sample = make()
    sample()
    with jax.no_tracing(True):
        for options in (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
            {"temperature": 0.0},
            {"min_p": 0.1, "forbidden": (7, 8)},
            {"stop": (1, 2, 3)},
        ):
            sample(**options)
        sample(PROMPTS[:1], IDS[:1], budgets=[[1, 2, 3, 4]])


def test_the_length_of_the_cache_changes_nothing(make, rollouts, monkeypatch):
    """The cache grows with the longest active rollout and shrinks when that rollout ends.

    It can become shorter than the longest prompt.
    """
    monkeypatch.setattr(programs_lib, "STEPS_PER_CHUNK", 2)
    sample, used = make(4, cache_lengths=(4, 8, 16, 24, 32)), []

    def record_length(key, program, *args):
        if key.kind is ProgramKind.DECODE:
            used.append(key.cache_length)
        return program(*args)

    with sample.programs.watched(record_length):
        assert_same(by_id(sample()), rollouts)
    assert {4, 8, 16, 24} <= set(used)
    assert any(b < a for a, b in itertools.pairwise(used))


def test_default_cache_lengths():
    shape = EngineShape(8, 8, 1024, 8192)
    assert engine_lib.default_cache_lengths(shape) == [128, 192, 320, 576, 1152, 2304, 4608, 9216]
    double = engine_lib.default_cache_lengths(shape._replace(response_tokens=2 * 9216 - 1024))
    assert double[:-1] == engine_lib.default_cache_lengths(shape)  # a larger budget reads no more
    assert engine_lib.default_cache_lengths(EngineShape(8, 8, 16, 88)) == [104]


@pytest.mark.parametrize(
    ("slots", "group_size", "rollouts", "shards", "expected"),
    [
        (64, 8, 512, 1, (64, 2)),  # a prefill of 2 prompts fills a quarter of the slots
        (64, 1, 20, 8, (24, 8)),  # 20 rollouts, rounded up to a multiple of the shards
        (8, 8, 512, 4, (8, 4)),
    ],
)
def test_an_engine_has_no_more_slots_than_rollouts(slots, group_size, rollouts, shards, expected):
    shape = engine_lib.shape_for(
        slots=slots,
        group_size=group_size,
        rollouts=rollouts,
        prompt_tokens=16,
        response_tokens=32,
        shards=shards,
    )
    assert shape == EngineShape(*expected, 16, 32)


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
def test_the_cache_is_updated_in_place(make, mesh_shape):
    """The decode program copies no layer's keys or values, and reuses the buffers of its input."""
    sample, leaves = make(8, mesh_shape, budget=112), []

    def record_cache(key, program, *args):
        outputs = program(*args)
        if key.kind is ProgramKind.DECODE:
            leaves[:] = jax.tree.leaves(outputs[0].cache)
        return outputs

    with sample.programs.watched(record_cache):
        sample(PROMPTS[:1], IDS[:1])
    (program,) = (p for key, p in sample.programs.by_key.items() if key.kind is ProgramKind.DECODE)
    size = np.prod(leaves[0].sharding.shard_shape(leaves[0].shape))
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    assert size > 8 * programs_lib.STEPS_PER_CHUNK  # larger than the sampled tokens of a chunk
    assert not [c for c in copies if np.prod([int(d) for d in c.split(",")]) >= size]
    cache_bytes = sum(4 * np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    assert program.memory_analysis().alias_size_in_bytes >= cache_bytes
    assert sample.engine.cache_bytes == cache_bytes


def test_empty_slots_and_padding_do_not_write_to_the_cache(model, params):
    """A prompt fills one cache entry per token. Empty slots leave the cache unchanged."""
    prefill = jax.jit(lambda *prompts: slots.prefill(model.policy, params, *prompts))
    cache = prefill(*left_pad([ids[:-1] for ids in PROMPTS], 8, 0))
    for layer in cache:
        written = np.abs(np.asarray(layer["v"])).sum(axis=(1, 3)) > 0
        lengths = np.array([len(ids) - 1 for ids in PROMPTS])
        np.testing.assert_array_equal(written, np.arange(8)[None] < lengths[:, None])
    last = [ids[-1] if i % 2 else 0 for i, ids in enumerate(PROMPTS)]
    position = [len(ids) - 1 if i % 2 else -1 for i, ids in enumerate(PROMPTS)]
    rows = slots.empty_rows(6)._replace(
        token=jnp.array(last), position=jnp.array(position), budget=jnp.full(6, 1)
    )
    sampling_params = sampling.params(V, stop=())
    decode = jax.jit(
        lambda state: slots.decode(
            model.policy, params, state, jax.random.key(0), sampling_params, jnp.int32(9), steps=4
        )
    )
    after, chunk = decode(slots.Slots(rows, cache))
    assert chunk.drawn.tolist() == [0, 1] * 3
    for before, layer in zip(cache, after.cache, strict=True):
        changed = np.any(np.asarray(before["v"]) != np.asarray(layer["v"]), axis=(1, 3))
        np.testing.assert_array_equal(changed, np.arange(8)[None] == np.array(position)[:, None])


@pytest.mark.parametrize(
    ("prompts", "budgets", "message"),
    [
        ([[1], [2] * 9], None, "prompt 1 has 9 tokens; expected 1 to 8"),
        ([[1], []], None, "prompt 1 has 0 tokens"),
        (
            [[1], [2]],
            [[1], [25]],
            r"budgets\[1\] is \[25\]; .* each of the 1 rollouts of prompt 1, from 1 to 24",
        ),
        ([[1], [2]], [[1, 1], [2]], r"budgets\[0\] is \[1, 1\]; .* each of the 1 rollouts"),
    ],
)
def test_prompts_and_budgets_that_do_not_fit_are_named(make, prompts, budgets, message):
    with pytest.raises(ValueError, match=message):
        make()(prompts, [[0], [1]], budgets=budgets)


def test_polling_ends_the_sampling(make):
    """`poll` is called between chunks. Rollouts that ended before it raised are yielded."""
    sample, polls = make(2), iter([None, None, RuntimeError("stop")])

    def poll():
        if error := next(polls):
            raise error

    sampling_params, key = sampling.params(V, stop=()), jax.random.key(0)
    budgets = [[1] * 4] * len(PROMPTS)
    batches = sample.engine(
        sample.params,
        PROMPTS,
        IDS,
        key=key,
        sampling_params=sampling_params,
        budgets=budgets,
        poll=poll,
    )
    yielded = [next(batches), next(batches)]
    assert [len(batch.responses) for batch in yielded] == [2, 2]
    with pytest.raises(RuntimeError, match="stop"):
        next(batches)


def test_a_resize_holds_at_most_one_leaf_twice(make):
    """Each leaf of the cache is deleted after it is resized and before the next one is resized."""
    sample, leaves, kept = make(4, cache_lengths=(8, 16, 24, 32)), [], []

    def record_leaves(key, program, *args):
        if key.kind is ProgramKind.RESIZE:
            kept.append(sum(not leaf.is_deleted() for leaf in leaves))
            return program(*args)
        outputs = program(*args)
        if key.kind is ProgramKind.START:
            leaves[:] = jax.tree.leaves(outputs.cache)
        return outputs

    with sample.programs.watched(record_leaves):
        sample(PROMPTS[:1], [[0]])
    assert kept == [*range(len(leaves), 0, -1)]


def test_keys_of_any_implementation_are_accepted(make):
    """The engine derives a threefry key from a key of another implementation."""
    sample, sampling_params = make(), sampling.params(V, stop=(EOS,))
    seen = []
    for seed in (0, 0, 1):
        key = jax.random.key(seed, impl="rbg")
        ended = sample.engine(sample.params, PROMPTS, IDS, key=key, sampling_params=sampling_params)
        seen.append(by_id([r for batch in ended for r in batch.responses]))
    assert_same(seen[0], seen[1])
    assert any(len(a.tokens) != len(seen[2][i].tokens) for i, a in seen[0].items())


def test_sampling_params_of_another_vocabulary_are_refused(make):
    sample = make()
    ended = sample.engine(
        sample.params, [], [], key=jax.random.key(0), sampling_params=sampling.params(7, stop=())
    )
    with pytest.raises(
        ValueError, match="sampling_params was built for a vocabulary of 7 tokens; expected 32"
    ):
        next(ended)


@pytest.mark.parametrize("lengths", [(16, 8, 32), (16, 16, 32), (8, 30)])
def test_cache_lengths_have_to_ascend_to_the_longest_rollout(make, lengths):
    with pytest.raises(ValueError, match=r"cache_lengths is .* ascending .* at least 31"):
        make(2, cache_lengths=lengths)


PROCESS = """
import json, pathlib
from opsd_jax.config import loading
from opsd_jax.models import decoder
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout.layout import decode_layout
from opsd_jax.rollout import sampling
from opsd_jax.rollout.engine import Engine, EngineShape
from opsd_jax.parallel.mesh import abstract_of

model = decoder.from_config(loading.read("quickstart").model)
mesh = mesh_lib.make_mesh((2, 2, 2))
shapes = jax.eval_shape(model.init, jax.random.key(0))
shardings = mesh_lib.tree_shardings(mesh, model.rules, shapes)
params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
layout = decode_layout(model, abstract_of(params, shardings), mesh)
shape = EngineShape(8, 4, 8, 40)
engine = Engine(model, layout.abstract, layout.mesh, shape, cache_lengths=(16, 48))
prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(12)]
ids = [[2 * i, 2 * i + 1] for i in range(12)]
options = {
    "key": jax.random.key(3), "sampling_params": sampling.params(32, stop=(2,), temperature=0.9)
}
made = []
for ended in engine(layout.convert(params), prompts, ids, **options):
    made += [
        [r.prompt, r.member, r.stop, r.tokens.tolist(), r.model_logprobs.tolist()]
        for r in ended.responses
    ]
pathlib.Path(sys.argv[4], f"{processes}-{number}.json").write_text(json.dumps(made))
"""


@pytest.mark.slow
def test_two_processes_sample_the_same_rollouts_as_one(tmp_path):
    """Both processes return the rollouts in the same order, so they make the same decisions."""
    processes.run(PROCESS, str(tmp_path), processes=1, devices=8)
    processes.run(PROCESS, str(tmp_path), processes=2, devices=4)
    one, *two = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert two[0] == two[1]
    assert len(one) == 24
    for a, b in zip(one, two[0], strict=True):
        assert a[:4] == b[:4]
        np.testing.assert_allclose(a[4], b[4], atol=1e-5)


class Counter:
    """A policy whose cache counts the tokens it has seen: a state that has no length axis."""

    @staticmethod
    def forward(params, tokens, positions, cache=None):
        seen = cache["seen"] + jnp.sum(positions >= 0, axis=1)
        return seen[:, None, None].astype(jnp.float32), {"seen": seen}

    @staticmethod
    def unembed(params, hidden):
        return jnp.where(jnp.arange(64)[None] == hidden[..., :1].astype(jnp.int32), 0.0, -jnp.inf)

    @staticmethod
    def init_cache(batch, length):
        return {"seen": jnp.zeros(batch, jnp.int32)}


def test_every_token_is_fed_once():
    """With a recurrent state: each sampled token is the number of tokens before it."""
    from opsd_jax.policy import Model, Policy

    policy = Policy(Counter.forward, Counter.unembed, Counter.init_cache)
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    engine = Engine(Model(policy, lambda key: {}, (), 64), {}, mesh, EngineShape(2, 2, 8, 6))
    sampling_params, key = sampling.params(64, stop=()), jax.random.key(0)
    ids = [[0, 1], [2], [3]]
    prompts = [[7, 7, 7], [5], [1, 2, 3, 4, 5, 6, 7, 8]]
    ended = [
        r
        for e in engine({}, prompts, ids, key=key, sampling_params=sampling_params)
        for r in e.responses
    ]
    assert len(ended) == 4
    for r in ended:
        n = len(prompts[r.prompt])
        assert r.tokens.tolist() == list(range(n, n + 6))


def test_weights_are_cast_once_and_norms_are_not(config):
    """The rollouts equal those of a model that casts its weights in every step."""
    section = config.model.copy_and_resolve_references()
    section.update({"dtype": "bfloat16"})
    model = decoder.from_config(section)
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    params = jax.jit(model.init)(jax.random.key(1))
    abstract = abstract_of(params, mesh_lib.tree_shardings(mesh, model.rules, params))
    dtypes, rollouts = [], []
    for one in (model, model._replace(decode_params=lambda params: params)):
        layout = decode_layout(one, abstract, mesh)
        decoded = layout.convert(params)
        leaves = jax.tree_util.tree_leaves_with_path(decoded)
        dtypes.append({mesh_lib.path_name(path): leaf.dtype.name for path, leaf in leaves})
        engine = Engine(one, layout.abstract, mesh, EngineShape(8, 8, 8, BUDGET))
        sampling_params, key = sampling.params(V, stop=(EOS,)), jax.random.key(0)
        ended = engine(decoded, PROMPTS, IDS, key=key, sampling_params=sampling_params)
        rollouts.append(by_id([r for batch in ended for r in batch.responses]))
    for name, dtype in dtypes[0].items():
        assert dtype == ("float32" if "norm" in name else "bfloat16")
    assert {*dtypes[1].values()} == {"float32"}
    assert_same(*rollouts)
