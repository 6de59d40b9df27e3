"""A plan's assumptions about lengths, slots and microbatches, compared with simulations."""

import numpy as np
import pytest

from opsd_jax.planning import workload
from opsd_jax.stages import batch as batch_lib


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


@pytest.mark.parametrize("buckets", [(64,), (16, 32, 64), (20, 30, 40, 64)])
def test_microbatches_equal_those_of_a_packed_step(buckets):
    targets = workload.response_lengths(30, 50, 0.5).tolist()
    rows = [{"student": [1] * 10, "response": [2] * n} for n in targets]
    shapes = [{"student": n} for n in buckets]
    batch = batch_lib.pack(rows, buckets=shapes, microbatch=4, capacity=32, pad_id=0)
    lengths = [{"student": 9 + n} for n in targets]
    packed = workload.packed(lengths, targets, shapes, 4)
    assert packed.counts == [int(bucket["count"]) for bucket in batch]
    assert packed.useful == pytest.approx(batch_lib.useful_fraction([batch]))
    totals = [n * tokens for n, tokens in zip(packed.counts, packed.targets, strict=True)]
    expected = [int(bucket["rows"]["mask"].sum()) for bucket in batch]
    assert totals == pytest.approx(expected)
