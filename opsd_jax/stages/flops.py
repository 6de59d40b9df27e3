"""Counts the operations that the models of a stage need for an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from opsd_jax.policy import Model
from opsd_jax.training.stage import Batch

TRAINED = 3  # forward passes that take as long as a forward and a backward pass
# The same without the gradients of weights, which an adapter leaves out. Its own are few.
ADAPTED = 2


def of_update(model: Model, passes: Mapping[str, int]) -> Callable[[Batch], float] | None:
    """Returns a function that counts the model FLOPs of an update, given its batch.

    These are the operations of the algorithm: without padding, without what rematerialisation
    computes twice, and without the logits of prompts. Attention is counted causally.

    Args:
      model: the model.
      passes: for each sequence of the batch's rows, such as "teacher", the number of forward passes
        over it, such as `Parts.trained`, in which a backward pass is included.

    Returns:
      The function; None if the model does not count FLOPs.
    """
    flops = model.flops
    if flops is None:
        return None

    def of_batch(batch: Batch) -> float:
        total = 0.0
        for bucket in batch:
            rows, count = bucket["rows"], int(bucket["count"])
            predicted = float(rows["mask"][:count].sum())
            for name, number in passes.items():
                # A token at position p attends to p + 1 tokens, and padding, at -1, to none.
                attended = rows[name]["positions"][:count].astype(np.float64) + 1
                total += number * flops(float((attended > 0).sum()), attended.sum(), predicted)
        return total

    return of_batch
