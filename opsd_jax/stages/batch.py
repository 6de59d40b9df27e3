"""From ragged rows to batches of a few fixed shapes, and the scoring of responses in them.

A batch is a tuple of buckets, one a shape: `{"count": n, "rows": arrays [M, m, ...]}`. Of its M
microbatches of m rows the first n are live, and the train step runs those alone: rows that a gate
dropped cost nothing, and no number of rows means another program.

A row is a dict with the ids of its `response` and of the prompts that it is scored from: `student`,
and `teacher` where there is one. A sequence is prompt and response; of its n tokens the first n - 1
are computed, each of which predicts the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.losses import Head
from opsd_jax.policy import Params, Policy
from opsd_jax.training.stage import Batch, Microbatch

Row = Mapping[str, Any]
Lengths = Mapping[str, int]  # of a row's sequences: {"student": 2048, "teacher": 3072}
Inserts = Sequence[tuple[int, Sequence[int]]]  # (index in the response, ids to stand before it)


def pack(
    rows: Sequence[Row],
    *,
    buckets: Sequence[Lengths],
    microbatch: int,
    capacity: int,
    per_token: Sequence[str] = (),
    per_row: Sequence[str] = (),
    pad_id: int,
) -> Batch:
    """Rows as microbatches of `collate`, with as little padding as there can be.

    Rows of a length stand together, and a microbatch has the shape of its longest row. That of the
    shortest rows is filled up with empty ones.

    Args:
      rows: at most `capacity`.
      buckets: the shapes, ascending: padded lengths of the sequences.
      microbatch: rows m of a microbatch.
      capacity: the most rows that a batch can have. It fixes M = ceil(capacity / m).
      per_token, per_row, pad_id: as in `collate`.

    Raises:
      ValueError: a row fits no bucket, or there are more rows than `capacity`.
    """
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows for a batch of capacity {capacity}.")
    lengths = [{name: _computed(row, name) for name in buckets[0]} for row in rows]
    batch = []
    for bucket, parts in zip(buckets, arranged(lengths, buckets, microbatch), strict=True):
        members = [[rows[i] for i in part] for part in parts]
        empty: list[list[Row]] = [[]] * (-(-capacity // microbatch) - len(members))
        collated = [
            collate(
                part,
                bucket,
                microbatch=microbatch,
                per_token=per_token,
                per_row=per_row,
                pad_id=pad_id,
            )
            for part in members + empty
        ]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *collated)
        batch.append({"count": np.int32(len(members)), "rows": stacked})
    return tuple(batch)


def arranged(
    lengths: Sequence[Lengths], buckets: Sequence[Lengths], microbatch: int
) -> list[list[list[int]]]:
    """The microbatches of each bucket, as numbers of rows of these lengths; raises as `pack`."""
    chosen = [first_that_holds(buckets, needed) for needed in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (chosen[i], lengths[i]["student"]))
    # From the longest down: no other way to cut them needs less padding.
    parts = [order[max(0, end - microbatch) : end] for end in range(len(order), 0, -microbatch)]
    return [[part for part in parts if chosen[part[-1]] == b] for b in range(len(buckets))]


def first_that_holds(buckets: Sequence[Lengths], needed: Lengths) -> int:
    """The first bucket into which a row of these lengths goes; ValueError if there is none."""
    for b, bucket in enumerate(buckets):
        if all(needed[name] <= size for name, size in bucket.items()):
            return b
    raise ValueError(f"a row of {dict(needed)} tokens; the longest bucket holds {buckets[-1]}.")


def _computed(row: Row, name: str) -> int:
    """The tokens of a row's sequence that are computed: all but the last."""
    inserted = sum(len(ids) for _, ids in row.get(f"{name}/inserts", ()))
    return len(row[name]) + len(row["response"]) + inserted - 1


