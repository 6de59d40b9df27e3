"""Packs rows of tokens into batches of a few fixed shapes, and computes the response logits.

A batch is a tuple of buckets, one per shape: `{"count": n, "rows": arrays [M, m, ...]}`. The train
step computes the first n of the bucket's M microbatches of m rows. Rows that a gate dropped
therefore cost nothing, and every number of rows uses the same program.

A row is a dict with the token ids of its `response` and of the prompts from which it is scored:
`student` and, for some algorithms, `teacher`. A sequence is a prompt and the response. The first
n - 1 of its n tokens are computed, since each token predicts the next one.
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
Lengths = Mapping[str, int]  # tokens of a row's sequences: {"student": 2048, "teacher": 3072}
Inserts = Sequence[tuple[int, Sequence[int]]]  # (index in the response, ids inserted before it)


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
    """Packs rows into microbatches of a few fixed shapes, with as little padding as possible.

    Rows of similar length share a microbatch, which has the shape of its longest row. The
    microbatch of the shortest rows is filled up with empty rows.

    Args:
      rows: at most `capacity` rows.
      buckets: the shapes, ascending: padded lengths of the sequences.
      microbatch: number of rows m in a microbatch.
      capacity: largest number of rows in a batch. It fixes M = ceil(capacity / m).
      per_token, per_row, pad_id: as in `collate`.

    Returns:
      One bucket per shape, each with M microbatches: `count` (int32 []) of them have rows.

    Raises:
      ValueError: a row fits no bucket, its prompt is empty, or there are more rows than `capacity`.
    """
    if len(rows) > capacity:
        raise ValueError(
            f"a batch has {len(rows)} rows; expected at most its capacity, {capacity}."
        )
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
    """Groups rows into microbatches. Returns, for each bucket, the row indices of its microbatches.

    Args:
      lengths: tokens of each row's sequences.
      buckets: the shapes, ascending.
      microbatch: largest number of rows in a microbatch.

    Raises:
      ValueError: a row fits no bucket.
    """
    chosen = [first_that_holds(buckets, needed) for needed in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (chosen[i], lengths[i]["student"]))
    # From the longest row down, which gives the least padding.
    parts = [order[max(0, end - microbatch) : end] for end in range(len(order), 0, -microbatch)]
    return [[part for part in parts if chosen[part[-1]] == b] for b in range(len(buckets))]


def first_that_holds(buckets: Sequence[Lengths], needed: Lengths) -> int:
    """Returns the index of the first bucket that a row fits into, or raises ValueError."""
    for b, bucket in enumerate(buckets):
        if all(needed[name] <= size for name, size in bucket.items()):
            return b
    raise ValueError(
        f"a row has the lengths {dict(needed)}, in tokens; expected at most {dict(buckets[-1])}, "
        "the stage's largest bucket. Increase the last value of the stage's `buckets`."
    )


def _computed(row: Row, name: str) -> int:
    """Returns the input length of a row's sequence: its number of tokens minus 1."""
    inserted = sum(len(ids) for _, ids in row.get(f"{name}/inserts", ()))
    return len(row[name]) + len(row["response"]) + inserted - 1


def _sequence(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of a row's sequence, and the positions that predict its response.

    Returns:
      `(token ids, columns)`, int32. The ids include the row's inserts. There is one column per
      token of the response.
    """
    prompt = np.asarray(row[name], np.int32)
    if not len(prompt):
        raise ValueError(f"the prompt {name!r} of a row is empty; expected at least one token.")
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
    """Makes the arrays of a microbatch from rows. Adds padding, and empty rows up to `microbatch`.

    The values of a response token are in the column of the student's sequence that predicts it,
    where the token's logits are.

    Args:
      rows: up to m rows. "teacher/inserts" of a row holds `Inserts` into the teacher's copy of the
        response, if there are any.
      lengths: padded lengths T of the sequences; "student" first.
      per_token: names of the rows' values with one number per response token.
      per_row: names of the rows' values with one number.
      pad_id: token id of padding.

    Returns:
      For each sequence, under its name: `tokens` and `positions`, int32 [m, T], and for sequences
      other than the student's `columns`, int32 [m, T of the student]: the column of the sequence
      that predicts the same token as the student's column. `targets` int32 and `mask` bool [m, T]:
      the tokens of the response. The values as float32 [m, T] and [m], 0 where there is no token.
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
    """Returns the fraction of computed tokens that are not padding; 1.0 for empty batches."""
    useful = computed = 0
    for bucket in itertools.chain(*batches):
        for sequences in bucket["rows"].values():
            if isinstance(sequences, dict):
                positions = sequences["positions"][: bucket["count"]]
                useful, computed = useful + np.sum(positions >= 0), computed + positions.size
    return float(useful / computed) if computed else 1.0


def response_head(policy: Policy, params: Params, sequences: dict[str, jax.Array]) -> Head:
    """Returns a `Head` that computes the logits [m, T, V] of a microbatch's response tokens.

    Args:
      policy: the model.
      params: its parameters.
      sequences: the arrays of one sequence of a `collate` microbatch, such as the teacher's. They
        are gathered at its `columns`, so that they line up with the student's.
    """
    hidden_mxTxD, _ = policy.forward(params, sequences["tokens"], sequences["positions"])
    if "columns" in sequences:
        columns_mxTx1 = sequences["columns"][..., None]
        hidden_mxTxD = jnp.take_along_axis(hidden_mxTxD, columns_mxTx1, axis=1)
    return Head(policy.unembed, params, hidden_mxTxD)
