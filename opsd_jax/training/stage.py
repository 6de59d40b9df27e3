"""`Stage`: the interface between the training loop and an algorithm.

A stage is a `Stage`: it makes the batches of each step on the host, and it has a loss that runs on
the device. `run_stage` does the rest: the train step, sharding, metrics, checkpoints, signals. This
minimal stage fits the slope of a line:

    def pack(x_N):  # one bucket of up to 4 microbatches of 8 rows each
        x_Mxm = np.zeros((4, 8), np.float32)
        x_Mxm[: len(x_N) // 8] = x_N.reshape(-1, 8)
        return ({"count": np.int32(len(x_N) // 8), "rows": {"x": x_Mxm}},)

    def batches(step, params):
        x_N = np.random.default_rng(step).normal(size=16).astype(np.float32)
        return StepData([pack(x_N)], {"tokens": 16.0})

    def loss(params, teacher, microbatch):
        error_m = params["slope"] * microbatch["x"] - 2 * microbatch["x"]
        return jnp.sum(error_m**2), (jnp.float32(error_m.size), {})

    Stage(steps=10, updates=1, batches=batches, empty_batch=pack(np.zeros(0)), loss=loss)

stages/sft.py is the shortest stage of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from opsd_jax.policy import Params
from opsd_jax.rollout.decoding import Decoding
from opsd_jax.rollout.diagnosis import Diagnosis

# The rows of one optimizer update, as a tuple of buckets. A bucket holds up to M microbatches of m
# rows each, all of one shape:
#   {"count": int32 [], the number of microbatches in use, at most M;
#    "rows": a pytree of arrays [M, m, ...]}
# The train step computes the first `count` microbatches and skips the others, so `count` may differ
# in every batch, but the shapes may not. Buckets of one batch may differ in shape, for example in
# their padded length. `stages.batch.pack` makes batches from rows of token ids.
Batch = tuple[dict[str, Any], ...]

# One microbatch, as the loss gets it: the tree `rows` of a bucket, with arrays [m, ...].
Microbatch = dict[str, Any]

# A sum, float32 of any shape, and its weight, float32 []. The loop adds up both over microbatches
# and updates, and reports their quotient.
Metric = tuple[jax.Array, jax.Array]


class Teacher(NamedTuple):
    """The functions that make and update the teacher's parameters in the training state.

    Both functions are pure and run inside jit.

    Attributes:
      init: `params -> teacher`, from the parameters at the start of the stage. Copies what it
        returns, because the parameters are donated.
      update: `(teacher, params, number, applied) -> teacher`, called after each optimizer update.
        `params` are the parameters after the update, `number` (int32 []) counts updates from 1, and
        `applied` (bool []) is False if the update was skipped: because no row of its batch was
        active, or because its gradient was not finite. None: the teacher never changes.
    """

    init: Callable[[Params], Params]
    update: Callable[[Params, Params, jax.Array, jax.Array], Params] | None = None


class StepData(NamedTuple):
    """The data of one training step, as NumPy arrays and Python values.

    Attributes:
      batches: one batch per optimizer update, each with the shapes of `Stage.empty_batch`.
      metrics: metrics that the host computes, by name. `tokens` is required: the number of sampled
        or read tokens, from which the progress bar computes tokens per second.
      groups: a JSON-ready record of each problem's group of rollouts, with the number of correct
        ones. They are written to `groups.jsonl`, from which a later run can select problems.
      diagnose: name of the stage -> a description of the step's rollouts. It is shown for the first
        steps, and if the run stops because no step has a gradient. None for a step without any.
      carried: what `Stage.batches` gets in the next step, arrays with the shapes of
        `Stage.carried`; None for a stage that carries nothing over.
      decoding: the memory traffic and the time of the step's rollouts; None for a step without any.
    """

    batches: list[Batch]
    metrics: dict[str, float]
    groups: Sequence[dict[str, Any]] = ()
    diagnose: Callable[[str], Diagnosis] | None = None
    carried: Any = None
    decoding: Decoding | None = None


class Stage(NamedTuple):
    """A training stage: the batches, the loss and the teacher of an algorithm.

    Attributes:
      steps: number of training steps.
      updates: number of optimizer updates in each step.
      batches: `(step, params) -> StepData` with `updates` batches. It runs on the host, on every
        host of the run, and depends on nothing but its arguments: every host gets the same
        batches, and a resumed run gets those of a run that was never interrupted. `params` are the
        current parameters, on the device; do not keep a reference, because the train step donates
        them. It runs under `jax.transfer_guard("disallow")`, so move arrays explicitly, with
        `jax.device_put` and `jax.device_get`. It may raise `signals.Interrupted`; the loop then
        saves a checkpoint, and the resumed run calls it again for the same step.
      empty_batch: a batch with `count` 0 in each bucket. The train step is compiled for its shapes
        and dtypes. The mesh's `data` and `fsdp` axes split the m rows of a microbatch, so their
        product divides m.
      loss: `(params, teacher, microbatch) -> (sum, (weight, metrics))`. Pure; it runs inside jit,
        under the training mesh. `sum` (float32 []) is the sum of the losses of the microbatch, and
        `weight` (float32 []) is its divisor: the train step adds up both over all microbatches and
        devices, and divides once. An update of total weight 0 changes nothing. The microbatch has
        the rows of one part of the mesh axis `data`, so all results must be sums over its rows: a
        term that does not depend on the rows is multiplied by their number. Specs in the loss do
        not name "data"; `opsd_jax.parallel.mesh` has `rows_in_context` for a `partition`, and
        `constrain` and `on_each_device`, which leave it out.
        `metrics` maps names to `Metric`s; the train step adds `loss`, `grad_norm`, `empty` and
        `nonfinite`.
      flops: `batch -> FLOPs`, the operations that the models need for an update with this batch, in
        host memory: what the figures of a step's speed count. None: unknown.
      carried: what steps carry over to the next one, in host memory: a pytree of NumPy arrays of
        fixed shapes, such as unfinished rollouts. This is its value before the first step. With it,
        `batches` is `(step, params, carried) -> StepData`, and checkpoints contain it. None: steps
        carry nothing over.
      summary: `means -> metrics`, computes the metrics that are written, all of them numbers, from
        the quotients of the step's `Metric`s. By default these are written.
      teacher: how to make and update the parameters that the loss gets as `teacher`; if None, the
        loss gets None.
      joined: `(base, adapter, draw=None) -> params`, for a stage that trains an adapter: the
        parameters of the state and of the teacher are adapters of a base model, and the loss gets
        `params` in place of each. The adapter is None for a stage without teacher parameters: its
        teacher is the base model. `draw` has integers that select what dropout sets to zero; it is
        None for the teacher. None: the loss gets the parameters of the state.
    """

    steps: int
    updates: int
    batches: Callable[..., StepData]
    empty_batch: Batch
    loss: Callable[
        [Params, Params | None, Microbatch],
        tuple[jax.Array, tuple[jax.Array, dict[str, Metric]]],
    ]
    teacher: Teacher | None = None
    joined: Callable[..., Params] | None = None
    summary: Callable[[dict[str, Any]], dict[str, float]] = lambda means: means
    carried: Any = None
    flops: Callable[[Batch], float] | None = None