def _sequence(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a row's sequence, and the columns that predict those of its response: it may
    have others inserted.
    """
    prompt = np.asarray(row[name], np.int32)
    if not len(prompt):
        raise ValueError(f"the prompt {name!r} is empty; expected one token at least.")
    response = np.asarray(row["response"], np.int32)
    columns = len(prompt) - 1 + np.arange(len(response), dtype=np.int32)
    if inserts := row.get(f"{name}/inserts"):
        places = [at for at, ids in inserts for _ in ids]
        columns += np.searchsorted(places, np.arange(len(response)), side="right").astype(np.int32)
        response = np.insert(response, places, [token for _, ids in inserts for token in ids])
    return np.concatenate([prompt, response]), columns


def collate(
    rows: Sequence[Row],
    lengths: Lengths,
    *,
    microbatch: int,
    per_token: Sequence[str] = (),
    per_row: Sequence[str] = (),
    pad_id: int,
) -> Microbatch:
    """The arrays of up to m = `microbatch` rows. Rows beyond the given ones are all padding.

    What belongs to a response's token stands in the column of the student's sequence that predicts
    it: the logits there are of that token.

    Args:
      rows: with `Inserts` into the teacher's copy of the response as "teacher/inserts", if any.
      lengths: padded lengths T of the sequences; "student" first.
      per_token: names of values with a number a response token.
      per_row: names of values with one number.
      pad_id: fills arrays of tokens.

    Returns:
      For each sequence, under its name, int32 `tokens` and `positions` [m, T]; for others than the
      student's `columns` [m, T of the student's], where each finds what it predicts too. `targets`
      int32 and `mask` bool [m, T]: the tokens of the response. The other values as float32 [m, T]
      and [m], 0 where there is nothing.
    """
    shape = microbatch, lengths["student"]
    arrays: Microbatch = {
        "targets": np.full(shape, pad_id, np.int32),
        "mask": np.zeros(shape, bool),
        **{name: np.zeros(shape, np.float32) for name in per_token},
        **{name: np.zeros(microbatch, np.float32) for name in per_row},
    }
    for name, length in lengths.items():
        arrays[name] = {
            "tokens": np.full((microbatch, length), pad_id, np.int32),
            "positions": np.full((microbatch, length), -1, np.int32),
        }
        if name != "student":
            arrays[name]["columns"] = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        sequences = {name: _sequence(row, name) for name in lengths}
        _, predicting = sequences["student"]
        for name, (tokens, columns) in sequences.items():
            n = len(tokens) - 1
            arrays[name]["tokens"][i, :n] = tokens[:-1]
            arrays[name]["positions"][i, :n] = np.arange(n)
            if name != "student":
                arrays[name]["columns"][i, predicting] = columns
        arrays["targets"][i, predicting] = row["response"]
        arrays["mask"][i, predicting] = True
        for name in per_token:
            arrays[name][i, predicting] = row[name]
        for name in per_row:
            arrays[name][i] = row[name]
    return arrays


def useful_fraction(batches: Sequence[Batch]) -> float:
    """Of the tokens that the live microbatches compute, those that are no padding; 1 of none."""
    useful = computed = 0
    for bucket in itertools.chain(*batches):
        for sequences in bucket["rows"].values():
            if isinstance(sequences, dict):
                positions = sequences["positions"][: bucket["count"]]
                useful, computed = useful + np.sum(positions >= 0), computed + positions.size
    return float(useful / computed) if computed else 1.0


def response_head(policy: Policy, params: Params, sequences: dict[str, jax.Array]) -> Head:
    """The logits [m, T, V] that predict the tokens of a `collate` microbatch's responses."""
    hidden_mxTxD, _ = policy.forward(params, sequences["tokens"], sequences["positions"])
    if "columns" in sequences:
        columns_mxTx1 = sequences["columns"][..., None]
        hidden_mxTxD = jnp.take_along_axis(hidden_mxTxD, columns_mxTx1, axis=1)
    return Head(policy.unembed, params, hidden_mxTxD)
