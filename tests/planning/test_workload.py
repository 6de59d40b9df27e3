"""What a plan assumes of lengths, slots and microbatches, against runs of them."""

import numpy as np
import pytest

from opsd_jax.planning import workload
from opsd_jax.stages import batch as batch_lib


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.5, 0.8])
def test_lengths_are_those_of_an_exponential_that_is_cut_off(mean):
    """Against a million that are drawn from one whose scale gives that mean."""
    lengths = workload.lengths(2000, 8192, mean)
    assert np.all(np.diff(lengths) >= 0)
    assert lengths[0] >= 1
    assert lengths[-1] <= 8192
    assert lengths.mean() == pytest.approx(mean * 8192, rel=0.01)
    inside = lengths[lengths < 8192]
    scale = lengths.sum() / len(inside)  # the estimate of an exponential's from what is cut off
    drawn = np.minimum(np.random.default_rng(0).exponential(scale, 1_000_000), 8192)
    assert drawn.mean() == pytest.approx(mean * 8192, rel=0.02)
    of_length = lambda values: np.quantile(values, [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(of_length(lengths), of_length(drawn), rtol=0.03)


def test_responses_of_their_whole_budget():
    assert set(workload.lengths(7, 100, 1.0)) == {100}


@pytest.mark.parametrize(("count", "slots"), [(1, 4), (32, 32), (100, 7), (64, 1)])
def test_slots_are_filled_again(count, slots):
    """Step by step."""
    lengths = workload.lengths(count, 50, 0.4)
    queue = [int(n) for n in np.random.default_rng(0).permutation(lengths)]
    left, steps = [0] * slots, 0
    while queue or any(left):
        left = [n if n else queue.pop(0) if queue else 0 for n in left]
        left = [max(0, n - 1) for n in left]
        steps += 1
    assert workload.decode_steps(lengths, slots) == steps


def test_what_decoding_reads_of_a_cache():
    """The tokens in it at each step of each response, one by one: on average half of one that
    is on its way.
    """
    lengths = workload.lengths(40, 400, 0.5)
    there = [np.arange(5, 5 + n) + 0.5 for n in lengths]
    assert workload.reads(5, lengths) == pytest.approx(sum(map(np.sum, there)))


@pytest.mark.parametrize("buckets", [(64,), (16, 32, 64), (20, 30, 40, 64)])
def test_microbatches_are_those_of_a_step(buckets):
    targets = workload.lengths(30, 50, 0.5).tolist()
    rows = [{"student": [1] * 10, "response": [2] * n} for n in targets]
    shapes = [{"student": n} for n in buckets]
    batch = batch_lib.pack(rows, buckets=shapes, microbatch=4, capacity=32, pad_id=0)
    lengths = [{"student": 9 + n} for n in targets]
    packed = workload.packed(lengths, targets, shapes, 4)
    assert packed.counts == [int(bucket["count"]) for bucket in batch]
    assert packed.useful == pytest.approx(batch_lib.useful_fraction([batch]))
    in_all = [n * tokens for n, tokens in zip(packed.counts, packed.targets, strict=True)]
    of_batch = [int(bucket["rows"]["mask"].sum()) for bucket in batch]
    assert in_all == pytest.approx(of_batch)
