"""Rollouts that go on in the next step, as arrays."""

import numpy as np

from opsd_jax.rollout import carry
from opsd_jax.rollout.engine import NO_TOKENS, RUNNING, STOP_EOS, Response


def response(group, member, length, stop):
    rng = np.random.default_rng(length)
    tokens, logprobs = rng.integers(0, 32, length).astype(np.int32), rng.random((2, length))
    return Response(group, member, tokens, *(-logprobs).astype(np.float32), stop)


def test_packed_groups_are_unpacked():
    groups = [
        carry.Group(7, 2, [response(0, 0, 5, STOP_EOS), response(0, 1, 3, RUNNING)]),
        carry.Group(9, 3, [response(1, 0, 8, RUNNING), Response(1, 1, *NO_TOKENS, RUNNING)]),
    ]
    arrays = carry.pack(groups, carry.empty(3, 2, 8))
    for group, expected in zip(carry.unpack(arrays), groups, strict=True):
        assert group[:2] == expected[:2]
        for a, b in zip(group.responses, expected.responses, strict=True):
            assert (a.prompt, a.member, a.stop) == (b.prompt, b.member, b.stop)
            for field in ("tokens", "sampling_logprobs", "model_logprobs"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    for name, array in carry.empty(3, 2, 8).items():
        assert (arrays[name].shape, arrays[name].dtype) == (array.shape, array.dtype)
    assert carry.unpack(carry.empty(3, 2, 8)) == []
