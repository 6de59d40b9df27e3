"""Groups of rollouts that go on in the next training step, as arrays of fixed shapes.

The arrays are part of the training state: a checkpoint contains them, so a resumed run continues
the same rollouts.

Shapes: U groups, G rollouts per group, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.rollout.engine import RUNNING, Response

# "place", int32 [U]: place of the group's problem in the stream of problems; -1 for no group.
# "began", int32 [U]: the step in which its rollouts began.
# "stop", int32 [U, G]: reason for which a rollout stopped; RUNNING if it has not.
# "length", int32 [U, G]: number of its tokens.
# "tokens", int32 [U, G, L]; "sampling_logprobs" and "model_logprobs", float32 [U, G, L].
Carried = dict[str, np.ndarray]


class Group(NamedTuple):
    """The rollouts of one problem, some of which may not have ended.

    Attributes:
      place: place of the problem in the stream of problems.
      began: the step in which the rollouts began.
      responses: the G responses so far; () before the first step.
    """

    place: int
    began: int
    responses: Sequence[Response] = ()


def empty(groups: int, group_size: int, response_tokens: int) -> Carried:
    """Returns the arrays for no group, with room for `groups`."""
    shape = groups, group_size
    long = *shape, response_tokens
    return {
        "place": np.full(groups, -1, np.int32),
        "began": np.zeros(groups, np.int32),
        "stop": np.full(shape, RUNNING, np.int32),
        "length": np.zeros(shape, np.int32),
        "tokens": np.zeros(long, np.int32),
        "sampling_logprobs": np.zeros(long, np.float32),
        "model_logprobs": np.zeros(long, np.float32),
    }


def pack(groups: Sequence[Group], like: Carried) -> Carried:
    """Returns groups as arrays with the shapes of `like`."""
    arrays = empty(*like["tokens"].shape)
    for u, group in enumerate(groups):
        arrays["place"][u], arrays["began"][u] = group.place, group.began
        for g, response in enumerate(group.responses):
            n = len(response.tokens)
            arrays["stop"][u, g], arrays["length"][u, g] = response.stop, n
            for name in ("tokens", "sampling_logprobs", "model_logprobs"):
                arrays[name][u, g, :n] = getattr(response, name)
    return arrays


def unpack(carried: Carried) -> list[Group]:
    """Returns the groups in the arrays, in the order of `pack`."""

    def response(u: int, g: int) -> Response:
        filled = u, g, slice(0, int(carried["length"][u, g]))
        return Response(
            prompt=u,
            member=g,
            tokens=carried["tokens"][filled],
            sampling_logprobs=carried["sampling_logprobs"][filled],
            model_logprobs=carried["model_logprobs"][filled],
            stop=int(carried["stop"][u, g]),
        )

    return [
        Group(
            int(carried["place"][u]),
            int(carried["began"][u]),
            [response(u, g) for g in range(carried["stop"].shape[1])],
        )
        for u in range(len(carried["place"]))
        if carried["place"][u] >= 0
    ]
