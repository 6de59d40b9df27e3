"""Packs responses into batches of a few fixed shapes, and computes the response logits.

A batch is a tuple of buckets, one per shape: `{"count": n, "rows": arrays [M, m, ...]}`. The train
step computes the first n of the bucket's M microbatches of m rows. Rows that a gate dropped
therefore cost nothing, and every number of rows uses the same program.

A `Row` is a dict with the token ids of a `response` and of the prompts from which it is scored:
`student` and, for some algorithms, `teacher`. A sequence is a prompt and the response. The first
n - 1 of its n tokens are computed, since each token predicts the next one. With `Packing`, a row of
a microbatch has the sequences of several responses, one after the other.
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
from opsd_jax.stages.packing import Lengths, Packing, arranged, shapes_of
from opsd_jax.training.stage import Batch, Microbatch

Row = Mapping[str, Any]
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
    packing: Packing | None = None,
) -> Batch:
    """Packs responses into microbatches of a few fixed shapes, with as little padding as possible.

    Without `packing`, each response has a row. Rows of similar length share a microbatch, which has
    the shape of its longest row. The microbatch of the shortest rows is filled up with empty rows.

    Args:
      rows: at most `capacity` responses.
      buckets: padded lengths of the sequences, ascending.
      microbatch: number of rows m in a microbatch.
      capacity: largest number of responses in a batch. It fixes M = ceil(capacity / m).
      per_token, per_row, pad_id: as in `collate`.
      packing: lets several responses share a row. None for a model that does not support it
        (`Model.packs`), and for losses that expect one response in each row.

    Returns:
      One bucket per shape of `shapes_of`, each with up to M microbatches: `count` (int32 []) of
      them have rows.

    Raises:
      ValueError: a response fits no bucket, its prompt is empty, or there are more responses than
        `capacity`.
    """
    if len(rows) > capacity:
        raise ValueError(
            f"a batch has {len(rows)} rows; expected at most its capacity, {capacity}."
        )
    lengths = [{name: _computed(row, name) for name in buckets[0]} for row in rows]
    shapes = shapes_of(buckets, microbatch, packing)
    values: Any = {"per_token": per_token, "per_row": per_row, "pad_id": pad_id}
    batch = []
    for shape, parts in zip(shapes, arranged(lengths, buckets, microbatch, packing), strict=True):
        whole = shape.rows == microbatch
        # Microbatches of fewer rows have the rows that are left over from whole microbatches.
        most = -(-capacity // microbatch) if whole else -(-microbatch // shape.rows) - 1
        members = [[[rows[i] for i in row] for row in part] for part in parts]
        empty: list[list[list[Row]]] = [[]] * (most - len(members))
        collated = [
            collate(
                part,
                shape.lengths,
                microbatch=shape.rows,
                responses=shape.responses,
                **values,
            )
            for part in members + empty
        ]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *collated)
        batch.append({"count": np.int32(len(members)), "rows": stacked})
    return tuple(batch)


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
    rows: Sequence[Sequence[Row]],
    lengths: Lengths,
    *,
    microbatch: int,
    responses: int = 0,
    per_token: Sequence[str] = (),
    per_row: Sequence[str] = (),
    pad_id: int,
) -> Microbatch:
    """Makes the arrays of a microbatch from rows. Adds padding, and empty rows up to `microbatch`.

    The values of a response token are in the column of the student's sequence that predicts it,
    where the token's logits are.

    Args:
      rows: the responses of each row, up to m rows. "teacher/inserts" of a response holds `Inserts`
        into the teacher's copy of it, if there are any.
      lengths: padded lengths T of the sequences; "student" first.
      responses: the most responses K in a row; 0 for exactly one.
      per_token: names of the responses' values with one number per token.
      per_row: names of the responses' values with one number.
      pad_id: token id of padding.

    Returns:
      For each sequence, under its name: `tokens` and `positions`, int32 [m, T], and for sequences
      other than the student's `columns`, int32 [m, T of the student]: the column of the sequence
      that predicts the same token as the student's column. `targets` int32 and `mask` bool [m, T]:
      the tokens of the response. The values as float32 [m, T] and [m], 0 where there is no token.
      With `responses`, the latter are [m, K], and `starts`, int32 [m, K], are the columns at which
      the student's sequences begin, as the losses take them.
    """
    shape = microbatch, lengths["student"]
    per_response = (microbatch, responses) if responses else (microbatch,)
    arrays: Microbatch = {
        "targets": np.full(shape, pad_id, np.int32),
        "mask": np.zeros(shape, bool),
        **{name: np.zeros(shape, np.float32) for name in per_token},
        **{name: np.zeros(per_response, np.float32) for name in per_row},
    }
    if responses:
        arrays["starts"] = np.full(per_response, lengths["student"], np.int32)
    for name, length in lengths.items():
        arrays[name] = {
            "tokens": np.full((microbatch, length), pad_id, np.int32),
            "positions": np.full((microbatch, length), -1, np.int32),
        }
        if name != "student":
            arrays[name]["columns"] = np.zeros(shape, np.int32)
    for i, sharing in enumerate(rows):
        start = dict.fromkeys(lengths, 0)
        for k, row in enumerate(sharing):
            place = (i, k) if responses else i
            if responses:
                arrays["starts"][place] = start["student"]
            for name in per_row:
                arrays[name][place] = row[name]
            _write(arrays, i, start, row, per_token)
    return arrays


def _write(
    arrays: Microbatch, i: int, start: dict[str, int], row: Row, per_token: Sequence[str]
) -> None:
    """Writes the tokens of a response into row i of a microbatch, and advances `start`.

    Args:
      arrays: the microbatch, which is changed.
      i: the index of the row.
      start: for each sequence, the column at which it begins; then the column after its end.
      row: the response.
      per_token: names of its values with one number per token.
    """
    sequences = {name: _sequence(row, name) for name in start}
    predicting = start["student"] + sequences["student"][1]
    for name, (tokens, columns) in sequences.items():
        begin, n = start[name], len(tokens) - 1
        arrays[name]["tokens"][i, begin : begin + n] = tokens[:-1]
        arrays[name]["positions"][i, begin : begin + n] = np.arange(n)
        if name != "student":
            arrays[name]["columns"][i, predicting] = begin + columns
        start[name] = begin + n
    arrays["targets"][i, predicting] = row["response"]
    arrays["mask"][i, predicting] = True
    for name in per_token:
        arrays[name][i, predicting] = row[name]


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
