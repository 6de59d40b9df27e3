"""Speculation: drafts, the same rollouts in fewer forward passes, and what it refuses."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.mesh import abstract_of
from opsd_jax.parallel.program import ProgramKind
from opsd_jax.policy import Model, Policy
from opsd_jax.rollout import programs as programs_lib
from opsd_jax.rollout import sampling, slots, speculation
from opsd_jax.rollout.engine import STOP_EOS, STOP_LENGTH, Engine, EngineShape
from opsd_jax.rollout.layout import decode_layout

EOS, V, BUDGET = 2, 32, 24
PROMPTS = [[1, 9, 20], [1, 5, 6, 7, 8, 3], [4], [1, 7], [9, 9, 4], [3, 1, 2, 30, 7, 7, 7, 1]]
IDS = [[4 * i + j for j in range(4)] for i in range(len(PROMPTS))]


class Sample:
    """Samples with an engine; `calls` has a (kind, active slots, forward passes) per chunk."""

    def __init__(self, model, params, shape, mesh_shape=(1, 1, 1), **options):
        mesh = mesh_lib.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
        placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, model.rules, params))
        layout = decode_layout(
            model, abstract_of(placed, jax.tree.map(lambda x: x.sharding, placed)), mesh
        )
        self.programs, self.calls = {}, []
        with mock.patch.object(aot, "compiled", self.compile):
            self.engine = Engine(model, layout.abstract, mesh, shape, **options)
        self.params = layout.convert(placed)

    def compile(self, key, lowered):
        program = lowered.compile()
        self.programs[key] = lowered.as_text(), program

        def call(*args):
            if key.kind not in (ProgramKind.DECODE, ProgramKind.SPECULATE):
                return program(*args)
            active = int((args[1].rows.position >= 0).sum())
            outputs = program(*args)
            self.calls.append((key.kind, active, outputs[1].forward_passes()))
            return outputs

        return call

    def __call__(self, prompts=PROMPTS, ids=IDS, budgets=None, stop=(EOS,), seed=5, **options):
        """Returns the response of each rollout, by rollout id."""
        self.calls.clear()
        sampling_params = sampling.params(self.engine._vocab_size, stop=stop, **options)
        ended = self.engine(
            self.params,
            prompts,
            ids,
            key=jax.random.key(seed),
            sampling_params=sampling_params,
            budgets=budgets,
        )
        batches = list(ended)
        assert sum(batch.steps for batch in batches) == sum(steps for *_, steps in self.calls)
        return {ids[r.prompt][r.member]: r for batch in batches for r in batch.responses}

    def apart(self, **options):
        """As a call, but as many rollouts at a time as there are slots, so that none waits."""
        size = min(self.engine.shape.slots, 24)
        found, calls = {}, []
        for start in range(0, 24, size):
            some = [[i for i in own if start <= i < start + size] for own in IDS]
            kept = [i for i, own in enumerate(some) if own]
            part = {"prompts": [PROMPTS[i] for i in kept], "ids": [some[i] for i in kept]}
            found |= self(**part, **options)
            calls += self.calls
        self.calls[:] = calls
        return found

    @property
    def steps(self):
        return sum(steps for *_, steps in self.calls)

    @property
    def kinds(self):
        return {kind for kind, *_ in self.calls}


@pytest.fixture(scope="module")
def make(model, params):
    """A function `(slots, speculation, mesh_shape, ...) -> Sample` that keeps what it compiled."""

    @functools.cache
    def make(slots=8, guesses=0, mesh_shape=(1, 1, 1), lengths=None):
        shape = EngineShape(slots, int(np.prod(mesh_shape[:2])), 8, BUDGET, speculation=guesses)
        return Sample(model, params, shape, mesh_shape, cache_lengths=lengths)

    return make


@pytest.fixture
def always(monkeypatch):
    """Speculates with any number of active slots, if no rollout waits."""
    few = property(lambda shape: shape.slots if shape.speculation else 0)
    monkeypatch.setattr(EngineShape, "few", few)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for i in a:
        np.testing.assert_array_equal(a[i].tokens, b[i].tokens)
        np.testing.assert_allclose(a[i].model_logprobs, b[i].model_logprobs, atol=1e-4)
        np.testing.assert_allclose(a[i].sampling_logprobs, b[i].sampling_logprobs, atol=1e-4)
        assert a[i].stop == b[i].stop


def expected_draft(text, guesses):
    """The definition of `drafts`, written as a search."""
    text = [int(token) for token in text]
    for size in range(speculation.NGRAM, 0, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                follows = text[end:]
                return [follows[i % len(follows)] for i in range(guesses)]
    return [text[-1]] * guesses


def test_drafts_continue_the_last_tokens_as_an_earlier_occurrence():
    rng = np.random.default_rng(0)
    history = rng.integers(0, 3, (400, 24), np.int32)
    position = rng.integers(-1, 24, 400).astype(np.int32)
    found = np.asarray(jax.jit(speculation.drafts, static_argnums=2)(history, position, 5))
    assert ((found >= 0) & (found < 3)).all()  # also for empty slots
    for text, last, draft in zip(history, position, found, strict=True):
        if last >= 0:
            assert draft.tolist() == expected_draft(text[: last + 1], 5)


def test_drafts_continue_a_period_for_any_number_of_tokens():
    history = np.array([[7, 8, 9, 7, 8, 9, 7, 0, 0, 0], [1, 2, 3, 4, 5, 6, 5, 5, 5, 5]], np.int32)
    found = speculation.drafts(history, np.array([6, 4], np.int32), 7)
    assert found.tolist() == [[8, 9, 7, 8, 9, 7, 8], [5] * 7]


GREEDY = {"temperature": 0.0, "stop": ()}
REPETITIVE = {"temperature": 0.4, "forbidden": range(6, V), "stop": (EOS, 5)}


@pytest.mark.parametrize("count", [1, 8, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, GREEDY, REPETITIVE], ids=["plain", "greedy", "repetitive"])
def test_speculation_changes_no_rollout(make, always, count, options):
    """Ids and stops are equal, log-probabilities to rounding, and forward passes are fewer."""
    ordinary, speculative = make(8), make(count, 3)
    expected = ordinary.apart(**options)
    assert_same(speculative.apart(**options), expected)
    assert speculative.kinds == {ProgramKind.SPECULATE}
    if count == 1:
        assert speculative.steps < sum(len(r.tokens) for r in expected.values())
    if count == 8:
        assert speculative.steps < ordinary.steps


@pytest.mark.parametrize(
    "mesh_shape", [(8, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_eight_devices_sample_the_same_rollouts(make, always, mesh_shape):
    sample = make(8, 3, mesh_shape)
    assert_same(sample.apart(**REPETITIVE), make(8).apart(**REPETITIVE))
    assert sample.kinds == {ProgramKind.SPECULATE}


@pytest.mark.parametrize("guesses", [1, 30])
def test_the_number_of_guesses_changes_no_rollout(make, always, guesses):
    assert_same(make(8, guesses).apart(), make(8).apart())


def test_chunks_and_cache_lengths_change_no_rollout(make, always, monkeypatch):
    """Chunks end in the middle of the text, and the cache grows and shrinks between them."""
    expected = make(8)()
    monkeypatch.setattr(programs_lib, "STEPS_PER_CHUNK", 3)
    sample = make(4, 2, lengths=(16, 32))
    assert_same(sample(), expected)
    assert sample.kinds == {ProgramKind.DECODE, ProgramKind.SPECULATE}
    assert_same(sample.apart(), expected)


def test_every_rollout_has_its_own_budget(make, always):
    """A guess may reach past the budget, and past the end of the longest cache."""
    budgets = [[1 + (5 * i + j) % 7 for j in range(4)] for i in range(len(PROMPTS))]
    assert_same(make(64, 3)(budgets=budgets, **GREEDY), make(8)(budgets=budgets, **GREEDY))
    longest = {"prompts": [[7] * 8], "ids": [[0, 1, 2]]}
    assert_same(make(8, 3)(**longest, **GREEDY), make(8)(**longest, **GREEDY))


def test_restricted_sampling_changes_no_rollout(make, always):
    options = {"stop": (EOS, 5, 11), "top_k": 8, "top_p": 0.9, "forbidden": (3, 7)}
    assert_same(make(8, 3).apart(**options), make(8).apart(**options))


def test_rollouts_in_8_bits_are_the_same(model, params, always):
    quantised = model.quantised(QuantisationOptions(weights="int8", cache="int8"))
    layout = decode_layout(quantised, *on_one_device(model, params))
    arguments = {"key": jax.random.key(5), "sampling_params": sampling.params(V, **GREEDY)}
    placed, found = layout.convert(params), []
    for guesses in (0, 3):
        shape = EngineShape(8, 8, 8, BUDGET, speculation=guesses)
        engine = Engine(quantised, layout.abstract, layout.mesh, shape)
        batches = list(engine(placed, PROMPTS, [[i] for i in range(6)], **arguments))
        found.append({(r.prompt, r.member): r for b in batches for r in b.responses})
        steps = sum(batch.steps for batch in batches)
    assert_same(*found)
    assert steps <= BUDGET


def on_one_device(model, params):
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    return abstract_of(params, mesh_lib.tree_shardings(mesh, model.rules, params)), mesh


def toy(next_logits):
    """A model without parameters whose logits, an array [V, V], depend on the last token alone."""
    table_VxV = np.asarray(next_logits, np.float32)

    def forward(params, tokens, positions, cache=None):
        return jnp.asarray(table_VxV)[tokens], cache

    def init_cache(batch, length):
        return {"unused": jnp.zeros((batch, length))}

    policy = Policy(forward, lambda params, hidden: hidden, init_cache)
    return Model(policy, lambda key: {}, (), len(table_VxV))


def counter(size):
    """A model that certainly continues token i with i + 1, and the last one with 0."""
    return toy(np.where(np.roll(np.eye(size), 1, axis=1) > 0, 0.0, -np.inf))


def test_right_guesses_save_forward_passes():
    """Once a text has repeated itself, a pass samples all of its guesses and one more token."""
    prompt = [0, 1, 2, 3, 4, 5, 6, 7, 0]
    sample = Sample(counter(8), {}, EngineShape(1, 1, 9, 21, speculation=4))
    (response,) = sample([prompt], [[0]], stop=()).values()
    assert response.tokens.tolist() == [(i + 1) % 8 for i in range(21)]
    assert response.stop == STOP_LENGTH
    np.testing.assert_allclose(response.model_logprobs, 0, atol=1e-6)
    assert sample.calls == [(ProgramKind.SPECULATE, 1, 5)]  # 4 passes of 5 tokens, and the last
    # A token takes 4 bytes of the cache, and the model has no weights.
    assert sample.engine.decoding.bytes == 4 * (8 + 13 + 18 + 23 + 28)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_stop_token_among_right_guesses_ends_the_response(at):
    prompt = [0, 1, 2, 3, 4, 5, 6, 7, 0]
    sample = Sample(counter(8), {}, EngineShape(1, 1, 9, 21, speculation=4))
    (response,) = sample([prompt], [[0]], stop=(at,)).values()
    assert response.tokens.tolist() == list(range(1, at + 1))
    assert len(response.model_logprobs) == len(response.sampling_logprobs) == at
    assert response.stop == STOP_EOS
    assert sample.steps == -(-at // 5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_have_the_distribution_of_the_model(temperature):
    """Pairs of consecutive tokens, whose guesses are often right and often wrong: chi-square."""
    S, size = 6_000, 4
    logits = np.random.default_rng(1).normal(size=(size, size))
    model = toy(logits)
    history = np.tile(np.array([[0, 1, 2, 0, 3, 1, 0, 0, 0, 0, 0]], np.int32), (S, 1))
    rows = slots.empty_rows(S)._replace(
        token=jnp.full(S, 1),
        position=jnp.full(S, 5),
        rollout_id=jnp.arange(S),
        budget=jnp.full(S, 3),
    )
    sampling_params = sampling.params(size, stop=(), temperature=temperature)
    decode = jax.jit(
        lambda rows, history: speculation.decode(
            model.policy,
            {},
            slots.Slots(rows, {}),
            jax.random.key(3),
            sampling_params,
            history,
            steps=8,
            guesses=2,
        )
    )
    _, chunk = decode(rows, history)
    assert (chunk.drawn == 3).all()
    assert chunk.steps == 3  # at least one row had no right guess
    p = np.exp(logits / temperature)
    p /= p.sum(axis=1, keepdims=True)
    triples = np.asarray(chunk.tokens)[:3]
    counts = np.zeros((size,) * 3)
    np.add.at(counts, tuple(triples), 1)
    expected = p[1][:, None, None] * p[:, :, None] * p[None]
    both_right = (triples[0] == 2) & (triples[1] == 0)  # the first guesses are 2, 0
    assert 0.01 < both_right.mean() < 0.5
    often = expected * S >= 5
    wanted = expected[often] / expected[often].sum() * counts[often].sum()
    assert stats.chisquare(counts[often], wanted).pvalue > 1e-3


def test_the_engine_speculates_while_few_slots_are_active(make):
    """An ordinary chunk ends when 2 of 8 slots are active and no rollout waits."""
    sample = make(8, 3)
    assert sample.engine.shape.few == 2
    budgets = [[2 + 3 * i + j for j in range(4)] for i in range(len(PROMPTS))]
    expected = make(8)(budgets=budgets, stop=())
    assert_same(sample(budgets=budgets, stop=()), expected)
    kinds = [kind for kind, *_ in sample.calls]
    first = kinds.index(ProgramKind.SPECULATE)
    assert set(kinds[:first]) == {ProgramKind.DECODE}
    assert set(kinds[first:]) == {ProgramKind.SPECULATE}
    assert [active for _, active, _ in sample.calls][first] <= 2
    assert all(active > 2 for _, active, _ in sample.calls[:first])
    ordinary = make(8)
    ordinary(budgets=budgets, stop=())
    assert sample.steps <= ordinary.steps


@pytest.mark.parametrize(
    ("slot_count", "guesses", "few"), [(128, 4, 25), (128, 0, 0), (3, 4, 1), (8, 1, 4)]
)
def test_few_slots_have_no_more_tokens_per_pass_than_a_step_of_all(slot_count, guesses, few):
    assert EngineShape(slot_count, 1, 8, 8, speculation=guesses).few == few


def test_without_speculation_the_decode_programs_are_the_same(make):
    """They are those of an engine that speculates, which has one more program per length."""
    off, on = make(8).programs, make(8, 3).programs
    assert not [key for key in off if key.kind is ProgramKind.SPECULATE]
    assert {key for key in on if key.kind is not ProgramKind.SPECULATE} == off.keys()
    for key in off:
        assert off[key][0] == on[key][0], key  # before optimisation


def test_the_cache_is_updated_in_place(model, params):
    sample = Sample(model, params, EngineShape(8, 8, 8, 112, speculation=3))
    (program,) = (p for key, (_, p) in sample.programs.items() if key.kind is ProgramKind.SPECULATE)
    assert program.memory_analysis().alias_size_in_bytes >= sample.engine.cache_bytes


@pytest.mark.parametrize("guesses", [-1, 32])
def test_a_number_of_guesses_out_of_bounds_is_refused(guesses):
    with pytest.raises(ValueError, match=f"speculation is {guesses}; expected 1 to 31 guesses"):
        Sample(counter(8), {}, EngineShape(1, 1, 8, 8, speculation=guesses))


def test_models_that_cannot_speculate_are_refused():
    shape = EngineShape(1, 1, 8, 8, speculation=2)
    model = counter(8)
    with pytest.raises(ValueError, match=r"is paged \(`Model.ragged`\)"):
        Sample(model._replace(ragged=True), {}, shape)
    recurrent = model.policy._replace(init_cache=lambda batch, length: jnp.zeros((batch, 4)))
    with pytest.raises(ValueError, match="a recurrent state, which cannot forget a wrong guess"):
        Sample(model._replace(policy=recurrent), {}, shape)
    Sample(model._replace(policy=recurrent), {}, shape._replace(speculation=0))
