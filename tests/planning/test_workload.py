"""A plan's assumptions about lengths, slots and microbatches, compared with simulations."""

import numpy as np
import pytest

from opsd_jax.planning import workload
from opsd_jax.rollout.pages import PagePool, PoolSizes
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages.packing import Packing


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.5, 0.8])
def test_lengths_follow_an_exponential_distribution_cut_off_at_the_budget(mean):
    """Compares the lengths with a million samples of an exponential with the same mean."""
    lengths = workload.response_lengths(2000, 8192, mean)
    assert np.all(np.diff(lengths) >= 0)
    assert lengths[0] >= 1
    assert lengths[-1] <= 8192
    assert lengths.mean() == pytest.approx(mean * 8192, rel=0.01)
    below_budget = lengths[lengths < 8192]
    scale = lengths.sum() / len(below_budget)  # the maximum-likelihood estimate with censoring
    samples = np.minimum(np.random.default_rng(0).exponential(scale, 1_000_000), 8192)
    assert samples.mean() == pytest.approx(mean * 8192, rel=0.02)
    quantiles = lambda values: np.quantile(values, [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(quantiles(lengths), quantiles(samples), rtol=0.03)


def test_with_a_mean_of_1_every_response_fills_its_budget():
    assert set(workload.response_lengths(7, 100, 1.0)) == {100}


@pytest.mark.parametrize(("count", "slots"), [(1, 4), (32, 32), (100, 7), (64, 1)])
def test_decode_steps_equal_a_simulation_step_by_step(count, slots):
    lengths = workload.response_lengths(count, 50, 0.4)
    queue = [int(n) for n in np.random.default_rng(0).permutation(lengths)]
    left, steps = [0] * slots, 0
    while queue or any(left):
        left = [n if n else queue.pop(0) if queue else 0 for n in left]
        left = [max(0, n - 1) for n in left]
        steps += 1
    assert workload.decode_steps(lengths, slots) == steps


def test_cache_reads_equal_the_sum_over_the_steps_of_every_response():
    """On average, a step also reads half of the token that it decodes."""
    lengths = workload.response_lengths(40, 400, 0.5)
    read_by_step = [np.arange(5, 5 + n) + 0.5 for n in lengths]
    assert workload.cache_tokens_read(5, lengths) == pytest.approx(sum(map(np.sum, read_by_step)))


@pytest.mark.parametrize(("group_size", "slots"), [(1, 5), (4, 8)])
def test_the_peak_of_the_pages_is_that_of_a_pool(monkeypatch, group_size, slots):
    """Simulates every chunk of a pool that has enough pages. Slots are refilled between chunks."""
    monkeypatch.setattr(workload, "STEPS_PER_CHUNK", 1)
    lengths = workload.response_lengths(32, 50, 0.4)
    order = np.random.default_rng(0).permutation(lengths).tolist()
    pool, peak = PagePool(PoolSizes(slots, 1, slots * 17, 17, 4)), 0
    waiting, active = list(range(32)), {}
    while waiting or active:
        assert pool.reserve({slot: 17 + done for slot, (_, done) in active.items()}) == []
        while waiting and pool.has_free_slot:
            prompt = waiting[0] // group_size
            active[pool.start(17, 66, prompt=prompt, shared=16)] = waiting.pop(0), 0
        peak = max(peak, len(np.unique(pool.table[pool.table < slots * 17])))
        for slot, (i, done) in list(active.items()):
            active[slot] = i, done + 1
            if done + 1 == order[i]:
                pool.free(slot)
                del active[slot]
    assert workload.peak_pages(16, lengths, group_size, slots, 4) == peak


def test_more_slots_fit_into_the_same_memory_than_rollouts_of_full_length():
    """RLVR of Qwen3-8B on a v5e-64: the pool has the memory of 256 rollouts of full length."""
    lengths = workload.response_lengths(2048, 16_384, 0.5)
    assert lengths.mean() == pytest.approx(8192, rel=0.01)
    sizes = PoolSizes(slots=256, shards=8, pages=256 * 72, width=72, page=256)
    apart, shared = (workload.slots_that_fit(sizes, 2048, lengths, size) for size in (1, 8))
    assert 1.7 * 256 <= apart < shared
    full = workload.slots_that_fit(sizes, 2048, np.full(2048, 16_384), 1)
    assert full == 256
    assert workload.slots_that_fit(PoolSizes(256), 2048, lengths, 8) is None


@pytest.mark.parametrize("packing", [None, Packing(1), Packing(4)])
@pytest.mark.parametrize("buckets", [(64,), (16, 32, 64), (20, 30, 40, 64)])
def test_microbatches_equal_those_of_a_packed_step(buckets, packing):
    targets = workload.response_lengths(30, 50, 0.5).tolist()
    rows = [{"student": [1] * 10, "response": [2] * n} for n in targets]
    shapes = [{"student": n} for n in buckets]
    batch = batch_lib.pack(
        rows, buckets=shapes, microbatch=4, capacity=32, pad_id=0, packing=packing
    )
    lengths = [{"student": 9 + n} for n in targets]
    packed = workload.packed(lengths, targets, shapes, 4, packing)
    assert packed.counts == [int(bucket["count"]) for bucket in batch]
    assert packed.useful == pytest.approx(batch_lib.useful_fraction([batch]))
    totals = [n * tokens for n, tokens in zip(packed.counts, packed.targets, strict=True)]
    expected = [int(bucket["rows"]["mask"].sum()) for bucket in batch]
    assert totals == pytest.approx(expected)
